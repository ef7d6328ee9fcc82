// What the writer and the reader of compressed-tensors folders share: the names of the format, nothing of its arithmetic.
// https://github.com/vllm-project/compressed-tensors
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "formats/tensor_data.h"
#include "quantize/grids.h"

namespace kompakt {

// A grid in the terms of the format. Codes are signed integers of 4 or 8 bits, or FP8 E4M3 values.
struct CompressedWeights {
  int bits = 4;
  bool small_float = false, symmetric = true;
  std::int64_t group = 0;  // 0 = a scale per row ("channel")
  int shift = 0;           // stored code = code - shift, zero point likewise
  bool operator==(const CompressedWeights&) const = default;
};
// False with a reason where no scheme of the format decodes to the same weights.
bool compressed_weights(const GridSpec& spec, std::int64_t columns, CompressedWeights& out, std::string& why);

// codes [N,K] int8 -> I32 [N, K bits / 32 rounded up]: code + 2^(bits-1) as a little-endian string of `bits` each, zero bits behind.
TensorData pack_compressed(const std::string& name, const at::Tensor& codes, int bits);

// "model.layers.3.self_attn.q_proj" -> "model.layers.3.self_attn", the module that has k_scale and v_scale.
std::string compressed_parent(const std::string& module);

}  // namespace kompakt
