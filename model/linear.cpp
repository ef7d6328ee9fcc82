// Linear layer and embedding: where weight transforms (masks, fake quantization) act, and the compact embedding of training.
#include "model/linear.h"

#include <ATen/ATen.h>
#include <ATen/core/List.h>

#include <stdexcept>

#include "model/products.h"

namespace kompakt {

at::Tensor Linear::effective_weight() const { return transform ? transform(weight) : weight; }

at::Tensor Linear::forward(const at::Tensor& x, TapSink* taps) const {
  if (taps) {
    const std::string tap = "input:" + name;
    if (taps->wants(tap)) taps->put(tap, x);
  }
  at::Tensor y = linear_product(input_transform ? input_transform(x) : x, effective_weight(), bias);
  if (side) y = y + side(x);
  if (taps) {
    const std::string tap = "output:" + name;
    if (taps->wants(tap)) taps->put(tap, y);
  }
  return y;
}

at::Tensor Embedding::effective_weight() const { return transform ? transform(weight) : weight; }

at::Tensor Embedding::forward(const at::Tensor& ids) const {
  // An id outside of the kept rows maps to -1, which at::embedding refuses.
  const at::Tensor rows = row_map.defined() ? row_map.index_select(0, ids.reshape(-1)).view_as(ids) : ids;
  if (transform && transform_by_row && !rows.is_meta()) {
    const auto [used, places, counts] = at::_unique2(rows, /*sorted=*/true, /*return_inverse=*/true);
    return at::embedding(transform(weight.index_select(0, used)), places);
  }
  const at::Tensor table = effective_weight();
  // Shapes alone: at::embedding has no meta kernel outside of Python.
  if (table.is_meta()) return at::index(table, {rows});
  return at::embedding(table, rows);
}

void Embedding::compact(const at::Tensor& ids) {
  if (compacted()) throw std::logic_error("Embedding::compact: '" + name + "' is compacted already");
  const bool grad = weight.requires_grad();
  const at::Tensor table = weight.detach();
  kept_ = ids.to(weight.device(), at::kLong).contiguous();
  row_map = at::full({table.size(0)}, -1, kept_.options());
  row_map.index_put_({kept_}, at::arange(kept_.size(0), kept_.options()));
  full_ = table;
  weight = table.index_select(0, kept_).requires_grad_(grad);
}

at::Tensor Embedding::full_weight() const {
  if (!compacted()) return weight;
  return full_.index_copy(0, kept_, weight.detach());
}

void Embedding::expand() {
  if (!compacted()) return;
  const bool grad = weight.requires_grad();
  weight = full_weight().requires_grad_(grad);
  row_map = at::Tensor();
  full_ = at::Tensor();
  kept_ = at::Tensor();
}

}  // namespace kompakt
