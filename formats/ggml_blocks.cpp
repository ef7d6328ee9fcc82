// The table of ggml's types. Plain types are blocks of one element; the quantized ones come from ggml_rows.h.
#include "formats/ggml_blocks.h"

#include <algorithm>
#include <cctype>
#include <cstring>

#include "formats/ggml_rows.h"
#include "formats/tensor_data.h"

namespace kompakt {
namespace {

template <class T>
void decode_plain(const std::byte* in, float* out) {
  T value;
  std::memcpy(&value, in, sizeof value);
  *out = static_cast<float>(value);
}

void decode_f16(const std::byte* in, float* out) {
  std::uint16_t half;
  std::memcpy(&half, in, 2);
  *out = half_to_float(half);
}

void decode_bf16(const std::byte* in, float* out) {
  std::uint16_t value;
  std::memcpy(&value, in, 2);
  *out = bfloat16_to_float(value);
}

void encode_f32(const float* in, std::byte* out) { std::memcpy(out, in, 4); }

void encode_f64(const float* in, std::byte* out) {
  const double value = *in;
  std::memcpy(out, &value, 8);
}

void encode_f16(const float* in, std::byte* out) {
  const std::uint16_t half = float_to_half(*in);
  std::memcpy(out, &half, 2);
}

void encode_bf16(const float* in, std::byte* out) {
  const std::uint16_t value = float_to_bfloat16(*in);
  std::memcpy(out, &value, 2);
}

// In the order of the numbers, which are ggml's.
constexpr GgmlType type_rows[] = {
    {0, "F32", 1, 4, decode_plain<float>, encode_f32, nullptr},
    {1, "F16", 1, 2, decode_f16, encode_f16, nullptr},
    {2, "Q4_0", 32, 18, ggml_rows::decode_q4_0, ggml_rows::encode_q4_0, ggml_rows::weigh_q4_0},
    {3, "Q4_1", 32, 20, ggml_rows::decode_q4_1, ggml_rows::encode_q4_1, ggml_rows::weigh_q4_1},
    {6, "Q5_0", 32, 22, ggml_rows::decode_q5_0, ggml_rows::encode_q5_0, ggml_rows::weigh_q5_0},
    {7, "Q5_1", 32, 24, ggml_rows::decode_q5_1, ggml_rows::encode_q5_1, ggml_rows::weigh_q5_1},
    {8, "Q8_0", 32, 34, ggml_rows::decode_q8_0, ggml_rows::encode_q8_0, nullptr},
    {10, "Q2_K", 256, 84, ggml_rows::decode_q2_k, ggml_rows::encode_q2_k, ggml_rows::weigh_q2_k},
    {11, "Q3_K", 256, 110, ggml_rows::decode_q3_k, ggml_rows::encode_q3_k, ggml_rows::weigh_q3_k},
    {12, "Q4_K", 256, 144, ggml_rows::decode_q4_k, ggml_rows::encode_q4_k, ggml_rows::weigh_q4_k},
    {13, "Q5_K", 256, 176, ggml_rows::decode_q5_k, ggml_rows::encode_q5_k, ggml_rows::weigh_q5_k},
    {14, "Q6_K", 256, 210, ggml_rows::decode_q6_k, ggml_rows::encode_q6_k, ggml_rows::weigh_q6_k},
    {20, "IQ4_NL", 32, 18, ggml_rows::decode_iq4_nl, ggml_rows::encode_iq4_nl, ggml_rows::weigh_iq4_nl},
    {23, "IQ4_XS", 256, 136, ggml_rows::decode_iq4_xs, ggml_rows::encode_iq4_xs, ggml_rows::weigh_iq4_xs},
    {24, "I8", 1, 1, decode_plain<std::int8_t>, nullptr, nullptr},
    {25, "I16", 1, 2, decode_plain<std::int16_t>, nullptr, nullptr},
    {26, "I32", 1, 4, decode_plain<std::int32_t>, nullptr, nullptr},
    {27, "I64", 1, 8, decode_plain<std::int64_t>, nullptr, nullptr},
    {28, "F64", 1, 8, decode_plain<double>, encode_f64, nullptr},
    {30, "BF16", 1, 2, decode_bf16, encode_bf16, nullptr},
    {34, "TQ1_0", 256, 54, ggml_rows::decode_tq1_0, ggml_rows::encode_tq1_0, nullptr},
    {35, "TQ2_0", 256, 66, ggml_rows::decode_tq2_0, ggml_rows::encode_tq2_0, nullptr},
    {39, "MXFP4", 32, 17, ggml_rows::decode_mxfp4, ggml_rows::encode_mxfp4, nullptr},
    {42, "Q2_0", 64, 18, ggml_rows::decode_q2_0, ggml_rows::encode_q2_0, nullptr},
};

bool equal_in_any_case(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](unsigned char x, unsigned char y) { return std::toupper(x) == std::toupper(y); });
}

}  // namespace

std::span<const GgmlType> ggml_types() { return type_rows; }

const GgmlType* find_ggml_type(std::uint32_t id) {
  for (const GgmlType& type : type_rows)
    if (type.id == id) return &type;
  return nullptr;
}

const GgmlType* find_ggml_type(std::string_view name) {
  for (const GgmlType& type : type_rows)
    if (equal_in_any_case(type.name, name)) return &type;
  return nullptr;
}

std::optional<std::int64_t> ggml_tensor_bytes(const GgmlType& type, std::int64_t row, std::int64_t rows) {
  if (row < 0 || rows < 0 || row % type.block != 0) return std::nullopt;
  std::int64_t bytes = 0;
  if (__builtin_mul_overflow(row / type.block, type.bytes, &bytes) || __builtin_mul_overflow(bytes, rows, &bytes)) return std::nullopt;
  return bytes;
}

}  // namespace kompakt
