#include "quantize/levels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "formats/ggml_pack.h"
#include "quantize/grid_math.h"

namespace kompakt {
namespace {

constexpr std::size_t level_parts = 512;

// Magnitude of a small float without infinities: `mantissa` bits after the leading one, exponents biased by `bias`.
float level_float(int bits, int mantissa, int bias) {
  const int exponent = bits >> mantissa, fraction = bits & ((1 << mantissa) - 1);
  return exponent == 0 ? std::ldexp(static_cast<float>(fraction), 1 - bias - mantissa) : std::ldexp(static_cast<float>(fraction + (1 << mantissa)), exponent - bias - mantissa);
}

// 2 * largest + 1 levels: magnitudes 0..largest of a small float times `factor`, and their negatives.
std::vector<float> level_floats(int largest, int mantissa, int bias, float factor) {
  std::vector<float> levels;
  for (int code = -largest; code <= largest; ++code) levels.push_back((code < 0 ? -factor : factor) * level_float(std::abs(code), mantissa, bias));
  return levels;
}

}  // namespace

LevelTable::LevelTable(int low, std::vector<float> levels, bool (*tie_up)(int k)) : low_(low), level_(std::move(levels)) {
  for (std::size_t k = 0; k + 1 < level_.size(); ++k) {
    const float middle = 0.5f * (level_[k] + level_[k + 1]);
    threshold_.push_back(tie_up(static_cast<int>(k)) ? middle : std::nextafter(middle, std::numeric_limits<float>::infinity()));
  }
  threshold_.push_back(std::numeric_limits<float>::quiet_NaN());  // reached by nothing
  const float range = level_.back() - level_.front();
  rate_ = static_cast<float>(level_parts) / range;
  for (std::size_t part = 0; part <= level_parts; ++part) {
    // One part lower than exact: the product in nearest() is rounded.
    const float from = level_.front() + range * (static_cast<float>(part) - 1) / static_cast<float>(level_parts);
    std::size_t k = 0;
    while (from >= threshold_[k]) ++k;
    start_.push_back(static_cast<std::uint8_t>(k));
  }
}

const LevelTable& iq4_levels() {
  static const LevelTable table(0, {std::begin(iq4_values), std::end(iq4_values)}, [](int) { return true; });
  return table;
}

const LevelTable& e2m1_levels() {
  // Of levels k and k + 1 the one with an even last bit; code 0 is the eighth level.
  static const LevelTable table(-7, level_floats(7, 1, 1, 2.0f), [](int k) { return (k + 1 - 7) % 2 == 0; });
  return table;
}

const LevelTable& e4m3_levels() {
  static const LevelTable table(-126, level_floats(126, 3, 7, 1.0f), [](int k) { return (k + 1 - 126) % 2 == 0; });
  return table;
}

float store_normal_half(float scale) { return grid::stored_scale(scale, grid::smallest_normal_half); }

float store_half(float scale) { return grid::stored_scale(scale, grid::smallest_half); }

float store_power(float scale) {
  if (scale == 0 || !std::isfinite(scale)) return scale;
  // Nearest by ratio: the boundary between 2^k and 2^(k+1) is sqrt(2) 2^k.
  int exponent = 0;
  const float fraction = std::frexp(std::fabs(scale), &exponent);  // [0.5, 1)
  exponent = std::max(fraction < 0.70710678f ? exponent - 1 : exponent, -24);
  return std::copysign(std::ldexp(1.0f, exponent), scale);
}

float store_e4m3(float scale) {
  if (scale == 0 || !std::isfinite(scale)) return scale;
  int exponent = 0;
  const float fraction = std::frexp(std::fabs(scale), &exponent);
  const float rounded = std::ldexp(grid::round_even(fraction * 16), exponent - 4);
  return std::copysign(std::max(rounded, grid::smallest_normal_half), scale);
}

float fit_levels(FitScratch& group, const LevelRule& rule) {
  if (group.largest == 0) return 0;
  const LevelTable& table = rule.table;
  const float low = table.value(table.low()), high = table.value(table.high());
  const auto sums = [&](float inverse, double& wl, double& ll) {
    wl = ll = 0;
    for (std::int64_t i = 0; i < group.size; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const float level = table.value(table.nearest(group.values[at] * inverse));
      wl += static_cast<double>(group.weights[at]) * level * group.values[at], ll += static_cast<double>(group.weights[at]) * level * level;
    }
  };
  const auto squared_error = [&](float scale) {
    const float inverse = grid::inverse_scale(scale);
    double sum = 0;
    for (std::int64_t i = 0; i < group.size; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const double e = group.values[at] - scale * table.value(table.nearest(group.values[at] * inverse));
      sum += group.weights[at] * e * e;
    }
    return sum;
  };
  double best = std::numeric_limits<double>::infinity();
  float chosen = 0;
  std::vector<float> tried;
  for (int sign = 1; sign >= (rule.both_signs ? -1 : 1); sign -= 2) {
    const float up = sign > 0 ? group.maximum : -group.minimum, down = sign > 0 ? -group.minimum : group.maximum;
    const float cover = std::max(up / high, down / -low);
    for (const float start : rule.starts) {
      float scale = static_cast<float>(sign) * cover * start;
      for (int i = 0; i < rule.iterations; ++i) {
        double wl, ll;
        sums(grid::inverse_scale(scale), wl, ll);
        if (ll <= 0) break;
        const float next = static_cast<float>(wl / ll);
        if (next == scale || next == 0 || (next < 0) != (sign < 0)) break;
        scale = next;
      }
      const float stored = rule.store(scale);
      if (std::find(tried.begin(), tried.end(), stored) != tried.end()) continue;
      tried.push_back(stored);
      const double error = squared_error(stored);
      if (error < best) best = error, chosen = stored;
    }
  }
  return chosen;
}

}  // namespace kompakt
