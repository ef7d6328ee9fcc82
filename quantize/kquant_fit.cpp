// The fit of a super-block, eight groups at a time: a lane is a group, so every sum is vertical and the whole block is tried with
// one scale a group in a few dozen instructions.
//  1. Every group alone: scale (and offset) by alternating codes and least squares from several starts.
//  2. For several d (and e): n (and m) of every group among the neighbours of its own optimum, by the error with nearest codes.
//  3. Least squares of d and e under these integers, and 2 again, as long as the error falls.
#include <algorithm>
#include <cmath>
#include <limits>

#include "quantize/grid_math.h"
#include "quantize/kquant.h"
#include "quantize/kquant_fit.h"
#include "quantize/vector_lanes.h"


namespace kompakt {
namespace {

// ---- what distinguishes the types for the search ----

struct KQuantQ2 {
  static constexpr int group = 16, low = 0, high = 3, step_low = 0, step_high = 15, minimum_high = 15;
  static constexpr bool levels = false, both_signs = false;
  static constexpr float starts[][2] = {{1, 1}, {1, 0.8f}, {0.8f, 1}, {0.8f, 0.8f}, {0.8f, 0.6f}, {0.6f, 0.8f}, {0.6f, 0.6f}, {1.2f, 1}, {1, 1.2f}};  // shares of both ends of the range
  static constexpr int alternations = 3;
  static constexpr float tops[][2] = {{15, 15}, {15, 14}, {14, 15}, {14, 14}, {13, 15}, {15, 13}, {12, 12}, {11, 13}, {13, 11}};  // integers of the largest scale and minimum
};

struct KQuantQ4 {
  static constexpr int group = 32, low = 0, high = 15, step_low = 0, step_high = 63, minimum_high = 63;
  static constexpr bool levels = false, both_signs = false;
  static constexpr float starts[][2] = {{1, 1}, {1.03f, 1.03f}, {0.97f, 0.97f}, {0.94f, 0.94f}, {0.9f, 0.9f}, {0.85f, 0.85f}, {0.78f, 0.78f}, {1, 0.92f}, {0.92f, 1}, {0.94f, 0.86f}, {0.86f, 0.94f}};
  static constexpr int alternations = 3;
  static constexpr float tops[][2] = {{63, 63}, {62, 60}, {60, 62}, {61, 57}, {58, 61}, {56, 59}, {55, 55}, {51, 53}};
};

struct KQuantQ5 : KQuantQ4 {
  static constexpr int high = 31;
  static constexpr float starts[][2] = {{1, 1}, {1.02f, 1.02f}, {0.985f, 0.985f}, {0.97f, 0.97f}, {0.95f, 0.95f}, {0.92f, 0.92f}, {0.88f, 0.88f}, {0.83f, 0.83f}, {1, 0.95f}, {0.95f, 1}, {0.96f, 0.91f}, {0.91f, 0.96f}};
};

struct KQuantQ6 {
  static constexpr int group = 16, low = -32, high = 31, step_low = -128, step_high = 127, minimum_high = 0;
  static constexpr bool levels = false, both_signs = false;
  static constexpr float starts[] = {1.03f, 1.01f, 1.0f, 0.99f, 0.98f, 0.97f, 0.955f, 0.94f, 0.92f, 0.9f, 0.87f, 0.83f};  // shares of the scale that clips nothing
  static constexpr int alternations = 2;
  static constexpr float tops[] = {128, 124, 119, 113};
  static constexpr int reach = 2;  // neighbours of n that are tried, on each side
};

struct KQuantQ3 {
  static constexpr int group = 16, low = -4, high = 3, step_low = -32, step_high = 31, minimum_high = 0;
  static constexpr bool levels = false, both_signs = true;
  static constexpr float starts[] = {1.0f, 0.88f, 0.77f, 0.66f, 0.55f};
  static constexpr int alternations = 3;
  static constexpr float tops[] = {32, 31, 30, 29, 28, 27, 25};
  static constexpr int reach = 1;
};

struct KQuantIq4 {
  static constexpr int group = 32, low = 0, high = 15, step_low = -32, step_high = 31, minimum_high = 0;
  static constexpr bool levels = true, both_signs = true;
  static constexpr float starts[] = {1.0f, 0.92f, 0.84f, 0.76f};
  static constexpr int alternations = 2;
  static constexpr float tops[] = {32, 31, 30, 29, 28, 27};
  static constexpr int reach = 1;
};

// ---- lanes ----

constexpr float kquant_enormous = std::numeric_limits<float>::max();

struct KQuantInput {
  float x[kquant_span], w[kquant_span];  // [octet][i][lane]: value i of group 8 * octet + lane
};

template <class Kind>
struct KQuantShape {
  static constexpr int groups = kquant_span / Kind::group, octets = groups / 8, stride = 8 * Kind::group;
};

struct KQuantSums {
  Lanes product, square, linear, error;  // of w x q, w q q, w q, w (x - scale q - offset)^2
};

KOMPAKT_INLINE void kquant_clamp(Lanes& v, float low, float high) {
  Lanes bottom = {}, top = {};
  bottom += low, top += high;
  v = v > bottom ? v : bottom;
  v = v < top ? v : top;
}

KOMPAKT_INLINE void kquant_integer(Lanes& v) { v = (v + 12582912.0f) + -12582912.0f; }

// y to the value of its nearest code.
template <class Kind>
KOMPAKT_INLINE void kquant_nearest(Lanes& y) {
  if constexpr (Kind::levels) {
    constexpr float level[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    Lanes value = {}, zero = {};
    value += level[0];
    for (int k = 0; k < 15; ++k) {
      Lanes middle = {}, step = {};
      middle += 0.5f * (level[k] + level[k + 1]), step += level[k + 1] - level[k];
      value += y >= middle ? step : zero;
    }
    y = value;
  } else {
    kquant_clamp(y, Kind::low, Kind::high);
    kquant_integer(y);
  }
}

// Eight groups under one scale (and offset) each.
template <class Kind>
KOMPAKT_INLINE void kquant_try(const float* x, const float* w, const Lanes& scale, const Lanes& offset, KQuantSums& out) {
  constexpr bool shifted = Kind::minimum_high > 0;
  const Lanes zero = {};
  const Lanes inverse = scale == zero ? zero : 1.0f / scale;
  Lanes a = {}, b = {}, c = {}, e = {};
  for (int i = 0; i < Kind::group; ++i) {
    Lanes v, d, q;
    KOMPAKT_LOAD(v, x + 8 * i);
    KOMPAKT_LOAD(d, w + 8 * i);
    if constexpr (shifted) q = (v - offset) * inverse;
    else q = v * inverse;
    kquant_nearest<Kind>(q);
    Lanes r = v - q * scale;
    if constexpr (shifted) r = r - offset;
    const Lanes p = d * q;
    a += p * v;
    b += p * q;
    if constexpr (shifted) c += p;
    e += d * r * r;
  }
  out.product = a, out.square = b, out.linear = c, out.error = e;
}

// Into lanes; false when a weight is not finite. Importance as shares of the largest, so that equal ones count like none.
template <class Kind>
KOMPAKT_INLINE bool kquant_load(const float* in, const float* importance, KQuantInput& out, float& largest) {
  const Lanes zero = {};
  Lanes high = {}, nothing = {}, most = {};
  for (int i = 0; i < kquant_span; i += lane_count) {
    Lanes v;
    KOMPAKT_LOAD(v, in + i);
    const Lanes m = v < zero ? -v : v;
    high = m > high ? m : high;
    nothing += v * 0.0f;  // not zero where a weight is infinite or not a number
    if (!importance) continue;
    KOMPAKT_LOAD(v, importance + i);
    most = v > most ? v : most;
  }
  largest = 0;
  float top = 0;
  for (int i = 0; i < lane_count; ++i) largest = std::max(largest, high[i]), top = std::max(top, most[i]);
  const bool weighted = top > 0 && top <= kquant_enormous;
  float shares[kquant_span];
  Lanes share = zero + 1.0f;
  for (int i = 0; i < kquant_span; i += lane_count) {
    if (weighted) {
      KOMPAKT_LOAD(share, importance + i);
      share = share > zero ? share / top : zero;
    }
    KOMPAKT_STORE(shares + i, share);
  }
  for (int g = 0; g < KQuantShape<Kind>::groups; ++g)
    for (int i = 0; i < Kind::group; ++i) {
      const int from = g * Kind::group + i, to = g / 8 * KQuantShape<Kind>::stride + 8 * i + g % 8;
      out.x[to] = in[from], out.w[to] = shares[from];
    }
  return sum_lanes(nothing) == 0;
}

float kquant_store(float scale) { return grid::stored_scale(scale, grid::smallest_half); }

// ---- without minima ----

template <class Kind>
struct KQuantSigned {
  static constexpr int octets = KQuantShape<Kind>::octets, stride = KQuantShape<Kind>::stride;
  float d = 0;
  double error = std::numeric_limits<double>::infinity(), product = 0, square = 0;
  Lanes steps[octets];

  // The best n of every group near target / d.
  KOMPAKT_INLINE void assign(const KQuantInput& in, const Lanes* target, float with) {
    d = with, error = product = square = 0;
    const float inverse = 1.0f / with;
    const Lanes zero = {};
    for (int o = 0; o < octets; ++o) {
      Lanes centre = target[o] * inverse, best = {}, best_product = {}, best_square = {};
      best += kquant_enormous;
      kquant_clamp(centre, Kind::step_low, Kind::step_high);
      kquant_integer(centre);
      steps[o] = zero;
      for (int by = -Kind::reach; by <= Kind::reach; ++by) {
        Lanes n = centre + static_cast<float>(by);
        kquant_clamp(n, Kind::step_low, Kind::step_high);
        KQuantSums sums;
        kquant_try<Kind>(in.x + o * stride, in.w + o * stride, n * with, zero, sums);
        const LaneMask better = sums.error < best;
        best = better ? sums.error : best;
        steps[o] = better ? n : steps[o];
        best_product = better ? n * sums.product : best_product;
        best_square = better ? n * n * sums.square : best_square;
      }
      error += sum_lanes(best), product += sum_lanes(best_product), square += sum_lanes(best_square);
    }
  }
};

template <class Kind>
KOMPAKT_INLINE void kquant_signed_groups(const KQuantInput& in, Lanes* found) {
  using Shape = KQuantShape<Kind>;
  const Lanes zero = {};
  constexpr float top = Kind::levels ? 113.0f : static_cast<float>(Kind::high), bottom = Kind::levels ? 127.0f : static_cast<float>(-Kind::low);
  for (int o = 0; o < Shape::octets; ++o) {
    const float* x = in.x + o * Shape::stride;
    const float* w = in.w + o * Shape::stride;
    Lanes up = {}, down = {}, best = {};
    best += kquant_enormous;
    for (int i = 0; i < Kind::group; ++i) {
      Lanes v;
      KOMPAKT_LOAD(v, x + 8 * i);
      up = v > up ? v : up;
      down = v < down ? v : down;
    }
    down = -down;
    // The scales of either sign that clip nothing.
    const Lanes up_high = up * (1 / top), down_low = down * (1 / bottom), down_high = down * (1 / top), up_low = up * (1 / bottom);
    const Lanes positive = up_high > down_low ? up_high : down_low, negative = down_high > up_low ? down_high : up_low;
    found[o] = zero;
    for (int sign = 0; sign < (Kind::both_signs ? 2 : 1); ++sign) {
      const Lanes first = positive <= negative ? positive : -negative, second = positive <= negative ? -negative : positive;
      const Lanes cover = sign == 0 ? first : second;
      for (const float start : Kind::starts) {
        Lanes scale = cover * start;
        for (int turn = 0; turn < Kind::alternations; ++turn) {
          KQuantSums sums;
          kquant_try<Kind>(x, w, scale, zero, sums);
          const LaneMask better = sums.error < best;
          best = better ? sums.error : best;
          found[o] = better ? scale : found[o];
          const Lanes next = sums.product / sums.square;
          scale = sums.square > zero ? next : scale;
        }
      }
    }
  }
}

template <class Kind>
KOMPAKT_INLINE float kquant_fit_signed(const float* in, const float* importance, float* scales) {
  using Shape = KQuantShape<Kind>;
  KQuantInput input;
  float largest;
  if (!kquant_load<Kind>(in, importance, input, largest)) return std::numeric_limits<float>::quiet_NaN();
  std::fill(scales, scales + Shape::groups, 0.0f);
  if (largest <= 0.5f * grid::smallest_half) return 0;  // nothing that half precision holds is nearer than zero
  constexpr float reach = Kind::levels ? 127.0f : static_cast<float>(-Kind::low);
  if (const float needed = largest / reach / static_cast<float>(Kind::step_high); !(needed < grid::largest_half)) return needed;
  Lanes found[Shape::octets];
  kquant_signed_groups<Kind>(input, found);
  float widest = 0;
  for (int g = 0; g < Shape::groups; ++g)
    if (std::fabs(found[g / 8][g % 8]) > std::fabs(widest)) widest = found[g / 8][g % 8];
  KQuantSigned<Kind> best, tried;
  for (const float top : Kind::tops) {
    const float d = kquant_store(-widest / top);
    if (d == 0) continue;
    tried.assign(input, found, d);
    if (tried.error < best.error) best = tried;
  }
  if (best.d == 0) return 0;
  for (int turn = 0; turn < 3 && best.square > 0; ++turn) {
    const float d = kquant_store(static_cast<float>(best.product / best.square));
    if (d == 0 || d == best.d) break;
    Lanes target[Shape::octets];
    for (int o = 0; o < Shape::octets; ++o) target[o] = best.steps[o] * best.d;
    tried.assign(input, target, d);
    if (!(tried.error < best.error)) break;
    best = tried;
  }
  for (int g = 0; g < Shape::groups; ++g) scales[g] = best.d * best.steps[g / 8][g % 8];
  return std::fabs(best.d);
}

// ---- with minima ----

template <class Kind>
struct KQuantShifted {
  static constexpr int octets = KQuantShape<Kind>::octets, stride = KQuantShape<Kind>::stride;
  float d = 0, e = 0;
  double error = std::numeric_limits<double>::infinity();
  double steps_square = 0, cross = 0, minima_square = 0, steps_product = 0, minima_product = 0;  // normal equations of d and e
  Lanes steps[octets], minima[octets];

  // The best n and m of every group near its scale / d and -offset / e; `weight` and `sum`: of w and of w x, per group.
  KOMPAKT_INLINE void assign(const KQuantInput& in, const Lanes* scale, const Lanes* offset, const Lanes* weight, const Lanes* sum, float with_d, float with_e) {
    d = with_d, e = with_e, error = steps_square = cross = minima_square = steps_product = minima_product = 0;
    const float inverse_d = grid::inverse_scale(with_d), inverse_e = grid::inverse_scale(with_e);
    const Lanes zero = {};
    for (int o = 0; o < octets; ++o) {
      Lanes centre = scale[o] * inverse_d, at = offset[o] * -inverse_e, best = {}, product = {}, square = {}, linear = {};
      best += kquant_enormous;
      kquant_clamp(centre, Kind::step_low, Kind::step_high);
      kquant_integer(centre);
      kquant_clamp(at, 0, Kind::minimum_high);
      kquant_integer(at);
      steps[o] = minima[o] = zero;
      for (int by = -1; by <= 1; ++by) {
        Lanes n = centre + static_cast<float>(by), m = at;
        kquant_clamp(n, Kind::step_low, Kind::step_high);
        const Lanes s = n * with_d;
        for (int turn = 0; turn < 2; ++turn) {
          KQuantSums sums;
          kquant_try<Kind>(in.x + o * stride, in.w + o * stride, s, -(m * with_e), sums);
          const LaneMask better = sums.error < best;
          best = better ? sums.error : best;
          steps[o] = better ? n : steps[o], minima[o] = better ? m : minima[o];
          product = better ? sums.product : product, square = better ? sums.square : square, linear = better ? sums.linear : linear;
          // The offset that suits these codes.
          Lanes next = (s * sums.linear - sum[o]) / weight[o] * inverse_e;
          kquant_clamp(next, 0, Kind::minimum_high);
          kquant_integer(next);
          m = weight[o] > zero ? next : m;
        }
      }
      error += sum_lanes(best);
      const Lanes nn = steps[o] * steps[o] * square, nm = steps[o] * minima[o] * linear, mm = minima[o] * minima[o] * weight[o], np = steps[o] * product, mx = minima[o] * sum[o];
      steps_square += sum_lanes(nn), cross += sum_lanes(nm), minima_square += sum_lanes(mm), steps_product += sum_lanes(np), minima_product += sum_lanes(mx);
    }
  }
};

template <class Kind>
KOMPAKT_INLINE void kquant_shifted_groups(const KQuantInput& in, Lanes* scales, Lanes* offsets, Lanes* weight, Lanes* sum) {
  using Shape = KQuantShape<Kind>;
  const Lanes zero = {};
  for (int o = 0; o < Shape::octets; ++o) {
    const float* x = in.x + o * Shape::stride;
    const float* w = in.w + o * Shape::stride;
    Lanes low = {}, high, best = {}, total = {}, moment = {};
    best += kquant_enormous;
    KOMPAKT_LOAD(high, x);
    for (int i = 0; i < Kind::group; ++i) {
      Lanes v, d;
      KOMPAKT_LOAD(v, x + 8 * i);
      KOMPAKT_LOAD(d, w + 8 * i);
      low = v < low ? v : low;
      high = v > high ? v : high;
      total += d;
      moment += d * v;
    }
    weight[o] = total, sum[o] = moment;
    scales[o] = offsets[o] = zero;
    for (const auto& start : Kind::starts) {
      Lanes offset = low * start[0], scale = (high * start[1] - offset) * (1.0f / Kind::high);
      scale = scale > zero ? scale : zero;
      for (int turn = 0; turn < Kind::alternations; ++turn) {
        KQuantSums sums;
        kquant_try<Kind>(x, w, scale, offset, sums);
        const LaneMask better = sums.error < best;
        best = better ? sums.error : best;
        scales[o] = better ? scale : scales[o], offsets[o] = better ? offset : offsets[o];
        const Lanes both = total * sums.square, determinant = both - sums.linear * sums.linear;
        Lanes s = (total * sums.product - moment * sums.linear) / determinant, m = (sums.square * moment - sums.linear * sums.product) / determinant;
        const Lanes alone = sums.product / sums.square;
        s = m > zero ? alone : s;
        m = m > zero ? zero : m;
        // Equal codes say nothing of scale and offset apart.
        const LaneMask use = (determinant > both * 1e-5f) & (s > zero);
        scale = use ? s : scale, offset = use ? m : offset;
      }
    }
  }
}

template <class Kind>
KOMPAKT_INLINE float kquant_fit_shifted(const float* in, const float* importance, float* scales, float* offsets) {
  using Shape = KQuantShape<Kind>;
  KQuantInput input;
  float largest;
  if (!kquant_load<Kind>(in, importance, input, largest)) return std::numeric_limits<float>::quiet_NaN();
  std::fill(scales, scales + Shape::groups, 0.0f);
  std::fill(offsets, offsets + Shape::groups, 0.0f);
  if (largest <= 0.5f * grid::smallest_half) return 0;
  if (const float needed = largest / static_cast<float>(Kind::minimum_high); !(needed < grid::largest_half)) return needed;
  Lanes scale[Shape::octets], offset[Shape::octets], weight[Shape::octets], sum[Shape::octets];
  kquant_shifted_groups<Kind>(input, scale, offset, weight, sum);
  float widest = 0, deepest = 0;
  for (int g = 0; g < Shape::groups; ++g) widest = std::max(widest, scale[g / 8][g % 8]), deepest = std::max(deepest, -offset[g / 8][g % 8]);
  KQuantShifted<Kind> best, tried;
  for (const auto& top : Kind::tops) {
    tried.assign(input, scale, offset, weight, sum, kquant_store(widest / top[0]), kquant_store(deepest / top[1]));
    if (tried.error < best.error) best = tried;
  }
  for (int turn = 0; turn < 3; ++turn) {
    const double determinant = best.steps_square * best.minima_square - best.cross * best.cross;
    double d = best.d, e = best.e;
    if (best.minima_square > 0 && determinant > 1e-9 * best.steps_square * best.minima_square) {
      d = (best.steps_product * best.minima_square - best.cross * best.minima_product) / determinant;
      e = (best.cross * best.steps_product - best.steps_square * best.minima_product) / determinant;
    } else if (best.steps_square > 0 && best.minima_square == 0) {
      d = best.steps_product / best.steps_square;
    }
    if (!(d > 0) || !(e >= 0)) break;
    const float next_d = kquant_store(static_cast<float>(d)), next_e = kquant_store(static_cast<float>(e));
    if (next_d == best.d && next_e == best.e) break;
    Lanes near_scale[Shape::octets], near_offset[Shape::octets];
    for (int o = 0; o < Shape::octets; ++o) near_scale[o] = best.steps[o] * best.d, near_offset[o] = -(best.minima[o] * best.e);
    tried.assign(input, near_scale, near_offset, weight, sum, next_d, next_e);
    if (!(tried.error < best.error)) break;
    best = tried;
  }
  for (int g = 0; g < Shape::groups; ++g) {
    scales[g] = best.d * best.steps[g / 8][g % 8];
    offsets[g] = -(best.e * best.minima[g / 8][g % 8]);
  }
  return std::max(best.d, best.e);
}

}  // namespace

KOMPAKT_LANES float kquant_fit_q2(const float* w, const float* importance, float* scales, float* offsets) { return kquant_fit_shifted<KQuantQ2>(w, importance, scales, offsets); }
KOMPAKT_LANES float kquant_fit_q4(const float* w, const float* importance, float* scales, float* offsets) { return kquant_fit_shifted<KQuantQ4>(w, importance, scales, offsets); }
KOMPAKT_LANES float kquant_fit_q5(const float* w, const float* importance, float* scales, float* offsets) { return kquant_fit_shifted<KQuantQ5>(w, importance, scales, offsets); }
KOMPAKT_LANES float kquant_fit_q3(const float* w, const float* importance, float* scales, float*) { return kquant_fit_signed<KQuantQ3>(w, importance, scales); }
KOMPAKT_LANES float kquant_fit_q6(const float* w, const float* importance, float* scales, float*) { return kquant_fit_signed<KQuantQ6>(w, importance, scales); }
KOMPAKT_LANES float kquant_fit_iq4(const float* w, const float* importance, float* scales, float*) { return kquant_fit_signed<KQuantIq4>(w, importance, scales); }

}  // namespace kompakt
