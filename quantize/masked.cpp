#include "quantize/masked.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <stdexcept>

#include "core/error.h"
#include "core/text.h"

namespace kompakt {
bool has_zero(const GridSpec& spec) {
  // A group of mixed signs with a zero in it, rounded.
  const std::int64_t columns = std::max<std::int64_t>(4, spec.span_for(spec.grid->default_group));
  at::Tensor w = at::linspace(-1.0, 0.7, columns).reshape({1, columns});
  w.slice(1, columns / 2).slice(1, 0, 1).zero_();
  return round_to_grid(spec, w)[0][columns / 2].item<float>() == 0;
}

std::string grids_with_zero() {
  std::vector<std::string> names;
  for (const Grid& grid : grids())
    if (has_zero({&grid, grid.default_group})) names.emplace_back(grid.name);
  return join(names, ", ");
}

void check_masks(const QuantizationPlan& plan, const StageContext& context) {
  for (const auto& [name, mask] : context.masks) {
    const auto planned = plan.tensors.find(name);
    if (planned == plan.tensors.end() || has_zero(planned->second)) continue;
    throw Error(str("the grid ", planned->second.grid->name, " has no zero, and an earlier stage pruned weights of ", name)).at(context.title).given(std::string(planned->second.grid->name)).allowed(grids_with_zero()).hint("choose a grid that has one, or leave the unstructured pruning out");
  }
}

void check_zeros(Transformer& model, const StageContext& context, const std::string& basis) {
  const at::NoGradGuard no_grad;
  for (const auto& [name, mask] : context.masks) {
    const Linear* linear = model.find_linear(name);
    if (!linear || linear->weight.sizes() != mask.sizes()) throw std::logic_error(str("quantize: no linear ", name, " that its mask fits"));
    if (linear->weight.masked_select(mask.to(linear->weight.device()).logical_not()).ne(0).any().item<bool>())
      throw Error(str("the change of basis mixes pruned weights of ", name, " with others")).at(context.title).given(basis).allowed("a basis that only scales: none, fold, awq or smoothquant").hint("rotations do not go together with unstructured pruning");
  }
}

void keep_zeros(const GridSpec& spec, const at::Tensor& mask, Quantized& quantized) {
  const at::NoGradGuard no_grad;
  const at::Tensor gone = mask.to(quantized.codes.device()).logical_not();
  const at::Tensor zeros = spec.grid->codes_for(at::zeros(quantized.codes.sizes()), quantized.scales, quantized.offsets, spec.group_for(quantized.codes.size(1)));
  quantized.codes = at::where(gone, zeros.to(quantized.codes.scalar_type()), quantized.codes).contiguous();
  if (decode(spec, quantized).masked_select(gone).ne(0).any().item<bool>()) throw std::logic_error(str("quantize: the grid ", spec.grid->name, " lost a zero"));
}

}  // namespace kompakt
