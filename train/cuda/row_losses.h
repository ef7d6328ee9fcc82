// Launchers of the CUDA kernels of the losses: device pointers and a stream, no torch. Each has a twin in train/row_losses.h with the same
// arguments, formulas and order of sums; they differ by the device's exp and log (a few units in the last place).
// All return a cudaError_t as int, 0 = launched.
#pragma once

#include <cstdint>

#include "train/row_loss_math.h"

struct CUstream_st;

namespace kompakt::cuda {

using Stream = CUstream_st*;

// values [rows, terms.count + 2]. Losses whose gradient is known without a sum over the row read it twice, the others three times.
int divergence_rows(const rows::RowTerms& terms, const rows::RowPair<float>& call, bool gradient, double* values, Stream stream);
int divergence_rows(const rows::RowTerms& terms, const rows::RowPair<rows::Bf16>& call, bool gradient, double* values, Stream stream);
// values [rows].
int cross_entropy_rows(const rows::RowLabels<float>& call, bool gradient, double* values, Stream stream);
int cross_entropy_rows(const rows::RowLabels<rows::Bf16>& call, bool gradient, double* values, Stream stream);

const char* row_error_text(int error);

}  // namespace kompakt::cuda
