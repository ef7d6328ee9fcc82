// Attention of a decoder's own tokens on the CPU, with its gradient: what a token may not look at is not computed.
//
// at::scaled_dot_product_attention masks a whole product of queries and keys, twice what is needed, and takes every head of a
// group of queries as if it had keys and values of its own.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace kompakt {

// Where it takes the place of ATen's: on a processor with own products (model/products.h), for float32, as many keys as queries,
// heads of whole registers and texts of more than a block.
bool fits_causal_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

// softmax(q k^T scale) v, where token t sees tokens t - window + 1 ... t (window 0: all before it and itself). q [B,H,T,hd]; k and v
// [B,Hkv,T,hd], key/value head h serving query heads h H/Hkv and following; any strides. float32 or float64; hd fills whole
// registers. Returns [B,T,H*hd]. Differentiable (first order): keeps the logarithm of every softmax's sum [B,H,T] and makes probabilities anew in the
// backward pass. The same bytes for any number of threads.
at::Tensor causal_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale, std::int64_t window = 0);

}  // namespace kompakt
