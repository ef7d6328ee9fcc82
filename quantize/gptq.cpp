// The GPTQ sweep. Rows are independent once the factor U of the inverse Hessian is known: inside a block of columns each row
// runs alone (group fit, rounding, compensation); what the blocks before it have left behind comes in one matrix product.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/text.h"
#include "model/parallel.h"
#include "model/products.h"
#include "quantize/code_rule.h"
#include "quantize/entropy_steps.h"
#include "quantize/factors.h"
#include "quantize/grid_math.h"
#include "quantize/kquant.h"
#include "quantize/methods.h"
#include "quantize/vector_lanes.h"
#include "train/sparsity_choice.h"

namespace kompakt {
namespace {

// w[i] -= e * u[i]
void gptq_subtract(float* w, const float* u, float e, std::int64_t n) { lanes_add(w, u, -e, n); }

void gptq_subtract(double* w, const double* u, double e, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) w[i] -= u[i] * e;
}

// [begin, end) in processed positions. A group is fitted when its first block begins, so a block either lies inside one
// group or holds whole groups.
std::vector<std::pair<std::int64_t, std::int64_t>> gptq_blocks(const ColumnOrder& order, std::int64_t width) {
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

// Marks what would go of the n weights of one row and one group of scales if all were chosen now: its scale is fitted to the rest.
template <class Real>
void expect_zeros(const Real* w, const Real* diagonal, std::int64_t n, const SparsityPattern& pattern, std::uint8_t* gone) {
  if (!pattern.grouped()) return choose_share(w, diagonal, 1, n, 0, n, pattern.sparsity, gone);
  for (std::int64_t i = 0; i < n; i += pattern.m) choose_in_group(w + i, diagonal + i, pattern, gone + i);
}

template <class Real>
LayerResult gptq_sweep(const at::Tensor& weight, const at::Tensor& mask, const SparsityPattern* sparsity, const InverseFactor& factor, const ColumnOrder& order, const GridSpec& spec, std::int64_t block_width, const at::Tensor& steps) {
  const auto type = sizeof(Real) == 8 ? at::kDouble : at::kFloat;
  const Grid& grid = *spec.grid;
  const std::int64_t rows = weight.size(0), columns = weight.size(1), group = spec.span_for(columns), groups = spec.scale_count(columns);
  const std::int64_t width_of_scale = spec.group_for(columns), scales_of_group = (group + width_of_scale - 1) / width_of_scale;  // 1, but for super-blocks
  const at::Tensor permutation = at::tensor(at::ArrayRef<std::int64_t>(order.column), at::kLong);
  at::Tensor work = weight.index_select(1, permutation).to(type).contiguous();  // compensated weights, processed order
  at::Tensor removed;  // [N,K] 1 = pruned, processed order
  if (mask.defined()) removed = mask.to(at::kCPU).logical_not().index_select(1, permutation).to(at::kByte).contiguous();
  else if (sparsity) removed = at::zeros({rows, columns}, at::kByte);
  std::uint8_t* gone = removed.defined() ? removed.data_ptr<std::uint8_t>() : nullptr;
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
  const float* fixed = steps.defined() ? steps.const_data_ptr<float>() : nullptr;  // scales that are known already
  const CodeRule rule(grid);
  const auto blocks = gptq_blocks(order, block_width);
  // Chunks of rows run through the whole sweep alone, products included: the split, and so every bit, is independent of threads.
  // A block takes what all errors in front of it make of its weights in one product, when its turn comes.
  constexpr std::int64_t chunk = 96;
  at::parallel_for(0, (rows + chunk - 1) / chunk, 1, [&](std::int64_t chunk_begin, std::int64_t chunk_end) {
    at::NoGradGuard no_grad;  // a worker thread has its own mode
    FitScratch scratch;
    std::vector<float> values(static_cast<std::size_t>(group)), weights(grid.kquant ? values.size() : 0);
    std::vector<std::uint8_t> expected;  // of a group in front of its fit
    for (std::int64_t c = chunk_begin; c < chunk_end; ++c) {
      const std::int64_t row_begin = c * chunk, row_end = std::min(rows, row_begin + chunk);
      at::Tensor part = work.slice(0, row_begin, row_end);
      Real* w = part.data_ptr<Real>();
      at::Tensor errors = u ? at::empty({row_end - row_begin, columns}, type) : at::Tensor();  // their negatives, e_j / U_jj
      Real* error = u ? errors.data_ptr<Real>() : nullptr;
      std::size_t next_group = 0;
      std::int64_t known = 0;  // the first error that the block's weights do not hold yet
      for (const auto& [from, to] : blocks) {
        const bool begins = next_group < order.group.size() && order.begin[next_group] == from;
        if (begins) known = 0;
        if (u && from > known) {  // a group that goes on behind the block is fitted as a whole, and so made up for as a whole
          const std::int64_t end = begins ? std::max(to, order.begin[next_group + 1]) : to;
          at::Tensor block = part.slice(1, from, end);
          matrix_product(block, errors.slice(1, known, from), upper.slice(0, known, from).slice(1, from, end), /*add=*/true);
        }
        if (begins) known = from;
        if (sparsity && !sparsity->grouped()) choose_share(w, diag, row_end - row_begin, columns, from, to, sparsity->sparsity, gone + row_begin * columns);
        for (std::int64_t r = row_begin; r < row_end; ++r) {
          Real* row = w + (r - row_begin) * columns;
          std::uint8_t* row_gone = gone ? gone + r * columns : nullptr;
          std::size_t g = next_group;
          GroupScale s;
          float inverse = 0;
          if (!grid.kquant && (g == order.group.size() || order.begin[g] != from)) {  // the block continues a group
            const std::int64_t at = r * groups + order.group[g - 1];
            s = {scales[at], offsets ? offsets[at] : 0.0f};
            inverse = grid::inverse_scale(s.scale);
          }
          for (std::int64_t j = from; j < to; ++j) {
            if (g < order.group.size() && order.begin[g] == j) {
              // Fitted on the compensated weights, taken in their own order: without compensation this is what encode does.
              const std::int64_t first = order.group[g] * group, n = order.begin[g + 1] - j, at = r * groups + order.group[g] * scales_of_group;
              const std::uint8_t* zero = row_gone ? row_gone + j : nullptr;
              if (sparsity && !fixed && (sparsity->grouped() || j + n > to)) {  // as they would be chosen now
                expected.assign(zero, zero + n);
                expect_zeros(row + j, diag + j, n, *sparsity, expected.data());
                zero = expected.data();
              }
              for (std::int64_t i = 0; i < n; ++i) values[static_cast<std::size_t>(order.column[static_cast<std::size_t>(j + i)] - first)] = zero && zero[i] ? 0.0f : static_cast<float>(row[j + i]);
              const auto not_finite = [&] { return Error(str("row ", r, ": the compensated weights are not finite")).hint("raise damping, or give more calibration data"); };
              if (grid.kquant) {
                // All scales of the super-block, as the loss of the sweep weighs its columns.
                for (std::int64_t i = 0; i < n; ++i) weights[static_cast<std::size_t>(order.column[static_cast<std::size_t>(j + i)] - first)] = static_cast<float>(1 / (diag[j + i] * diag[j + i]));
                const float needed = grid.kquant->fit(values.data(), weights.data(), scales + at, offsets ? offsets + at : nullptr);
                if (std::isnan(needed)) throw not_finite();
                if (!(needed < grid::largest_half)) throw Error(str("row ", r, " needs a scale of ", needed, ", more than half precision holds")).hint("keep this tensor in float (keep_float), or raise damping");
              } else {
                if (!scratch.load(values.data(), nullptr, n)) throw not_finite();
                s = fixed ? GroupScale{fixed[r], 0} : grid.fit(scratch);
                inverse = grid::inverse_scale(s.scale);
                scales[at] = s.scale;
                if (offsets) offsets[at] = s.offset;
              }
              ++g;
            }
            if (grid.kquant) {  // columns of one super-block are visited in any order
              const std::int64_t at = r * groups + order.column[static_cast<std::size_t>(j)] / width_of_scale;
              s = {scales[at], offsets ? offsets[at] : 0.0f};
              inverse = grid::inverse_scale(s.scale);
            }
            if (sparsity && sparsity->grouped() && order.column[static_cast<std::size_t>(j)] % sparsity->m == 0) choose_in_group(row + j, diag + j, *sparsity, row_gone + j);
            // A pruned weight is rounded to zero, and what compensation made of it is made up for like any error.
            const float code = rule.nearest(row_gone && row_gone[j] ? 0.0f : static_cast<float>(row[j]), inverse, s.offset);
            codes[r * columns + order.column[static_cast<std::size_t>(j)]] = static_cast<std::int8_t>(static_cast<int>(code));
            const Real e = (row[j] - static_cast<Real>(grid::decode_value(rule.value(code), s.scale, s.offset))) / diag[j];
            row_loss[r] += static_cast<double>(e) * e;
            if (!u) continue;
            error[(r - row_begin) * columns + j] = -e;
            gptq_subtract(row + j + 1, u + j * columns + j + 1, e, to - j - 1);
          }
        }
        while (next_group < order.group.size() && order.begin[next_group] < to) ++next_group;
      }
    }
  });
  result.sweep_loss = loss.sum().item<double>();
  if (sparsity) result.mask = at::empty({rows, columns}, at::kBool).index_copy_(1, permutation, removed.eq(0));
  return result;
}

// n:m inside of a group of scales, whose columns are consecutive then, and inside of a block.
void check_groups(const SparsityPattern& pattern, std::int64_t columns, std::int64_t group, std::int64_t block) {
  check_pattern(pattern, columns);
  if (pattern.grouped() && (group % pattern.m != 0 || (group > block && block % pattern.m != 0)))
    throw Error(str("groups of ", group, " weights, updated by ", block, " columns, do not divide into ", pattern.m)).given(pattern.text()).hint("choose a pattern such as 2:4 whose second number divides the grid's group");
}

}  // namespace

LayerResult quantize_gptq(const LayerInput& input, const GridSpec& spec, const LayerOptions& options) {
  at::NoGradGuard no_grad;
  at::Tensor weight = input.weight.detach().to(at::kCPU, at::kFloat).contiguous();
  const std::int64_t columns = weight.size(1), group = spec.span_for(columns);
  TORCH_CHECK(!spec.grid->group_fixed || columns % group == 0, "the grid's group does not divide the row");
  InputFactors own;
  InputFactors& factors = input.factors ? *input.factors : own;
  if (factors.group != group) factor_input(input, group, options, factors);
  // A column whose input is always zero costs nothing: its weights are free and become zero.
  if (factors.dead_count > 0) weight = weight.masked_fill(factors.dead.unsqueeze(0), 0);
  const std::int64_t width = std::max<std::int64_t>(1, options.block);
  const at::Tensor steps = entropy_row_steps(spec, weight, input.row_importance);
  const SparsityPattern* sparsity = options.sparsity && !input.dense ? &*options.sparsity : nullptr;
  if (sparsity) check_groups(*sparsity, columns, group, width);
  LayerResult result = options.float64 ? gptq_sweep<double>(weight, input.mask, sparsity, factors.factor, factors.order, spec, width, steps) : gptq_sweep<float>(weight, input.mask, sparsity, factors.factor, factors.order, spec, width, steps);
  result.damping = factors.factor.damping, result.path = factors.factor.path, result.dead = factors.dead_count;
  return result;
}

double output_error(const at::Tensor& weight, const at::Tensor& decoded, const at::Tensor& hessian) {
  const at::Tensor w = weight.to(hessian.scalar_type()), e = w - decoded.to(hessian.scalar_type());
  const double all = (at::matmul(w, hessian) * w).sum(at::kDouble).item<double>();
  return all > 0 ? (at::matmul(e, hessian) * e).sum(at::kDouble).item<double>() / all : 0;
}

}  // namespace kompakt
