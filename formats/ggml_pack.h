// Codes and scales of ggml's blocks to bytes and back, one pair of pure functions per type; no arithmetic on weights.
// A quantizer that finds its own codes and scales writes them with these; decode and the reference encoders use them as well.
//
// Codes are the numbers of the formulas: w = code * d for symmetric types (Q4_0: -8..7), w = code * d + m for Q4_1 and Q5_1,
// w = scale * d * code - min * dmin for Q2_K, Q4_K, Q5_K. d and its kin are IEEE half bits as stored. pack throws
// std::logic_error for a code or scale outside its range (a wrong byte would be silent otherwise); unpack accepts any bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kompakt {

// Blocks of 32.
void pack_q8_0(const std::int8_t* codes, std::uint16_t d, std::byte* out);                   // codes -128..127; 34 bytes
void unpack_q8_0(const std::byte* in, std::int8_t* codes, std::uint16_t* d);
void pack_q4_0(const std::int8_t* codes, std::uint16_t d, std::byte* out);                   // codes -8..7; 18 bytes
void unpack_q4_0(const std::byte* in, std::int8_t* codes, std::uint16_t* d);
void pack_q4_1(const std::int8_t* codes, std::uint16_t d, std::uint16_t m, std::byte* out);  // codes 0..15; 20 bytes
void unpack_q4_1(const std::byte* in, std::int8_t* codes, std::uint16_t* d, std::uint16_t* m);
void pack_q5_0(const std::int8_t* codes, std::uint16_t d, std::byte* out);                   // codes -16..15; 22 bytes
void unpack_q5_0(const std::byte* in, std::int8_t* codes, std::uint16_t* d);
void pack_q5_1(const std::int8_t* codes, std::uint16_t d, std::uint16_t m, std::byte* out);  // codes 0..31; 24 bytes
void unpack_q5_1(const std::byte* in, std::int8_t* codes, std::uint16_t* d, std::uint16_t* m);
void pack_iq4_nl(const std::int8_t* codes, std::uint16_t d, std::byte* out);                 // codes 0..15 index iq4_values; 18 bytes
void unpack_iq4_nl(const std::byte* in, std::int8_t* codes, std::uint16_t* d);
void pack_mxfp4(const std::int8_t* codes, std::uint8_t e, std::byte* out);                   // codes 0..15 index mxfp4_values; e is E8M0; 17 bytes
void unpack_mxfp4(const std::byte* in, std::int8_t* codes, std::uint8_t* e);

// Ternary blocks. TQ2_0 and Q2_0 hold a fourth code, 2.
void pack_tq1_0(const std::int8_t* codes, std::uint16_t d, std::byte* out);  // 256 codes -1..1; 54 bytes
void unpack_tq1_0(const std::byte* in, std::int8_t* codes, std::uint16_t* d);
void pack_tq2_0(const std::int8_t* codes, std::uint16_t d, std::byte* out);  // 256 codes -1..2; 66 bytes
void unpack_tq2_0(const std::byte* in, std::int8_t* codes, std::uint16_t* d);
void pack_q2_0(const std::int8_t* codes, std::uint16_t d, std::byte* out);   // 64 codes -1..2; 18 bytes
void unpack_q2_0(const std::byte* in, std::int8_t* codes, std::uint16_t* d);

// Super-blocks of 256.
struct Q2KBlock { std::int8_t codes[256]; std::uint8_t scales[16], mins[16]; std::uint16_t d, dmin; };  // codes 0..3, scales and mins 0..15
struct Q3KBlock { std::int8_t codes[256], scales[16]; std::uint16_t d; };                               // codes -4..3, scales -32..31
struct Q4KBlock { std::int8_t codes[256]; std::uint8_t scales[8], mins[8]; std::uint16_t d, dmin; };    // codes 0..15 (Q5_K 0..31), scales and mins 0..63
using Q5KBlock = Q4KBlock;
struct Q6KBlock { std::int8_t codes[256], scales[16]; std::uint16_t d; };                               // codes -32..31, scales -128..127
struct Iq4XsBlock { std::int8_t codes[256], scales[8]; std::uint16_t d; };                              // codes 0..15 index iq4_values, scales -32..31

void pack_q2_k(const Q2KBlock& block, std::byte* out);  // 84 bytes
void unpack_q2_k(const std::byte* in, Q2KBlock& block);
void pack_q3_k(const Q3KBlock& block, std::byte* out);  // 110 bytes
void unpack_q3_k(const std::byte* in, Q3KBlock& block);
void pack_q4_k(const Q4KBlock& block, std::byte* out);  // 144 bytes
void unpack_q4_k(const std::byte* in, Q4KBlock& block);
void pack_q5_k(const Q5KBlock& block, std::byte* out);  // 176 bytes
void unpack_q5_k(const std::byte* in, Q5KBlock& block);
void pack_q6_k(const Q6KBlock& block, std::byte* out);  // 210 bytes
void unpack_q6_k(const std::byte* in, Q6KBlock& block);
void pack_iq4_xs(const Iq4XsBlock& block, std::byte* out);  // 136 bytes
void unpack_iq4_xs(const std::byte* in, Iq4XsBlock& block);

// The values that the codes of IQ4_NL and IQ4_XS, and of MXFP4 (doubled: scale is 2^(e-128)), stand for.
inline constexpr std::int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
inline constexpr std::int8_t mxfp4_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
float mxfp4_scale(std::uint8_t e);  // 2^(e-128), the factor of mxfp4_values

}  // namespace kompakt
