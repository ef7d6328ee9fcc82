// The range that a static scale covers, from values of a calibration set.
#pragma once

#include <ATen/core/Tensor.h>

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "model/rounding.h"

namespace kompakt {

// Extremes of all values that were seen, and a part of the values themselves.
struct ValueSample {
  float low = 0, high = 0;
  at::Tensor values;  // [n] float32
};

struct ClipRange {
  float low = 0, high = 0;
};

struct ClipRequest {
  const RoundingFormat& format;
  bool symmetric;
  double percentile;
};

struct Clip {
  std::string_view name, summary;
  ClipRange (*range)(const ValueSample& sample, const ClipRequest& request);
};
// absmax: everything that was seen. percentile: that share of the magnitudes (asymmetric: of the values, at either end). mse: of
// the ranges absmax 2^(-i/8) the one with the least squared error of rounding and clipping together (i up to 64; ten in a row without gain end the search).
// percentile and mse never give an empty range where absmax gives none.
std::span<const Clip> clips();
const Clip* find_clip(std::string_view name);
std::vector<std::string> clip_names();

// Squared error of rounding the sample over the sum of its squares; 0 for a sample of zeros.
double sample_error(const ValueSample& sample, const RoundingFormat& format, const RoundingScale& scale);

}  // namespace kompakt
