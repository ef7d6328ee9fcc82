// Matrix products in float32 for processors whose BLAS leaves a good part of the registers' speed unused.
//
// On one core of an AMD EPYC 7003 (102 GFLOP/s at most) MKL gives 74 to 86 GFLOP/s for the linears of a 135M-parameter decoder at 2048
// tokens, and 55 where few rows meet a large matrix (170 rows of hidden states x a vocabulary of 49,152), because it packs the
// large one anew; a prototype of what is here gave 84 to 87 there. Everywhere else matrix_product() is at::mm.
#pragma once

#include <ATen/core/Tensor.h>

namespace kompakt {

// True on processors for which the above was found: AMD's, with fused multiply-add.
bool has_own_products();
// c [m,n] = a [m,k] b [k,n], or c += a b with `add`. c: unit stride in its rows, aliasing neither. Outside of autograd. The order
// of every sum is fixed, whatever the number of threads.
void matrix_product(at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool add = false);

// at::linear, differentiable (first order), by these products where they are faster.
at::Tensor linear_product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);

// linear(silu(gate) up), differentiable (first order): the product of both is made again in the backward pass instead of kept, which
// is the largest tensor of a gated block. float32 and float64 of the CPU, outside of autocast: fits_gated_linear().
bool fits_gated_linear(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& weight);
at::Tensor gated_linear(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& weight, const at::Tensor& bias);

}  // namespace kompakt
