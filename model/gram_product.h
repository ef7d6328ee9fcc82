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

}  // namespace kompakt
