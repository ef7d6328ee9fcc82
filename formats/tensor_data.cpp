// Conversions of single values and of whole tensors to float32; owning tensors. No file access here.
#include "formats/tensor_data.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "core/error.h"
#include "core/text.h"

namespace kompakt {
namespace {

template <class T>
T tensor_load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);  // the data section of a file need not be aligned
  return value;
}

// OCP 8-bit floats. E4M3 ("fn"): bias 7, no infinity, only 0x7F and 0xFF are NaN.
float tensor_e4m3(std::uint8_t bits) {
  const int exponent = (bits >> 3) & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return std::nanf("");
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9) : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return bits & 0x80 ? -magnitude : magnitude;
}

template <class T>
float tensor_plain(const std::byte* at) { return static_cast<float>(tensor_load<T>(at)); }

struct Converter {
  DType dtype;
  float (*read)(const std::byte*);
};

constexpr Converter tensor_converters[] = {
    {DType::f64, tensor_plain<double>},
    {DType::f32, tensor_plain<float>},
    {DType::f16, [](const std::byte* at) { return half_to_float(tensor_load<std::uint16_t>(at)); }},
    {DType::bf16, [](const std::byte* at) { return bfloat16_to_float(tensor_load<std::uint16_t>(at)); }},
    {DType::f8_e4m3, [](const std::byte* at) { return tensor_e4m3(tensor_load<std::uint8_t>(at)); }},
    {DType::f8_e5m2, [](const std::byte* at) { return half_to_float(static_cast<std::uint16_t>(tensor_load<std::uint8_t>(at) << 8)); }},
    {DType::i64, tensor_plain<std::int64_t>},
    {DType::i32, tensor_plain<std::int32_t>},
    {DType::i16, tensor_plain<std::int16_t>},
    {DType::i8, tensor_plain<std::int8_t>},
    {DType::u64, tensor_plain<std::uint64_t>},
    {DType::u32, tensor_plain<std::uint32_t>},
    {DType::u16, tensor_plain<std::uint16_t>},
    {DType::u8, tensor_plain<std::uint8_t>},
    {DType::boolean, [](const std::byte* at) { return tensor_load<std::uint8_t>(at) ? 1.0f : 0.0f; }},
};

const Converter& tensor_converter(DType dtype) {
  for (const Converter& converter : tensor_converters)
    if (converter.dtype == dtype) return converter;
  throw std::logic_error("dtype without a converter to float32");
}

}  // namespace

std::optional<std::int64_t> checked_product(std::span<const std::int64_t> factors) {
  std::int64_t product = 1;
  bool overflow = false, zero = false;
  for (const std::int64_t factor : factors) {
    if (factor < 0) return std::nullopt;
    zero |= factor == 0;
    if (!overflow) overflow = __builtin_mul_overflow(product, factor, &product);
  }
  // An empty tensor may have huge other dimensions; its product is zero all the same.
  if (zero) return 0;
  if (overflow) return std::nullopt;
  return product;
}

std::string shape_text(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::int64_t TensorData::elements() const {
  const auto product = checked_product(shape);
  if (!product) throw std::logic_error("tensor \"" + name + "\" has the impossible shape " + shape_text(shape));
  return *product;
}

std::vector<float> to_float32(const TensorData& tensor, bool refuse_nan) {
  const std::size_t count = static_cast<std::size_t>(tensor.elements()), step = size_of(tensor.dtype);
  if (tensor.bytes.size() != count * step) throw std::logic_error("tensor \"" + tensor.name + "\" has bytes that do not match its shape");
  std::vector<float> values(count);
  if (tensor.dtype == DType::f32) {
    if (count) std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
  } else {
    const auto read = tensor_converter(tensor.dtype).read;
    for (std::size_t i = 0; i < count; ++i) values[i] = read(tensor.bytes.data() + i * step);
  }
  if (refuse_nan)
    for (std::size_t i = 0; i < count; ++i)
      if (std::isnan(values[i])) throw Error(str("element ", i, " of the tensor is not a number (NaN)")).at(str("tensor \"", tensor.name, "\"")).hint("the checkpoint is damaged: get it again, or train with a lower learning rate");
  return values;
}

float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16, exponent = (half >> 10) & 31, mantissa = half & 0x3FF;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000u | (mantissa << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // exact: subnormal halves are normal floats
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

std::uint16_t float_to_half(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value), magnitude = bits & 0x7FFFFFFFu;
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000);
  if (magnitude > 0x7F800000u) return sign | 0x7E00;   // NaN, always the same quiet one
  if (magnitude >= 0x477FF000u) return sign | 0x7C00;  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {                       // below 2^-14: a multiple of 2^-24
    // Adding 0.5 puts the unit of the last place of the sum at 2^-24, so the hardware rounds to nearest even for us.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3F000000u));
  }
  const std::uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

float bfloat16_to_float(std::uint16_t value) { return std::bit_cast<float>(static_cast<std::uint32_t>(value) << 16); }

std::uint16_t float_to_bfloat16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<std::uint16_t>((bits >> 16) | 64);  // keep NaN a NaN, quiet
  return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

TensorData make_tensor(std::string name, std::vector<std::int64_t> shape, std::vector<float> values) {
  const auto owner = std::make_shared<const std::vector<float>>(std::move(values));
  TensorData tensor{std::move(name), DType::f32, std::move(shape), std::as_bytes(std::span(*owner)), owner};
  if (static_cast<std::size_t>(tensor.elements()) != owner->size()) throw std::logic_error("make_tensor: values do not match the shape of \"" + tensor.name + "\"");
  return tensor;
}

TensorData make_tensor(std::string name, DType dtype, std::vector<std::int64_t> shape, std::vector<std::byte> bytes) {
  const auto owner = std::make_shared<const std::vector<std::byte>>(std::move(bytes));
  TensorData tensor{std::move(name), dtype, std::move(shape), std::span(*owner), owner};
  if (static_cast<std::size_t>(tensor.elements()) * size_of(dtype) != owner->size()) throw std::logic_error("make_tensor: bytes do not match the shape of \"" + tensor.name + "\"");
  return tensor;
}

}  // namespace kompakt
