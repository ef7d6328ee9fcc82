// The sweep: rows are independent once the factor U of the inverse Hessian is known and the mask of a block is chosen. Inside a
// block of columns each row runs alone; what the blocks before it have left behind comes in one matrix product.
#include "prune/sparsegpt.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "core/error.h"
#include "core/text.h"
#include "model/parallel.h"
#include "model/products.h"
#include "train/calibration.h"
#include "train/sparsity_choice.h"

namespace kompakt {
namespace {

using at::Tensor;

constexpr std::int64_t sparsegpt_row_chunk = 96;

// w[i] -= e * u[i]
void sparsegpt_subtract(float* w, const float* u, float e, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) w[i] -= u[i] * e;
}

// work(first, end) for chunks of rows. The split, and so every bit, is independent of the number of threads.
void sparsegpt_rows(std::int64_t rows, std::int64_t chunk, const std::function<void(std::int64_t, std::int64_t)>& work) {
  for_each_batch(c10::kCPU, static_cast<std::size_t>((rows + chunk - 1) / chunk), [&](std::size_t i) {
    const std::int64_t first = static_cast<std::int64_t>(i) * chunk;
    work(first, std::min(rows, first + chunk));
  });
}

}  // namespace

InputMetric input_metric(const Tensor& hessian, double damping, bool factorize) {
  const at::NoGradGuard no_grad;
  TORCH_CHECK(hessian.defined() && hessian.dim() == 2 && hessian.size(0) == hessian.size(1), "a [K,K] second moment is needed");
  InputMetric metric;
  metric.hessian = hessian.detach().to(at::kCPU, at::kFloat).clone();
  if (!std::isfinite(metric.hessian.sum(at::kDouble).item<double>())) throw Error("the calibration inputs of a layer are not finite").hint("an activation has overflowed: check the model on the calibration data");
  metric.dead = metric.hessian.diagonal().le(0);
  metric.dead_count = metric.dead.sum().item<std::int64_t>();
  if (metric.dead_count > 0) metric.hessian.diagonal().masked_fill_(metric.dead, 1);
  if (factorize) metric.factor = damped_inverse_factor(metric.hessian, damping, false);
  return metric;
}

SparseMatrix sparsegpt(const Tensor& weight, const InputMetric& metric, const SparsityPattern& pattern, std::int64_t block) {
  const at::NoGradGuard no_grad;
  const std::int64_t rows = weight.size(0), columns = weight.size(1);
  TORCH_CHECK(metric.hessian.size(0) == columns, "second moments of other inputs");
  check_pattern(pattern, columns);
  const std::int64_t width = pattern.grouped() ? std::max(pattern.m, block / pattern.m * pattern.m) : std::max<std::int64_t>(1, block);
  SparseMatrix out;
  out.weight = weight.detach().to(at::kCPU, at::kFloat).clone(at::MemoryFormat::Contiguous);
  if (metric.dead_count > 0) out.weight.masked_fill_(metric.dead.unsqueeze(0), 0);
  Tensor removed = out.weight.eq(0).to(at::kByte).contiguous();
  std::uint8_t* gone = removed.data_ptr<std::uint8_t>();
  float* w = out.weight.data_ptr<float>();
  const Tensor upper = metric.factor.upper.defined() ? metric.factor.upper.to(at::kFloat).contiguous() : Tensor();  // undefined: no compensation
  const Tensor diagonal = metric.factor.diagonal.to(at::kFloat).contiguous();
  const float* u = upper.defined() ? upper.data_ptr<float>() : nullptr;
  const float* diag = diagonal.data_ptr<float>();
  Tensor loss = at::zeros({rows}, at::kDouble);
  double* row_loss = loss.data_ptr<double>();

  Tensor errors = u ? at::zeros({rows, columns}, at::kFloat) : Tensor();  // their negatives, e_j / U_jj
  float* error = u ? errors.data_ptr<float>() : nullptr;
  for (std::int64_t from = 0; from < columns; from += width) {
    const std::int64_t to = std::min(columns, from + width);
    if (u && from > 0)
      sparsegpt_rows(rows, sparsegpt_row_chunk, [&](std::int64_t first, std::int64_t end) {
        Tensor part = out.weight.slice(0, first, end).slice(1, from, to);
        matrix_product(part, errors.slice(0, first, end).slice(1, 0, from), upper.slice(0, 0, from).slice(1, from, to), /*add=*/true);
      });
    if (!pattern.grouped()) choose_share(w, diag, rows, columns, from, to, pattern.sparsity, gone);
    sparsegpt_rows(rows, sparsegpt_row_chunk, [&](std::int64_t first, std::int64_t end) {
      for (std::int64_t r = first; r < end; ++r) {
        float* row = w + r * columns;
        std::uint8_t* row_gone = gone + r * columns;
        for (std::int64_t j = from; j < to; ++j) {
          if (pattern.grouped() && j % pattern.m == 0) choose_in_group(row + j, diag + j, pattern, row_gone + j);
          if (!row_gone[j]) continue;
          const float e = row[j] / diag[j];
          row[j] = 0;
          row_loss[r] += static_cast<double>(e) * e;
          if (!u) continue;
          error[r * columns + j] = -e;
          sparsegpt_subtract(row + j + 1, u + j * columns + j + 1, e, to - j - 1);
        }
      }
    });
  }
  out.mask = removed.eq(0);
  out.sweep_loss = loss.sum().item<double>();
  if (!out.weight.isfinite().all().item<bool>()) throw Error("the compensated weights are not finite").hint("raise damping, or give more calibration data");
  return out;
}

Tensor refit_support(const Tensor& weight, const Tensor& mask, const Tensor& hessian, double damping) {
  const at::NoGradGuard no_grad;
  const Tensor w = weight.detach().to(at::kCPU, at::kFloat).contiguous(), m = mask.to(at::kCPU);
  Tensor h = hessian.detach().to(at::kCPU, at::kFloat).clone();
  h.diagonal().add_(damping * h.diagonal().mean().item<double>());
  Tensor out = w.masked_fill(m.logical_not(), 0);
  Tensor target;  // H w of every row
  {
    const SingleThread single;  // one product for all rows, on any machine the same
    target = at::matmul(w, h);
  }
  sparsegpt_rows(w.size(0), 1, [&](std::int64_t first, std::int64_t end) {
    for (std::int64_t r = first; r < end; ++r) {
      const Tensor support = m[r].nonzero().squeeze(-1);
      if (support.numel() == 0 || support.numel() == w.size(1)) continue;
      const auto [factor, failed] = at::linalg_cholesky_ex(h.index_select(0, support).index_select(1, support));
      if (failed.item<int>() != 0) continue;
      const Tensor solved = at::cholesky_solve(target[r].index_select(0, support).unsqueeze(1), factor).squeeze(1);
      if (solved.isfinite().all().item<bool>()) out[r].index_copy_(0, support, solved);
    }
  });
  return out;
}

}  // namespace kompakt
