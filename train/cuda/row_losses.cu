// Softmax of both sides, losses and gradient of a row of logits by one block. The arithmetic of a column is that of row_loss_math.h.
#include "train/cuda/row_losses.h"

#include <cuda_runtime.h>

namespace kompakt::cuda {
namespace {

using rows::row_lanes;
using rows::RowTerms;

// Of one number per thread, in float64 and in pairs; every thread gets it.
__device__ double block_total(double mine, double* shared) {
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int half = row_lanes / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  const double total = shared[0];
  __syncthreads();  // before the next one writes
  return total;
}

template <class R>
__device__ void block_merge(rows::RowSoftmax<R>* lanes, const RowTerms& terms) {
  __syncthreads();
  for (int half = row_lanes / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) rows::row_merge(lanes[threadIdx.x], lanes[threadIdx.x + half], terms);
    __syncthreads();
  }
}

template <class I>
__global__ void __launch_bounds__(row_lanes) divergence_rows_kernel(const RowTerms terms, const rows::RowPair<I> call, const bool gradient, double* values) {
  using R = typename rows::RowReal<I>::Type;
  __shared__ rows::RowSoftmax<R> of_student[row_lanes], of_teacher[row_lanes];
  __shared__ rows::RowNormalizers<R> normalizers;
  __shared__ double shared[row_lanes];
  const bool needs_slopes = rows::row_needs_slopes(terms);
  const int lane = threadIdx.x;
  for (std::int64_t r = blockIdx.x; r < call.rows; r += gridDim.x) {
    I* student = call.student + r * call.student_width;
    const I* teacher = call.teacher + r * call.teacher_width;
    {
      rows::RowSoftmax<R> mine, other;
      rows::row_clear(mine);
      rows::row_clear(other);
      for (std::int64_t j = lane; j < call.columns; j += row_lanes) {
        const R s = rows::row_load(student[j]), t = rows::row_load(teacher[j]);
        if (rows::row_removed(s, t)) continue;
        rows::row_push(mine, terms, s);
        rows::row_push(other, terms, t);
      }
      of_student[lane] = mine, of_teacher[lane] = other;
    }
    block_merge(of_student, terms);
    block_merge(of_teacher, terms);
    if (lane == 0) rows::row_normalizers(of_student[0], of_teacher[0], terms, normalizers);
    __syncthreads();

    rows::RowSums<R> sums;
    R slopes[rows::most_terms] = {};
    const bool at_once = gradient && !needs_slopes;
    for (std::int64_t j = lane; j < call.columns; j += row_lanes) {
      const R s = rows::row_load(student[j]), t = rows::row_load(teacher[j]);
      const bool removed = rows::row_removed(s, t);
      if (!removed) rows::row_add(sums, terms, normalizers, s, t);
      if (at_once) rows::row_store(removed ? R(0) : rows::row_gradient(terms, normalizers, slopes, s, t), student[j]);
    }
    double* out = values + r * (terms.count + 2);
#pragma unroll
    for (int i = 0; i < rows::most_terms; ++i) {
      if (i >= terms.count) continue;
      const double value = block_total(sums.value[i], shared);
      if (lane == 0) out[i] = terms.terms[i].value_factor * value;
      if (gradient && needs_slopes) slopes[i] = static_cast<R>(block_total(sums.slope[i], shared));
    }
    const double forward = block_total(sums.forward, shared), reverse = block_total(sums.reverse, shared);
    if (lane == 0) out[terms.count] = forward, out[terms.count + 1] = reverse;
    if (!gradient) continue;
    if (!at_once) {
      for (std::int64_t j = lane; j < call.columns; j += row_lanes) {
        const R s = rows::row_load(student[j]), t = rows::row_load(teacher[j]);
        rows::row_store(rows::row_removed(s, t) ? R(0) : rows::row_gradient(terms, normalizers, slopes, s, t), student[j]);
      }
    }
    for (std::int64_t j = call.columns + lane; j < call.student_width; j += row_lanes) rows::row_store(R(0), student[j]);
  }
}

template <class I>
__global__ void __launch_bounds__(row_lanes) cross_entropy_rows_kernel(const rows::RowLabels<I> call, const bool gradient, double* values) {
  using R = typename rows::RowReal<I>::Type;
  __shared__ rows::RowSoftmax<R> lanes[row_lanes];
  __shared__ double shared[row_lanes];
  __shared__ R chosen;
  const RowTerms alone;
  const int lane = threadIdx.x;
  for (std::int64_t r = blockIdx.x; r < call.rows; r += gridDim.x) {
    I* logits = call.logits + r * call.width;
    const std::int64_t target = call.targets[r];
    if (lane == 0) chosen = static_cast<R>(NAN);
    __syncthreads();
    rows::RowSoftmax<R> mine;
    rows::row_clear(mine);
    for (std::int64_t j = lane; j < call.width; j += row_lanes) {
      const R s = rows::row_load(logits[j]);
      if (j == target) chosen = s;
      if (s != -static_cast<R>(INFINITY)) rows::row_push(mine, alone, s);
    }
    lanes[lane] = mine;
    block_merge(lanes, alone);
    const R top = lanes[0].top, log_sum = rows::row_log(lanes[0].sums[0]);
    R below = 0;
    if (call.smoothing > 0)
      for (std::int64_t j = lane; j < call.width; j += row_lanes) below += top - rows::row_load(logits[j]);
    const double sum_below_top = block_total(below, shared);
    if (lane == 0) values[r] = rows::row_cross_entropy(top, log_sum, chosen, sum_below_top, call.width, call.smoothing);
    if (gradient)
      for (std::int64_t j = lane; j < call.width; j += row_lanes)
        rows::row_store(rows::row_cross_entropy_gradient<R>(rows::row_load(logits[j]) - top - log_sum, j == target, call.width, call.smoothing, call.factor), logits[j]);
    __syncthreads();  // before `chosen` and `lanes` are written again
  }
}

unsigned row_blocks(std::int64_t count) { return static_cast<unsigned>(count < 65535 ? count : 65535); }

template <class I>
int launch_divergences(const RowTerms& terms, const rows::RowPair<I>& call, bool gradient, double* values, Stream stream) {
  if (call.rows == 0) return 0;
  divergence_rows_kernel<<<row_blocks(call.rows), row_lanes, 0, stream>>>(terms, call, gradient, values);
  return static_cast<int>(cudaGetLastError());
}

template <class I>
int launch_cross_entropy(const rows::RowLabels<I>& call, bool gradient, double* values, Stream stream) {
  if (call.rows == 0) return 0;
  cross_entropy_rows_kernel<<<row_blocks(call.rows), row_lanes, 0, stream>>>(call, gradient, values);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int divergence_rows(const RowTerms& terms, const rows::RowPair<float>& call, bool gradient, double* values, Stream stream) { return launch_divergences(terms, call, gradient, values, stream); }
int divergence_rows(const RowTerms& terms, const rows::RowPair<rows::Bf16>& call, bool gradient, double* values, Stream stream) { return launch_divergences(terms, call, gradient, values, stream); }
int cross_entropy_rows(const rows::RowLabels<float>& call, bool gradient, double* values, Stream stream) { return launch_cross_entropy(call, gradient, values, stream); }
int cross_entropy_rows(const rows::RowLabels<rows::Bf16>& call, bool gradient, double* values, Stream stream) { return launch_cross_entropy(call, gradient, values, stream); }

const char* row_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace kompakt::cuda
