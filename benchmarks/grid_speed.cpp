// Million weights per second that each grid encodes, rounds (as in training) and decodes, one thread and all threads; and the
// error on normal numbers. Ratios between rows carry over to other machines, absolute figures do not.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <chrono>
#include <cstdio>
#include <functional>

#include "core/random.h"
#include "core/system.h"
#include "quantize/grids.h"

namespace {

double million_per_second(std::int64_t weights, const std::function<void()>& work) {
  work();
  const auto start = std::chrono::steady_clock::now();
  double seconds = 0;
  int runs = 0;
  for (; seconds < 0.3; ++runs) {
    work();
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  return static_cast<double>(weights) * runs / seconds / 1e6;
}

}  // namespace

int main() {
  using namespace kompakt;
  at::Tensor w = at::empty({1536, 512}, at::kFloat);
  const CounterRandom random(1, "grid-speed");
  for (std::int64_t i = 0; i < w.numel(); ++i) w.data_ptr<float>()[i] = static_cast<float>(random.normal(static_cast<std::uint64_t>(i)));
  std::printf("%s, %d cores; 1536 x 512 normal numbers; million weights per second\n", processor_name().c_str(), core_count());
  std::printf("%-16s %6s %8s %12s %12s %12s %12s\n", "grid", "group", "error", "encode 1", "encode all", "round 1", "decode 1");
  for (const Grid& grid : grids()) {
    const GridSpec spec{&grid, grid.default_group};
    const Quantized q = encode(spec, w);
    const double error = ((decode(spec, q) - w).square().sum() / w.square().sum()).item<double>();
    at::set_num_threads(core_count());
    const double all = million_per_second(w.numel(), [&] { encode(spec, w); });
    at::set_num_threads(1);
    const double one = million_per_second(w.numel(), [&] { encode(spec, w); });
    const double round = million_per_second(w.numel(), [&] { round_to_grid(spec, w); });
    const double back = million_per_second(w.numel(), [&] { decode(spec, q); });
    std::printf("%-16s %6lld %8.5f %12.1f %12.1f %12.1f %12.1f\n", std::string(grid.name).c_str(), static_cast<long long>(spec.group), error, one, all, round, back);
  }
  return 0;
}
