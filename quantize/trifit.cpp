// Polish after the sweep, and the target that makes up for the drift of the quantized prefix.
// Per row r with E = decoded - w: scales of all groups jointly (normal equations B H B^T a = B H w, B = masked code rows),
// then each code in turn (the best level for w_j given all others is the one nearest to decoded_j - (E H)_j / H_jj).
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "model/parallel.h"
#include "quantize/code_rule.h"
#include "quantize/factors.h"
#include "quantize/grid_math.h"
#include "quantize/kquant_polish.h"
#include "quantize/methods.h"
#include "quantize/vector_lanes.h"

namespace kompakt {
namespace {

// What every chunk of rows sees of the Hessian.
struct TrifitMetric {
  at::Tensor hessian;      // [K,K] float32, positive on its diagonal
  at::Tensor inverse;      // [K] 1 / H_jj
  at::Tensor group_rows;   // [G,K] float32 sums of the rows of every group; only for grids with free offsets
  at::Tensor group_blocks; // [G,G] float64 sums of its blocks; likewise
};

// The rows of one chunk, with everything the two subproblems share.
struct TrifitChunk {
  const GridSpec& spec;
  const TrifitMetric& metric;
  at::Tensor weight;    // [n,K] target
  at::Tensor goal;      // [n,K] weight H
  at::Tensor codes;     // [n,K] int8
  at::Tensor scales;    // [n,G]
  at::Tensor offsets;   // [n,G] or undefined
  at::Tensor kept;      // [n,K] bool or undefined: false = its code stands for zero and stays
  std::int64_t group, groups, columns, rows;

  // Codes as they multiply the scale: an integer zero point belongs to the code.
  at::Tensor multipliers() const {
    at::Tensor t = code_values(*spec.grid, codes);
    return spec.grid->integer_zero ? t + spread(zeros()) : t;
  }
  // offset / scale of an integer zero point.
  at::Tensor zeros() const { return at::where(scales.eq(0), at::zeros_like(scales), (offsets / at::where(scales.eq(0), at::ones_like(scales), scales)).round()); }
  at::Tensor spread(const at::Tensor& per_group) const { return per_group.repeat_interleave(group, 1).slice(1, 0, columns); }
  at::Tensor decoded() const {
    at::Tensor w = code_values(*spec.grid, codes) * spread(scales);
    return offsets.defined() ? w + spread(offsets) : w;
  }
};

// Scales and offsets as they are stored.
void trifit_round(const GridSpec& spec, at::Tensor& scales) {
  float* s = scales.data_ptr<float>();
  for (std::int64_t i = 0; i < scales.numel(); ++i) s[i] = spec.grid->store_scale(s[i]);
}

void trifit_round_offsets(at::Tensor& offsets) {
  float* o = offsets.data_ptr<float>();
  for (std::int64_t i = 0; i < offsets.numel(); ++i) o[i] = grid::round_to_half(o[i]);
}

// Joint least squares of all scales (and free offsets) of every row. Rows whose objective would not fall keep theirs.
void trifit_refit(TrifitChunk& c, bool stored) {
  const bool free_offsets = c.offsets.defined() && !c.spec.grid->integer_zero;
  const at::Tensor t = c.multipliers().contiguous();
  const std::int64_t unknowns = c.groups * (free_offsets ? 2 : 1), square = unknowns * unknowns;
  at::Tensor normal = at::empty({c.rows, unknowns, unknowns}, at::kDouble), right = at::empty({c.rows, unknowns}, at::kDouble);
  at::Tensor silent = at::empty({c.rows, c.groups}, at::kBool);  // groups without any multiplier
  double* n = normal.data_ptr<double>();
  double* b = right.data_ptr<double>();
  const float* multiplier = t.data_ptr<float>();
  const float* goal = c.goal.data_ptr<float>();
  for (std::int64_t g = 0; g < c.groups; ++g) {
    // Row g of B H from the group's own columns on: what lies before is known by symmetry.
    const std::int64_t first = g * c.group, end = std::min(c.columns, first + c.group), width = c.columns - first;
    const at::Tensor product = at::matmul(t.slice(1, first, end), c.metric.hessian.slice(0, first, end).slice(1, first)).contiguous();
    const float* p = product.data_ptr<float>();
    for (std::int64_t row = 0; row < c.rows; ++row) {
      const float* tr = multiplier + row * c.columns;
      double* nr = n + row * square;
      for (std::int64_t other = g; other < c.groups; ++other) {
        const std::int64_t from = other * c.group, length = std::min(c.columns, from + c.group) - from;
        nr[g * unknowns + other] = nr[other * unknowns + g] = lanes_dot(p + row * width + from - first, tr + from, length);
      }
      b[row * unknowns + g] = lanes_dot(goal + row * c.columns + first, tr + first, end - first);
      silent.data_ptr<bool>()[row * c.groups + g] = lanes_dot(tr + first, tr + first, end - first) == 0;
    }
  }
  if (free_offsets) {  // the basis of an offset is a group of ones, the same for every row
    const float* sums = c.metric.group_rows.data_ptr<float>();
    const double* blocks = c.metric.group_blocks.data_ptr<double>();
    for (std::int64_t row = 0; row < c.rows; ++row) {
      const float* tr = multiplier + row * c.columns;
      const float* gr = goal + row * c.columns;
      double* nr = n + row * square;
      for (std::int64_t g = 0; g < c.groups; ++g) {
        const std::int64_t ones = c.groups + g;
        for (std::int64_t other = 0; other < c.groups; ++other) {
          const std::int64_t from = other * c.group, length = std::min(c.columns, from + c.group) - from;
          nr[ones * unknowns + other] = nr[other * unknowns + ones] = lanes_dot(sums + g * c.columns + from, tr + from, length);
          nr[ones * unknowns + c.groups + other] = blocks[g * c.groups + other];
        }
        double sum = 0;
        for (std::int64_t j = g * c.group; j < std::min(c.columns, (g + 1) * c.group); ++j) sum += gr[j];
        b[row * unknowns + ones] = sum;
      }
    }
  }
  const at::Tensor gram = normal.clone();  // without the ridge: judges candidates
  const at::Tensor ridge = normal.diagonal(0, 1, 2).mean(1).clamp_min(1e-30) * 1e-6;
  normal.diagonal(0, 1, 2).add_(ridge.unsqueeze(1));
  const auto [lower, info] = at::linalg_cholesky_ex(normal);
  at::Tensor solution = at::cholesky_solve(right.unsqueeze(2), lower).squeeze(2);
  at::Tensor scales = solution.slice(1, 0, c.groups).to(at::kFloat), offsets = free_offsets ? solution.slice(1, c.groups).to(at::kFloat) : at::Tensor();
  // A group without any non-zero multiplier says nothing about its scale; one whose sign turned is legal only on some grids.
  at::Tensor keep = silent.logical_or(scales.isfinite().logical_not()).logical_or(scales.abs().gt(grid::largest_half));
  TrifitChunk candidate = c;
  at::Tensor sign;  // of the codes, where it turns
  if (!c.spec.grid->signed_scale && c.spec.grid->code_min == -c.spec.grid->code_max) {  // mirrored codes: the sign moves into them
    sign = at::where(scales.lt(0).logical_and(keep.logical_not()), at::full_like(scales, -1), at::ones_like(scales));
    candidate.codes = (c.codes * c.spread(sign).to(at::kChar)).contiguous();
    scales = scales * sign;
  }
  if (!c.spec.grid->signed_scale) keep = keep.logical_or(scales.le(0));
  scales = at::where(keep, c.scales, scales).contiguous();
  if (free_offsets) offsets = at::where(keep, c.offsets, offsets).contiguous();
  if (stored) {
    trifit_round(c.spec, scales);
    if (free_offsets) trifit_round_offsets(offsets);
  }
  candidate.scales = scales;
  if (free_offsets) candidate.offsets = offsets;
  if (c.spec.grid->integer_zero) candidate.offsets = scales * c.zeros();
  // tr(E H E^T) of a row is x^T A x - 2 x^T b and a constant: no product with H is needed to judge the candidate.
  const auto value = [&](const at::Tensor& scale, const at::Tensor& offset) {
    const at::Tensor x = (free_offsets ? at::cat({scale, offset}, 1) : scale).to(at::kDouble);
    return (at::matmul(gram, x.unsqueeze(2)).squeeze(2) * x).sum(1) - 2 * (right * x).sum(1);
  };
  const at::Tensor after = value(sign.defined() ? candidate.scales * sign : candidate.scales, candidate.offsets), before = value(c.scales, c.offsets);
  const at::Tensor better = after.lt(before).logical_and(info.eq(0)).unsqueeze(1);
  c.codes = at::where(better, candidate.codes, c.codes).contiguous();
  c.scales = at::where(better, candidate.scales, c.scales).contiguous();
  if (c.offsets.defined()) c.offsets = at::where(better, candidate.offsets, c.offsets).contiguous();
}

// One cyclic pass over the codes of every row. The objective before and after comes with it for free.
// The columns of a block are settled row by row; what they do to the columns to come is added behind the block, where a row of H
// serves all rows of the chunk.
std::pair<double, double> trifit_descend(TrifitChunk& c) {
  const Grid& grid = *c.spec.grid;
  const CodeRule rule(grid);
  const std::int64_t columns = c.columns;
  constexpr std::int64_t block = 64;
  at::Tensor values = c.decoded().contiguous();
  const at::Tensor error = values - c.weight;
  at::Tensor residual = at::matmul(error, c.metric.hessian).contiguous();
  float* w = values.data_ptr<float>();
  float* r = residual.data_ptr<float>();
  const float* h = c.metric.hessian.data_ptr<float>();
  const float* inverse_diagonal = c.metric.inverse.data_ptr<float>();
  std::int8_t* codes = c.codes.data_ptr<std::int8_t>();
  const float* scales = c.scales.data_ptr<float>();
  const float* offsets = c.offsets.defined() ? c.offsets.data_ptr<float>() : nullptr;
  const bool* kept = c.kept.defined() ? c.kept.const_data_ptr<bool>() : nullptr;
  const double before = lanes_dot(error.data_ptr<float>(), r, error.numel());
  double gained = 0;
  at::Tensor changes = at::empty({c.rows, block});
  float* change = changes.data_ptr<float>();
  for (std::int64_t from = 0; from < columns; from += block) {
    const std::int64_t to = std::min(columns, from + block);
    std::int64_t changed = 0;
    for (std::int64_t row = 0; row < c.rows; ++row) {
      float* rr = r + row * columns;
      float* row_change = change + row * block;
      std::int64_t g = -1, group_end = from;
      float scale = 0, offset = 0, inverse = 0;
      for (std::int64_t j = from; j < to; ++j) {
        row_change[j - from] = 0;
        if (j >= group_end) {
          g = j / c.group, group_end = (g + 1) * c.group;
          scale = scales[row * c.groups + g], offset = offsets ? offsets[row * c.groups + g] : 0.0f;
          inverse = scale == 0 ? 0.0f : grid::inverse_scale(scale);
        }
        const std::int64_t at = row * columns + j;
        if (scale == 0 || (kept && !kept[at])) continue;
        const float target = w[at] - rr[j] * inverse_diagonal[j];
        const float code = rule.nearest(target, inverse, offset);
        const float value = grid::decode_value(rule.value(code), scale, offset), delta = value - w[at];
        if (delta == 0) continue;
        // Nearest by rounding and nearest by value may differ at a tie: only a real gain changes a code.
        const float gain = delta * (2 * rr[j] + delta * h[j * columns + j]);
        if (!(gain < 0)) continue;
        codes[at] = static_cast<std::int8_t>(static_cast<int>(code));
        w[at] = value;
        row_change[j - from] = delta;
        gained += gain;
        ++changed;
        // From a whole lane on; columns that were visited get it as well, which nothing reads.
        const std::int64_t lane = from + (j - from) / lane_count * lane_count;
        lanes_add(rr + lane, h + j * columns + lane, delta, to - lane);
      }
    }
    if (to == columns || changed == 0) continue;
    if (changed * 4 > c.rows * (to - from)) {  // so many that a dense product is faster
      residual.slice(1, to).addmm_(changes.slice(1, 0, to - from), c.metric.hessian.slice(0, from, to).slice(1, to));
      continue;
    }
    for (std::int64_t j = from; j < to; ++j)
      for (std::int64_t row = 0; row < c.rows; ++row)
        if (const float delta = change[row * block + j - from]; delta != 0) lanes_add(r + row * columns + to, h + j * columns + to, delta, columns - to);
  }
  return {before, before + gained};
}

}  // namespace

void polish(const at::Tensor& weight, const at::Tensor& hessian, const GridSpec& spec, std::int64_t rounds, Quantized& quantized, std::vector<double>& objective, const at::Tensor& mask) {
  at::NoGradGuard no_grad;
  if (spec.grid->kquant) return kquant_polish(weight, hessian, spec, rounds, quantized, objective, mask);
  const std::int64_t rows = weight.size(0), columns = weight.size(1), group = spec.group_for(columns), groups = spec.scale_count(columns);
  const at::Tensor h = hessian.to(at::kFloat).contiguous(), w = weight.to(at::kFloat).contiguous(), kept = mask.defined() ? mask.to(at::kCPU, at::kBool).contiguous() : at::Tensor();
  TrifitMetric metric{h, h.diagonal().reciprocal().contiguous(), {}, {}};
  if (spec.grid->asymmetric && !spec.grid->integer_zero) {
    std::vector<at::Tensor> sums;
    for (std::int64_t g = 0; g < groups; ++g) sums.push_back(h.slice(0, g * group, std::min(columns, (g + 1) * group)).sum(0, false, at::kDouble));
    const at::Tensor wide = at::stack(sums);
    metric.group_rows = wide.to(at::kFloat).contiguous();
    std::vector<at::Tensor> blocks;
    for (std::int64_t g = 0; g < groups; ++g) blocks.push_back(wide.slice(1, g * group, std::min(columns, (g + 1) * group)).sum(1));
    metric.group_blocks = at::stack(blocks, 1).contiguous();
  }
  const std::int64_t steps = 2 * rounds + 3;  // start; refit, descent per round; stored refit, last descent
  constexpr std::int64_t chunk = 128;         // fixed: results do not depend on threads
  const std::int64_t chunks = (rows + chunk - 1) / chunk;
  at::Tensor history = at::zeros({chunks, steps}, at::kDouble);
  Quantized& q = quantized;
  at::parallel_for(0, chunks, 1, [&](std::int64_t begin, std::int64_t end) {
    at::NoGradGuard worker_no_grad;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t first = i * chunk, last = std::min(rows, first + chunk);
      const at::Tensor part = w.slice(0, first, last);
      TrifitChunk c{spec, metric, part, at::matmul(part, h), q.codes.slice(0, first, last).clone(), q.scales.slice(0, first, last).clone(),
                    q.offsets.defined() ? q.offsets.slice(0, first, last).clone() : at::Tensor(), kept.defined() ? kept.slice(0, first, last) : at::Tensor(), group, groups, columns, last - first};
      double* out = history.data_ptr<double>() + i * steps;
      const auto descend = [&] {
        const auto [before, after] = trifit_descend(c);
        *out++ = before, *out++ = after;
      };
      const at::Tensor error = c.decoded() - c.weight;
      *out++ = (at::matmul(error, h).to(at::kDouble) * error.to(at::kDouble)).sum().item<double>();
      for (std::int64_t round = 0; round < rounds; ++round) trifit_refit(c, spec.grid->coarse_scale), descend();
      // Scales as they are stored: a refit judged after its rounding, or the plain rounding of what there is.
      trifit_refit(c, true);
      const at::Tensor zeros = spec.grid->integer_zero ? c.zeros() : at::Tensor();
      trifit_round(spec, c.scales);
      if (zeros.defined())
        c.offsets = (c.scales * zeros).contiguous();
      else if (c.offsets.defined())
        trifit_round_offsets(c.offsets);
      descend();
      q.codes.slice(0, first, last).copy_(c.codes);
      q.scales.slice(0, first, last).copy_(c.scales);
      if (q.offsets.defined()) q.offsets.slice(0, first, last).copy_(c.offsets);
    }
  });
  const at::Tensor sums = history.sum(0);
  objective.assign(sums.data_ptr<double>(), sums.data_ptr<double>() + steps);
}

at::Tensor teacher_target(const LayerInput& input, double alpha, double damping) {
  at::NoGradGuard no_grad;
  const at::Tensor weight = input.weight.detach().to(at::kCPU, at::kFloat).contiguous();
  if (alpha == 0 || !input.cross.defined()) return weight;
  InputFactors own;
  InputFactors& factors = input.factors ? *input.factors : own;
  const std::int64_t rows = weight.size(0), columns = weight.size(1);
  if (!factors.tried) {
    factors.tried = true;
    const SingleThread single;
    at::Tensor damped = input.hessian.to(at::kDouble).clone();
    const at::Tensor diagonal = damped.diagonal().clone();
    damped.diagonal().masked_fill_(diagonal.le(0), 1);
    damped.diagonal().add_(std::max(damping, 1e-4) * diagonal.mean().item<double>());
    const auto [lower, info] = at::linalg_cholesky_ex(damped);
    if (info.item<int>() == 0) factors.lower = lower;
  }
  if (!factors.lower.defined()) return weight;
  const at::Tensor drift = input.cross - input.hessian;
  // X (H + damping)^-1 in chunks of the rows of X: every bit is independent of threads.
  const auto solved = [&](std::int64_t count, const std::function<at::Tensor(std::int64_t, std::int64_t)>& right, at::Tensor& out) {
    constexpr std::int64_t chunk = 128;
    at::parallel_for(0, (count + chunk - 1) / chunk, 1, [&](std::int64_t begin, std::int64_t end) {
      at::NoGradGuard worker_no_grad;
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t first = i * chunk, last = std::min(count, first + chunk);
        out.slice(0, first, last).copy_(at::cholesky_solve(right(first, last).to(at::kDouble).t().contiguous(), factors.lower).t());
      }
    });
  };
  at::Tensor target = at::empty_like(weight);
  if (!factors.shift.defined() && rows < columns) {  // few rows: theirs alone are solved
    solved(rows, [&](std::int64_t first, std::int64_t last) { return at::matmul(weight.slice(0, first, last).to(drift.scalar_type()), drift); }, target);
    return weight + alpha * target;
  }
  if (!factors.shift.defined()) {
    factors.shift = at::empty({columns, columns});
    solved(columns, [&](std::int64_t first, std::int64_t last) { return drift.slice(0, first, last); }, factors.shift);
  }
  constexpr std::int64_t chunk = 128;
  at::parallel_for(0, (rows + chunk - 1) / chunk, 1, [&](std::int64_t begin, std::int64_t end) {
    at::NoGradGuard worker_no_grad;
    for (std::int64_t i = begin; i < end; ++i) {
      const at::Tensor part = weight.slice(0, i * chunk, std::min(rows, (i + 1) * chunk));
      target.slice(0, i * chunk, std::min(rows, (i + 1) * chunk)).copy_(part + alpha * at::matmul(part, factors.shift));
    }
  });
  return target;
}

LayerResult quantize_trifit(const LayerInput& input, const GridSpec& spec, const LayerOptions& options) {
  at::NoGradGuard no_grad;
  LayerInput target = input;
  target.weight = teacher_target(input, options.teacher_target, options.damping);
  LayerResult result = quantize_gptq(target, spec, options);
  if (options.polish_rounds == 0) return result;
  at::Tensor damped = input.hessian.to(at::kFloat).clone();
  const at::Tensor dead = damped.diagonal().le(0);
  const double mean = damped.diagonal().mean().item<double>();
  damped.diagonal().masked_fill_(dead, 1).add_(std::max(options.damping, 1e-6) * mean);
  if (dead.any().item<bool>()) target.weight = target.weight.masked_fill(dead.unsqueeze(0), 0);
  polish(target.weight, damped, spec, options.polish_rounds, result.quantized, result.objective, result.mask.defined() ? result.mask : input.mask);
  return result;
}

}  // namespace kompakt
