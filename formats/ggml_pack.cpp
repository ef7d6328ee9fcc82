// Byte layouts of the legacy and ternary blocks.
#include "formats/ggml_pack.h"

#include <bit>
#include <string>

#include "formats/ggml_bits.h"
#include "formats/ggml_lanes.h"

namespace kompakt {
namespace {

// Bit j of the 32-bit word is the fifth bit of code j.
void pack_fifth_bits(const std::int8_t* codes, int offset, std::byte* out) {
  for (int part = 0; part < 4; ++part) {
    std::uint64_t eight;
    std::uint8_t bits[8];
    for (int j = 0; j < 8; ++j) bits[j] = static_cast<std::uint8_t>(((codes[8 * part + j] + offset) >> 4) & 1);
    std::memcpy(&eight, bits, 8);
    out[part] = static_cast<std::byte>((eight * 0x0102040810204080ull) >> 56);  // byte j to bit j
  }
}

void unpack_fifth_bits(const std::byte* in, std::int8_t* codes) {
  std::uint32_t word;
  std::memcpy(&word, in, 4);
  for (int j = 0; j < 32; ++j) codes[j] = static_cast<std::int8_t>(codes[j] + static_cast<int>((word >> j) & 1) * 16);
}

// TQ1_0 is three runs of bytes; in each, digit n of byte m is element first + m + n * bytes, most significant digit first.
struct TritRun {
  int offset, bytes, first, digits;
};
constexpr TritRun trit_runs[] = {{0, 32, 0, 5}, {32, 16, 160, 5}, {48, 4, 240, 4}};

}  // namespace

void pack_q8_0(const std::int8_t* codes, std::uint16_t d, std::byte* out) {
  ggml_bits::put_u16(d, out);
  std::memcpy(out + 2, codes, 32);
}

void unpack_q8_0(const std::byte* in, std::int8_t* codes, std::uint16_t* d) {
  *d = ggml_bits::get_u16(in);
  std::memcpy(codes, in + 2, 32);
}

void pack_q4_0(const std::int8_t* codes, std::uint16_t d, std::byte* out) {
  ggml_bits::check_range(codes, 32, -8, 7, "code of Q4_0");
  ggml_bits::put_u16(d, out);
  ggml_bits::pack_nibbles(codes, 16, 8, out + 2);
}

void unpack_q4_0(const std::byte* in, std::int8_t* codes, std::uint16_t* d) {
  *d = ggml_bits::get_u16(in);
  ggml_bits::unpack_nibbles(in + 2, 16, 8, codes);
}

void pack_q4_1(const std::int8_t* codes, std::uint16_t d, std::uint16_t m, std::byte* out) {
  ggml_bits::check_range(codes, 32, 0, 15, "code of Q4_1");
  ggml_bits::put_u16(d, out);
  ggml_bits::put_u16(m, out + 2);
  ggml_bits::pack_nibbles(codes, 16, 0, out + 4);
}

void unpack_q4_1(const std::byte* in, std::int8_t* codes, std::uint16_t* d, std::uint16_t* m) {
  *d = ggml_bits::get_u16(in);
  *m = ggml_bits::get_u16(in + 2);
  ggml_bits::unpack_nibbles(in + 4, 16, 0, codes);
}

void pack_q5_0(const std::int8_t* codes, std::uint16_t d, std::byte* out) {
  ggml_bits::check_range(codes, 32, -16, 15, "code of Q5_0");
  ggml_bits::put_u16(d, out);
  pack_fifth_bits(codes, 16, out + 2);
  ggml_bits::pack_nibbles(codes, 16, 16, out + 6);
}

void unpack_q5_0(const std::byte* in, std::int8_t* codes, std::uint16_t* d) {
  *d = ggml_bits::get_u16(in);
  ggml_bits::unpack_nibbles(in + 6, 16, 16, codes);
  unpack_fifth_bits(in + 2, codes);
}

void pack_q5_1(const std::int8_t* codes, std::uint16_t d, std::uint16_t m, std::byte* out) {
  ggml_bits::check_range(codes, 32, 0, 31, "code of Q5_1");
  ggml_bits::put_u16(d, out);
  ggml_bits::put_u16(m, out + 2);
  pack_fifth_bits(codes, 0, out + 4);
  ggml_bits::pack_nibbles(codes, 16, 0, out + 8);
}

void unpack_q5_1(const std::byte* in, std::int8_t* codes, std::uint16_t* d, std::uint16_t* m) {
  *d = ggml_bits::get_u16(in);
  *m = ggml_bits::get_u16(in + 2);
  ggml_bits::unpack_nibbles(in + 8, 16, 0, codes);
  unpack_fifth_bits(in + 4, codes);
}

void pack_iq4_nl(const std::int8_t* codes, std::uint16_t d, std::byte* out) {
  ggml_bits::check_range(codes, 32, 0, 15, "code of IQ4_NL");
  ggml_bits::put_u16(d, out);
  ggml_bits::pack_nibbles(codes, 16, 0, out + 2);
}

void unpack_iq4_nl(const std::byte* in, std::int8_t* codes, std::uint16_t* d) {
  *d = ggml_bits::get_u16(in);
  ggml_bits::unpack_nibbles(in + 2, 16, 0, codes);
}

void pack_mxfp4(const std::int8_t* codes, std::uint8_t e, std::byte* out) {
  ggml_bits::check_range(codes, 32, 0, 15, "code of MXFP4");
  out[0] = static_cast<std::byte>(e);
  ggml_bits::pack_nibbles(codes, 16, 0, out + 1);
}

void unpack_mxfp4(const std::byte* in, std::int8_t* codes, std::uint8_t* e) {
  *e = static_cast<std::uint8_t>(ggml_bits::bits(in[0]));
  ggml_bits::unpack_nibbles(in + 1, 16, 0, codes);
}

float mxfp4_scale(std::uint8_t e) {
  // e = 0 and 1 are subnormal; the others have the exponent field e - 1.
  return std::bit_cast<float>(e < 2 ? 0x00200000u << e : static_cast<std::uint32_t>(e - 1) << 23);
}

void pack_tq1_0(const std::int8_t* codes, std::uint16_t d, std::byte* out) {
  ggml_bits::check_range(codes, 256, -1, 1, "code of TQ1_0");
  std::uint8_t numbers[64];
  for (int m = 0; m < 48; m += 16) {  // the first two runs
    const TritRun& run = trit_runs[m / 32];
    ggml_lanes::Bytes number = {};
    for (int n = 0; n < 5; ++n) number = number + number + number + (ggml_lanes::load(static_cast<const void*>(codes + run.first + m - run.offset + n * run.bytes)) + 1);
    ggml_lanes::store(number, numbers + m);
  }
  for (int m = 0; m < 4; ++m) {
    unsigned number = 0;
    for (int n = 0; n < 4; ++n) number = number * 3 + static_cast<unsigned>(codes[240 + m + 4 * n] + 1);
    numbers[48 + m] = static_cast<std::uint8_t>(number * 3);
  }
  for (int m = 0; m < 52; ++m) out[m] = static_cast<std::byte>((numbers[m] * 256u + 242u) / 243u);  // fixed point in base 3, rounded up
  ggml_bits::put_u16(d, out + 52);
}

void unpack_tq1_0(const std::byte* in, std::int8_t* codes, std::uint16_t* d) {
  for (const TritRun& run : trit_runs)
    for (int m = 0; m < run.bytes; ++m) {
      unsigned rest = ggml_bits::bits(in[run.offset + m]);
      for (int n = 0; n < run.digits; ++n) {
        rest *= 3;  // the next digit moves above the point
        codes[run.first + m + n * run.bytes] = static_cast<std::int8_t>(static_cast<int>(rest >> 8) - 1);
        rest &= 255;
      }
    }
  *d = ggml_bits::get_u16(in + 52);
}

void pack_tq2_0(const std::int8_t* codes, std::uint16_t d, std::byte* out) {
  ggml_bits::check_range(codes, 256, -1, 2, "code of TQ2_0");
  for (int half = 0; half < 2; ++half) ggml_bits::pack_planes(codes + 128 * half, 1, 0, out + 32 * half);
  ggml_bits::put_u16(d, out + 64);
}

void unpack_tq2_0(const std::byte* in, std::int8_t* codes, std::uint16_t* d) {
  for (int i = 0; i < 256; ++i) codes[i] = static_cast<std::int8_t>(ggml_bits::plane_value(in + 32 * (i / 128), i % 128) - 1);
  *d = ggml_bits::get_u16(in + 64);
}

void pack_q2_0(const std::int8_t* codes, std::uint16_t d, std::byte* out) {
  ggml_bits::check_range(codes, 64, -1, 2, "code of Q2_0");
  ggml_bits::put_u16(d, out);
  std::uint32_t words[16];
  for (int i = 0; i < 64; i += 16) ggml_lanes::store(ggml_lanes::load(static_cast<const void*>(codes + i)) + 1, reinterpret_cast<std::uint8_t*>(words) + i);
  for (int j = 0; j < 16; ++j) out[2 + j] = static_cast<std::byte>(words[j] | (words[j] >> 6) | (words[j] >> 12) | (words[j] >> 18));
}

void unpack_q2_0(const std::byte* in, std::int8_t* codes, std::uint16_t* d) {
  *d = ggml_bits::get_u16(in);
  for (int i = 0; i < 64; ++i) codes[i] = static_cast<std::int8_t>(static_cast<int>((ggml_bits::bits(in[2 + i / 4]) >> (2 * (i % 4))) & 3) - 1);
}

}  // namespace kompakt
