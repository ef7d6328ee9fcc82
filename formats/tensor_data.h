// A named tensor as bytes: what readers give and writers take. Knows nothing of models or torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "formats/dtype.h"

namespace kompakt {

// Product of a shape; nothing for a negative dimension or when it does not fit. 1 for an empty list (a scalar).
std::optional<std::int64_t> checked_product(std::span<const std::int64_t> factors);
std::string shape_text(std::span<const std::int64_t> shape);  // "[2, 3]"

// Borrowed bytes, row-major, last dimension contiguous. `owner` keeps the bytes alive (a memory map or a buffer).
struct TensorData {
  std::string name;
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape;  // [] is a scalar
  std::span<const std::byte> bytes;
  std::shared_ptr<const void> owner;
  std::int64_t elements() const;  // product of shape; 1 for a scalar
};

// Copies or converts any float or integer tensor to float32. Throws Error for NaN only when `refuse_nan`.
std::vector<float> to_float32(const TensorData& tensor, bool refuse_nan = false);

// IEEE half, bfloat16 and back; round to nearest even.
float half_to_float(std::uint16_t half);
std::uint16_t float_to_half(float value);
float bfloat16_to_float(std::uint16_t value);
std::uint16_t float_to_bfloat16(float value);

// Owning constructors, for writers and tests.
TensorData make_tensor(std::string name, std::vector<std::int64_t> shape, std::vector<float> values);
TensorData make_tensor(std::string name, DType dtype, std::vector<std::int64_t> shape, std::vector<std::byte> bytes);

}  // namespace kompakt
