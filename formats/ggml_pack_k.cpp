// Byte layouts of the super-blocks of 256: Q2_K to Q6_K and IQ4_XS.

#include "formats/ggml_bits.h"
#include "formats/ggml_pack.h"

namespace kompakt {
namespace {

// Eight scales and eight minima of 6 bits in 12 bytes: the first four of each whole in bytes 0-3 and 4-7, whose two top bits
// take the high bits of the last four; their low nibbles share bytes 8-11.
void pack_six_bit_pairs(const std::uint8_t* scales, const std::uint8_t* mins, std::byte* out) {
  for (int j = 0; j < 4; ++j) {
    out[j] = static_cast<std::byte>(scales[j] | ((scales[j + 4] >> 4) << 6));
    out[j + 4] = static_cast<std::byte>(mins[j] | ((mins[j + 4] >> 4) << 6));
    out[j + 8] = static_cast<std::byte>((scales[j + 4] & 15) | ((mins[j + 4] & 15) << 4));
  }
}

void unpack_six_bit_pairs(const std::byte* in, std::uint8_t* scales, std::uint8_t* mins) {
  for (int j = 0; j < 4; ++j) {
    scales[j] = static_cast<std::uint8_t>(ggml_bits::bits(in[j]) & 63);
    mins[j] = static_cast<std::uint8_t>(ggml_bits::bits(in[j + 4]) & 63);
    scales[j + 4] = static_cast<std::uint8_t>((ggml_bits::bits(in[j + 8]) & 15) | ((ggml_bits::bits(in[j]) >> 6) << 4));
    mins[j + 4] = static_cast<std::uint8_t>((ggml_bits::bits(in[j + 8]) >> 4) | ((ggml_bits::bits(in[j + 4]) >> 6) << 4));
  }
}

}  // namespace

void pack_q2_k(const Q2KBlock& block, std::byte* out) {
  ggml_bits::check_range(block.codes, 256, 0, 3, "code of Q2_K");
  ggml_bits::check_range(block.scales, 16, 0, 15, "scale of Q2_K");
  ggml_bits::check_range(block.mins, 16, 0, 15, "minimum of Q2_K");
  for (int j = 0; j < 16; ++j) out[j] = static_cast<std::byte>(block.scales[j] | (block.mins[j] << 4));
  for (int half = 0; half < 2; ++half) ggml_bits::pack_planes(block.codes + 128 * half, 0, 0, out + 16 + 32 * half);
  ggml_bits::put_u16(block.d, out + 80);
  ggml_bits::put_u16(block.dmin, out + 82);
}

void unpack_q2_k(const std::byte* in, Q2KBlock& block) {
  for (int j = 0; j < 16; ++j) {
    block.scales[j] = static_cast<std::uint8_t>(ggml_bits::bits(in[j]) & 15);
    block.mins[j] = static_cast<std::uint8_t>(ggml_bits::bits(in[j]) >> 4);
  }
  for (int i = 0; i < 256; ++i) block.codes[i] = static_cast<std::int8_t>(ggml_bits::plane_value(in + 16 + 32 * (i / 128), i % 128));
  block.d = ggml_bits::get_u16(in + 80);
  block.dmin = ggml_bits::get_u16(in + 82);
}

void pack_q3_k(const Q3KBlock& block, std::byte* out) {
  ggml_bits::check_range(block.codes, 256, -4, 3, "code of Q3_K");
  ggml_bits::check_range(block.scales, 16, -32, 31, "scale of Q3_K");
  std::memset(out, 0, 110);
  // Code + 4 has three bits: the third goes to the mask (bit i / 32 of byte i % 32), the others to the planes.
  for (int i = 0; i < 256; ++i) out[i % 32] |= static_cast<std::byte>(((block.codes[i] + 4) >> 2) << (i / 32));
  for (int half = 0; half < 2; ++half) ggml_bits::pack_planes(block.codes + 128 * half, 4, 0, out + 32 + 32 * half);
  for (int j = 0; j < 16; ++j) {
    const unsigned scale = static_cast<unsigned>(block.scales[j] + 32);
    out[96 + j % 8] |= static_cast<std::byte>((scale & 15) << (j < 8 ? 0 : 4));
    out[104 + j % 4] |= static_cast<std::byte>((scale >> 4) << (2 * (j / 4)));
  }
  ggml_bits::put_u16(block.d, out + 108);
}

void unpack_q3_k(const std::byte* in, Q3KBlock& block) {
  for (int i = 0; i < 256; ++i) {
    const int high = static_cast<int>(ggml_bits::bits(in[i % 32]) >> (i / 32)) & 1;
    block.codes[i] = static_cast<std::int8_t>(ggml_bits::plane_value(in + 32 + 32 * (i / 128), i % 128) + 4 * high - 4);
  }
  for (int j = 0; j < 16; ++j) {
    const unsigned low = (ggml_bits::bits(in[96 + j % 8]) >> (j < 8 ? 0 : 4)) & 15, high = (ggml_bits::bits(in[104 + j % 4]) >> (2 * (j / 4))) & 3;
    block.scales[j] = static_cast<std::int8_t>(static_cast<int>(low | (high << 4)) - 32);
  }
  block.d = ggml_bits::get_u16(in + 108);
}

void pack_q4_k(const Q4KBlock& block, std::byte* out) {
  ggml_bits::check_range(block.codes, 256, 0, 15, "code of Q4_K");
  ggml_bits::check_range(block.scales, 8, 0, 63, "scale of Q4_K");
  ggml_bits::check_range(block.mins, 8, 0, 63, "minimum of Q4_K");
  ggml_bits::put_u16(block.d, out);
  ggml_bits::put_u16(block.dmin, out + 2);
  pack_six_bit_pairs(block.scales, block.mins, out + 4);
  for (int part = 0; part < 4; ++part) ggml_bits::pack_nibbles(block.codes + 64 * part, 32, 0, out + 16 + 32 * part);
}

void unpack_q4_k(const std::byte* in, Q4KBlock& block) {
  block.d = ggml_bits::get_u16(in);
  block.dmin = ggml_bits::get_u16(in + 2);
  unpack_six_bit_pairs(in + 4, block.scales, block.mins);
  for (int part = 0; part < 4; ++part) ggml_bits::unpack_nibbles(in + 16 + 32 * part, 32, 0, block.codes + 64 * part);
}

void pack_q5_k(const Q5KBlock& block, std::byte* out) {
  ggml_bits::check_range(block.codes, 256, 0, 31, "code of Q5_K");
  ggml_bits::check_range(block.scales, 8, 0, 63, "scale of Q5_K");
  ggml_bits::check_range(block.mins, 8, 0, 63, "minimum of Q5_K");
  ggml_bits::put_u16(block.d, out);
  ggml_bits::put_u16(block.dmin, out + 2);
  pack_six_bit_pairs(block.scales, block.mins, out + 4);
  std::memset(out + 16, 0, 32);
  for (int i = 0; i < 256; ++i) out[16 + i % 32] |= static_cast<std::byte>((block.codes[i] >> 4) << (i / 32));
  for (int part = 0; part < 4; ++part) ggml_bits::pack_nibbles(block.codes + 64 * part, 32, 0, out + 48 + 32 * part);
}

void unpack_q5_k(const std::byte* in, Q5KBlock& block) {
  block.d = ggml_bits::get_u16(in);
  block.dmin = ggml_bits::get_u16(in + 2);
  unpack_six_bit_pairs(in + 4, block.scales, block.mins);
  for (int part = 0; part < 4; ++part) ggml_bits::unpack_nibbles(in + 48 + 32 * part, 32, 0, block.codes + 64 * part);
  for (int i = 0; i < 256; ++i) block.codes[i] = static_cast<std::int8_t>(block.codes[i] | (static_cast<int>(ggml_bits::bits(in[16 + i % 32]) >> (i / 32)) & 1) << 4);
}

void pack_q6_k(const Q6KBlock& block, std::byte* out) {
  ggml_bits::check_range(block.codes, 256, -32, 31, "code of Q6_K");
  for (int half = 0; half < 2; ++half) {
    const std::int8_t* codes = block.codes + 128 * half;
    ggml_bits::pack_nibbles(codes, 64, 32, out + 64 * half);
    ggml_bits::pack_planes(codes, 32, 4, out + 128 + 32 * half);
  }
  std::memcpy(out + 192, block.scales, 16);
  ggml_bits::put_u16(block.d, out + 208);
}

void unpack_q6_k(const std::byte* in, Q6KBlock& block) {
  for (int half = 0; half < 2; ++half) {
    std::int8_t* codes = block.codes + 128 * half;
    ggml_bits::unpack_nibbles(in + 64 * half, 64, 32, codes);
    for (int i = 0; i < 128; ++i) codes[i] = static_cast<std::int8_t>(codes[i] + 16 * ggml_bits::plane_value(in + 128 + 32 * half, i));
  }
  std::memcpy(block.scales, in + 192, 16);
  block.d = ggml_bits::get_u16(in + 208);
}

void pack_iq4_xs(const Iq4XsBlock& block, std::byte* out) {
  ggml_bits::check_range(block.codes, 256, 0, 15, "code of IQ4_XS");
  ggml_bits::check_range(block.scales, 8, -32, 31, "scale of IQ4_XS");
  ggml_bits::put_u16(block.d, out);
  std::memset(out + 2, 0, 6);
  unsigned high = 0;
  for (int j = 0; j < 8; ++j) {
    const unsigned scale = static_cast<unsigned>(block.scales[j] + 32);
    high |= (scale >> 4) << (2 * j);
    out[4 + j / 2] |= static_cast<std::byte>((scale & 15) << (4 * (j % 2)));
    ggml_bits::pack_nibbles(block.codes + 32 * j, 16, 0, out + 8 + 16 * j);
  }
  ggml_bits::put_u16(static_cast<std::uint16_t>(high), out + 2);
}

void unpack_iq4_xs(const std::byte* in, Iq4XsBlock& block) {
  block.d = ggml_bits::get_u16(in);
  const unsigned high = ggml_bits::get_u16(in + 2);
  for (int j = 0; j < 8; ++j) {
    const unsigned low = (ggml_bits::bits(in[4 + j / 2]) >> (4 * (j % 2))) & 15;
    block.scales[j] = static_cast<std::int8_t>(static_cast<int>(low | ((high >> (2 * j)) & 3) << 4) - 32);
    ggml_bits::unpack_nibbles(in + 8 + 16 * j, 16, 0, block.codes + 32 * j);
  }
}

}  // namespace kompakt
