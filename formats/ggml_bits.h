// Bit layouts that several block types share: halves, nibble pairs, planes of two bits. Internal to formats/ggml_*.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "formats/ggml_lanes.h"

namespace kompakt::ggml_bits {

inline void put_u16(std::uint16_t value, std::byte* out) { std::memcpy(out, &value, 2); }

inline std::uint16_t get_u16(const std::byte* in) {
  std::uint16_t value;
  std::memcpy(&value, in, 2);
  return value;
}

inline unsigned bits(std::byte value) { return std::to_integer<unsigned>(value); }

template <class T>
void check_range(const T* values, int count, int low, int high, const char* what) {
  int signs = 0;  // negative when one of the differences is; without branches, so that lanes are tested at once
  for (int i = 0; i < count; ++i) signs |= (values[i] - low) | (high - values[i]);
  if (signs < 0) throw std::logic_error(std::string("ggml block: ") + what + " out of range");
}

// `half` is a multiple of 16. Byte j holds codes[j] + offset in its low and codes[j + half] + offset in its high four bits; higher bits are cut off.
inline void pack_nibbles(const std::int8_t* codes, int half, int offset, std::byte* out) {
  const auto by = static_cast<std::uint8_t>(offset);
  for (int j = 0; j < half; j += 16) ggml_lanes::store(((ggml_lanes::load(static_cast<const void*>(codes + j)) + by) & 15) | (((ggml_lanes::load(static_cast<const void*>(codes + j + half)) + by) & 15) << 4), out + j);
}

inline void unpack_nibbles(const std::byte* in, int half, int offset, std::int8_t* codes) {
  for (int j = 0; j < half; ++j) {
    codes[j] = static_cast<std::int8_t>(static_cast<int>(bits(in[j]) & 15) - offset);
    codes[j + half] = static_cast<std::int8_t>(static_cast<int>(bits(in[j]) >> 4) - offset);
  }
}

// 128 values of two bits in 32 bytes: byte l holds the bits (value >> shift) & 3 of l, l+32, l+64, l+96 from low to high.
inline void pack_planes(const std::int8_t* codes, int offset, int shift, std::byte* out) {
  const auto by = static_cast<std::uint8_t>(offset);
  for (int l = 0; l < 32; l += 16) {
    ggml_lanes::Bytes byte = {};
    for (int k = 0; k < 4; ++k) byte |= (((ggml_lanes::load(static_cast<const void*>(codes + l + 32 * k)) + by) >> shift) & 3) << (2 * k);
    ggml_lanes::store(byte, out + l);
  }
}

// The two bits of value `index` (0..127) of such a plane.
inline int plane_value(const std::byte* in, int index) { return static_cast<int>(bits(in[index % 32]) >> (2 * (index / 32))) & 3; }

}  // namespace kompakt::ggml_bits
