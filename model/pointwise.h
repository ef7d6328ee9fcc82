// The parts of a block between its products, with backward passes by hand: one pass over memory each, and nothing kept for the
// backward pass but what went in. For float32 and float64 on the CPU; callers ask fits_pointwise() and use ATen otherwise.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace kompakt {

bool fits_pointwise(const at::Tensor& x);

// x / sqrt(mean(x^2) + eps) (offset + weight) over the last axis. x [.., d], weight [d] -> the shape of x.
at::Tensor rms_norm_rows(const at::Tensor& x, const at::Tensor& weight, double offset, double eps);
// silu(gate) up, both of one shape: SwiGLU's product (Shazeer 2020).
at::Tensor gated_silu(const at::Tensor& gate, const at::Tensor& up);
std::pair<at::Tensor, at::Tensor> gated_silu_backward(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& gradient);  // to gate, to up
// x [B,H,T,hd], cos and sin [T,hd] or [B,1,T,hd] as in RopeTables -> rotated; the memory is laid out as [B,T,H,hd], which is how
// linear layers leave queries and keys.
at::Tensor rotate_halves(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

}  // namespace kompakt
