// What linears with the same input have in common: the order in which columns are visited, the factor of the inverse Hessian,
// and the shift of the target towards the teacher's activations. Computed when the first of them asks.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "quantize/methods.h"
#include "train/inverse_factor.h"

namespace kompakt {

struct ColumnOrder {
  std::vector<std::int64_t> column;  // processed position -> column
  std::vector<std::int64_t> group;   // processed group -> group
  std::vector<std::int64_t> begin;   // processed group -> first processed position; one more at the end
};
// Groups by falling largest energy, columns likewise inside a group; or all as they stand, with `inside_groups` false those inside of
// groups. `energy` [K] = diag H.
ColumnOrder column_order(const at::Tensor& energy, std::int64_t group, bool act_order, bool inside_groups = true);

struct InputFactors {
  // of the sweep
  std::int64_t group = -1;  // that `order` was made for; -1 = nothing is there yet
  ColumnOrder order;
  InverseFactor factor;
  at::Tensor dead;          // [K] bool: inputs that never fire
  std::int64_t dead_count = 0;
  // of the teacher's target
  bool tried = false;
  at::Tensor lower;         // [K,K] float64 Cholesky factor of the damped H; undefined when it failed
  at::Tensor shift;         // [K,K] float32 (C - H)(H + damping)^-1, where it is worth its time
};

// Fills the part of the sweep. Error when H is not finite.
void factor_input(const LayerInput& input, std::int64_t group, const LayerOptions& options, InputFactors& factors);

}  // namespace kompakt
