// Reference encoders of the four- and five-bit blocks of 32 without importance: the bytes of ggml's quantize_row_*_ref, written
// from vectors of eight codes.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/lanes.h"
#include "formats/ggml_bits.h"
#include "formats/ggml_rows.h"
#include "formats/tensor_data.h"

namespace kompakt::ggml_rows {
namespace {

typedef std::uint8_t PlainBytes __attribute__((vector_size(32)));

KOMPAKT_INLINE void plain_load(const float* in, Lanes (&v)[4]) {
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    Lanes lanes;  // a load to an element of an array goes through memory, in halves
    KOMPAKT_LOAD(lanes, in + 8 * k);
    v[k] = lanes;
  }
}

// Least and largest of 32 numbers in every lane; which of two equal zeros is not said.
KOMPAKT_INLINE void plain_extremes(const Lanes (&v)[4], Lanes& low, Lanes& high) {
  const Lanes low_a = v[0] < v[1] ? v[0] : v[1], low_b = v[2] < v[3] ? v[2] : v[3], high_a = v[0] > v[1] ? v[0] : v[1], high_b = v[2] > v[3] ? v[2] : v[3];
  low = low_a < low_b ? low_a : low_b, high = high_a > high_b ? high_a : high_b;
  for (int by = 4; by > 0; by /= 2) {
    LaneMask other = {0, 1, 2, 3, 4, 5, 6, 7};
    other ^= by;
    const Lanes l = __builtin_shuffle(low, other), h = __builtin_shuffle(high, other);
    low = l < low ? l : low;
    high = h > high ? h : high;
  }
}

// Four bits of codes j and j + 16 to byte j; where `five`, the fifth bit of code j to bit j of a word before them.
template <bool five>
KOMPAKT_INLINE void plain_store(const LaneMask (&code)[4], std::byte* out) {
  if constexpr (five) {
    const LaneMask lane = {0, 1, 2, 3, 4, 5, 6, 7};
    LaneMask word = {};
    for (int k = 0; k < 4; ++k) word |= ((code[k] >> 4) & 1) << (lane + 8 * k);
    for (int by = 4; by > 0; by /= 2) word |= __builtin_shuffle(word, lane ^ by);
    const std::int32_t bits = word[0];
    std::memcpy(out, &bits, 4);
    out += 4;
  }
  // Bytes j and j + 8 of a lane j, then in their order.
  const LaneMask pairs = (code[0] & 15) | ((code[2] & 15) << 4) | ((code[1] & 15) << 8) | ((code[3] & 15) << 12);
  PlainBytes bytes;
  __builtin_memcpy(&bytes, &pairs, sizeof bytes);
  const PlainBytes front = __builtin_shuffle(bytes, PlainBytes{0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29});
  __builtin_memcpy(out, &front, 16);
}

// v * inverse + shift within 0..most, cut towards zero. What is no number gives 0.
KOMPAKT_INLINE void plain_codes(const Lanes& v, const Lanes& inverse, float shift, float most, LaneMask& code) {
  const Lanes bottom = {}, y = v * inverse + shift;
  Lanes top = {};
  top += most;
  const Lanes above = y > bottom ? y : bottom;
  code = __builtin_convertvector(above < top ? above : top, LaneMask);
}

// The value of largest magnitude becomes the code -half; the others are rounded by adding half a step and cutting. All in lanes:
// a branch on the sign of the largest would be missed every second time.
template <int half>
KOMPAKT_INLINE void plain_signed(const float* in, std::byte* out) {
  const Lanes zero = {};
  Lanes v[4], low, high;
  LaneMask code[4];
  plain_load(in, v);
  plain_extremes(v, low, high);
  Lanes maximum = high > -low ? high : low;
  if (high[0] == -low[0]) maximum = zero + (high[0] == 0 ? 0.0f : *std::find_if(in, in + 32, [h = high[0]](float x) { return std::fabs(x) == h; }));  // the first of equals
  const Lanes d = maximum * (-1.0f / half), inverse = d != zero ? 1.0f / d : zero;
  for (int k = 0; k < 4; ++k) plain_codes(v[k], inverse, half + 0.5f, 2 * half - 1, code[k]);
  plain_store<half == 16>(code, out + 2);
  ggml_bits::put_u16(float_to_half(d[0]), out);
}

template <int largest>
KOMPAKT_INLINE void plain_affine(const float* in, std::byte* out) {
  const Lanes zero = {};
  Lanes v[4], low, high;
  LaneMask code[4];
  plain_load(in, v);
  plain_extremes(v, low, high);
  if (low[0] == 0) {  // the first of zeros gives the sign
    const float first = *std::find(in, in + 32, 0.0f);
    for (int i = 0; i < 8; ++i) low[i] = first, high[i] = high[i] == 0 ? first : high[i];
  }
  const Lanes d = (high - low) / static_cast<float>(largest), inverse = d != zero ? 1.0f / d : zero;
  for (int k = 0; k < 4; ++k) plain_codes(v[k] - low, inverse, 0.5f, largest, code[k]);
  plain_store<largest == 31>(code, out + 4);
  const float scale = d[0], minimum = low[0];
  ggml_bits::put_u16(float_to_half(scale), out);
  ggml_bits::put_u16(float_to_half(minimum), out + 2);
}

}  // namespace

KOMPAKT_LANES void encode_q4_0(const float* in, std::byte* out) { plain_signed<8>(in, out); }
KOMPAKT_LANES void encode_q5_0(const float* in, std::byte* out) { plain_signed<16>(in, out); }
KOMPAKT_LANES void encode_q4_1(const float* in, std::byte* out) { plain_affine<15>(in, out); }
KOMPAKT_LANES void encode_q5_1(const float* in, std::byte* out) { plain_affine<31>(in, out); }

}  // namespace kompakt::ggml_rows
