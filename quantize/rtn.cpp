// Round to nearest: the data-free method and the last step of quantization-aware training; and the table of methods.
#include "quantize/entropy_steps.h"
#include "quantize/methods.h"

#include <ATen/ATen.h>

namespace kompakt {

namespace {

Quantized rtn_encode(const LayerInput& input, const GridSpec& spec, const at::Tensor& importance) {
  const at::Tensor steps = entropy_row_steps(spec, input.weight, input.row_importance);
  if (!steps.defined()) return encode(spec, input.weight, importance);
  Quantized out;
  out.scales = steps.unsqueeze(1).to(input.weight.device());
  out.codes = spec.grid->codes_for(input.weight, out.scales, {}, spec.group);
  return out;
}

}  // namespace

LayerResult quantize_rtn(const LayerInput& input, const GridSpec& spec, const LayerOptions&) {
  LayerResult result;
  result.quantized = rtn_encode(input, spec, {});
  result.path = "rtn";
  return result;
}

LayerResult quantize_imatrix(const LayerInput& input, const GridSpec& spec, const LayerOptions&) {
  LayerResult result;
  result.quantized = rtn_encode(input, spec, input.hessian.defined() ? input.hessian.diagonal() : at::Tensor());
  result.path = "rtn";
  return result;
}

std::span<const QuantizationMethod> quantization_methods() {
  // gptq is the same function with no rounds and no target unless the recipe asks for them.
  static constexpr QuantizationMethod table[] = {
      {"rtn", "round to nearest with the grid's own fit; no data", false, false, false, quantize_rtn},
      {"imatrix", "round to nearest with scales fitted for each input's mean square, as an importance matrix of llama.cpp; needs calibration data", true, false, false, quantize_imatrix},
      {"gptq", "column by column, each rounding error compensated by the columns to come; needs calibration data", true, false, false, quantize_trifit},
      {"trifit", "gptq towards the teacher's activations, then joint scale refit and coordinate descent over the codes", true, false, false, quantize_trifit},
      {"qad", "quantization-aware distillation: training on the grid itself with straight-through gradients", false, true, false, quantize_rtn},
      {"hqq", "round to nearest with zero points that forgive outliers, for grids with an offset; no data", false, false, true, quantize_hqq},
  };
  return table;
}

const QuantizationMethod* find_quantization_method(std::string_view name) {
  for (const QuantizationMethod& row : quantization_methods())
    if (row.name == name) return &row;
  return nullptr;
}

std::vector<std::string> quantization_method_names() {
  std::vector<std::string> names;
  for (const QuantizationMethod& row : quantization_methods()) names.emplace_back(row.name);
  return names;
}

}  // namespace kompakt
