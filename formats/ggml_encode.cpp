// Reference encoders of the blocks with one scale: the bytes of ggml's quantize_row_*_ref (four and five bits: ggml_encode_plain.cpp),
// and of its importance-weighted variants. The latter take the block's own mean square where ggml takes the row's: a block is all that is seen here.
#include <algorithm>
#include <cmath>

#include "formats/ggml_lanes.h"
#include "formats/ggml_pack.h"
#include "formats/ggml_rows.h"
#include "formats/ggml_search.h"
#include "formats/tensor_data.h"

namespace kompakt::ggml_rows {
namespace {

constexpr ggml_search::AffineGrid weighted_grid = {-0.9f, 0.05f, 36, false};

float inverse_or_zero(float d) { return d != 0 ? 1.0f / d : 0.0f; }

// round(w * inverse), half away from zero, within +-most.
template <int Count>
void away_codes(const float* in, float inverse, float most, std::int8_t* codes) {
  ggml_lanes::to_codes(in, Count, codes, [&](const ggml_lanes::Floats& v) {
    const ggml_lanes::Floats y = v * inverse;  // no number where a subnormal scale has no inverse: code 0
    return ggml_lanes::rounded_away(ggml_lanes::clamped(y == y ? y : ggml_lanes::Floats{}, -most, most));
  });
}

// Codes round(w / largest magnitude), half away from zero.
template <int Count, auto Pack>
void encode_by_magnitude(const float* in, std::byte* out) {
  const float d = ggml_lanes::largest_magnitude(in, Count), inverse = inverse_or_zero(d);
  std::int8_t codes[Count];
  away_codes<Count>(in, inverse, 1, codes);
  Pack(codes, float_to_half(d), out);
}

// importance * sqrt(mean square + w^2): a weight near zero still counts a little.
void block_weights(const float* in, const float* importance, float* weights) {
  float sum = 0;
  for (int i = 0; i < 32; ++i) sum += in[i] * in[i];
  const float mean = sum / 32;
  for (int i = 0; i < 32; ++i) weights[i] = importance[i] * std::sqrt(mean + in[i] * in[i]);
}

template <int Half, auto Pack>
void weigh_signed(const float* in, const float* importance, std::byte* out) {
  float weights[32];
  std::int8_t codes[32];
  block_weights(in, importance, weights);
  const float d = ggml_search::symmetric_search(32, Half, in, weights, codes);
  Pack(codes, float_to_half(d), out);
}

template <int Largest, auto Pack>
void weigh_affine(const float* in, const float* importance, std::byte* out) {
  float weights[32], minimum;
  std::int8_t codes[32];
  block_weights(in, importance, weights);
  const float d = ggml_search::affine_search(32, Largest, in, weights, weighted_grid, codes, &minimum);
  Pack(codes, float_to_half(d), float_to_half(-minimum), out);
}

}  // namespace

void encode_q8_0(const float* in, std::byte* out) {
  const float d = ggml_lanes::largest_magnitude(in, 32) / 127, inverse = inverse_or_zero(d);
  std::int8_t codes[32];
  away_codes<32>(in, inverse, 127, codes);
  pack_q8_0(codes, float_to_half(d), out);
}

void encode_tq1_0(const float* in, std::byte* out) { encode_by_magnitude<256, pack_tq1_0>(in, out); }
void encode_tq2_0(const float* in, std::byte* out) { encode_by_magnitude<256, pack_tq2_0>(in, out); }
void encode_q2_0(const float* in, std::byte* out) { encode_by_magnitude<64, pack_q2_0>(in, out); }

void weigh_q4_0(const float* in, const float* weight, std::byte* out) { weigh_signed<8, pack_q4_0>(in, weight, out); }
void weigh_q5_0(const float* in, const float* weight, std::byte* out) { weigh_signed<16, pack_q5_0>(in, weight, out); }
void weigh_q4_1(const float* in, const float* weight, std::byte* out) { weigh_affine<15, pack_q4_1>(in, weight, out); }
void weigh_q5_1(const float* in, const float* weight, std::byte* out) { weigh_affine<31, pack_q5_1>(in, weight, out); }

void encode_mxfp4(const float* in, std::byte* out) {
  const float largest = ggml_lanes::largest_magnitude(in, 32);
  // The largest value gets the exponent of 4 or 6, the two top values of E2M1.
  const int e = largest > 0 ? ggml_search::clamped_int(std::floor(std::log2(largest)) - 2 + 127, 0, 254) : 0;
  const float scale = mxfp4_scale(static_cast<std::uint8_t>(e));
  std::int8_t codes[32];
  // The magnitudes half way between two values; ggml takes the smaller of two equally near ones, and 0 for -0.
  static constexpr float middles[] = {0.5f, 1.5f, 2.5f, 3.5f, 5, 7, 10};
  ggml_lanes::to_codes(in, 32, codes, [&](const ggml_lanes::Floats& v) {
    const ggml_lanes::Floats m = v < 0 ? -v : v, none = {};
    ggml_lanes::Floats code = {};
    for (const float middle : middles) code += m > middle * scale ? none + 1.0f : none;
    return code + ((v < 0) & (code > 0) ? none + 8.0f : none);
  });
  pack_mxfp4(codes, static_cast<std::uint8_t>(e), out);
}

}  // namespace kompakt::ggml_rows
