// One weight under a grid: its nearest code, and what the code stands for. For methods that choose codes one by one.
#pragma once

#include "quantize/grid_math.h"
#include "quantize/grids.h"
#include "quantize/levels.h"

namespace kompakt {

struct CodeRule {
  explicit CodeRule(const Grid& grid) : low(static_cast<float>(grid.code_min)), high(static_cast<float>(grid.code_max)), levels(grid.levels) {}

  // Nearest code of w = scale * value(code) + offset; `inverse` is inverse_scale(scale).
  float nearest(float w, float inverse, float offset) const {
    if (!levels) return grid::nearest_code(w, inverse, offset, low, high);
    return static_cast<float>(levels->nearest(grid::multiply_rounded(grid::add_rounded(w, -offset), inverse)));
  }
  // The multiple of the scale that a code stands for: the code itself on even grids.
  float value(float code) const { return levels ? levels->value(static_cast<int>(code)) : code; }

  float low, high;
  const LevelTable* levels;
};

// value() of a tensor of codes, float32.
at::Tensor code_values(const Grid& grid, const at::Tensor& codes);

}  // namespace kompakt
