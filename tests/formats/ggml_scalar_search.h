// The searches of formats/ggml_search.h as ggml writes them, one value after the other: what the lanes are held against.
#pragma once

#include <algorithm>
#include <cmath>

#include "formats/ggml_search.h"

namespace kompakt::ggml_search::scalar {

inline constexpr int most_codes = 32;  // the largest group

// The element of largest magnitude, with its sign; the first one of equals.
inline float signed_maximum(int n, const float* x, float* magnitude) {
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

// Codes for one inverse scale, and their weighted sums.
inline Sums symmetric_try(int n, int half, const float* x, const float* weights, float inverse, std::int8_t* codes) {
  Sums sums;
  for (int i = 0; i < n; ++i) {
    const int code = std::clamp(nearest_int(inverse * x[i]), -half, half - 1);
    codes[i] = static_cast<std::int8_t>(code);
    const float w = weights ? weights[i] : x[i] * x[i], l = static_cast<float>(code);
    sums.xl += w * x[i] * l;
    sums.l2 += w * l * l;
  }
  return sums;
}

inline float affine_error(int n, const float* x, const float* weights, float scale, float minimum, bool absolute, const std::int8_t* codes) {
  float error = 0;
  for (int i = 0; i < n; ++i) {
    const float diff = scale * static_cast<float>(codes[i]) + minimum - x[i];
    error += weights[i] * (absolute ? std::fabs(diff) : diff * diff);
  }
  return error;
}

inline float scalar_affine_search(int n, int largest, const float* x, const float* weights, const AffineGrid& grid, std::int8_t* codes, float* minimum) {
  float low = x[0], high = x[0], sum_w = weights[0], sum_x = sum_w * x[0];
  for (int i = 1; i < n; ++i) {
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
    sum_w += weights[i];
    sum_x += weights[i] * x[i];
  }
  if (low > 0) low = 0;
  if (high <= low) {
    std::fill(codes, codes + n, std::int8_t{0});
    *minimum = -low;
    return 0;
  }
  const float span = high - low, most = static_cast<float>(largest);
  float inverse = most / span, best_scale = 1 / inverse, best_low = low;
  for (int i = 0; i < n; ++i) codes[i] = static_cast<std::int8_t>(std::clamp(nearest_int(inverse * (x[i] - low)), 0, largest));
  float best_error = affine_error(n, x, weights, best_scale, low, grid.absolute, codes);
  // ggml measures the codes of every later step from the minimum found so far.
  for (int step = 0; step <= grid.steps; ++step) {
    inverse = (grid.start + grid.step * static_cast<float>(step) + most) / (high - best_low);
    std::int8_t tried[most_codes];
    float sum_l = 0, sum_l2 = 0, sum_xl = 0;
    for (int i = 0; i < n; ++i) {
      const int code = std::clamp(nearest_int(inverse * (x[i] - best_low)), 0, largest);
      tried[i] = static_cast<std::int8_t>(code);
      const float w = weights[i], l = static_cast<float>(code);
      sum_l += w * l;
      sum_l2 += w * l * l;
      sum_xl += w * l * x[i];
    }
    const float determinant = sum_w * sum_l2 - sum_l * sum_l;
    if (!(determinant > 0)) continue;
    float scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
    float offset = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
    if (offset > 0) {
      offset = 0;
      scale = sum_xl / sum_l2;
    }
    const float error = affine_error(n, x, weights, scale, offset, grid.absolute, tried);
    if (!(error < best_error)) continue;
    std::copy(tried, tried + n, codes);
    best_error = error;
    best_scale = scale;
    best_low = offset;
  }
  *minimum = -best_low;
  return best_scale;
}

inline float scalar_symmetric_search(int n, int half, const float* x, const float* weights, std::int8_t* codes) {
  float magnitude;
  const float maximum = signed_maximum(n, x, &magnitude);
  if (magnitude < tiny_group) {
    std::fill(codes, codes + n, static_cast<std::int8_t>(-half));
    return 0;
  }
  const Sums first = symmetric_try(n, half, x, weights, static_cast<float>(-half) / maximum, codes);
  float scale = first.l2 != 0 ? first.xl / first.l2 : 0.0f, best = scale * first.xl;
  for (int step = -9; step <= 9; ++step) {
    if (step == 0) continue;
    std::int8_t tried[most_codes];
    const Sums sums = symmetric_try(n, half, x, weights, -(static_cast<float>(half) + 0.1f * static_cast<float>(step)) / maximum, tried);
    if (sums.l2 > 0 && sums.xl * sums.xl > best * sums.l2) {
      std::copy(tried, tried + n, codes);
      scale = sums.xl / sums.l2;
      best = scale * sums.xl;
    }
  }
  return scale;
}

inline float scalar_symmetric_descent(int n, int half, const float* x, std::int8_t* codes) {
  float magnitude;
  const float maximum = signed_maximum(n, x, &magnitude);
  if (magnitude < tiny_group) {
    std::fill(codes, codes + n, static_cast<std::int8_t>(-half));
    return 0;
  }
  Sums sums = symmetric_try(n, half, x, nullptr, static_cast<float>(-half) / maximum, codes);
  for (int pass = 0; pass < 5; ++pass) {
    bool changed = false;
    for (int i = 0; i < n; ++i) {
      const float w = x[i] * x[i], old = static_cast<float>(codes[i]);
      Sums without{sums.xl - w * x[i] * old, 0};
      if (!(without.xl > 0)) continue;
      without.l2 = sums.l2 - w * old * old;
      const int code = std::clamp(nearest_int(x[i] * without.l2 / without.xl), -half, half - 1);
      if (code == codes[i]) continue;
      const float l = static_cast<float>(code);
      without.xl += w * x[i] * l;
      without.l2 += w * l * l;
      if (without.l2 > 0 && without.xl * without.xl * sums.l2 > sums.xl * sums.xl * without.l2) {
        codes[i] = static_cast<std::int8_t>(code);
        sums = without;
        changed = true;
      }
    }
    if (!changed) break;
  }
  return sums.l2 > 0 ? sums.xl / sums.l2 : 0.0f;
}

inline float scalar_positive_search(int n, int largest, const float* x, const float* weights, std::uint8_t* codes) {
  float maximum = 0;
  for (int i = 0; i < n; ++i) maximum = std::max(maximum, x[i]);
  if (maximum < tiny_group) {
    std::fill(codes, codes + n, std::uint8_t{0});
    return 0;
  }
  const auto code_of = [&](float inverse, float value) { return std::clamp(nearest_int(inverse * value), 0, largest); };
  const auto error_of = [&](float inverse) {
    const float scale = 1 / inverse;
    float error = 0;
    for (int i = 0; i < n; ++i) {
      const float diff = x[i] - scale * static_cast<float>(code_of(inverse, x[i]));
      error += weights[i] * diff * diff;
    }
    return error;
  };
  float inverse = static_cast<float>(largest) / maximum, best_error = error_of(inverse);
  for (int step = -4; step <= 4; ++step) {
    if (step == 0) continue;
    const float tried = (0.1f * static_cast<float>(step) + static_cast<float>(largest)) / maximum, error = error_of(tried);
    if (error < best_error) {
      best_error = error;
      inverse = tried;
    }
  }
  Sums sums;
  for (int i = 0; i < n; ++i) {
    codes[i] = static_cast<std::uint8_t>(code_of(inverse, x[i]));
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

}  // namespace kompakt::ggml_search::scalar
