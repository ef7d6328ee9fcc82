#include "evaluate/latency.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "core/text.h"
#include "model/parallel.h"

namespace kompakt {

Latency measure_latency(const Transformer& model, std::int64_t tokens, int threads, int repeats) {
  const at::NoGradGuard no_grad;
  const int before = at::get_num_threads();
  at::set_num_threads(threads);
  ModelInput input;
  input.ids = (at::arange(tokens, at::kLong) * 7 % std::max<std::int64_t>(model.config().vocab, 1)).unsqueeze(0).to(model.device());
  std::vector<double> milliseconds;
  for (int i = -5; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const at::Tensor out = model.config().is_classifier() ? model.forward(input) : model.head(model.hidden(input).slice(1, tokens - 1));
    (void)out.sum().item<float>();  // waits for a device as well
    if (i >= 0) milliseconds.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  at::set_num_threads(before);
  std::sort(milliseconds.begin(), milliseconds.end());
  Latency latency;
  latency.fastest_ms = milliseconds.front();
  latency.median_ms = milliseconds[milliseconds.size() / 2];
  latency.tokens_per_second = static_cast<double>(tokens) / latency.median_ms * 1e3;
  latency.protocol = str("batch 1, ", tokens, " tokens, ", threads, threads == 1 ? " thread" : " threads", ", float32, median of ", repeats, " after 5 warm-up runs");
  return latency;
}

}  // namespace kompakt
