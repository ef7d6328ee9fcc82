// How long one request takes. Median of many, after a warm-up, with a fixed number of threads.
#pragma once

#include <cstdint>
#include <string>

#include "model/transformer.h"

namespace kompakt {

struct Latency {
  double median_ms = 0, fastest_ms = 0;
  double tokens_per_second = 0;
  std::string protocol;
};

// Classifier or decoder prompt: one forward of batch 1 with `tokens` tokens, `threads` threads, `repeats` timed runs.
// The weights that the forward pass uses are the decoded ones: packed kernels are not claimed.
Latency measure_latency(const Transformer& model, std::int64_t tokens, int threads, int repeats);

}  // namespace kompakt
