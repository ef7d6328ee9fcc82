#include "quantize/entropy_steps.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "quantize/grid_math.h"

namespace kompakt {
namespace {

constexpr double entropy_reach_up = 8, entropy_least_importance = 0.01;

// normal_entropy at steps 2^-8 .. 2^6, sixteen to an octave: a search asks for it a million times.
constexpr int entropy_table_low = -8, entropy_table_high = 6, entropy_table_points = 16;

double entropy_looked_up(double log2_step) {
  static const auto table = [] {
    std::array<double, (entropy_table_high - entropy_table_low) * entropy_table_points + 1> out;
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = normal_entropy(std::exp2(entropy_table_low + static_cast<double>(i) / entropy_table_points));
    return out;
  }();
  const double at = std::clamp((log2_step - entropy_table_low) * entropy_table_points, 0.0, static_cast<double>(table.size() - 1) - 1e-9);
  const auto i = static_cast<std::size_t>(at);
  return table[i] + (at - static_cast<double>(i)) * (table[i + 1] - table[i]);
}

// Root mean squares of the rows and importances that may be used, in double; empty where the rule of the grid stays.
struct EntropyRows {
  std::vector<double> rms, least;        // least: the step that the largest weight needs, for its code must fit
  std::vector<double> importance, wish;  // wish: importance^-1/2
};

EntropyRows entropy_rows(const GridSpec& spec, const at::Tensor& weight, const at::Tensor& importance) {
  EntropyRows out;
  if (!spec.grid->entropy_coded() || !importance.defined() || spec.scale_count(weight.size(1)) != 1 || weight.numel() == 0) return out;
  TORCH_CHECK(importance.numel() == weight.size(0), "importance has ", importance.numel(), " values for ", weight.size(0), " rows");
  const at::Tensor rms = weight.detach().square().mean(1, false, at::kDouble).sqrt().cpu().contiguous(), given = importance.detach().to(at::kCPU, at::kDouble).contiguous();
  const at::Tensor largest = weight.detach().abs().amax(1).to(at::kCPU, at::kDouble).contiguous();
  const double mean = given.mean().item<double>();
  if (!(mean > 0) || !std::isfinite(mean) || !rms.isfinite().all().item<bool>()) return out;
  for (std::int64_t r = 0; r < rms.numel(); ++r) {
    out.rms.push_back(rms.const_data_ptr<double>()[r]);
    out.least.push_back(largest.const_data_ptr<double>()[r] / spec.grid->code_max);
    out.importance.push_back(std::max(given.const_data_ptr<double>()[r], entropy_least_importance * mean));
    out.wish.push_back(1 / std::sqrt(out.importance.back()));
  }
  return out;
}

// The steps before they are stored. One factor for all rows remains: found by bisection on the mean entropy.
std::vector<double> entropy_steps(const EntropyRows& rows, double share) {
  std::vector<double> steps(rows.rms.size(), 0.0);
  const auto at_level = [&](double level) {
    double bits = 0;
    for (std::size_t r = 0; r < steps.size(); ++r) {
      if (rows.rms[r] == 0) continue;
      const double own = rows.rms[r] * share;
      steps[r] = std::max(std::clamp(level * rows.wish[r], own / entropy_reach_up, own * entropy_reach_up), rows.least[r]);
      bits += entropy_looked_up(std::log2(steps[r] / rows.rms[r]));
    }
    return bits;
  };
  double wanted = 0, low = INFINITY, high = 0;
  for (std::size_t r = 0; r < steps.size(); ++r) {
    if (rows.rms[r] == 0) continue;
    wanted += entropy_looked_up(std::log2(std::max(share, rows.least[r] / rows.rms[r])));
    low = std::min(low, rows.rms[r] * share / rows.wish[r] / entropy_reach_up), high = std::max(high, rows.rms[r] * share / rows.wish[r] * entropy_reach_up);
  }
  if (high == 0) return steps;
  for (int i = 0; i < 50; ++i) {
    const double middle = std::sqrt(low * high);
    (at_level(middle) > wanted ? low : high) = middle;
  }
  at_level(high);
  return steps;
}

}  // namespace

double normal_entropy(double step) {
  if (step < 0.25) return std::log2(std::sqrt(2 * M_PI * M_E) / step) + step * step / 24 * M_LOG2E;  // of a staircase in place of the density; off by 1e-5
  const auto below = [](double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); };
  double bits = 0;
  for (int k = 0; (k - 0.5) * step < 9; ++k) {
    const double p = below((k + 0.5) * step) - below((k - 0.5) * step);
    if (p > 0) bits -= (k == 0 ? 1 : 2) * p * std::log2(p);
  }
  return bits;
}

at::Tensor entropy_row_steps(const GridSpec& spec, const at::Tensor& weight, const at::Tensor& importance) {
  const EntropyRows rows = entropy_rows(spec, weight, importance);
  if (rows.rms.empty()) return {};
  const std::vector<double> steps = entropy_steps(rows, spec.grid->entropy_step);
  at::Tensor out = at::empty({weight.size(0)}, at::kFloat);
  for (std::size_t r = 0; r < steps.size(); ++r) {
    // A step that half precision cannot hold: the grid's own rule refuses such a row and names it, as it does with weights that are not finite.
    if (!(steps[r] < grid::largest_half)) return {};
    out.mutable_data_ptr<float>()[r] = spec.grid->store_scale(static_cast<float>(steps[r]));
  }
  return out;
}

double entropy_row_gain(const GridSpec& spec, const at::Tensor& weight, const at::Tensor& importance) {
  const EntropyRows rows = entropy_rows(spec, weight, importance);
  if (rows.rms.empty()) return 1;
  const double share = spec.grid->entropy_step;
  const std::vector<double> steps = entropy_steps(rows, share);
  double with = 0, without = 0;
  // A row is never worse off than with nothing but zeros.
  const auto error = [](double step, double rms) { return std::min(step * step / 12, rms * rms); };
  for (std::size_t r = 0; r < steps.size(); ++r) with += rows.importance[r] * error(steps[r], rows.rms[r]), without += rows.importance[r] * error(std::max(share * rows.rms[r], rows.least[r]), rows.rms[r]);
  return without > 0 ? with / without : 1;
}

}  // namespace kompakt
