// Options of the stage `quantize` for what is not a weight: activations, and the key/value cache.
#pragma once

#include <string>
#include <vector>

#include "core/fields.h"

namespace kompakt {

struct ActivationOptions {
  std::string format = "int8";   // row of model/rounding.h
  std::string mode = "dynamic";  // dynamic: a scale per token, from the token; static: one per linear, calibrated
  bool symmetric = true;
  std::string clip = "absmax";   // row of the table of clips (quantize/activation_clip.h), static only
  double percentile = 99.99;     // of clip percentile
};
void fields(FieldVisitor& visitor, ActivationOptions& options);

struct KvCacheOptions {
  std::string format = "fp8_e4m3";
  std::string clip = "absmax";
  double percentile = 99.99;
};
void fields(FieldVisitor& visitor, KvCacheOptions& options);

}  // namespace kompakt
