// Weights that an earlier stage pruned stay exactly zero on a grid.
#pragma once

#include "quantize/stage.h"

namespace kompakt {

// Error when a masked matrix is planned for a grid without a zero.
void check_masks(const QuantizationPlan& plan, const StageContext& context);
// Error when a change of basis has mixed masked weights with others.
void check_zeros(Transformer& model, const StageContext& context, const std::string& basis);
// Whether a zero of a matrix is one on the grid too.
bool has_zero(const GridSpec& spec);
// Names of all grids that have one.
std::string grids_with_zero();
// Codes of masked weights become the code of zero: for methods that know nothing of masks, a check for those that do.
void keep_zeros(const GridSpec& spec, const at::Tensor& mask, Quantized& quantized);

}  // namespace kompakt
