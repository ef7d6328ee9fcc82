#include "formats/ggml_search.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "formats/ggml_search_lanes.h"

namespace kompakt::ggml_search {
namespace {

constexpr int most_codes = 32;  // the largest group

// The element of largest magnitude, with its sign; the first one of equals.
float signed_maximum(int n, const float* x, float* magnitude) {
  float best = 0, largest = 0;
  for (int i = 0; i < n; ++i)
    if (std::fabs(x[i]) > largest) {
      largest = std::fabs(x[i]);
      best = x[i];
    }
  *magnitude = largest;
  return best;
}

struct Sums {
  float xl = 0, l2 = 0;
};

// The inverse scales of the symmetric search are -(half + these) / (signed maximum), those of the positive one (largest + these) /
// maximum; the first is the plain one. Padded to whole vectors with the last.
constexpr float symmetric_steps[24] = {0,           0.1f * -9.0f, 0.1f * -8.0f, 0.1f * -7.0f, 0.1f * -6.0f, 0.1f * -5.0f, 0.1f * -4.0f, 0.1f * -3.0f,
                                       0.1f * -2.0f, 0.1f * -1.0f, 0.1f * 1.0f,  0.1f * 2.0f,  0.1f * 3.0f,  0.1f * 4.0f,  0.1f * 5.0f,  0.1f * 6.0f,
                                       0.1f * 7.0f,  0.1f * 8.0f,  0.1f * 9.0f,  0.1f * 9.0f,  0.1f * 9.0f,  0.1f * 9.0f,  0.1f * 9.0f,  0.1f * 9.0f};
constexpr int symmetric_count = 19;
constexpr float positive_steps[16] = {0,           0.1f * -4.0f, 0.1f * -3.0f, 0.1f * -2.0f, 0.1f * -1.0f, 0.1f * 1.0f, 0.1f * 2.0f, 0.1f * 3.0f,
                                      0.1f * 4.0f, 0.1f * 4.0f,  0.1f * 4.0f,  0.1f * 4.0f,  0.1f * 4.0f,  0.1f * 4.0f, 0.1f * 4.0f, 0.1f * 4.0f};
constexpr int positive_count = 9;

// Codes of (x - low) * inverse; n is a multiple of 8.
KOMPAKT_INLINE void write_codes(int n, const float* x, float low, float inverse, int least, int largest, std::int8_t* codes) {
  for (int i = 0; i < n; i += 8) {
    Lanes v, code;
    KOMPAKT_LOAD(v, x + i);
    code_lanes((v - low) * inverse, least, largest, code);
    store_bytes(codes + i, code);
  }
}

// What eight inverse scales, measured from `low`, lead to: least squares of scale and minimum, and their error.
struct AffineTry {
  float scale[8], offset[8], error[8], determinant[8];
};

template <bool absolute>
KOMPAKT_INLINE void affine_try(int n, int largest, const float* x, const float* weights, float sum_w, float sum_x, float low, const Lanes& inverse, AffineTry& out) {
  const Lanes zero = {};
  Lanes codes[most_codes], sum_l = {}, sum_l2 = {}, sum_xl = {};
  for (int i = 0; i < n; ++i) {
    code_lanes(inverse * (x[i] - low), 0, largest, codes[i]);
    const Lanes weighted = weights[i] * codes[i];
    sum_l += weighted;
    sum_l2 += weighted * codes[i];
    sum_xl += weighted * x[i];
  }
  const Lanes determinant = sum_w * sum_l2 - sum_l * sum_l;
  const Lanes free_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant, free_offset = (sum_l2 * sum_x - sum_l * sum_xl) / determinant, alone = sum_xl / sum_l2;
  const Lanes scale = free_offset > zero ? alone : free_scale, offset = free_offset > zero ? zero : free_offset;
  Lanes error = {};
  for (int i = 0; i < n; ++i) {
    const Lanes diff = scale * codes[i] + offset - x[i];
    if constexpr (absolute) error += weights[i] * (diff < zero ? -diff : diff);
    else error += weights[i] * (diff * diff);
  }
  KOMPAKT_STORE(out.scale, scale);
  KOMPAKT_STORE(out.offset, offset);
  KOMPAKT_STORE(out.error, error);
  KOMPAKT_STORE(out.determinant, determinant);
}

template <bool absolute>
KOMPAKT_INLINE float affine_search_lanes(int n, int largest, const float* x, const float* weights, const AffineGrid& grid, std::int8_t* codes, float* minimum) {
  float low = x[0], high = x[0], sum_w = weights[0], sum_x = sum_w * x[0];
  for (int i = 1; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = high < x[i] ? x[i] : high;
    sum_w += weights[i];
    sum_x += weights[i] * x[i];
  }
  if (low > 0) low = 0;
  if (high <= low) {
    for (int i = 0; i < n; ++i) codes[i] = 0;
    *minimum = -low;
    return 0;
  }
  const float span = high - low, most = static_cast<float>(largest);
  float best_inverse = most / span, from = low, best_scale = 1 / best_inverse, best_low = low, best_error = 0;
  write_codes(n, x, low, best_inverse, 0, largest, codes);
  for (int i = 0; i < n; ++i) {
    const float diff = best_scale * static_cast<float>(codes[i]) + low - x[i];
    best_error += weights[i] * (absolute ? (diff < 0 ? -diff : diff) : diff * diff);
  }
  // ggml measures the codes of every later step from the minimum found so far: eight steps are tried at once from the present one,
  // and those behind the first gain again from the new one.
  Lanes ramp = {0, 1, 2, 3, 4, 5, 6, 7};
  for (int step = 0; step <= grid.steps;) {
    const Lanes inverse = (grid.start + grid.step * (ramp + static_cast<float>(step)) + most) / (high - best_low);
    AffineTry tried;
    affine_try<absolute>(n, largest, x, weights, sum_w, sum_x, best_low, inverse, tried);
    const int end = step + 8 <= grid.steps + 1 ? 8 : grid.steps + 1 - step;
    const float measured_from = best_low;
    int k = 0;
    while (k < end && best_low == measured_from) {
      if (tried.determinant[k] > 0 && tried.error[k] < best_error) {
        best_error = tried.error[k];
        best_scale = tried.scale[k];
        best_low = tried.offset[k];
        best_inverse = inverse[k];
        from = measured_from;
      }
      ++k;
    }
    step += k;
  }
  write_codes(n, x, from, best_inverse, 0, largest, codes);
  *minimum = -best_low;
  return best_scale;
}

}  // namespace

int nearest_int(float value) { return static_cast<int>(std::bit_cast<std::uint32_t>(value + 12582912.0f) & 0x007FFFFF) - 0x00400000; }

int clamped_int(float value, int low, int high) {
  if (!(value == value)) return 0;
  if (value <= static_cast<float>(low)) return low;
  if (value >= static_cast<float>(high)) return high;
  return static_cast<int>(value);
}

KOMPAKT_LANES float affine_search(int n, int largest, const float* x, const float* weights, const AffineGrid& grid, std::int8_t* codes, float* minimum) {
  return grid.absolute ? affine_search_lanes<true>(n, largest, x, weights, grid, codes, minimum) : affine_search_lanes<false>(n, largest, x, weights, grid, codes, minimum);
}

KOMPAKT_LANES float symmetric_search(int n, int half, const float* x, const float* weights, std::int8_t* codes) {
  float magnitude;
  const float maximum = signed_maximum(n, x, &magnitude);
  if (magnitude < tiny_group) {
    for (int i = 0; i < n; ++i) codes[i] = static_cast<std::int8_t>(-half);
    return 0;
  }
  Lanes inverse[3], xl[3] = {}, l2[3] = {};
  for (int part = 0; part < 3; ++part) {
    Lanes steps;
    KOMPAKT_LOAD(steps, symmetric_steps + 8 * part);
    inverse[part] = -(static_cast<float>(half) + steps) / maximum;
  }
  for (int i = 0; i < n; ++i) {
    const float w = weights ? weights[i] : x[i] * x[i], wx = w * x[i];
    for (int part = 0; part < 3; ++part) {
      Lanes code;
      code_lanes(inverse[part] * x[i], -half, half - 1, code);
      xl[part] += wx * code;
      l2[part] += w * code * code;
    }
  }
  float inverses[24], sums_xl[24], sums_l2[24];
  __builtin_memcpy(inverses, inverse, sizeof inverses);
  __builtin_memcpy(sums_xl, xl, sizeof sums_xl);
  __builtin_memcpy(sums_l2, l2, sizeof sums_l2);
  int chosen = 0;
  float scale = sums_l2[0] != 0 ? sums_xl[0] / sums_l2[0] : 0.0f, best = scale * sums_xl[0];
  for (int k = 1; k < symmetric_count; ++k)
    if (sums_l2[k] > 0 && sums_xl[k] * sums_xl[k] > best * sums_l2[k]) {
      chosen = k;
      scale = sums_xl[k] / sums_l2[k];
      best = scale * sums_xl[k];
    }
  write_codes(n, x, 0, inverses[chosen], -half, half - 1, codes);
  return scale;
}

KOMPAKT_LANES void symmetric_descent(int half, const float* x, std::int8_t* codes, float* scales) {
  constexpr int n = 16, octets = 2;  // a lane is a group; two chains of eight run beside each other, as each step waits for the one before
  const Lanes zero = {};
  float turned[octets][n][8];
  for (int o = 0; o < octets; ++o)
    for (int i = 0; i < n; ++i)
      for (int g = 0; g < 8; ++g) turned[o][i][g] = x[16 * (8 * o + g) + i];
  Lanes v[n][octets], wx[n][octets], w[n][octets], code[n][octets], magnitude[octets] = {}, maximum[octets] = {}, xl[octets] = {}, l2[octets] = {};
  for (int o = 0; o < octets; ++o) {
    for (int i = 0; i < n; ++i) {
      Lanes value;
      KOMPAKT_LOAD(value, turned[o][i]);
      const Lanes m = value < zero ? -value : value;
      maximum[o] = m > magnitude[o] ? value : maximum[o];
      magnitude[o] = m > magnitude[o] ? m : magnitude[o];
      v[i][o] = value, w[i][o] = value * value, wx[i][o] = value * value * value;
    }
    const Lanes inverse = static_cast<float>(-half) / maximum[o];
    for (int i = 0; i < n; ++i) {
      code_lanes(inverse * v[i][o], -half, half - 1, code[i][o]);
      xl[o] += wx[i][o] * code[i][o];
      l2[o] += w[i][o] * code[i][o] * code[i][o];
    }
  }
  for (int pass = 0; pass < 5; ++pass) {
    LaneMask changed = {};
    for (int i = 0; i < n; ++i) {
#pragma GCC unroll 2
      for (int o = 0; o < octets; ++o) {
        const Lanes old = code[i][o], value = v[i][o], weight = w[i][o], moment = wx[i][o];
        const Lanes rest_xl = xl[o] - moment * old, rest_l2 = l2[o] - weight * old * old;
        Lanes next;
        code_lanes(value * rest_l2 / rest_xl, -half, half - 1, next);
        const Lanes next_xl = rest_xl + moment * next, next_l2 = rest_l2 + weight * next * next;
        const LaneMask gain = (rest_xl > zero) & (next != old) & (next_l2 > zero) & (next_xl * next_xl * l2[o] > xl[o] * xl[o] * next_l2);
        code[i][o] = gain ? next : old;
        xl[o] = gain ? next_xl : xl[o];
        l2[o] = gain ? next_l2 : l2[o];
        changed |= gain;
      }
    }
    int any = 0;
    for (int g = 0; g < 8; ++g) any |= changed[g];
    if (!any) break;
  }
  for (int o = 0; o < octets; ++o)
    for (int g = 0; g < 8; ++g) {
      const int group = 8 * o + g;
      const bool empty = magnitude[o][g] < tiny_group;
      scales[group] = !empty && l2[o][g] > 0 ? xl[o][g] / l2[o][g] : 0.0f;
      for (int i = 0; i < n; ++i) codes[16 * group + i] = empty ? static_cast<std::int8_t>(-half) : static_cast<std::int8_t>(static_cast<int>(code[i][o][g]));
    }
}

KOMPAKT_LANES float positive_search(int n, int largest, const float* x, const float* weights, std::uint8_t* codes) {
  float maximum = 0;
  for (int i = 0; i < n; ++i) maximum = maximum < x[i] ? x[i] : maximum;
  if (maximum < tiny_group) {
    for (int i = 0; i < n; ++i) codes[i] = 0;
    return 0;
  }
  Lanes inverse[2], scale[2], error[2] = {};
  for (int part = 0; part < 2; ++part) {
    Lanes steps;
    KOMPAKT_LOAD(steps, positive_steps + 8 * part);
    inverse[part] = (steps + static_cast<float>(largest)) / maximum;
    scale[part] = 1 / inverse[part];
  }
  for (int i = 0; i < n; ++i)
    for (int part = 0; part < 2; ++part) {
      Lanes code;
      code_lanes(inverse[part] * x[i], 0, largest, code);
      const Lanes diff = x[i] - scale[part] * code;
      error[part] += weights[i] * diff * diff;
    }
  float inverses[16], errors[16];
  __builtin_memcpy(inverses, inverse, sizeof inverses);
  __builtin_memcpy(errors, error, sizeof errors);
  int chosen = 0;
  for (int k = 1; k < positive_count; ++k)
    if (errors[k] < errors[chosen]) chosen = k;
  Sums sums;
  for (int i = 0; i < n; ++i) {
    codes[i] = static_cast<std::uint8_t>(std::clamp(nearest_int(inverses[chosen] * x[i]), 0, largest));
    const float l = static_cast<float>(codes[i]);
    sums.xl += weights[i] * x[i] * l;
    sums.l2 += weights[i] * l * l;
  }
  for (int pass = 0; pass < 5; ++pass) {
    bool changed = false;
    for (int i = 0; i < n; ++i) {
      const float w = weights[i], old = static_cast<float>(codes[i]);
      Sums without{sums.xl - w * x[i] * old, sums.l2 - w * old * old};
      if (!(without.xl > 0 && without.l2 > 0)) continue;
      const int code = std::clamp(nearest_int(x[i] * without.l2 / without.xl), 0, largest);
      if (code == codes[i]) continue;
      const float l = static_cast<float>(code);
      without.xl += w * x[i] * l;
      without.l2 += w * l * l;
      if (without.xl * without.xl * sums.l2 > sums.xl * sums.xl * without.l2) {
        codes[i] = static_cast<std::uint8_t>(code);
        sums = without;
        changed = true;
      }
    }
    if (!changed) break;
  }
  return sums.l2 > 0 ? sums.xl / sums.l2 : 0.0f;
}

KOMPAKT_LANES void nearest_codes(int n, const float* x, float shift, float scale, int least, int largest, std::int8_t* codes) {
  for (int i = 0; i < n; i += 8) {
    Lanes v, code;
    KOMPAKT_LOAD(v, x + i);
    code_lanes((v + shift) / scale, least, largest, code);
    store_bytes(codes + i, code);
  }
}

}  // namespace kompakt::ggml_search
