#include "quantize/levels.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "core/lanes.h"
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

// Thresholds of up to 16 levels in the order in which halving the range asks for them. Those that are missing are never reached.
struct LevelTree {
  float half, quarter[2], eighth[8], last[8], level[16];

  explicit LevelTree(const LevelTable& table) {
    const auto threshold = [&](std::size_t k) { return k < table.thresholds().size() ? table.thresholds()[k] : std::numeric_limits<float>::quiet_NaN(); };
    half = threshold(7), quarter[0] = threshold(3), quarter[1] = threshold(11);
    for (std::size_t k = 0; k < 8; ++k) eighth[k] = threshold(4 * (k % 4) + 1), last[k] = threshold(2 * k);
    for (std::size_t k = 0; k < 16; ++k) level[k] = table.levels()[std::min(k, table.levels().size() - 1)];
  }
};

typedef double LevelDoubles __attribute__((vector_size(32)));
typedef float LevelHalf __attribute__((vector_size(16)));

// Index of the level nearest to x: the number of thresholds that x reaches. What is no number gives 0.
KOMPAKT_INLINE void level_index(const LevelTree& tree, const Lanes& x, LaneMask& index) {
  Lanes low = {}, high = {}, eighth, last;
  KOMPAKT_LOAD(eighth, tree.eighth);
  KOMPAKT_LOAD(last, tree.last);
  low += tree.quarter[0], high += tree.quarter[1];
  const LaneMask upper = x >= tree.half;
  index = (upper & 2) | ((x >= (upper ? high : low)) & 1);
  index = (index << 1) | ((x >= __builtin_shuffle(eighth, index)) & 1);
  index = (index << 1) | ((x >= __builtin_shuffle(last, index)) & 1);
}

KOMPAKT_INLINE void level_nearest(const LevelTree& tree, const Lanes& x, Lanes& level) {
  LaneMask index;
  Lanes low, high;
  KOMPAKT_LOAD(low, tree.level);
  KOMPAKT_LOAD(high, tree.level + 8);
  level_index(tree, x, index);
  level = index >= 8 ? __builtin_shuffle(high, index & 7) : __builtin_shuffle(low, index & 7);
}

KOMPAKT_INLINE void level_halves(const Lanes& v, LevelDoubles (&out)[2]) {
  out[0] = __builtin_convertvector(__builtin_shufflevector(v, v, 0, 1, 2, 3), LevelDoubles);
  out[1] = __builtin_convertvector(__builtin_shufflevector(v, v, 4, 5, 6, 7), LevelDoubles);
}

// For eight inverse scales: sums of d w l and of d l^2 in double, l the nearest levels.
KOMPAKT_LANES void level_sums(const float* values, const float* weights, std::int64_t n, const LevelTree& tree, const float* inverse, double* wl, double* ll) {
  Lanes by;
  KOMPAKT_LOAD(by, inverse);
  LevelDoubles a[2] = {}, b[2] = {};
  for (std::int64_t i = 0; i < n; ++i) {
    Lanes level;
    level_nearest(tree, by * values[i], level);
    LevelDoubles l[2];
    level_halves(level, l);
    for (int h = 0; h < 2; ++h) {
      const LevelDoubles weighted = l[h] * static_cast<double>(weights[i]);
      a[h] += weighted * static_cast<double>(values[i]);
      b[h] += weighted * l[h];
    }
  }
  __builtin_memcpy(wl, a, sizeof a);
  __builtin_memcpy(ll, b, sizeof b);
}

// For eight scales: sum of d (w - scale l)^2 in double.
KOMPAKT_LANES void level_errors(const float* values, const float* weights, std::int64_t n, const LevelTree& tree, const float* scale, const float* inverse, double* errors) {
  Lanes by, with;
  KOMPAKT_LOAD(by, inverse);
  KOMPAKT_LOAD(with, scale);
  LevelDoubles sum[2] = {};
  for (std::int64_t i = 0; i < n; ++i) {
    Lanes level;
    level_nearest(tree, by * values[i], level);
    LevelDoubles e[2];
    level_halves(values[i] - with * level, e);
    for (int h = 0; h < 2; ++h) sum[h] += e[h] * static_cast<double>(weights[i]) * e[h];
  }
  __builtin_memcpy(errors, sum, sizeof sum);
}

KOMPAKT_LANES void level_codes(const float* w, std::int64_t n, float offset, float inverse, const LevelTree& tree, int low, std::int8_t* codes) {
  for (std::int64_t i = 0; i < n; i += lane_count) {
    Lanes v = {}, code;
    if (i + lane_count <= n) KOMPAKT_LOAD(v, w + i);
    else
      for (std::int64_t k = i; k < n; ++k) v[k - i] = w[k];
    LaneMask index;
    level_index(tree, (v + -offset) * inverse, index);
    code = __builtin_convertvector(index + low, Lanes);
    if (i + lane_count <= n) {
      store_bytes(codes + i, code);
    } else {
      std::int8_t rest[lane_count];
      store_bytes(rest, code);
      std::copy(rest, rest + (n - i), codes + i);
    }
  }
}

}  // namespace

void LevelTable::nearest_few(const float* w, std::int64_t n, float offset, float inverse, std::int8_t* codes) const {
  level_codes(w, n, offset, inverse, LevelTree(*this), low_, codes);
}

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
  if (!table.few()) throw std::logic_error("fit_levels: more than 16 levels");
  const float low = table.value(table.low()), high = table.value(table.high());
  const LevelTree tree(table);
  double best = std::numeric_limits<double>::infinity();
  float chosen = 0;
  // Candidates, eight at a time: the starts of one sign after those of the other.
  const std::size_t per_sign = rule.starts.size(), count = per_sign * (rule.both_signs ? 2 : 1);
  for (std::size_t first = 0; first < count; first += lane_count) {
    const std::size_t used = std::min<std::size_t>(lane_count, count - first);
    float scale[lane_count], inverse[lane_count];
    bool moving[lane_count];
    for (std::size_t k = 0; k < lane_count; ++k) {
      const std::size_t candidate = std::min(first + k, count - 1);
      const float sign = candidate < per_sign ? 1.0f : -1.0f;
      const float up = sign > 0 ? group.maximum : -group.minimum, down = sign > 0 ? -group.minimum : group.maximum;
      scale[k] = sign * std::max(up / high, down / -low) * rule.starts[candidate % per_sign];
      moving[k] = k < used;
    }
    for (int turn = 0; turn < rule.iterations && std::any_of(moving, moving + lane_count, [](bool m) { return m; }); ++turn) {
      double wl[lane_count], ll[lane_count];
      for (std::size_t k = 0; k < lane_count; ++k) inverse[k] = grid::inverse_scale(scale[k]);
      level_sums(group.values.data(), group.weights.data(), group.size, tree, inverse, wl, ll);
      for (std::size_t k = 0; k < lane_count; ++k) {
        if (!moving[k]) continue;
        const float next = static_cast<float>(wl[k] / ll[k]);
        moving[k] = ll[k] > 0 && next != scale[k] && next != 0 && (next < 0) == (scale[k] < 0);
        if (moving[k]) scale[k] = next;
      }
    }
    double errors[lane_count];
    for (std::size_t k = 0; k < lane_count; ++k) scale[k] = rule.store(scale[k]), inverse[k] = grid::inverse_scale(scale[k]);
    level_errors(group.values.data(), group.weights.data(), group.size, tree, scale, inverse, errors);
    for (std::size_t k = 0; k < used; ++k)
      if (errors[k] < best) best = errors[k], chosen = scale[k];
  }
  return chosen;
}

}  // namespace kompakt
