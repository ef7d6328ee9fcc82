#include "quantize/activation_clip.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace kompakt {
namespace {

constexpr std::int64_t clip_mse_values = 1 << 18;  // that a candidate is judged on
constexpr int clip_mse_steps = 64, clip_mse_patience = 10;

ClipRange clip_absmax(const ValueSample& sample, const ClipRequest&) { return {sample.low, sample.high}; }

// The value below which `share` percent of the sample lie.
float clip_quantile(const at::Tensor& values, double share) {
  const std::int64_t n = values.numel(), rank = std::clamp<std::int64_t>(static_cast<std::int64_t>(std::ceil(share / 100 * static_cast<double>(n))), 1, n);
  return std::get<0>(values.kthvalue(rank)).item<float>();
}

ClipRange clip_percentile(const ValueSample& sample, const ClipRequest& request) {
  if (sample.values.numel() == 0) return {sample.low, sample.high};
  ClipRange range;
  if (request.symmetric) range.high = clip_quantile(sample.values.abs(), request.percentile), range.low = -range.high;
  else range = {std::min(0.0f, -clip_quantile(-sample.values, request.percentile)), std::max(0.0f, clip_quantile(sample.values, request.percentile))};
  return range.high > range.low ? range : ClipRange{sample.low, sample.high};  // hardly anything but zeros
}

double clip_squares(const at::Tensor& values, const RoundingFormat& format, const RoundingScale& scale) {
  return (round_static(values, format, scale) - values).square().sum(at::kDouble).item<double>();
}

ClipRange clip_mse(const ValueSample& sample, const ClipRequest& request) {
  const std::int64_t step = std::max<std::int64_t>(1, sample.values.numel() / clip_mse_values);
  const at::Tensor values = sample.values.slice(0, 0, sample.values.numel(), step).contiguous();
  ClipRange best{sample.low, sample.high};
  double least = INFINITY;
  for (int i = 0, since = 0; i <= clip_mse_steps && since < clip_mse_patience; ++i, ++since) {
    const float share = std::exp2(-static_cast<float>(i) / 8);
    const RoundingScale scale = rounding_scale(request.format, request.symmetric, sample.low * share, sample.high * share);
    if (!(scale.scale > 0)) break;
    const double error = clip_squares(values, request.format, scale);
    if (error < least) least = error, best = {sample.low * share, sample.high * share}, since = 0;
  }
  return best;
}

}  // namespace

std::span<const Clip> clips() {
  static constexpr std::array<Clip, 3> rows = {{{"absmax", "nothing that was seen is clipped", clip_absmax},
                                                {"percentile", "the largest magnitudes are clipped", clip_percentile},
                                                {"mse", "the range with the least squared error of rounding and clipping", clip_mse}}};
  return rows;
}

const Clip* find_clip(std::string_view name) {
  for (const Clip& row : clips())
    if (row.name == name) return &row;
  return nullptr;
}

std::vector<std::string> clip_names() {
  std::vector<std::string> names;
  for (const Clip& row : clips()) names.emplace_back(row.name);
  return names;
}

double sample_error(const ValueSample& sample, const RoundingFormat& format, const RoundingScale& scale) {
  const double squares = sample.values.square().sum(at::kDouble).item<double>();
  return squares > 0 ? clip_squares(sample.values, format, scale) / squares : 0;
}

}  // namespace kompakt
