// Steps of entropy-coded grids, row by row. Of all ways to spend the same number of bits, the one with the smallest weighted error takes
// steps that are inversely proportional to the root of a row's importance, whatever the spread of its weights (reverse water-filling):
// a row that matters little has few bits, and a code of variable length lets it have them.
#pragma once

#include <ATen/core/Tensor.h>

#include "quantize/grids.h"

namespace kompakt {

// Bits of a normal variable rounded to steps of `step` standard deviations, coded ideally.
double normal_entropy(double step);

// Steps [N], float32, as they are stored: proportional to importance^-1/2 and expected to cost as many bits as the grid's own rule, a
// fixed share of each row's root mean square. No row leaves the range of an eighth to eight times its own rule. Rows whose importance is
// below a hundredth of the mean count as a hundredth: what calibration text does not show may still be needed. Undefined where the
// grid is not entropy-coded, a row has several scales, or there is no importance. weight [N,K], importance [N] >= 0.
at::Tensor entropy_row_steps(const GridSpec& spec, const at::Tensor& weight, const at::Tensor& importance);
// The weighted error under such steps as a share of that under the grid's own rule; 1 where there are none.
double entropy_row_gain(const GridSpec& spec, const at::Tensor& weight, const at::Tensor& importance);

}  // namespace kompakt
