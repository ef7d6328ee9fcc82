// The straight-through pair: rounding forward, the identity (with a wall at the ends of the grid) backward.
#include "quantize/latent.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "quantize/grid_math.h"

namespace kompakt {
namespace {

constexpr double latent_beyond = 0.4;  // how far a latent may lie outside of the grid

// Scales are halves in the file; float64 stands for exact arithmetic in gradient checks.
at::Tensor latent_stored(const at::Tensor& values) {
  return values.scalar_type() == at::kDouble ? values : values.clamp(-grid::largest_half, grid::largest_half).to(at::kHalf).to(values.scalar_type());
}

at::Tensor latent_groups(const at::Tensor& matrix, const at::Tensor& scales) { return matrix.unflatten(1, {scales.size(1), matrix.size(1) / std::max<std::int64_t>(1, scales.size(1))}); }

at::Tensor latent_rounded(const LatentGrid& grid, const at::Tensor& codes) { return codes.clamp(grid.spec.grid->code_min, grid.spec.grid->code_max).round_(); }

at::Tensor latent_scales(const LatentGrid& grid, const LatentValues& values) { return latent_stored(grid.scales * values.scale_factor); }

at::Tensor latent_offsets(const LatentGrid& grid, const LatentValues& values, const at::Tensor& scales) {
  if (grid.zeros.defined()) return -(grid.zeros * scales);
  return grid.minima.defined() ? latent_stored(grid.minima + grid.scales * values.offset_shift) : at::Tensor();
}

at::Tensor latent_decoded(const LatentGrid& grid, const LatentValues& values, const at::Tensor& rounded) {
  const at::Tensor scales = latent_scales(grid, values), offsets = latent_offsets(grid, values, scales);
  at::Tensor weight = latent_groups(rounded, scales) * scales.unsqueeze(2);
  if (offsets.defined()) weight.add_(offsets.unsqueeze(2));
  return weight.flatten(1);
}

// A function of the value's three tensors; tensors that a grid lacks are stood in for by empty ones.
struct LatentFunction : public torch::autograd::Function<LatentFunction> {
  static at::Tensor given(const at::Tensor& t, const at::Tensor& like) { return t.defined() ? t : at::empty({0}, like.options()); }
  static at::Tensor taken(const at::Tensor& t) { return t.dim() == 2 ? t : at::Tensor(); }

  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& codes, const at::Tensor& factor, const at::Tensor& shift, const LatentGrid* grid) {
    context->save_for_backward({codes, factor, shift, grid->scales, given(grid->zeros, factor), given(grid->minima, factor)});
    context->saved_data["grid"] = static_cast<std::int64_t>(grid->spec.grid - grids().data());
    context->saved_data["group"] = grid->spec.group;
    context->saved_data["codes"] = codes.requires_grad();
    return latent_decoded(*grid, {codes, factor, taken(shift)}, latent_rounded(*grid, codes));
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context, torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const LatentGrid grid{{grids().data() + context->saved_data["grid"].toInt(), context->saved_data["group"].toInt()}, saved[3], taken(saved[4]), taken(saved[5])};
    const LatentValues values{saved[0], saved[1], taken(saved[2])};
    LatentValues out = latent_gradients(grid, values, gradients[0]);
    if (!context->saved_data["codes"].toBool()) out.codes = at::Tensor();
    return {out.codes, out.scale_factor, values.offset_shift.defined() ? out.offset_shift : at::Tensor(), at::Tensor()};
  }
};

}  // namespace

LatentGrid latent_grid(const GridSpec& spec, const Quantized& start) {
  TORCH_CHECK(spec.grid->levels == nullptr, "latents need even levels, those of grid ", std::string(spec.grid->name), " are not");
  TORCH_CHECK(spec.grid->kquant == nullptr, "latents need free scales, those of grid ", std::string(spec.grid->name), " are tied");
  TORCH_CHECK(start.scales.size(1) > 0 && start.codes.size(1) % start.scales.size(1) == 0, "latents need groups of equal size");
  LatentGrid grid{spec, start.scales.detach().clone(), {}, {}};
  if (!start.offsets.defined()) return grid;
  if (!spec.grid->integer_zero) {
    grid.minima = start.offsets.detach().clone();
    return grid;
  }
  const at::Tensor none = start.scales.eq(0);
  grid.zeros = (-start.offsets / start.scales.masked_fill(none, 1)).round().masked_fill(none, 0);
  return grid;
}

LatentValues latent_start(const LatentGrid& grid, const at::Tensor& weight, const at::Tensor& codes, double margin) {
  at::NoGradGuard no_grad;
  const double low = grid.spec.grid->code_min, high = grid.spec.grid->code_max;
  LatentValues values;
  values.scale_factor = at::ones_like(grid.scales);
  if (grid.minima.defined()) values.offset_shift = at::zeros_like(grid.minima);
  const at::Tensor offsets = latent_offsets(grid, values, grid.scales), none = grid.scales.eq(0).unsqueeze(2);
  const at::Tensor start = latent_groups(codes.to(grid.scales.scalar_type()), grid.scales);
  at::Tensor latent = latent_groups(weight.detach().to(grid.scales.scalar_type()), grid.scales);
  if (offsets.defined()) latent = latent - offsets.unsqueeze(2);
  latent = latent / grid.scales.unsqueeze(2).masked_fill(none, 1);
  const at::Tensor from = (start - margin).masked_fill_(start.eq(low), low - latent_beyond), to = (start + margin).masked_fill_(start.eq(high), high + latent_beyond);
  values.codes = at::where(none, start, at::minimum(at::maximum(latent, from), to)).flatten(1).contiguous();
  return values;
}

at::Tensor latent_weight(const LatentGrid& grid, const LatentValues& values) {
  const bool learns = values.codes.requires_grad() || values.scale_factor.requires_grad() || (values.offset_shift.defined() && values.offset_shift.requires_grad());
  if (!learns || !at::GradMode::is_enabled()) return latent_decoded(grid, values, latent_rounded(grid, values.codes));
  return LatentFunction::apply(values.codes, values.scale_factor, LatentFunction::given(values.offset_shift, values.scale_factor), &grid);
}

LatentValues latent_gradients(const LatentGrid& grid, const LatentValues& values, const at::Tensor& weight_gradient) {
  at::NoGradGuard no_grad;
  const double low = grid.spec.grid->code_min, high = grid.spec.grid->code_max;
  const at::Tensor scales = latent_scales(grid, values), g = latent_groups(weight_gradient, scales);
  LatentValues out;
  out.codes = (g * scales.unsqueeze(2)).flatten(1);
  // Walls: a descent step moves against the gradient, so outside of the grid only gradients that lead back in pass.
  out.codes.masked_fill_(values.codes.lt(low).logical_and_(out.codes.gt(0)), 0).masked_fill_(values.codes.gt(high).logical_and_(out.codes.lt(0)), 0);
  at::Tensor distance = latent_groups(latent_rounded(grid, values.codes), scales);
  if (grid.zeros.defined()) distance = distance - grid.zeros.unsqueeze(2);
  out.scale_factor = (distance * g).sum(2).mul_(grid.scales);
  if (values.offset_shift.defined()) out.offset_shift = g.sum(2).mul_(grid.scales);
  return out;
}

Quantized latent_codes(const LatentGrid& grid, const LatentValues& values) {
  at::NoGradGuard no_grad;
  Quantized q;
  q.codes = latent_rounded(grid, values.codes).to(at::kChar).contiguous();
  q.scales = latent_scales(grid, values).contiguous();
  q.offsets = latent_offsets(grid, values, q.scales);
  if (q.offsets.defined()) q.offsets = q.offsets.contiguous();
  return q;
}

}  // namespace kompakt
