// Normalizers of tokenizer.json, executed as the file describes them.
#pragma once

#include <memory>
#include <string>

#include "core/json.h"

namespace kompakt {

class Normalizer {
 public:
  virtual ~Normalizer() = default;
  virtual std::string apply(std::string text) const = 0;  // valid UTF-8 in and out
};

// `description` is the value of "normalizer"; null gives nullptr. Unsupported types and broken fields are Errors at `place`.
std::unique_ptr<Normalizer> make_normalizer(const Json& description, const std::string& place);

}  // namespace kompakt
