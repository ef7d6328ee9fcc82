// Element types of checkpoints (the safetensors set). Block-quantized types are GGUF's own: formats/ggml_blocks.h.
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>

namespace kompakt {

enum class DType { f64, f32, f16, bf16, f8_e4m3, f8_e5m2, i64, i32, i16, i8, u64, u32, u16, u8, boolean };

std::size_t size_of(DType dtype);                              // bytes per element
std::string_view name_of(DType dtype);                         // safetensors name: "F32", "BF16", ...
std::optional<DType> dtype_from_name(std::string_view name);

}  // namespace kompakt
