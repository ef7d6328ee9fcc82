// ggml's block types: one row each, decode for all, byte-exact reference encode where ggml has a deterministic one.
// Layouts: docs of ggml's block structs; checked against golden bytes and the PyPI package `gguf`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

namespace kompakt {

struct GgmlType {
  std::uint32_t id;            // number in the file
  std::string_view name;       // "Q4_K", upper case as in file listings
  std::int64_t block;          // elements per block; 1 for plain types
  std::int64_t bytes;          // bytes per block
  void (*decode)(const std::byte* block_bytes, float* out);               // one block; never null
  void (*encode)(const float* in, std::byte* block_bytes);                // reference encoder of one block; null when read-only
  // The same weighted by importance (diag of the input second moment), [block]; null when the type has none.
  void (*encode_weighted)(const float* in, const float* weight, std::byte* block_bytes);
};

std::span<const GgmlType> ggml_types();
const GgmlType* find_ggml_type(std::uint32_t id);
const GgmlType* find_ggml_type(std::string_view name);  // any case
// Bytes of a tensor of `elements` values whose rows have `row` values; nothing when row % block != 0 or on overflow.
std::optional<std::int64_t> ggml_tensor_bytes(const GgmlType& type, std::int64_t row, std::int64_t rows);

}  // namespace kompakt
