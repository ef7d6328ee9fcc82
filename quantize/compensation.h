// How much smaller the output error of a linear becomes when rounding errors are fed back into the columns that follow (GPTQ), before anything
// is quantized: the ratio depends on the inputs alone, not on the grid.
#pragma once

#include <ATen/core/Tensor.h>

namespace kompakt {

// Expected tr(E H E^T) after error feedback over that of rounding with errors of the same size, inputs [n,K]. With H = L L^T and U = L^-1 (of the damped
// second moments) the feedback's errors are R diag(1 / U_kk) U with white R, so the ratio is sum_k (U H U^T)_kk / U_kk^2 over tr H. Measured on the
// rows that U was made of and on others, the geometric mean of both: the few inputs of a sensitivity pass make U, and the method will
// see more of them. At most 1; 1 where there are fewer than 16 rows.
double compensation_ratio(const at::Tensor& inputs, double damping);

}  // namespace kompakt
