#include "quantize/vector_lanes.h"

namespace kompakt {

KOMPAKT_LANES void lanes_add(float* a, const float* b, float factor, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + lane_count <= n; i += lane_count) {
    Lanes x, y;
    KOMPAKT_LOAD(x, a + i);
    KOMPAKT_LOAD(y, b + i);
    x = x + y * factor;
    KOMPAKT_STORE(a + i, x);
  }
  for (; i < n; ++i) a[i] += b[i] * factor;
}

KOMPAKT_LANES double lanes_dot(const float* a, const float* b, std::int64_t n) {
  Lanes sum = {};
  std::int64_t i = 0;
  for (; i + lane_count <= n; i += lane_count) {
    Lanes x, y;
    KOMPAKT_LOAD(x, a + i);
    KOMPAKT_LOAD(y, b + i);
    sum = sum + x * y;
  }
  double out = sum_lanes(sum);
  for (; i < n; ++i) out += static_cast<double>(a[i]) * b[i];
  return out;
}

}  // namespace kompakt
