// Unstructured and n:m sparsity: which weights of a matrix go. What keeps them at zero afterwards is train/mask.h.
#pragma once

#include <ATen/core/Tensor.h>

#include "train/sparsity.h"

namespace kompakt {

// true = the weight stays. weight [N,K].
at::Tensor magnitude_mask(const at::Tensor& weight, const SparsityPattern& pattern);
// Wanda (Sun et al. 2024): |w| times the root mean square of its input, compared inside a row. input_square [K]: mean x^2.
at::Tensor wanda_mask(const at::Tensor& weight, const at::Tensor& input_square, const SparsityPattern& pattern);

}  // namespace kompakt
