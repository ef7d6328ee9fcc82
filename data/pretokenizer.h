// Pre-tokenizers of tokenizer.json: they cut a text into pieces that the model encodes one by one.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/json.h"

namespace kompakt {

// Pieces are [begin, end) byte ranges of one buffer, so that cutting moves no text.
struct Pieces {
  std::string buffer;
  std::vector<std::pair<std::size_t, std::size_t>> ranges;
  bool at_start = true;  // the first piece begins the whole input (Metaspace "first")
  std::string_view piece(std::size_t i) const { return std::string_view(buffer).substr(ranges[i].first, ranges[i].second - ranges[i].first); }
};

class PreTokenizer {
 public:
  virtual ~PreTokenizer() = default;
  virtual void apply(Pieces& pieces) const = 0;
};

// `description` is the value of "pre_tokenizer"; null gives nullptr.
std::unique_ptr<PreTokenizer> make_pre_tokenizer(const Json& description, const std::string& place);

// GPT-2's pattern, which ByteLevel uses with use_regex.
extern const char* const gpt2_pattern;

}  // namespace kompakt
