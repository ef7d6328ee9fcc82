// Windows of equal length for calibration and perplexity, and the proof that two texts share none.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kompakt {

class Tokenizer;
struct TextSet;

struct TokenWindows {
  std::vector<std::vector<std::int64_t>> windows;  // each of `length` tokens
  std::int64_t length = 0;
  std::string hash;  // SHA-256 over length and all ids in order
};

// The first `count` windows (0 = all) of the documents, encoded without special tokens and joined by the tokenizer's end token
// where there is one. No window when the text is shorter than that is an Error; fewer windows than asked for as well.
TokenWindows token_windows(const TextSet& text, const Tokenizer& tokenizer, std::int64_t length, std::int64_t count);

// How many of the aligned spans of `span` tokens of `evaluation` occur anywhere in `calibration` (every shift).
std::int64_t shared_spans(const TokenWindows& calibration, const TokenWindows& evaluation, std::int64_t span = 32);
// Error when there is a shared span: figures measured on text that was calibrated on are no evidence.
void check_no_overlap(const TokenWindows& calibration, const TokenWindows& evaluation, const std::string& calibration_name, const std::string& evaluation_name);

}  // namespace kompakt
