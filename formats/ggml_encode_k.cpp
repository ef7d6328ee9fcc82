// Reference encoders of the super-blocks Q2_K to Q6_K, without and with importance (llama.cpp's imatrix), byte for byte.
// Each finds a scale (and minimum) per group, stores these on a few bits, then chooses the codes again for the stored ones.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "formats/ggml_pack.h"
#include "formats/ggml_rows.h"
#include "formats/ggml_search.h"
#include "formats/tensor_data.h"

namespace kompakt::ggml_rows {
namespace {

constexpr ggml_search::AffineGrid super_weighted_grid = {-0.9f, 0.05f, 36, false};

// sqrt(factor * mean square + w^2) * importance for one group; the mean is that of the super-block.
float super_weights(const float* in, const float* importance, int count, float mean_square, float* weights) {
  float sum = 0;
  for (int i = 0; i < count; ++i) {
    weights[i] = importance[i] * std::sqrt(mean_square + in[i] * in[i]);
    sum += weights[i];
  }
  return sum;
}

float sum_of_squares(const float* in, int count) {
  float sum = 0;
  for (int i = 0; i < count; ++i) sum += in[i] * in[i];
  return sum;
}

// What distinguishes Q2_K, Q4_K and Q5_K: group size, largest code, largest stored scale, grid and weights without importance.
template <class Block>
struct AffineKind {
  int group, largest, most;
  ggml_search::AffineGrid grid;
  bool mean_in_weight;  // |w| + root mean square of the group, else |w|
  float mean_factor;    // with importance
  void (*pack)(const Block&, std::byte*);
};

constexpr AffineKind<Q2KBlock> kind_q2_k = {16, 3, 15, {-0.5f, 0.1f, 15, true}, false, 1, pack_q2_k};
constexpr AffineKind<Q4KBlock> kind_q4_k = {32, 15, 63, {-1.0f, 0.1f, 20, false}, true, 2, pack_q4_k};
constexpr AffineKind<Q5KBlock> kind_q5_k = {32, 31, 63, {-0.5f, 0.1f, 15, false}, true, 2, pack_q5_k};

// Codes for the stored scales and minima. A group whose scale is stored as zero keeps the codes of the search.
template <class Block>
void recode_affine(const AffineKind<Block>& kind, const float* in, Block& block) {
  for (int j = 0; j < 256 / kind.group; ++j) {
    const float scale = half_to_float(block.d) * static_cast<float>(block.scales[j]);
    if (scale == 0) continue;
    const float minimum = half_to_float(block.dmin) * static_cast<float>(block.mins[j]);
    ggml_search::nearest_codes(kind.group, in + kind.group * j, minimum, scale, 0, kind.largest, block.codes + kind.group * j);
  }
}

std::uint16_t store_by_largest(const float* values, int count, int most, std::uint8_t* stored) {
  float largest = 0;
  for (int j = 0; j < count; ++j) largest = std::max(largest, values[j]);
  const float inverse = largest > 0 ? static_cast<float>(most) / largest : 0.0f;
  for (int j = 0; j < count; ++j) stored[j] = static_cast<std::uint8_t>(std::clamp(ggml_search::nearest_int(inverse * values[j]), 0, most));
  return float_to_half(largest / static_cast<float>(most));
}

template <class Block>
void encode_super_affine(const AffineKind<Block>& kind, const float* in, std::byte* out) {
  Block block;
  float scales[16], mins[16], weights[32];
  const int groups = 256 / kind.group;
  for (int j = 0; j < groups; ++j) {
    const float* x = in + kind.group * j;
    const float mean = kind.mean_in_weight ? std::sqrt(sum_of_squares(x, kind.group) / static_cast<float>(kind.group)) : 0.0f;
    for (int i = 0; i < kind.group; ++i) weights[i] = mean + std::fabs(x[i]);
    scales[j] = ggml_search::affine_search(kind.group, kind.largest, x, weights, kind.grid, block.codes + kind.group * j, &mins[j]);
  }
  block.d = store_by_largest(scales, groups, kind.most, block.scales);
  block.dmin = store_by_largest(mins, groups, kind.most, block.mins);
  recode_affine(kind, in, block);
  kind.pack(block, out);
}

template <class Block>
void weigh_super_affine(const AffineKind<Block>& kind, const float* in, const float* importance, std::byte* out) {
  Block block;
  float scales[16], mins[16], sums[16], weights[32];
  const int groups = 256 / kind.group;
  const float mean_square = kind.mean_factor * sum_of_squares(in, 256) / 256;
  for (int j = 0; j < groups; ++j) {
    const int first = kind.group * j;
    sums[j] = super_weights(in + first, importance + first, kind.group, mean_square, weights);
    scales[j] = ggml_search::affine_search(kind.group, kind.largest, in + first, weights, super_weighted_grid, block.codes + first, &mins[j]);
  }
  block.d = float_to_half(ggml_search::positive_search(groups, kind.most, scales, sums, block.scales));
  block.dmin = float_to_half(ggml_search::positive_search(groups, kind.most, mins, sums, block.mins));
  recode_affine(kind, in, block);
  kind.pack(block, out);
}

// The scale of largest magnitude is stored as -most; returns that scale. `most` is 32 or 128.
float store_signed(const float* scales, int most, std::int8_t* stored, std::uint16_t* d) {
  float magnitude = 0, maximum = 0;
  for (int j = 0; j < 16; ++j)
    if (std::fabs(scales[j]) > magnitude) {
      magnitude = std::fabs(scales[j]);
      maximum = scales[j];
    }
  const float inverse = maximum != 0 ? static_cast<float>(-most) / maximum : 0.0f;
  for (int j = 0; j < 16; ++j) stored[j] = static_cast<std::int8_t>(std::clamp(ggml_search::nearest_int(inverse * scales[j]), -most, most - 1));
  *d = float_to_half(maximum != 0 ? 1 / inverse : 0.0f);
  return maximum;
}

template <class Block>
void recode_signed(const float* in, int half, Block& block) {
  for (int j = 0; j < 16; ++j) {
    const float scale = half_to_float(block.d) * static_cast<float>(block.scales[j]);
    if (scale == 0) continue;
    ggml_search::nearest_codes(16, in + 16 * j, 0, scale, -half, half - 1, block.codes + 16 * j);
  }
}

// `importance` may be nullptr: weights w^2.
void encode_q6(const float* in, const float* importance, std::byte* out) {
  Q6KBlock block;
  float scales[16];
  for (int j = 0; j < 16; ++j) scales[j] = ggml_search::symmetric_search(16, 32, in + 16 * j, importance ? importance + 16 * j : nullptr, block.codes + 16 * j);
  if (std::fabs(store_signed(scales, 128, block.scales, &block.d)) < ggml_search::tiny_group) {
    std::memset(out, 0, 210);
    return;
  }
  recode_signed(in, 32, block);
  pack_q6_k(block, out);
}

}  // namespace

void encode_q2_k(const float* in, std::byte* out) { encode_super_affine(kind_q2_k, in, out); }
void encode_q4_k(const float* in, std::byte* out) { encode_super_affine(kind_q4_k, in, out); }
void encode_q5_k(const float* in, std::byte* out) { encode_super_affine(kind_q5_k, in, out); }
void encode_q6_k(const float* in, std::byte* out) { encode_q6(in, nullptr, out); }

void weigh_q2_k(const float* in, const float* weight, std::byte* out) { weigh_super_affine(kind_q2_k, in, weight, out); }
void weigh_q4_k(const float* in, const float* weight, std::byte* out) { weigh_super_affine(kind_q4_k, in, weight, out); }
void weigh_q5_k(const float* in, const float* weight, std::byte* out) { weigh_super_affine(kind_q5_k, in, weight, out); }
void weigh_q6_k(const float* in, const float* weight, std::byte* out) { encode_q6(in, weight, out); }

void encode_q3_k(const float* in, std::byte* out) {
  Q3KBlock block;
  float scales[16];
  ggml_search::symmetric_descent(4, in, block.codes, scales);
  if (store_signed(scales, 32, block.scales, &block.d) == 0) std::fill(block.scales, block.scales + 16, std::int8_t{-32});  // ggml leaves the scale bytes at zero
  recode_signed(in, 4, block);
  pack_q3_k(block, out);
}

void weigh_q3_k(const float* in, const float* weight, std::byte* out) {
  Q3KBlock block;
  float scales[16], sums[16], weights[16];
  const float mean_square = 2 * sum_of_squares(in, 256) / 256;
  for (int j = 0; j < 16; ++j) {
    sums[j] = super_weights(in + 16 * j, weight + 16 * j, 16, mean_square, weights);
    scales[j] = ggml_search::symmetric_search(16, 4, in + 16 * j, weights, block.codes + 16 * j);
  }
  block.d = float_to_half(ggml_search::symmetric_search(16, 32, scales, sums, block.scales));
  recode_signed(in, 4, block);
  pack_q3_k(block, out);
}

}  // namespace kompakt::ggml_rows
