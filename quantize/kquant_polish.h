// Polish of super-blocks (kquant.h) in the metric of the Hessian.
#pragma once

#include <vector>

#include "quantize/methods.h"

namespace kompakt {

// As polish() of methods.h: exact coordinate steps over codes, over the integers of every group's scale and minimum, and over
// the two halves of every super-block. The objective never rises, and what comes out is stored as it is.
void kquant_polish(const at::Tensor& weight, const at::Tensor& hessian, const GridSpec& spec, std::int64_t rounds, Quantized& quantized, std::vector<double>& objective, const at::Tensor& mask = {});

}  // namespace kompakt
