// Losses over rows of logits with their gradient in place: the CPU twins of train/cuda/row_losses.cu, and the choice between both.
//
// The twins are the reference of the kernels (same formulas, row_loss_math.h; same order of sums) for tests and `kompakt doctor`. Training
// on the CPU has faster paths of its own (distill/kl_rows.h, ATen).
#pragma once

#include <ATen/core/Tensor.h>

#include "train/row_loss_math.h"

namespace kompakt {

namespace cpu {

// values [rows, terms.count + 2] float64: every term times its value_factor, then forward and reverse KL at temperature 1. I: float, double
// or Bf16. A row without a column that both sides have counts 0.
template <class I>
void divergence_rows(const rows::RowTerms& terms, const rows::RowPair<I>& call, bool gradient, double* values);
// values [rows] float64, in nats. A target outside of the row gives NaN.
template <class I>
void cross_entropy_rows(const rows::RowLabels<I>& call, bool gradient, double* values);

}  // namespace cpu

// True where the functions below run a kernel: CUDA tensors of float32 or bfloat16, in a program that nvcc compiled the kernels for.
bool has_row_kernels(c10::Device device, at::ScalarType type);

// student [n, V], teacher [n, V_t] of one type and device, contiguous; their first `columns` are compared. float32, float64 (CPU only) or
// bfloat16. Returns [n, terms.count + 2] float64 as above; with `gradient` `student` holds dL/dlogits afterwards.
at::Tensor divergence_rows(const rows::RowTerms& terms, at::Tensor& student, const at::Tensor& teacher, std::int64_t columns, bool gradient);
// logits [n, V] contiguous, targets [n] int64. Returns [n] float64; with `gradient` `logits` holds factor x dL/dlogits afterwards.
at::Tensor cross_entropy_rows(at::Tensor& logits, const at::Tensor& targets, double smoothing, double factor, bool gradient);

}  // namespace kompakt
