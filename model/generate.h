// Text generation with a key/value cache: greedy or sampled with a counter-based generator.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace kompakt {

class Transformer;

struct GenerateOptions {
  std::int64_t max_new_tokens = 128;
  double temperature = 0;  // 0 = greedy (first index wins a tie)
  std::int64_t top_k = 0;  // 0 = all
  double top_p = 1;
  std::uint64_t seed = 0;
  std::int64_t vocabulary = 0;     // only ids below this are written: rows of the head behind the tokenizer's are padding; 0 = all
  std::vector<std::int64_t> stop;  // token ids that end the text (not returned)
};

// `on_token` (may be empty) sees every new token as it comes; returning false stops.
std::vector<std::int64_t> generate(const Transformer& model, const std::vector<std::int64_t>& prompt, const GenerateOptions& options,
                                   const std::function<bool(std::int64_t)>& on_token = {});

// One text for each prompt, all in one batch; row r draws from `seeds[r]` alone. As generate(), but a token of `stop` ends a text and is
// returned. Prompts may differ in length: nothing is padded, the shorter ones begin to write while the longer ones are still read.
// Rows that have ended leave the batch.
std::vector<std::vector<std::int64_t>> generate_batch(const Transformer& model, const std::vector<std::vector<std::int64_t>>& prompts, const GenerateOptions& options,
                                                      const std::vector<std::uint64_t>& seeds);

}  // namespace kompakt
