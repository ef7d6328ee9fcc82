// HQQ (Badri and Shaji 2023): zero points without data. For every group of an asymmetric grid the scale stays that of the
// range, and the zero moves by half-quadratic splitting towards the minimum of sum |w - w^|^p, p = 0.7, which forgives outliers:
//   e = shrink_p(w - w^, beta), shrink_p(x, beta) = sign(x) max(|x| - |x|^(p-1) / beta, 0);  zero = mean(q - (w - e) / scale)
// Candidates are judged as they are stored (half scale, integer zero or half offset), the grid's own fit among them.
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "model/parallel.h"
#include "quantize/grid_math.h"
#include "quantize/methods.h"

namespace kompakt {
namespace {

constexpr double hqq_power = 0.7, hqq_beta = 10, hqq_kappa = 1.01;
constexpr int hqq_rounds = 20;

struct HqqGroup {
  const float* w;
  std::int64_t n;
  float high;
  bool integer_zero;

  GroupScale stored(float scale, double zero) const {
    GroupScale g;
    g.scale = grid::stored_scale(scale, grid::smallest_normal_half);
    if (integer_zero) g.offset = -(g.scale * std::min(std::max(grid::round_even(static_cast<float>(zero)), 0.0f), high));
    else g.offset = grid::round_to_half(static_cast<float>(-zero * g.scale));
    return g;
  }
  double loss(const GroupScale& g) const {
    const float inverse = grid::inverse_scale(g.scale);
    double sum = 0;
    for (std::int64_t i = 0; i < n; ++i)
      sum += std::pow(std::fabs(static_cast<double>(w[i]) - grid::decode_value(grid::nearest_code(w[i], inverse, g.offset, 0, high), g.scale, g.offset)), hqq_power);
    return sum;
  }
};

double hqq_shrink(double x, double beta) {
  const double magnitude = std::fabs(x);
  if (magnitude == 0) return 0;
  return std::copysign(std::max(magnitude - std::pow(magnitude, hqq_power - 1) / beta, 0.0), x);
}

// The best of `start` and the zeros on the way.
GroupScale hqq_fit(const HqqGroup& group, const GroupScale& start) {
  float low = group.w[0], top = group.w[0];
  for (std::int64_t i = 1; i < group.n; ++i) low = std::min(low, group.w[i]), top = std::max(top, group.w[i]);
  if (group.integer_zero) low = std::min(low, 0.0f), top = std::max(top, 0.0f);
  if (!(top > low) || start.scale == 0) return start;
  GroupScale best = start;
  double least = group.loss(start), previous = std::numeric_limits<double>::infinity();
  const double scale = static_cast<double>(grid::stored_scale((top - low) / group.high, grid::smallest_normal_half));
  double zero = -static_cast<double>(low) / scale, beta = hqq_beta;
  for (int round = 0; round < hqq_rounds; ++round, beta *= hqq_kappa) {
    const GroupScale now = group.stored(static_cast<float>(scale), zero);
    const double loss = group.loss(now);
    if (loss < least) least = loss, best = now;
    double error = 0, sum = 0;
    for (std::int64_t i = 0; i < group.n; ++i) {
      const double w = static_cast<double>(group.w[i]), q = std::min(std::max(std::nearbyint(w / scale + zero), 0.0), static_cast<double>(group.high));
      const double rest = w - scale * (q - zero);
      error += std::fabs(rest);
      sum += q - (w - hqq_shrink(rest, beta)) / scale;
    }
    if (error > previous) break;
    previous = error;
    zero = sum / static_cast<double>(group.n);
  }
  return best;
}

}  // namespace

LayerResult quantize_hqq(const LayerInput& input, const GridSpec& spec, const LayerOptions& options) {
  LayerResult result = quantize_rtn(input, spec, options);
  const Grid& grid = *spec.grid;
  if (!grid.asymmetric || grid.kquant) return result;  // a fallback grid
  result.path = "hqq";
  const at::Tensor weight = input.weight.detach().to(at::kCPU, at::kFloat).contiguous();
  Quantized& q = result.quantized;
  const std::int64_t rows = weight.size(0), columns = weight.size(1), width = spec.group_for(columns), groups = q.scales.size(1);
  const float* w = weight.const_data_ptr<float>();
  float* scales = q.scales.mutable_data_ptr<float>();
  float* offsets = q.offsets.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin * groups; k < end * groups; ++k) {
      const std::int64_t first = k % groups * width;
      const GroupScale g = hqq_fit({w + k / groups * columns + first, std::min(width, columns - first), static_cast<float>(grid.code_max), grid.integer_zero}, {scales[k], offsets[k]});
      scales[k] = g.scale, offsets[k] = g.offset;
    }
  });
  q.codes = grid.codes_for(weight, q.scales, q.offsets, spec.group);
  return result;
}

}  // namespace kompakt
