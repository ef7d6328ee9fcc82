// Straight-through rounding to a grid, and the constraint that applies it in every forward pass.
#pragma once

#include <memory>

#include "quantize/stage.h"

namespace kompakt {

// Forward: exactly `rounded`. Backward: the gradient passes to `weight` unchanged (Bengio et al. 2013).
at::Tensor straight_through(const at::Tensor& weight, const at::Tensor& rounded);

}  // namespace kompakt
