// The functions that fill the columns of the table in ggml_blocks.cpp. Internal to formats/ggml_*.cpp.
// decode_*: one block of bytes to floats. encode_*: the reference encoder, byte for byte. weigh_*: the same with importance.
#pragma once

#include <cstddef>

namespace kompakt::ggml_rows {

void decode_q8_0(const std::byte* in, float* out);
void decode_q4_0(const std::byte* in, float* out);
void decode_q4_1(const std::byte* in, float* out);
void decode_q5_0(const std::byte* in, float* out);
void decode_q5_1(const std::byte* in, float* out);
void decode_iq4_nl(const std::byte* in, float* out);
void decode_mxfp4(const std::byte* in, float* out);
void decode_tq1_0(const std::byte* in, float* out);
void decode_tq2_0(const std::byte* in, float* out);
void decode_q2_0(const std::byte* in, float* out);
void decode_q2_k(const std::byte* in, float* out);
void decode_q3_k(const std::byte* in, float* out);
void decode_q4_k(const std::byte* in, float* out);
void decode_q5_k(const std::byte* in, float* out);
void decode_q6_k(const std::byte* in, float* out);
void decode_iq4_xs(const std::byte* in, float* out);

void encode_q8_0(const float* in, std::byte* out);
void encode_q4_0(const float* in, std::byte* out);
void encode_q4_1(const float* in, std::byte* out);
void encode_q5_0(const float* in, std::byte* out);
void encode_q5_1(const float* in, std::byte* out);
void encode_iq4_nl(const float* in, std::byte* out);
void encode_mxfp4(const float* in, std::byte* out);
void encode_tq1_0(const float* in, std::byte* out);
void encode_tq2_0(const float* in, std::byte* out);
void encode_q2_0(const float* in, std::byte* out);
void encode_q2_k(const float* in, std::byte* out);
void encode_q3_k(const float* in, std::byte* out);
void encode_q4_k(const float* in, std::byte* out);
void encode_q5_k(const float* in, std::byte* out);
void encode_q6_k(const float* in, std::byte* out);
void encode_iq4_xs(const float* in, std::byte* out);

void weigh_q4_0(const float* in, const float* weight, std::byte* out);
void weigh_q4_1(const float* in, const float* weight, std::byte* out);
void weigh_q5_0(const float* in, const float* weight, std::byte* out);
void weigh_q5_1(const float* in, const float* weight, std::byte* out);
void weigh_iq4_nl(const float* in, const float* weight, std::byte* out);
void weigh_q2_k(const float* in, const float* weight, std::byte* out);
void weigh_q3_k(const float* in, const float* weight, std::byte* out);
void weigh_q4_k(const float* in, const float* weight, std::byte* out);
void weigh_q5_k(const float* in, const float* weight, std::byte* out);
void weigh_q6_k(const float* in, const float* weight, std::byte* out);
void weigh_iq4_xs(const float* in, const float* weight, std::byte* out);

}  // namespace kompakt::ggml_rows
