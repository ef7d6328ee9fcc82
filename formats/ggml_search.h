// Searches for the scale (and minimum) of a group that the reference encoders of ggml make. Internal to formats/ggml_*.cpp.
// Byte-exactness rests on the order of the float operations: sums run forward, in float32, without contraction. Lanes hold eight
// candidates of one group, or one candidate of eight groups, so every sum keeps that order. n is 8, 16 or 32.
#pragma once

#include <cstdint>

namespace kompakt::ggml_search {

inline constexpr float tiny_group = 1e-15f;  // below this largest magnitude a group counts as zero

// Round half to even by the addition of 1.5 * 2^23. Any input, also infinite or NaN, gives some integer below 2^22.
int nearest_int(float value);

// Float to int for values that a subnormal scale may have blown up: NaN gives 0, the rest is clamped, then cut towards zero.
int clamped_int(float value, int low, int high);

// Grid of inverse scales tried by `affine_search`: (start + step * i + largest code) / (max - min), i = 0..steps.
struct AffineGrid {
  float start, step;
  int steps;
  bool absolute;  // error is |diff| instead of its square
};

// x ~ scale * code - minimum with codes 0..largest and minimum >= 0, weighted least squares on every step of the grid.
// Returns the scale.
float affine_search(int n, int largest, const float* x, const float* weights, const AffineGrid& grid, std::int8_t* codes, float* minimum);

// x ~ scale * code with codes -half..half-1, 19 inverse scales around -half / (signed maximum). Weights of nullptr mean x^2.
// Codes of an all-zero group are -half (ggml's choice). Returns the scale.
float symmetric_search(int n, int half, const float* x, const float* weights, std::int8_t* codes);

// The same without a grid, for the 16 groups of 16 of a super-block: up to five coordinate passes from the scale -half / (signed
// maximum), weights x^2. x and codes [256], scales [16].
void symmetric_descent(int half, const float* x, std::int8_t* codes, float* scales);

// Non-negative x ~ scale * code with codes 0..largest: nine inverse scales, then up to five coordinate passes.
float positive_search(int n, int largest, const float* x, const float* weights, std::uint8_t* codes);

// clamp(nearest_int((x + shift) / scale), least, largest)
void nearest_codes(int n, const float* x, float shift, float scale, int least, int largest, std::int8_t* codes);

}  // namespace kompakt::ggml_search
