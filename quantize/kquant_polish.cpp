// Coordinate descent on super-blocks. With E = decoded - w, R = E H and a direction v (a change of the decoded weights per unit of
// one number): the objective tr(E H E^T) of a row changes by 2 t R v + t^2 v H v, so its best t is -R v / v H v, rounded to what is
// stored and taken when it gains. Numbers: d and e of a super-block, n and m of a group, the code of a weight.
#include "quantize/kquant_polish.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "model/parallel.h"
#include "quantize/code_rule.h"
#include "quantize/grid_math.h"
#include "quantize/kquant.h"
#include "quantize/vector_lanes.h"

namespace kompakt {
namespace {

// Some rows of one matrix, with the numbers of their super-blocks.
class KQuantPolish {
 public:
  KQuantPolish(const GridSpec& spec, const at::Tensor& weight, const at::Tensor& hessian, const Quantized& q, const at::Tensor& kept)
      : kquant_(*spec.grid->kquant), rule_(*spec.grid), weight_(weight), hessian_(hessian), kept_(kept), codes_(q.codes.clone()), rows_(weight.size(0)), columns_(weight.size(1)), blocks_(columns_ / kquant_span),
        numbers_(static_cast<std::size_t>(rows_ * blocks_)) {
    const at::Tensor s = q.scales.contiguous(), o = kquant_.minimum() ? q.offsets.contiguous() : at::Tensor();
    for (std::int64_t b = 0; b < rows_ * blocks_; ++b)
      if (!kquant_factor(kquant_, s.const_data_ptr<float>() + b * kquant_.groups(), o.defined() ? o.const_data_ptr<float>() + b * kquant_.groups() : nullptr, numbers_[static_cast<std::size_t>(b)]))
        throw std::logic_error("kquant_polish: the scales are not those of super-blocks");
    values_ = at::empty({rows_, columns_});
    for (std::int64_t r = 0; r < rows_; ++r)
      for (std::int64_t b = 0; b < blocks_; ++b) decode_block(r, b);
  }

  // Starts a pass: R, and the objective.
  double measure() {
    const at::Tensor error = values_ - weight_;
    residual_ = at::matmul(error, hessian_).contiguous();
    return (error.to(at::kDouble) * residual_.to(at::kDouble)).sum().item<double>();
  }

  void pass() {
    for (std::int64_t b = 0; b < blocks_; ++b) {
      const std::int64_t from = b * kquant_span, to = from + kquant_span;
      const at::Tensor before = values_.slice(1, from, to).clone();
      halves(b, false);
      if (kquant_.minimum()) halves(b, true);
      for (std::int64_t r = 0; r < rows_; ++r)
        for (int g = 0; g < kquant_.groups(); ++g) {
          integer(r, b, g, false);
          if (kquant_.minimum()) integer(r, b, g, true);
          codes(r, b, g);
        }
      if (to < columns_) residual_.slice(1, to).addmm_(values_.slice(1, from, to) - before, hessian_.slice(0, from, to).slice(1, to));
    }
  }

  void result(at::Tensor codes, at::Tensor scales, at::Tensor offsets) const {
    codes.copy_(codes_);
    at::Tensor s = at::empty(scales.sizes(), at::kFloat), o = offsets.defined() ? at::empty(offsets.sizes(), at::kFloat) : at::Tensor();
    for (std::int64_t b = 0; b < rows_ * blocks_; ++b)
      for (int g = 0; g < kquant_.groups(); ++g) {
        const KQuantBlock& block = numbers_[static_cast<std::size_t>(b)];
        s.data_ptr<float>()[b * kquant_.groups() + g] = scale(block, g);
        if (o.defined()) o.data_ptr<float>()[b * kquant_.groups() + g] = offset(block, g);
      }
    scales.copy_(s);
    if (o.defined()) offsets.copy_(o);
  }

 private:
  KQuantBlock& block(std::int64_t r, std::int64_t b) { return numbers_[static_cast<std::size_t>(r * blocks_ + b)]; }
  static float scale(const KQuantBlock& block, int g) { return block.d * static_cast<float>(block.steps[g]); }
  static float offset(const KQuantBlock& block, int g) { return -(block.e * static_cast<float>(block.minima[g])); }
  float* value_at(std::int64_t r, std::int64_t b) { return values_.data_ptr<float>() + r * columns_ + b * kquant_span; }
  float* residual_at(std::int64_t r, std::int64_t b) { return residual_.data_ptr<float>() + r * columns_ + b * kquant_span; }
  std::int8_t* code_at(std::int64_t r, std::int64_t b) { return codes_.data_ptr<std::int8_t>() + r * columns_ + b * kquant_span; }
  // Row `j` of the super-block's own part of H.
  const float* own(std::int64_t b, int j) const { return hessian_.const_data_ptr<float>() + (b * kquant_span + j) * columns_ + b * kquant_span; }

  void decode_block(std::int64_t r, std::int64_t b) {
    for (int g = 0; g < kquant_.groups(); ++g) decode_group(r, b, g);
  }
  void decode_group(std::int64_t r, std::int64_t b, int g) {
    const KQuantBlock& numbers = block(r, b);
    const float s = scale(numbers, g), o = offset(numbers, g);
    for (int i = g * kquant_.group; i < (g + 1) * kquant_.group; ++i) value_at(r, b)[i] = grid::decode_value(rule_.value(static_cast<float>(code_at(r, b)[i])), s, o);
  }

  // d, or e with `minimum`, of super-block `b` in every row.
  void halves(std::int64_t b, bool minimum) {
    at::Tensor directions = at::empty({rows_, kquant_span});
    float* v = directions.data_ptr<float>();
    for (std::int64_t r = 0; r < rows_; ++r)
      for (int i = 0; i < kquant_span; ++i) {
        const KQuantBlock& numbers = block(r, b);
        const int g = i / kquant_.group;
        v[r * kquant_span + i] = minimum ? -static_cast<float>(numbers.minima[g]) : static_cast<float>(numbers.steps[g]) * rule_.value(static_cast<float>(code_at(r, b)[i]));
      }
    const at::Tensor along = at::matmul(directions, hessian_.slice(0, b * kquant_span, (b + 1) * kquant_span).slice(1, b * kquant_span, (b + 1) * kquant_span)).contiguous();
    for (std::int64_t r = 0; r < rows_; ++r) {
      const float* hv = along.const_data_ptr<float>() + r * kquant_span;
      const double slope = lanes_dot(v + r * kquant_span, residual_at(r, b), kquant_span), curvature = lanes_dot(v + r * kquant_span, hv, kquant_span);
      if (!(curvature > 0)) continue;
      float& number = minimum ? block(r, b).e : block(r, b).d;
      const float next = grid::stored_scale(static_cast<float>(number - slope / curvature), grid::smallest_half);
      const double change = static_cast<double>(next) - number;
      if (next == 0 || (next < 0) != (number < 0) || !(std::fabs(next) < grid::largest_half) || !(change * (2 * slope + change * curvature) < 0)) continue;
      number = next;
      decode_block(r, b);
      lanes_add(residual_at(r, b), hv, static_cast<float>(change), kquant_span);
    }
  }

  // n, or m with `minimum`, of one group.
  void integer(std::int64_t r, std::int64_t b, int g, bool minimum) {
    KQuantBlock& numbers = block(r, b);
    const float unit = minimum ? numbers.e : numbers.d;
    if (unit == 0) return;
    const int first = g * kquant_.group;
    float v[32];
    double slope = 0, curvature = 0;
    for (int i = 0; i < kquant_.group; ++i) v[i] = minimum ? -1.0f : rule_.value(static_cast<float>(code_at(r, b)[first + i]));
    for (int i = 0; i < kquant_.group; ++i) slope += static_cast<double>(v[i]) * residual_at(r, b)[first + i];
    for (int i = 0; i < kquant_.group; ++i) curvature += v[i] * lanes_dot(v, own(b, first + i) + first, kquant_.group);
    if (!(curvature > 0)) return;
    int& number = minimum ? numbers.minima[g] : numbers.steps[g];
    const double wanted = number - slope / curvature / unit;
    const int next = static_cast<int>(std::nearbyint(std::clamp(wanted, minimum ? 0.0 : static_cast<double>(kquant_.step_min), static_cast<double>(minimum ? kquant_.minimum_max : kquant_.step_max))));
    const double change = static_cast<double>(unit) * (next - number);
    if (next == number || !(change * (2 * slope + change * curvature) < 0)) return;
    number = next;
    decode_group(r, b, g);
    for (int i = 0; i < kquant_.group; ++i) lanes_add(residual_at(r, b), own(b, first + i), static_cast<float>(change) * v[i], kquant_span);
  }

  void codes(std::int64_t r, std::int64_t b, int g) {
    const float s = scale(block(r, b), g), o = offset(block(r, b), g), inverse = grid::inverse_scale(s);
    if (s == 0) return;
    float* w = value_at(r, b);
    float* rr = residual_at(r, b);
    const bool* kept = kept_.defined() ? kept_.const_data_ptr<bool>() + r * columns_ + b * kquant_span : nullptr;
    for (int i = g * kquant_.group; i < (g + 1) * kquant_.group; ++i) {
      if (kept && !kept[i]) continue;
      const float* h = own(b, i);
      const float code = rule_.nearest(w[i] - rr[i] / h[i], inverse, o), value = grid::decode_value(rule_.value(code), s, o), delta = value - w[i];
      if (delta == 0 || !(delta * (2 * rr[i] + delta * h[i]) < 0)) continue;
      code_at(r, b)[i] = static_cast<std::int8_t>(static_cast<int>(code));
      w[i] = value;
      lanes_add(rr, h, delta, kquant_span);
    }
  }

  const KQuant& kquant_;
  const CodeRule rule_;
  at::Tensor weight_, hessian_, kept_, codes_, values_, residual_;
  std::int64_t rows_, columns_, blocks_;
  std::vector<KQuantBlock> numbers_;
};

}  // namespace

void kquant_polish(const at::Tensor& weight, const at::Tensor& hessian, const GridSpec& spec, std::int64_t rounds, Quantized& quantized, std::vector<double>& objective, const at::Tensor& mask) {
  const at::Tensor h = hessian.to(at::kFloat).contiguous(), w = weight.to(at::kFloat).contiguous(), kept = mask.defined() ? mask.to(at::kCPU, at::kBool).contiguous() : at::Tensor();
  Quantized& q = quantized;
  constexpr std::int64_t chunk = 128;  // fixed: results do not depend on threads
  const std::int64_t rows = weight.size(0), chunks = (rows + chunk - 1) / chunk;
  at::Tensor history = at::zeros({chunks, rounds + 1}, at::kDouble);
  at::parallel_for(0, chunks, 1, [&](std::int64_t begin, std::int64_t end) {
    at::NoGradGuard worker_no_grad;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t first = i * chunk, last = std::min(rows, first + chunk);
      const at::Tensor offsets = q.offsets.defined() ? q.offsets.slice(0, first, last) : at::Tensor();
      KQuantPolish part(spec, w.slice(0, first, last), h, {q.codes.slice(0, first, last), q.scales.slice(0, first, last), offsets}, kept.defined() ? kept.slice(0, first, last) : at::Tensor());
      double* out = history.data_ptr<double>() + i * (rounds + 1);
      for (std::int64_t round = 0; round < rounds; ++round) {
        *out++ = part.measure();
        part.pass();
      }
      *out = part.measure();
      part.result(q.codes.slice(0, first, last), q.scales.slice(0, first, last), offsets);
    }
  });
  const at::Tensor sums = history.sum(0);
  objective.assign(sums.data_ptr<double>(), sums.data_ptr<double>() + rounds + 1);
}

}  // namespace kompakt
