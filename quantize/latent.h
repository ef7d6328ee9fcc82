// Weights that learn on a grid. Codes are the rounding of a latent in units of codes, scales a learnable multiple of where they
// started; what computes is exactly what will be stored, and gradients pass through the rounding unchanged (straight through).
// Shared by tuning block by block and tuning of the whole model.
#pragma once

#include <ATen/core/Tensor.h>

#include "quantize/grids.h"

namespace kompakt {

// What does not learn: the grid and the scales (and offsets) of the start.
struct LatentGrid {
  GridSpec spec;
  at::Tensor scales;   // [N,G]
  at::Tensor zeros;    // [N,G] integer zero points (grids with integer_zero), else undefined: offset = -scale * zero
  at::Tensor minima;   // [N,G] offsets of their own (the other asymmetric grids), else undefined
};

// What may learn. Types may be float64, for checks of gradients: scales are then not rounded to half.
struct LatentValues {
  at::Tensor codes;         // [N,K] latent; the code is its rounding, clamped to the grid
  at::Tensor scale_factor;  // [N,G] scale / starting scale, 1 at the start
  at::Tensor offset_shift;  // [N,G] shift of the minimum in units of the starting scale, 0 at the start; undefined without minima
};

// K must be a multiple of the group, as plan_quantization sees to.
LatentGrid latent_grid(const GridSpec& spec, const Quantized& start);
// Latents of `weight` [N,K], moved to at most `margin` < 0.5 from the start's codes (outermost codes are open to 0.4 beyond), so
// that the latents round to exactly those codes. Groups with scale zero lie on their codes.
LatentValues latent_start(const LatentGrid& grid, const at::Tensor& weight, const at::Tensor& codes, double margin);

// decode(latent_codes(...)), differentiable in every value that requires a gradient.
at::Tensor latent_weight(const LatentGrid& grid, const LatentValues& values);
// The gradient of the straight-through weight for d loss / d weight [N,K]. With w = s (c - z) [+ m]: d/d codes = s g, zero where
// the latent lies outside of the grid and would move further out; d/d factor = s0 sum_group (c - z) g; d/d shift = s0 sum_group g.
LatentValues latent_gradients(const LatentGrid& grid, const LatentValues& values, const at::Tensor& weight_gradient);
// Codes, and scales and offsets in their stored precision.
Quantized latent_codes(const LatentGrid& grid, const LatentValues& values);

}  // namespace kompakt
