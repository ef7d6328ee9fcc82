// Torch tensors and bytes: the one place where element types of files meet those of torch.
#include <ATen/ATen.h>

#include <cstring>
#include <stdexcept>
#include <utility>

#include "core/error.h"
#include "model/checkpoint.h"
#include "model/paged.h"

namespace kompakt {

namespace {

struct TensorTypeRow {
  DType file;
  at::ScalarType torch;
};

constexpr TensorTypeRow kTensorTypes[] = {
    {DType::f64, at::kDouble}, {DType::f32, at::kFloat}, {DType::f16, at::kHalf}, {DType::bf16, at::kBFloat16},
    {DType::f8_e4m3, at::kFloat8_e4m3fn}, {DType::f8_e5m2, at::kFloat8_e5m2}, {DType::i64, at::kLong}, {DType::i32, at::kInt},
    {DType::i16, at::kShort}, {DType::i8, at::kChar}, {DType::u8, at::kByte}, {DType::boolean, at::kBool},
};

}  // namespace

at::Tensor as_tensor(const TensorData& data) {
  for (const TensorTypeRow& row : kTensorTypes) {
    if (row.file != data.dtype) continue;
    const auto options = at::TensorOptions().dtype(row.torch);
    if (data.bytes.empty()) return at::empty(data.shape, options);
    void* bytes = const_cast<std::byte*>(data.bytes.data());
    if (reinterpret_cast<std::uintptr_t>(bytes) % size_of(data.dtype) != 0) {
      at::Tensor copy = at::empty(data.shape, options);
      std::memcpy(copy.mutable_data_ptr(), bytes, data.bytes.size());
      return copy;
    }
    return at::from_blob(bytes, data.shape, [owner = data.owner](void*) {}, options);
  }
  throw Error("the tensor '" + data.name + "' has an element type that a model cannot hold").given(std::string(name_of(data.dtype)));
}

TensorData as_data(std::string name, const at::Tensor& tensor) {
  const at::Tensor dense = tensor.detach().to(at::kCPU).contiguous();
  for (const TensorTypeRow& row : kTensorTypes) {
    if (row.torch != dense.scalar_type()) continue;
    TensorData data;
    data.name = std::move(name);
    data.dtype = row.file;
    data.shape = dense.sizes().vec();
    // Who has written the bytes drops them: weights that lie in a file need not stay in memory.
    const std::shared_ptr<const at::Tensor> owner(new at::Tensor(dense), [](const at::Tensor* held) {
      release_pages(*held);
      delete held;
    });
    data.bytes = {static_cast<const std::byte*>(owner->const_data_ptr()), static_cast<std::size_t>(dense.nbytes())};
    data.owner = owner;
    return data;
  }
  throw std::logic_error("as_data: no file type for the element type of '" + name + "'");
}

}  // namespace kompakt
