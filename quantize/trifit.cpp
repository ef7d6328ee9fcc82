// Polish after the sweep, and the target that makes up for the drift of the quantized prefix.
// Per row r with E = decoded - w: scales of all groups jointly (normal equations B H B^T a = B H w, B = masked code rows),
// then each code in turn (the best level for w_j given all others is the one nearest to decoded_j - (E H)_j / H_jj).
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "model/parallel.h"
#include "quantize/code_rule.h"
#include "quantize/grid_math.h"
#include "quantize/methods.h"
#include "quantize/vector_lanes.h"

namespace kompakt {
namespace {

KOMPAKT_LANES void trifit_add(float* r, const float* h, float delta, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + lane_count <= n; i += lane_count) {
    Lanes a, b;
    KOMPAKT_LOAD(a, r + i);
    KOMPAKT_LOAD(b, h + i);
    a = a + b * delta;
    KOMPAKT_STORE(r + i, a);
  }
  for (; i < n; ++i) r[i] += h[i] * delta;
}

// The rows of one chunk, with everything the two subproblems share.
struct TrifitChunk {
  const GridSpec& spec;
  at::Tensor hessian;   // [K,K] float32
  at::Tensor weight;    // [n,K] target
  at::Tensor codes;     // [n,K] int8
  at::Tensor scales;    // [n,G]
  at::Tensor offsets;   // [n,G] or undefined
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
  const at::Tensor t = c.multipliers();
  const std::int64_t unknowns = c.groups * (free_offsets ? 2 : 1);
  at::Tensor normal = at::empty({c.rows, unknowns, unknowns}, at::kDouble), right = at::empty({c.rows, unknowns}, at::kDouble);
  const auto grouped = [&](const at::Tensor& products, const at::Tensor& factor) {  // [n,K] * [n,K] summed by group -> [n,G]
    at::Tensor p = products * factor;
    const std::int64_t padded = c.groups * c.group;
    if (padded != c.columns) p = at::constant_pad_nd(p, {0, padded - c.columns});
    return p.view({c.rows, c.groups, c.group}).sum(2).to(at::kDouble);
  };
  const at::Tensor ones = free_offsets ? at::ones_like(t) : at::Tensor();
  for (std::int64_t i = 0; i < unknowns; ++i) {
    const std::int64_t g = i % c.groups, first = g * c.group, end = std::min(c.columns, first + c.group);
    const at::Tensor basis = (i < c.groups ? t : ones).slice(1, first, end);
    const at::Tensor product = at::matmul(basis, c.hessian.slice(0, first, end));  // row i of B H: [n,K]
    normal.select(1, i).slice(1, 0, c.groups).copy_(grouped(product, t));
    if (free_offsets) normal.select(1, i).slice(1, c.groups).copy_(grouped(product, ones));
    right.select(1, i).copy_((product * c.weight).sum(1).to(at::kDouble));
  }
  const at::Tensor gram = normal.clone();  // without the ridge: judges candidates
  const at::Tensor ridge = normal.diagonal(0, 1, 2).mean(1).clamp_min(1e-30) * 1e-6;
  normal.diagonal(0, 1, 2).add_(ridge.unsqueeze(1));
  const auto [lower, info] = at::linalg_cholesky_ex(normal);
  at::Tensor solution = at::cholesky_solve(right.unsqueeze(2), lower).squeeze(2);
  at::Tensor scales = solution.slice(1, 0, c.groups).to(at::kFloat), offsets = free_offsets ? solution.slice(1, c.groups).to(at::kFloat) : at::Tensor();
  // A group without any non-zero multiplier says nothing about its scale; one whose sign turned is legal only on some grids.
  at::Tensor keep = grouped(t, t).eq(0).logical_or(scales.isfinite().logical_not()).logical_or(scales.abs().gt(grid::largest_half));
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
std::pair<double, double> trifit_descend(TrifitChunk& c) {
  const Grid& grid = *c.spec.grid;
  const CodeRule rule(grid);
  at::Tensor values = c.decoded().contiguous(), residual = at::matmul(values - c.weight, c.hessian).contiguous();
  float* w = values.data_ptr<float>();
  float* r = residual.data_ptr<float>();
  const float* h = c.hessian.data_ptr<float>();
  std::int8_t* codes = c.codes.data_ptr<std::int8_t>();
  const float* scales = c.scales.data_ptr<float>();
  const float* offsets = c.offsets.defined() ? c.offsets.data_ptr<float>() : nullptr;
  const auto objective = [&] { return ((values - c.weight).to(at::kDouble) * residual.to(at::kDouble)).sum().item<double>(); };
  const double before = objective();
  for (std::int64_t row = 0; row < c.rows; ++row) {
    float* rr = r + row * c.columns;
    for (std::int64_t g = 0; g < c.groups; ++g) {
      const float scale = scales[row * c.groups + g], offset = offsets ? offsets[row * c.groups + g] : 0.0f;
      if (scale == 0) continue;
      const float inverse = grid::inverse_scale(scale);
      const std::int64_t end = std::min(c.columns, (g + 1) * c.group);
      for (std::int64_t j = g * c.group; j < end; ++j) {
        const std::int64_t at = row * c.columns + j;
        const float target = w[at] - rr[j] / h[j * c.columns + j];
        const float code = rule.nearest(target, inverse, offset);
        const float value = grid::decode_value(rule.value(code), scale, offset), delta = value - w[at];
        if (delta == 0) continue;
        // Nearest by rounding and nearest by value may differ at a tie: only a real gain changes a code.
        const float gain = delta * (2 * rr[j] + delta * h[j * c.columns + j]);
        if (!(gain < 0)) continue;
        codes[at] = static_cast<std::int8_t>(static_cast<int>(code));
        w[at] = value;
        trifit_add(rr, h + j * c.columns, delta, c.columns);
      }
    }
  }
  return {before, objective()};
}

}  // namespace

void polish(const at::Tensor& weight, const at::Tensor& hessian, const GridSpec& spec, std::int64_t rounds, Quantized& quantized, std::vector<double>& objective) {
  at::NoGradGuard no_grad;
  const std::int64_t rows = weight.size(0), columns = weight.size(1), group = spec.group_for(columns), groups = spec.scale_count(columns);
  const at::Tensor h = hessian.to(at::kFloat).contiguous(), w = weight.to(at::kFloat).contiguous();
  const std::int64_t steps = 2 * rounds + 3;  // start; refit, descent per round; stored refit, last descent
  constexpr std::int64_t chunk = 64;          // fixed: results do not depend on threads
  const std::int64_t chunks = (rows + chunk - 1) / chunk;
  at::Tensor history = at::zeros({chunks, steps}, at::kDouble);
  Quantized& q = quantized;
  at::parallel_for(0, chunks, 1, [&](std::int64_t begin, std::int64_t end) {
    at::NoGradGuard worker_no_grad;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t first = i * chunk, last = std::min(rows, first + chunk);
      TrifitChunk c{spec, h, w.slice(0, first, last), q.codes.slice(0, first, last).clone(), q.scales.slice(0, first, last).clone(),
                    q.offsets.defined() ? q.offsets.slice(0, first, last).clone() : at::Tensor(), group, groups, columns, last - first};
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
  const at::Tensor weight = input.weight.detach().to(at::kCPU, at::kFloat);
  if (alpha == 0 || !input.cross.defined()) return weight;
  const at::Tensor h = input.hessian.to(at::kDouble), c = input.cross.to(at::kDouble);
  at::Tensor damped = h.clone();
  damped.diagonal().masked_fill_(h.diagonal().le(0), 1);
  damped.diagonal().add_(std::max(damping, 1e-4) * h.diagonal().mean().item<double>());
  const auto [lower, info] = at::linalg_cholesky_ex(damped);
  if (info.item<int>() != 0) return weight;
  const at::Tensor shift = at::cholesky_solve((c - h).t().contiguous(), lower).t();  // (C - H)(H + damping)^-1
  return (weight + alpha * at::matmul(weight.to(at::kDouble), shift).to(at::kFloat)).contiguous();
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
  polish(target.weight, damped, spec, options.polish_rounds, result.quantized, result.objective);
  return result;
}

}  // namespace kompakt
