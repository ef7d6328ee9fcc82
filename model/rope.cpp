// Rotary embedding. Angles are computed in double and rounded once, so a long position loses nothing.
#include "model/rope.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "model/pointwise.h"

namespace kompakt {

namespace {

// Llama 3: long wavelengths are slowed by `factor`, short ones kept, those between blended.
double rope_llama3(double frequency, const RopeConfig& rope) {
  const double wavelength = 2 * std::numbers::pi / frequency;
  const double original = static_cast<double>(rope.original_max_positions);
  if (wavelength < original / rope.high_freq_factor) return frequency;
  if (wavelength > original / rope.low_freq_factor) return frequency / rope.factor;
  const double smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  return frequency * ((1 - smooth) / rope.factor + smooth);
}

// YaRN: the pair at which a full turn happens `turns` times over the original context.
double rope_yarn_pair(double turns, const RopeConfig& rope, double head_dim) {
  return head_dim * std::log(static_cast<double>(rope.original_max_positions) / (turns * 2 * std::numbers::pi)) / (2 * std::log(rope.theta));
}

}  // namespace

std::vector<double> rope_frequencies(const RopeConfig& rope, std::int64_t head_dim, bool local) {
  const double base = local && rope.local_theta > 0 ? rope.local_theta : rope.theta;
  const std::int64_t pairs = head_dim / 2;
  std::vector<double> frequencies(static_cast<std::size_t>(pairs));
  for (std::int64_t i = 0; i < pairs; ++i) {
    frequencies[static_cast<std::size_t>(i)] = std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
  }
  if (local) return frequencies;
  if (rope.scaling == "linear") {
    for (double& f : frequencies) f /= rope.factor;
  } else if (rope.scaling == "llama3") {
    for (double& f : frequencies) f = rope_llama3(f, rope);
  } else if (rope.scaling == "yarn") {
    const double dims = static_cast<double>(head_dim);
    double low = std::max(std::floor(rope_yarn_pair(rope.beta_fast, rope, dims)), 0.0);
    double high = std::min(std::ceil(rope_yarn_pair(rope.beta_slow, rope, dims)), dims - 1);
    if (low == high) high += 0.001;
    for (std::int64_t i = 0; i < pairs; ++i) {
      const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
      double& f = frequencies[static_cast<std::size_t>(i)];
      f = f / rope.factor * ramp + f * (1 - ramp);
    }
  }
  return frequencies;
}

double rope_magnitude(const RopeConfig& rope) { return rope.scaling == "yarn" ? rope.attention_factor : 1.0; }

RopeTables rope_tables(const RopeConfig& rope, std::int64_t head_dim, const at::Tensor& positions, const at::Tensor& like, bool local) {
  const std::vector<double> frequencies = rope_frequencies(rope, head_dim, local);
  const at::Tensor inverse = at::tensor(frequencies, at::kDouble).to(positions.device());
  at::Tensor angles = positions.to(at::kDouble).unsqueeze(-1) * inverse;  // [.., T, hd/2]
  angles = at::cat({angles, angles}, -1);
  if (positions.dim() == 2) angles = angles.unsqueeze(1);  // [B,1,T,hd]
  const double magnitude = local ? 1.0 : rope_magnitude(rope);
  const auto options = like.options();
  return {(angles.cos() * magnitude).to(options), (angles.sin() * magnitude).to(options)};
}

at::Tensor apply_rope(const at::Tensor& x, const RopeTables& tables) {
  if (fits_pointwise(x) && x.dim() == 4 && x.size(-1) % 2 == 0 && tables.cos.scalar_type() == x.scalar_type()) return rotate_halves(x, tables.cos, tables.sin);
  const std::int64_t half = x.size(-1) / 2;
  const at::Tensor rotated = at::cat({x.narrow(-1, half, half).neg(), x.narrow(-1, 0, half)}, -1);
  return x * tables.cos + rotated * tables.sin;
}

at::Tensor permute_rope_rows(const at::Tensor& w, std::int64_t heads) {
  const auto shape = w.sizes().vec();
  return w.reshape({heads, 2, shape[0] / heads / 2, -1}).transpose(1, 2).reshape(shape).contiguous();
}

at::Tensor unpermute_rope_rows(const at::Tensor& w, std::int64_t heads) {
  const auto shape = w.sizes().vec();
  return w.reshape({heads, shape[0] / heads / 2, 2, -1}).transpose(1, 2).reshape(shape).contiguous();
}

}  // namespace kompakt
