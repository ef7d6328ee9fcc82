// Block bytes to floats. The order of the float operations is ggml's, so that values agree bit for bit.
#include "formats/ggml_pack.h"
#include "formats/ggml_rows.h"
#include "formats/tensor_data.h"

namespace kompakt::ggml_rows {
namespace {

template <int Count, auto Unpack>
void decode_symmetric(const std::byte* in, float* out) {
  std::int8_t codes[Count];
  std::uint16_t d;
  Unpack(in, codes, &d);
  const float scale = half_to_float(d);
  for (int i = 0; i < Count; ++i) out[i] = static_cast<float>(codes[i]) * scale;
}

template <auto Unpack>
void decode_affine(const std::byte* in, float* out) {
  std::int8_t codes[32];
  std::uint16_t d, m;
  Unpack(in, codes, &d, &m);
  const float scale = half_to_float(d), minimum = half_to_float(m);
  for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(codes[i]) * scale + minimum;
}

// Super-blocks with a scale and a minimum for every `Group` values.
template <class Block, int Group, auto Unpack>
void decode_super_affine(const std::byte* in, float* out) {
  Block block;
  Unpack(in, block);
  const float d = half_to_float(block.d), dmin = half_to_float(block.dmin);
  for (int j = 0; j < 256 / Group; ++j) {
    const float scale = d * static_cast<float>(block.scales[j]), minimum = dmin * static_cast<float>(block.mins[j]);
    for (int i = Group * j; i < Group * (j + 1); ++i) out[i] = scale * static_cast<float>(block.codes[i]) - minimum;
  }
}

// Super-blocks with a signed scale for every 16 values.
template <class Block, auto Unpack>
void decode_super_symmetric(const std::byte* in, float* out) {
  Block block;
  Unpack(in, block);
  const float d = half_to_float(block.d);
  for (int j = 0; j < 16; ++j) {
    const float scale = d * static_cast<float>(block.scales[j]);
    for (int i = 16 * j; i < 16 * (j + 1); ++i) out[i] = scale * static_cast<float>(block.codes[i]);
  }
}

}  // namespace

void decode_q8_0(const std::byte* in, float* out) { decode_symmetric<32, unpack_q8_0>(in, out); }
void decode_q4_0(const std::byte* in, float* out) { decode_symmetric<32, unpack_q4_0>(in, out); }
void decode_q5_0(const std::byte* in, float* out) { decode_symmetric<32, unpack_q5_0>(in, out); }
void decode_q4_1(const std::byte* in, float* out) { decode_affine<unpack_q4_1>(in, out); }
void decode_q5_1(const std::byte* in, float* out) { decode_affine<unpack_q5_1>(in, out); }
void decode_tq1_0(const std::byte* in, float* out) { decode_symmetric<256, unpack_tq1_0>(in, out); }
void decode_tq2_0(const std::byte* in, float* out) { decode_symmetric<256, unpack_tq2_0>(in, out); }
void decode_q2_0(const std::byte* in, float* out) { decode_symmetric<64, unpack_q2_0>(in, out); }
void decode_q2_k(const std::byte* in, float* out) { decode_super_affine<Q2KBlock, 16, unpack_q2_k>(in, out); }
void decode_q4_k(const std::byte* in, float* out) { decode_super_affine<Q4KBlock, 32, unpack_q4_k>(in, out); }
void decode_q5_k(const std::byte* in, float* out) { decode_super_affine<Q5KBlock, 32, unpack_q5_k>(in, out); }
void decode_q3_k(const std::byte* in, float* out) { decode_super_symmetric<Q3KBlock, unpack_q3_k>(in, out); }
void decode_q6_k(const std::byte* in, float* out) { decode_super_symmetric<Q6KBlock, unpack_q6_k>(in, out); }

void decode_iq4_nl(const std::byte* in, float* out) {
  std::int8_t codes[32];
  std::uint16_t d;
  unpack_iq4_nl(in, codes, &d);
  const float scale = half_to_float(d);
  for (int i = 0; i < 32; ++i) out[i] = scale * static_cast<float>(iq4_values[codes[i]]);
}

void decode_iq4_xs(const std::byte* in, float* out) {
  Iq4XsBlock block;
  unpack_iq4_xs(in, block);
  const float d = half_to_float(block.d);
  for (int i = 0; i < 256; ++i) out[i] = d * static_cast<float>(block.scales[i / 32]) * static_cast<float>(iq4_values[block.codes[i]]);
}

void decode_mxfp4(const std::byte* in, float* out) {
  std::int8_t codes[32];
  std::uint8_t e;
  unpack_mxfp4(in, codes, &e);
  const float scale = mxfp4_scale(e);
  for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(mxfp4_values[codes[i]]) * scale;
}

}  // namespace kompakt::ggml_rows
