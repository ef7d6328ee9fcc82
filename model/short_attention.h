// Attention of short texts on the CPU, with its gradient.
//
// at::scaled_dot_product_attention starts a matrix product of the BLAS for every head; at 16 tokens those products cost more to
// start than to compute, and two threads are slower than one.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace kompakt {

// CPU, float32 or float64, equal heads of q, k and v, a head size of whole vector registers, few tokens.
bool fits_short_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

// softmax(q k^T scale) v over the first lengths[b] keys of each text; without any key the mean of all values, as an additive
// mask of equal numbers would give. q, k, v [B,T,H,hd]; lengths [B] int64 on the CPU, undefined = T. Returns [B,T,H,hd].
// Heads are independent of each other: same bytes for any number of threads.
at::Tensor short_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& lengths, double scale);

}  // namespace kompakt
