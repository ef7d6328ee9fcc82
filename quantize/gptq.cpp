// The GPTQ sweep. Rows are independent once the factor U of the inverse Hessian is known: inside a block of columns each row
// runs alone (group fit, rounding, compensation), the columns to the right are updated by one matrix product.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"
#include "core/text.h"
#include "model/parallel.h"
#include "quantize/code_rule.h"
#include "quantize/grid_math.h"
#include "quantize/methods.h"
#include "quantize/vector_lanes.h"

namespace kompakt {
namespace {

// w[i] -= e * u[i]
KOMPAKT_LANES void gptq_subtract(float* w, const float* u, float e, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + lane_count <= n; i += lane_count) {
    Lanes a, b;
    KOMPAKT_LOAD(a, w + i);
    KOMPAKT_LOAD(b, u + i);
    a = a - b * e;
    KOMPAKT_STORE(w + i, a);
  }
  for (; i < n; ++i) w[i] -= u[i] * e;
}

void gptq_subtract(double* w, const double* u, double e, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) w[i] -= u[i] * e;
}

struct GptqFactor {
  at::Tensor upper;       // [K,K]; undefined = diagonal H
  at::Tensor diagonal;    // [K] of U
  double damping = 0;
  std::string path;
};

at::Tensor gptq_damped(const at::Tensor& hessian, double damping) {
  at::Tensor damped = hessian.clone();
  damped.diagonal().add_(damping * hessian.diagonal().mean().item<double>());
  return damped;
}

// Damping is raised tenfold up to three times, then float64 is tried, then only the diagonal is used.
GptqFactor gptq_factor(const at::Tensor& hessian, const LayerOptions& options) {
  GptqFactor factor;
  std::vector<std::pair<double, bool>> ladder;
  for (const double raise : {1.0, 10.0, 100.0}) ladder.emplace_back(std::max(options.damping, raise > 1 ? 1e-4 : 0.0) * raise, options.float64);
  if (!options.float64)
    for (const double raise : {1.0, 100.0}) ladder.emplace_back(std::max(options.damping, raise > 1 ? 1e-4 : 0.0) * raise, true);
  for (std::size_t i = 0; i < ladder.size(); ++i) {
    const auto [damping, wide] = ladder[i];
    const at::Tensor upper = inverse_factor(gptq_damped(hessian, damping).to(wide ? at::kDouble : at::kFloat));
    if (!upper.defined()) continue;
    factor.upper = upper, factor.damping = damping;
    factor.path = wide ? "cholesky float64" : "cholesky";
    if (i > 0) factor.path += damping > options.damping ? ", damping raised" : ", float32 failed";
    factor.diagonal = upper.diagonal().contiguous();
    return factor;
  }
  factor.damping = options.damping;
  factor.path = "diagonal";
  factor.diagonal = gptq_damped(hessian, options.damping).diagonal().clamp_min(1e-30).rsqrt().contiguous();
  return factor;
}

struct GptqOrder {
  std::vector<std::int64_t> column;  // processed position -> column
  std::vector<std::int64_t> group;   // processed group -> group
  std::vector<std::int64_t> begin;   // processed group -> first processed position; one more at the end
};

GptqOrder gptq_order(const at::Tensor& energy, std::int64_t group, bool act_order) {
  const at::Tensor e = energy.to(at::kCPU, at::kDouble).contiguous();
  const double* values = e.data_ptr<double>();
  const std::int64_t columns = e.size(0), groups = (columns + group - 1) / group;
  GptqOrder order;
  order.group.resize(static_cast<std::size_t>(groups));
  std::iota(order.group.begin(), order.group.end(), 0);
  if (act_order) {
    std::vector<double> largest(static_cast<std::size_t>(groups), 0);
    for (std::int64_t k = 0; k < columns; ++k) largest[static_cast<std::size_t>(k / group)] = std::max(largest[static_cast<std::size_t>(k / group)], values[k]);
    std::stable_sort(order.group.begin(), order.group.end(), [&](std::int64_t a, std::int64_t b) { return largest[static_cast<std::size_t>(a)] > largest[static_cast<std::size_t>(b)]; });
  }
  for (const std::int64_t g : order.group) {
    order.begin.push_back(static_cast<std::int64_t>(order.column.size()));
    const std::int64_t first = g * group, end = std::min(columns, first + group);
    for (std::int64_t k = first; k < end; ++k) order.column.push_back(k);
    if (act_order) std::stable_sort(order.column.end() - (end - first), order.column.end(), [&](std::int64_t a, std::int64_t b) { return values[a] > values[b]; });
  }
  order.begin.push_back(columns);
  return order;
}

// [begin, end) in processed positions. A group is fitted when its first block begins, so a block either lies inside one
// group or holds whole groups.
std::vector<std::pair<std::int64_t, std::int64_t>> gptq_blocks(const GptqOrder& order, std::int64_t width) {
  std::vector<std::pair<std::int64_t, std::int64_t>> blocks;
  std::int64_t open = 0;
  for (std::size_t g = 0; g + 1 < order.begin.size(); ++g) {
    const std::int64_t first = order.begin[g], end = order.begin[g + 1];
    if (end - first > width) {
      if (open < first) blocks.emplace_back(open, first);
      for (std::int64_t at = first; at < end; at += width) blocks.emplace_back(at, std::min(end, at + width));
      open = end;
    } else if (end - open > width) {
      blocks.emplace_back(open, first);
      open = first;
    }
  }
  if (open < order.begin.back()) blocks.emplace_back(open, order.begin.back());
  return blocks;
}

template <class Real>
LayerResult gptq_sweep(const at::Tensor& weight, const GptqFactor& factor, const GptqOrder& order, const GridSpec& spec, std::int64_t block_width) {
  const auto type = sizeof(Real) == 8 ? at::kDouble : at::kFloat;
  const Grid& grid = *spec.grid;
  const std::int64_t rows = weight.size(0), columns = weight.size(1), group = spec.group_for(columns), groups = spec.scale_count(columns);
  const at::Tensor permutation = at::tensor(at::ArrayRef<std::int64_t>(order.column), at::kLong);
  at::Tensor work = weight.index_select(1, permutation).to(type).contiguous();  // compensated weights, processed order
  const bool dense = factor.upper.defined();
  const at::Tensor upper = dense ? factor.upper.to(type).contiguous() : at::Tensor(), diagonal = factor.diagonal.to(type).contiguous();
  const Real* u = dense ? upper.data_ptr<Real>() : nullptr;
  const Real* diag = diagonal.data_ptr<Real>();

  LayerResult result;
  Quantized& q = result.quantized;
  q.codes = at::zeros({rows, columns}, at::kChar);
  q.scales = at::zeros({rows, groups});
  if (grid.asymmetric) q.offsets = at::zeros({rows, groups});
  std::int8_t* codes = q.codes.data_ptr<std::int8_t>();
  float* scales = q.scales.data_ptr<float>();
  float* offsets = grid.asymmetric ? q.offsets.data_ptr<float>() : nullptr;
  at::Tensor loss = at::zeros({rows}, at::kDouble);
  double* row_loss = loss.data_ptr<double>();
  const CodeRule rule(grid);
  const auto blocks = gptq_blocks(order, block_width);
  // Chunks of rows run through the whole sweep alone, products included: the split, and so every bit, is independent of threads.
  constexpr std::int64_t chunk = 64;
  at::parallel_for(0, (rows + chunk - 1) / chunk, 1, [&](std::int64_t chunk_begin, std::int64_t chunk_end) {
    at::NoGradGuard no_grad;  // a worker thread has its own mode
    FitScratch scratch;
    std::vector<float> values(static_cast<std::size_t>(group));
    for (std::int64_t c = chunk_begin; c < chunk_end; ++c) {
      const std::int64_t row_begin = c * chunk, row_end = std::min(rows, row_begin + chunk);
      at::Tensor part = work.slice(0, row_begin, row_end);
      Real* w = part.data_ptr<Real>();
      std::size_t next_group = 0;
      for (const auto& [from, to] : blocks) {
        const std::int64_t width = to - from;
        at::Tensor errors = at::empty({row_end - row_begin, width}, type);
        Real* error = errors.data_ptr<Real>();
        for (std::int64_t r = row_begin; r < row_end; ++r) {
          Real* row = w + (r - row_begin) * columns;
          Real* row_error = error + (r - row_begin) * width;
          std::size_t g = next_group;
          GroupScale s;
          float inverse = 0;
          if (g == order.group.size() || order.begin[g] != from) {  // the block continues a group
            const std::int64_t at = r * groups + order.group[g - 1];
            s = {scales[at], offsets ? offsets[at] : 0.0f};
            inverse = grid::inverse_scale(s.scale);
          }
          for (std::int64_t j = from; j < to; ++j) {
            if (g < order.group.size() && order.begin[g] == j) {
              // Fitted on the compensated weights, taken in their own order: without compensation this is what encode does.
              const std::int64_t first = order.group[g] * group, n = order.begin[g + 1] - j, at = r * groups + order.group[g];
              for (std::int64_t i = 0; i < n; ++i) values[static_cast<std::size_t>(order.column[static_cast<std::size_t>(j + i)] - first)] = static_cast<float>(row[j + i]);
              if (!scratch.load(values.data(), nullptr, n)) throw Error(str("row ", r, ": the compensated weights are not finite")).hint("raise damping, or give more calibration data");
              s = grid.fit(scratch);
              inverse = grid::inverse_scale(s.scale);
              scales[at] = s.scale;
              if (offsets) offsets[at] = s.offset;
              ++g;
            }
            const float code = rule.nearest(static_cast<float>(row[j]), inverse, s.offset);
            codes[r * columns + order.column[static_cast<std::size_t>(j)]] = static_cast<std::int8_t>(static_cast<int>(code));
            const Real e = (row[j] - static_cast<Real>(grid::decode_value(rule.value(code), s.scale, s.offset))) / diag[j];
            row_error[j - from] = e;
            row_loss[r] += static_cast<double>(e) * e;
            if (u) gptq_subtract(row + j + 1, u + j * columns + j + 1, e, to - j - 1);
          }
        }
        while (next_group < order.group.size() && order.begin[next_group] < to) ++next_group;
        if (u && to < columns) part.slice(1, to).sub_(at::matmul(errors, upper.slice(0, from, to).slice(1, to)));
      }
    }
  });
  result.sweep_loss = loss.sum().item<double>();
  return result;
}

}  // namespace

at::Tensor inverse_factor(const at::Tensor& hessian) {
  // With J the reversal of order: J H J = L L^T, so H = M M^T with M = J L J upper triangular, and H^-1 = U^T U with U = M^-1.
  // One factorization and one triangular inverse, no inverse of H.
  const at::Tensor reversed = hessian.flip({0, 1}).contiguous();
  const auto [lower, info] = at::linalg_cholesky_ex(reversed);
  if (info.item<int>() != 0) return {};
  const at::Tensor middle = lower.flip({0, 1}).contiguous();
  const at::Tensor upper = at::linalg_solve_triangular(middle, at::eye(hessian.size(0), hessian.options()), /*upper=*/true).triu();
  if (!upper.isfinite().all().item<bool>() || upper.diagonal().min().item<double>() <= 0) return {};
  return upper.contiguous();
}

LayerResult quantize_gptq(const LayerInput& input, const GridSpec& spec, const LayerOptions& options) {
  at::NoGradGuard no_grad;
  at::Tensor weight = input.weight.detach().to(at::kCPU, at::kFloat).contiguous();
  const std::int64_t columns = weight.size(1);
  TORCH_CHECK(input.hessian.defined() && input.hessian.dim() == 2 && input.hessian.size(0) == columns && input.hessian.size(1) == columns, "gptq needs a [K,K] Hessian");
  TORCH_CHECK(!spec.grid->group_fixed || columns % spec.grid->default_group == 0, "the grid's group does not divide the row");
  at::Tensor hessian = input.hessian.detach().to(at::kCPU, options.float64 ? at::kDouble : at::kFloat).clone();
  if (!hessian.isfinite().all().item<bool>()) throw Error("the calibration inputs of a layer are not finite").hint("an activation has overflowed: check the model on the calibration data");
  const at::Tensor dead = hessian.diagonal().le(0);
  const std::int64_t dead_count = dead.sum().item<std::int64_t>();
  if (dead_count > 0) {
    // A column whose input is always zero costs nothing: its weights are free and become zero.
    hessian.diagonal().masked_fill_(dead, 1);
    weight = weight.masked_fill(dead.unsqueeze(0), 0);
  }
  const GptqOrder order = gptq_order(hessian.diagonal(), spec.group_for(columns), options.act_order);
  const at::Tensor permutation = at::tensor(at::ArrayRef<std::int64_t>(order.column), at::kLong);
  const GptqFactor factor = gptq_factor(hessian.index_select(0, permutation).index_select(1, permutation), options);
  const std::int64_t width = std::max<std::int64_t>(1, options.block);
  LayerResult result = options.float64 ? gptq_sweep<double>(weight, factor, order, spec, width) : gptq_sweep<float>(weight, factor, order, spec, width);
  result.damping = factor.damping, result.path = factor.path, result.dead = dead_count;
  return result;
}

double output_error(const at::Tensor& weight, const at::Tensor& decoded, const at::Tensor& hessian) {
  const at::Tensor w = weight.to(hessian.scalar_type()), e = w - decoded.to(hessian.scalar_type());
  const double all = (at::matmul(w, hessian) * w).sum(at::kDouble).item<double>();
  return all > 0 ? (at::matmul(e, hessian) * e).sum(at::kDouble).item<double>() / all : 0;
}

}  // namespace kompakt
