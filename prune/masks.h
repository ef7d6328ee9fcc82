// Unstructured and n:m sparsity: which weights are zero, and the constraint that keeps them zero while anything trains.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "train/constraint.h"

namespace kompakt {

// n:m keeps n of every m consecutive weights of a row (columns must divide by m); else the share `sparsity` of every row goes
// (rounded down). Ties: the lower column stays.
struct SparsityPattern {
  double sparsity = 0.5;
  std::int64_t n = 0, m = 0;  // both 0: unstructured
};

// true = the weight stays. weight [N,K]; Error when K does not divide by m.
at::Tensor magnitude_mask(const at::Tensor& weight, const SparsityPattern& pattern);
// Wanda (Sun et al. 2024): |w| times the root mean square of its input, compared inside a row. input_square [K]: mean x^2.
at::Tensor wanda_mask(const at::Tensor& weight, const at::Tensor& input_square, const SparsityPattern& pattern);

// Masks by linear name. attach() sets the masked weights to zero; after every optimizer step they are set to exact zero again.
// Works beside fake quantization: a zero stays zero on every symmetric grid.
std::shared_ptr<Constraint> mask_constraint(std::map<std::string, at::Tensor> masks);

}  // namespace kompakt
