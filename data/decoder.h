// Decoders of tokenizer.json (tokens back to text) and post-processors (special tokens around the text).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/json.h"

namespace kompakt {

class Decoder {
 public:
  virtual ~Decoder() = default;
  virtual void apply(std::vector<std::string>& tokens) const = 0;  // the text is what the tokens give when joined
};

// null gives nullptr: tokens are then joined by spaces.
std::unique_ptr<Decoder> make_decoder(const Json& description, const std::string& place);

// Ids before and after a single text.
struct SpecialFrame {
  std::vector<std::int64_t> before, after;
};
SpecialFrame make_frame(const Json& post_processor, const std::string& place);
// The same post-processor with ids changed by `new_id` (-1: the token is gone, an Error).
Json renumber_post_processor(const Json& post_processor, const std::function<std::int64_t(std::int64_t)>& new_id, const std::string& place);

}  // namespace kompakt
