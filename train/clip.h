// Global gradient norm and what it means for the step.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace kompakt {

// Euclidean norm over all gradients together, a scalar float32 tensor on their device; zero for an empty list.
// Infinite or NaN when any gradient is.
at::Tensor global_norm(const std::vector<at::Tensor>& gradients);

// What every gradient must be divided by so that the global norm is at most `limit` (0 = off); 1 when it already is.
double clip_divisor(double norm, double limit);

}  // namespace kompakt
