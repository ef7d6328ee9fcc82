// Arithmetic of one weight, one group or one byte, shared by the CPU kernels and the CUDA kernels: the same functions give
// the same bits on both. No torch, no allocation; C++17 so that nvcc compiles it.
// Products and sums that must round twice are spelled with multiply_rounded/add_rounded: a device compiler would fuse them.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace kompakt::grid {

KOMPAKT_HD float multiply_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

KOMPAKT_HD float add_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

KOMPAKT_HD float divide_rounded(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

KOMPAKT_HD std::uint32_t float_bits(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

KOMPAKT_HD float bits_float(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Round half to even for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
KOMPAKT_HD float round_even(float x) {
  const float magic = 12582912.0f;
  return add_rounded(add_rounded(x, magic), -magic);
}

// ---- scales in half precision --------------------------------------------------------------------------------------

constexpr float smallest_normal_half = 6.103515625e-5f;      // 2^-14
constexpr float smallest_half = 5.9604644775390625e-8f;      // 2^-24, subnormal
constexpr float largest_half = 65504.0f;

// The nearest value of IEEE half, ties to even. Saturates at +-65504 instead of infinity; NaN stays NaN.
KOMPAKT_HD float round_to_half(float value) {
  const std::uint32_t bits = float_bits(value), sign = bits & 0x80000000u;
  std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return value;
  if (magnitude >= 0x477fe000u) return bits_float(sign | 0x477fe000u);
  if (magnitude < 0x38800000u) {  // subnormal halves are the multiples of 2^-24
    const float rounded = add_rounded(add_rounded(bits_float(magnitude), 0.5f), -0.5f);
    return bits_float(sign | float_bits(rounded));
  }
  magnitude += 0x0fffu + ((magnitude >> 13) & 1u);
  magnitude &= ~0x1fffu;
  if (magnitude > 0x477fe000u) magnitude = 0x477fe000u;
  return bits_float(sign | magnitude);
}

// Bits of a half whose value `value` already is (the result of round_to_half).
KOMPAKT_HD std::uint16_t half_bits(float value) {
  const std::uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu;
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude < 0x38800000u) return static_cast<std::uint16_t>(sign | static_cast<std::uint32_t>(multiply_rounded(bits_float(magnitude), 16777216.0f)));
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u) >> 13));
}

KOMPAKT_HD float half_value(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, mantissa = half & 1023u;
  if (exponent == 0) {
    const float magnitude = multiply_rounded(static_cast<float>(mantissa), smallest_half);
    return bits_float(sign | float_bits(magnitude));
  }
  if (exponent == 31) return bits_float(sign | 0x7f800000u | (mantissa << 13));
  return bits_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

// The nearest bfloat16, ties to even; NaN stays NaN.
KOMPAKT_HD float round_to_bfloat16(float value) {
  std::uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return value;
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return bits_float(bits & 0xffff0000u);
}

// A scale as it is stored: half, not smaller than `smallest` unless it is zero (sign kept). Rounded before codes are chosen.
KOMPAKT_HD float stored_scale(float scale, float smallest) {
  const float magnitude = scale < 0 ? -scale : scale;
  if (magnitude == 0.0f) return 0.0f;
  if (magnitude < smallest) return scale < 0 ? -smallest : smallest;
  return round_to_half(scale);
}

// ---- one weight ----------------------------------------------------------------------------------------------------

// 1 / scale, and 0 for a group of zeros, so that its codes become 0.
KOMPAKT_HD float inverse_scale(float scale) { return scale == 0.0f ? 0.0f : divide_rounded(1.0f, scale); }

// Nearest code in [low, high] of w = scale * code + offset. A NaN gives `low`.
KOMPAKT_HD float nearest_code(float w, float inverse, float offset, float low, float high) {
  float x = multiply_rounded(add_rounded(w, -offset), inverse);
  x = x > low ? x : low;
  x = x < high ? x : high;
  return round_even(x);
}

KOMPAKT_HD float decode_value(float code, float scale, float offset) { return add_rounded(multiply_rounded(scale, code), offset); }

// ---- one byte ------------------------------------------------------------------------------------------------------

// Five trits (0, 1, 2), first most significant, as the fraction q/243 in 8 bits: ceil(256 q / 243), as in ggml's TQ1_0.
KOMPAKT_HD std::uint8_t pack_trits(unsigned a, unsigned b, unsigned c, unsigned d, unsigned e) {
  const unsigned q = (((a * 3 + b) * 3 + c) * 3 + d) * 3 + e;
  return static_cast<std::uint8_t>((q * 256 + 242) / 243);
}

// Trit `n` (0..4) of a packed byte, without division.
KOMPAKT_HD unsigned unpack_trit(std::uint8_t byte, int n) {
  const unsigned power = n == 0 ? 1u : n == 1 ? 3u : n == 2 ? 9u : n == 3 ? 27u : 81u;
  return (((byte * power) & 255u) * 3u) >> 8;
}

// Code `k` of a little-endian string of codes of `bits` <= 8 bits each; reads at most two bytes, the second only when needed.
KOMPAKT_HD unsigned unpack_bits(const std::uint8_t* bytes, std::int64_t k, int bits) {
  const std::int64_t at = k * bits;
  const int shift = static_cast<int>(at & 7);
  unsigned word = bytes[at >> 3];
  if (shift + bits > 8) word |= static_cast<unsigned>(bytes[(at >> 3) + 1]) << 8;
  return (word >> shift) & ((1u << bits) - 1u);
}

}  // namespace kompakt::grid
