// Fits of one group of weights; formulas: least squares over the support (ternary), alternating least squares (uniform grids).
#include "quantize/group_fit.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "quantize/grid_math.h"
#include "quantize/vector_lanes.h"

namespace kompakt {
namespace {

// Float lanes are summed into a double after so many elements, which keeps the relative error of long rows near 1e-7.
constexpr std::int64_t fit_chunk = 1024;

struct FitSums {
  double product = 0, weight = 0;  // sum d |w|, sum d over the chosen magnitudes
};

// Sums over magnitudes above two thresholds in one pass; n is a multiple of lane_count.
KOMPAKT_LANES void fit_sums_above(const float* magnitudes, std::int64_t n, float low, float high, FitSums& above_low, FitSums& above_high) {
  double sums[4] = {0, 0, 0, 0};
  for (std::int64_t begin = 0; begin < n; begin += fit_chunk) {
    const std::int64_t end = begin + fit_chunk < n ? begin + fit_chunk : n;
    Lanes a = {}, b = {}, c = {}, d = {}, one = {}, zero = {};
    one += 1.0f;
    for (std::int64_t i = begin; i < end; i += lane_count) {
      Lanes m;
      KOMPAKT_LOAD(m, magnitudes + i);
      a += m > low ? m : zero;
      b += m > low ? one : zero;
      c += m > high ? m : zero;
      d += m > high ? one : zero;
    }
    sums[0] += sum_lanes(a), sums[1] += sum_lanes(b), sums[2] += sum_lanes(c), sums[3] += sum_lanes(d);
  }
  above_low.product += sums[0], above_low.weight += sums[1], above_high.product += sums[2], above_high.weight += sums[3];
}

KOMPAKT_LANES void fit_weighted_sums_above(const float* magnitudes, const float* weights, std::int64_t n, float low, float high, FitSums& above_low,
                                           FitSums& above_high) {
  double sums[4] = {0, 0, 0, 0};
  for (std::int64_t begin = 0; begin < n; begin += fit_chunk) {
    const std::int64_t end = begin + fit_chunk < n ? begin + fit_chunk : n;
    Lanes a = {}, b = {}, c = {}, d = {}, zero = {};
    for (std::int64_t i = begin; i < end; i += lane_count) {
      Lanes m, w;
      KOMPAKT_LOAD(m, magnitudes + i);
      KOMPAKT_LOAD(w, weights + i);
      const Lanes p = m * w;
      a += m > low ? p : zero;
      b += m > low ? w : zero;
      c += m > high ? p : zero;
      d += m > high ? w : zero;
    }
    sums[0] += sum_lanes(a), sums[1] += sum_lanes(b), sums[2] += sum_lanes(c), sums[3] += sum_lanes(d);
  }
  above_low.product += sums[0], above_low.weight += sums[1], above_high.product += sums[2], above_high.weight += sums[3];
}

// |w|, its sums and extremes. Padding is zero in both arrays.
KOMPAKT_LANES void fit_prepare(const float* values, const float* weights, float* magnitudes, std::int64_t n, double& product, double& total, float& minimum,
                               float& maximum) {
  Lanes low = {}, high = {}, zero = {};
  product = total = 0;
  for (std::int64_t begin = 0; begin < n; begin += fit_chunk) {
    const std::int64_t end = begin + fit_chunk < n ? begin + fit_chunk : n;
    Lanes a = {}, b = {};
    for (std::int64_t i = begin; i < end; i += lane_count) {
      Lanes v, w;
      KOMPAKT_LOAD(v, values + i);
      KOMPAKT_LOAD(w, weights + i);
      const Lanes m = v < zero ? -v : v;
      KOMPAKT_STORE(magnitudes + i, m);
      low = v < low ? v : low;
      high = v > high ? v : high;
      a += m * w;
      b += w;
    }
    product += sum_lanes(a), total += sum_lanes(b);
  }
  minimum = low[0], maximum = high[0];
  for (int i = 1; i < lane_count; ++i) minimum = low[i] < minimum ? low[i] : minimum, maximum = high[i] > maximum ? high[i] : maximum;
}

// Magnitudes in (low, high] to `kept` (which may be the input itself), with their weights where there are any; their number. Few
// are left, so those of 32 are found by the bits of a word.
KOMPAKT_LANES std::int64_t fit_keep_between(const float* magnitudes, const float* weights, std::int64_t n, float low, float high, float* kept, float* kept_weights) {
  const LaneMask lane = {0, 1, 2, 3, 4, 5, 6, 7};
  std::int64_t count = 0;
  for (std::int64_t begin = 0; begin < n; begin += 32) {
    LaneMask word = {};
    for (std::int64_t i = begin; i < begin + 32 && i < n; i += lane_count) {
      Lanes m;
      KOMPAKT_LOAD(m, magnitudes + i);
      word |= ((m > low) & (m <= high) & 1) << (lane + static_cast<std::int32_t>(i - begin));
    }
    word |= __builtin_shuffle(word, lane ^ 4);
    word |= __builtin_shuffle(word, lane ^ 2);
    word |= __builtin_shuffle(word, lane ^ 1);
    for (auto bits = static_cast<std::uint32_t>(word[0]); bits != 0; bits &= bits - 1) {
      const std::int64_t i = begin + __builtin_ctz(bits);
      kept[count] = magnitudes[i];
      if (weights) kept_weights[count] = weights[i];
      ++count;
    }
  }
  return count;
}

// The two sums of the least-squares scale of a grid without offset, for nearest codes: sum d w q, sum d q^2.
KOMPAKT_LANES void fit_scale_sums(const float* values, const float* weights, std::int64_t n, float inverse, float low, float high, double& wq, double& qq) {
  Lanes bottom = {}, top = {};
  bottom += low, top += high;
  const float magic = 12582912.0f;
  wq = qq = 0;
  for (std::int64_t begin = 0; begin < n; begin += fit_chunk) {
    const std::int64_t end = begin + fit_chunk < n ? begin + fit_chunk : n;
    Lanes a = {}, b = {};
    for (std::int64_t i = begin; i < end; i += lane_count) {
      Lanes v, w;
      KOMPAKT_LOAD(v, values + i);
      KOMPAKT_LOAD(w, weights + i);
      Lanes x = v * inverse;
      x = x > bottom ? x : bottom;
      x = x < top ? x : top;
      const Lanes q = (x + magic) - magic;
      const Lanes p = w * q;
      a += p * v;
      b += p * q;
    }
    wq += sum_lanes(a), qq += sum_lanes(b);
  }
}

// sum d (w - scale q)^2 for nearest codes.
KOMPAKT_LANES double fit_squared_error(const float* values, const float* weights, std::int64_t n, float scale, float inverse, float low, float high) {
  Lanes bottom = {}, top = {};
  bottom += low, top += high;
  const float magic = 12582912.0f;
  double sum = 0;
  for (std::int64_t begin = 0; begin < n; begin += fit_chunk) {
    const std::int64_t end = begin + fit_chunk < n ? begin + fit_chunk : n;
    Lanes e = {};
    for (std::int64_t i = begin; i < end; i += lane_count) {
      Lanes v, w;
      KOMPAKT_LOAD(v, values + i);
      KOMPAKT_LOAD(w, weights + i);
      Lanes x = v * inverse;
      x = x > bottom ? x : bottom;
      x = x < top ? x : top;
      const Lanes r = v - ((x + magic) - magic) * scale;
      e += w * r * r;
    }
    sum += sum_lanes(e);
  }
  return sum;
}

// Shares of the root mean square, in equal ratios.
constexpr Lanes fit_two_bits_starts = {0.5f, 0.595522f, 0.709291f, 0.844796f, 1.006187f, 1.198411f, 1.427359f, 1.7f};
constexpr std::int64_t fit_two_bits_chunk = 256;  // values summed in one go

// For eight scales: the least-squares scale of their nearest codes, and how much of the squared weights it takes away. Where codes
// say nothing, or the sign turns, the scale stays and takes nothing.
KOMPAKT_INLINE void fit_two_bits_turn(const float* values, const float* weights, std::int64_t n, float low, float high, Lanes& scale, Lanes& gain) {
  const Lanes zero = {}, inverse = 1.0f / scale;
  Lanes bottom = {}, top = {}, product = {}, square = {};
  bottom += low, top += high;
  const float magic = 12582912.0f;
  for (std::int64_t begin = 0; begin < n; begin += fit_two_bits_chunk) {
    const std::int64_t end = begin + fit_two_bits_chunk < n ? begin + fit_two_bits_chunk : n;
    Lanes a = {}, b = {};
    for (std::int64_t i = begin; i < end; ++i) {
      Lanes x = inverse * values[i];
      x = x > bottom ? x : bottom;
      x = x < top ? x : top;
      const Lanes q = (x + magic) - magic, p = q * weights[i];
      a += p * values[i];
      b += p * q;
    }
    product += a, square += b;
  }
  const Lanes next = product / square;
  const LaneMask good = (square > zero) & (next * scale > zero);
  gain = good ? next * product : zero;
  scale = good ? next : scale;
}

KOMPAKT_LANES float fit_two_bits_lanes(const float* values, const float* weights, std::int64_t n, float rms, float low, float high, bool both_signs) {
  Lanes scale = fit_two_bits_starts * rms, gain;
  if (both_signs) {
    Lanes negative = -scale, taken;
    fit_two_bits_turn(values, weights, n, low, high, scale, gain);
    fit_two_bits_turn(values, weights, n, low, high, negative, taken);
    scale = taken > gain ? negative : scale;
  } else {
    fit_two_bits_turn(values, weights, n, low, high, scale, gain);
  }
  for (int turn = 0; turn < 2; ++turn) fit_two_bits_turn(values, weights, n, low, high, scale, gain);
  int best = 0;
  for (int k = 1; k < lane_count; ++k)
    if (gain[k] > gain[best]) best = k;
  return scale[best];
}

struct FitMoments {
  double wq = 0, qq = 0, w = 0, q = 0, error = 0;  // weighted sums for nearest codes
};

// Nearest codes for one scale: sums for the least-squares scale, and the squared error of this scale.
KOMPAKT_LANES void fit_moments(const float* values, const float* weights, std::int64_t n, float scale, float inverse, float offset, float low, float high,
                               FitMoments& out) {
  double sums[5] = {0, 0, 0, 0, 0};
  Lanes bottom = {}, top = {};
  bottom += low, top += high;
  const float magic = 12582912.0f;
  for (std::int64_t begin = 0; begin < n; begin += fit_chunk) {
    const std::int64_t end = begin + fit_chunk < n ? begin + fit_chunk : n;
    Lanes a = {}, b = {}, c = {}, d = {}, e = {};
    for (std::int64_t i = begin; i < end; i += lane_count) {
      Lanes v, w;
      KOMPAKT_LOAD(v, values + i);
      KOMPAKT_LOAD(w, weights + i);
      Lanes x = (v - offset) * inverse;
      x = x > bottom ? x : bottom;
      x = x < top ? x : top;
      const Lanes q = (x + magic) - magic;
      const Lanes r = v - (q * scale + offset);
      const Lanes wq = w * q;
      a += wq * v;
      b += wq * q;
      c += w * v;
      d += wq;
      e += w * r * r;
    }
    sums[0] += sum_lanes(a), sums[1] += sum_lanes(b), sums[2] += sum_lanes(c), sums[3] += sum_lanes(d), sums[4] += sum_lanes(e);
  }
  out = {sums[0], sums[1], sums[2], sums[3], sums[4]};
}

}  // namespace

bool FitScratch::load(const float* w, const float* importance, std::int64_t n) {
  size = n;
  padded = (n + lane_count - 1) / lane_count * lane_count;
  const auto room = static_cast<std::size_t>(padded);
  if (values.size() < room) values.resize(room), magnitudes.resize(room), weights.resize(room), active.resize(room), active_weights.resize(room);
  std::copy(w, w + n, values.begin());
  std::fill(values.begin() + n, values.begin() + padded, 0.0f);
  weighted = importance != nullptr;
  if (weighted) {
    std::copy(importance, importance + n, weights.begin());
    weighted = std::any_of(importance, importance + n, [](float d) { return d > 0; });
  }
  if (!weighted) std::fill(weights.begin(), weights.begin() + n, 1.0f);
  std::fill(weights.begin() + n, weights.begin() + padded, 0.0f);
  fit_prepare(values.data(), weights.data(), magnitudes.data(), padded, magnitude_sum, weight_sum, minimum, maximum);
  largest = std::max(-minimum, maximum);
  if (std::isfinite(magnitude_sum) && std::isfinite(largest)) return true;
  return std::all_of(values.begin(), values.begin() + n, [](float v) { return std::isfinite(v); });
}

float fit_absmean(const FitScratch& group) { return group.size == 0 ? 0.0f : static_cast<float>(group.magnitude_sum / group.weight_sum); }

float fit_absmax(const FitScratch& group, int high) { return group.largest / static_cast<float>(high); }

float fit_ternary(FitScratch& group) {
  if (group.largest == 0) return 0;
  const float* magnitudes = group.magnitudes.data();
  const float* weights = group.weights.data();
  std::int64_t n = group.padded;
  FitSums certain;  // magnitudes above the upper bracket: in every optimal support
  double low = group.magnitude_sum / group.weight_sum, high = group.largest;
  const double below = 1 - 1e-6, above = 1 + 1e-6;  // float sums err by less
  float low_threshold = 0, high_threshold = 0;
  for (int round = 0; round < 16; ++round) {
    FitSums from_low, from_high;
    const int passes = round == 0 ? 3 : 2;
    for (int pass = 0; pass < passes; ++pass) {
      low_threshold = static_cast<float>(low / 2 * below), high_threshold = static_cast<float>(high / 2 * above);
      from_low = from_high = certain;
      if (group.weighted)
        fit_weighted_sums_above(magnitudes, weights, n, low_threshold, high_threshold, from_low, from_high);
      else
        fit_sums_above(magnitudes, n, low_threshold, high_threshold, from_low, from_high);
      if (from_low.weight > 0) low = std::max(low, from_low.product / from_low.weight);
      if (from_high.weight > 0) high = std::min(high, from_high.product / from_high.weight);
    }
    // Keep the undecided; what lies above is booked. A magnitude of weight 0 is never counted and may go either way.
    certain = from_high;
    const std::int64_t kept = fit_keep_between(magnitudes, group.weighted ? weights : nullptr, n, low_threshold, high_threshold, group.active.data(), group.active_weights.data());
    const std::int64_t before = n;
    n = (kept + lane_count - 1) / lane_count * lane_count;
    for (std::int64_t i = kept; i < n; ++i) group.active[static_cast<std::size_t>(i)] = 0, group.active_weights[static_cast<std::size_t>(i)] = 0;
    magnitudes = group.active.data();
    if (group.weighted) weights = group.active_weights.data();
    if (kept <= 4 || n == before) break;
  }
  group.sorted.clear();
  for (std::int64_t i = 0; i < n; ++i)
    if (magnitudes[i] > 0) group.sorted.emplace_back(magnitudes[i], group.weighted ? weights[i] : 1.0f);
  const auto descending = [](const auto& a, const auto& b) { return a > b; };
  if (group.sorted.size() > 1) std::sort(group.sorted.begin(), group.sorted.end(), descending);
  double best = certain.weight > 0 ? certain.product * certain.product / certain.weight : -1;
  double alpha = certain.weight > 0 ? certain.product / certain.weight : 0;
  double product = certain.product, weight = certain.weight;
  for (const auto& [m, d] : group.sorted) {
    product += static_cast<double>(m) * d, weight += d;
    const double value = weight > 0 ? product * product / weight : -1;
    if (value > best) best = value, alpha = product / weight;
  }
  return static_cast<float>(alpha);
}

float fit_two_bits(FitScratch& group, int low, int high, bool both_signs, float smallest) {
  if (group.largest == 0) return 0;
  double rms = std::sqrt(fit_squared_error(group.values.data(), group.weights.data(), group.padded, 0, 0, 0, 0) / group.weight_sum);
  if (rms == 0) rms = group.largest;
  return grid::stored_scale(fit_two_bits_lanes(group.values.data(), group.weights.data(), group.size, static_cast<float>(rms), static_cast<float>(low), static_cast<float>(high), both_signs), smallest);
}

float fit_uniform(FitScratch& group, const UniformRule& rule) {
  if (group.largest == 0) return 0;
  double best = std::numeric_limits<double>::infinity();
  float chosen = 0;
  const float* values = group.values.data();
  const float* weights = group.weights.data();
  const float low = static_cast<float>(rule.low), high = static_cast<float>(rule.high);
  std::vector<float>& tried = group.active;  // free here: scales that earlier starts have reached
  std::size_t tried_count = 0;
  for (int sign = 1; sign >= (rule.both_signs ? -1 : 1); sign -= 2) {
    // The smallest scale of this sign that clips nothing.
    const double up = sign > 0 ? group.maximum : -group.minimum, down = sign > 0 ? -group.minimum : group.maximum;
    const double cover = std::max(up / rule.high, down / -rule.low);
    for (const float start : rule.starts) {
      float scale = static_cast<float>(sign * cover * start);
      for (int i = 0; i < rule.iterations; ++i) {
        double wq, qq;
        fit_scale_sums(values, weights, group.padded, grid::inverse_scale(scale), low, high, wq, qq);
        if (qq <= 0) break;
        const float next = static_cast<float>(wq / qq);
        if (next == scale || next == 0 || (next < 0) != (sign < 0)) break;
        scale = next;
      }
      const float stored = grid::stored_scale(scale, rule.smallest);
      const auto end = tried.begin() + static_cast<std::ptrdiff_t>(tried_count);
      if (std::find(tried.begin(), end, stored) != end) continue;
      if (tried_count < tried.size()) tried[tried_count++] = stored;
      const double error = fit_squared_error(values, weights, group.padded, stored, grid::inverse_scale(stored), low, high);
      if (error < best) best = error, chosen = stored;
    }
  }
  return chosen;
}

GroupScale fit_offset(FitScratch& group, const OffsetRule& rule) {
  double best = std::numeric_limits<double>::infinity();
  GroupScale chosen;
  const float high = static_cast<float>(rule.high);
  float minimum = group.minimum, maximum = group.maximum;  // both include zero
  if (!rule.integer_zero) {
    minimum = maximum = group.values[0];
    for (std::int64_t i = 1; i < group.size; ++i) minimum = std::min(minimum, group.values[static_cast<std::size_t>(i)]), maximum = std::max(maximum, group.values[static_cast<std::size_t>(i)]);
  }
  if (maximum == minimum) {
    if (!rule.integer_zero) chosen.offset = grid::round_to_half(minimum);
    return chosen;
  }
  const auto error_of = [&](const GroupScale& g, FitMoments& m) {
    fit_moments(group.values.data(), group.weights.data(), group.padded, g.scale, grid::inverse_scale(g.scale), g.offset, 0, high, m);
    return m.error;
  };
  const auto consider = [&](double bottom, double top) {
    GroupScale g;
    FitMoments m;
    double scale = (top - bottom) / high, offset = bottom;
    if (rule.integer_zero) {
      g.scale = grid::stored_scale(static_cast<float>(scale), rule.smallest);
      const float zero = grid::nearest_code(static_cast<float>(-bottom), grid::inverse_scale(g.scale), 0, 0, high);
      g.offset = -(g.scale * zero);
    } else {
      for (int i = 0; i < rule.iterations; ++i) {
        error_of({static_cast<float>(scale), static_cast<float>(offset)}, m);
        const double determinant = group.weight_sum * m.qq - m.q * m.q;
        if (determinant <= 1e-9 * group.weight_sum * m.qq) break;
        const double next = (group.weight_sum * m.wq - m.q * m.w) / determinant;
        if (next <= 0) break;
        const double next_offset = (m.qq * m.w - m.q * m.wq) / determinant;
        const bool same = static_cast<float>(next) == static_cast<float>(scale) && static_cast<float>(next_offset) == static_cast<float>(offset);
        scale = next, offset = next_offset;
        if (same) break;
      }
      g.scale = grid::stored_scale(static_cast<float>(scale), rule.smallest);
      g.offset = grid::round_to_half(static_cast<float>(offset));
    }
    const double error = error_of(g, m);
    if (error < best) best = error, chosen = g;
  };
  for (const float a : rule.starts) {
    if (!rule.pairs) {
      consider(minimum * a, maximum * a);
      continue;
    }
    for (const float b : rule.starts) consider(minimum * a, maximum * b);
  }
  return chosen;
}

}  // namespace kompakt
