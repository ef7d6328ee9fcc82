// Whole vectors of a block's values and codes by the compiler's vector extension, in the baseline instruction set: what the
// encoders of blocks with one scale spend their time on. Element by element these are the operations of ggml's reference code.
// Internal to formats/ggml_*.cpp.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kompakt::ggml_lanes {

typedef float Floats __attribute__((vector_size(16)));
typedef std::int32_t Integers __attribute__((vector_size(16)));
typedef std::uint8_t Bytes __attribute__((vector_size(16)));

inline Floats load(const float* in) {
  Floats v;
  std::memcpy(&v, in, sizeof v);
  return v;
}

inline Bytes load(const void* in) {
  Bytes v;
  std::memcpy(&v, in, sizeof v);
  return v;
}

inline void store(const Bytes& v, void* out) { std::memcpy(out, &v, sizeof v); }

// Least and largest value of numbers. `count` is a multiple of 4.
inline void extremes(const float* in, int count, float& least, float& largest) {
  Floats low = load(in), high = low;
  for (int i = 4; i < count; i += 4) {
    const Floats v = load(in + i);
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  least = low[0], largest = high[0];
  for (int i = 1; i < 4; ++i) least = low[i] < least ? low[i] : least, largest = high[i] > largest ? high[i] : largest;
}

inline float largest_magnitude(const float* in, int count) {
  Floats high = {};
  for (int i = 0; i < count; i += 4) {
    const Floats v = load(in + i), m = v < 0 ? -v : v;
    high = m > high ? m : high;
  }
  float largest = 0;
  for (int i = 0; i < 4; ++i) largest = high[i] > largest ? high[i] : largest;
  return largest;
}

// Lanes to codes of a byte each, cut towards zero; `count` is a multiple of 16.
template <class Function>
inline void to_codes(const float* in, int count, std::int8_t* codes, const Function& value) {
  for (int i = 0; i < count; i += 16) {
    std::int16_t half[16];
    for (int part = 0; part < 4; ++part) {
      const Integers v = __builtin_convertvector(value(load(in + i + 4 * part)), Integers);
      for (int j = 0; j < 4; ++j) half[4 * part + j] = static_cast<std::int16_t>(v[j]);
    }
    for (int j = 0; j < 16; ++j) codes[i + j] = static_cast<std::int8_t>(half[j]);
  }
}

inline Floats clamped(const Floats& v, float low, float high) {
  const Floats bottom = Floats{} + low, top = Floats{} + high;
  const Floats above = v > bottom ? v : bottom;
  return above < top ? above : top;
}

// The whole number nearest to v, halves away from zero; |v| < 2^22.
inline Floats rounded_away(const Floats& v) {
  const Floats whole = __builtin_convertvector(__builtin_convertvector(v, Integers), Floats), rest = v - whole, one = Floats{} + 1.0f, none = {};
  return whole + (rest >= 0.5f ? one : none) - (rest <= -0.5f ? one : none);
}

}  // namespace kompakt::ggml_lanes
