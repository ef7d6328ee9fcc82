// Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): a function's inner values are thrown away after the forward pass and
// computed again in the backward pass. The gradients are those of the plain function, bit for bit unless something else uses x as well (sums in
// another order).
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

namespace kompakt {

// function(x), which may use any other tensors that require gradients: theirs are added up by the inner backward pass, so that only
// `backward()` works, not `grad()` on single tensors. The function must be pure: the same values, whenever it is called. Autocast is
// in the backward pass as it was in the forward pass.
at::Tensor recompute(const std::function<at::Tensor(const at::Tensor&)>& function, const at::Tensor& x);

}  // namespace kompakt
