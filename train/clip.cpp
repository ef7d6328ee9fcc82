// Gradient clipping by global norm (Pascanu et al. 2013).
#include "train/clip.h"

#include <ATen/ATen.h>

namespace kompakt {

at::Tensor global_norm(const std::vector<at::Tensor>& gradients) {
  if (gradients.empty()) return at::zeros({}, at::kFloat);
  return at::linalg_vector_norm(at::stack(at::_foreach_norm(gradients, 2)).to(at::kFloat), 2);
}

double clip_divisor(double norm, double limit) { return limit > 0 && norm > limit ? norm / limit : 1.0; }

}  // namespace kompakt
