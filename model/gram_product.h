// Sums of outer products of rows, a^T b: the second moments of calibration. Both operands are long and lie by rows, so that a general
// product packs one of them over and over; here each is packed once and both sides read the same panels.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace kompakt {

// sum += a[0]^T b[0] + a[1]^T b[1] + ...; a[i] [n_i,K], b[i] [n_i,M], sum [K,M] contiguous, made when undefined.
// `symmetric`, with the same columns on both sides: only the values on and above the diagonal are right. The same bits for any number of
// threads. Outside of autograd. On processors of has_own_products() 90 to 100 of 116 GFLOP/s (AMD EPYC 9004, one core) against MKL's 80, and
// symmetric ones half of the work; everywhere else at::addmm by panels.
void add_gram(at::Tensor& sum, const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b, bool symmetric);

// The same of float32 or bfloat16 rows, in any mixture, whose values are rounded to bfloat16 as they are packed; products and `sum` are
// float32. With AVX-512 BF16 twice as fast as the above (215 GFLOP/s there, by a profile of gptq); elsewhere the above on rounded rows.
void add_gram_bf16(at::Tensor& sum, const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b, bool symmetric);

// What lies above the diagonal of [K,K], times `factor`, on both of its sides; exactly symmetric, a matrix of its own.
at::Tensor mirrored(const at::Tensor& upper, double factor);

}  // namespace kompakt
