// Where the quantizable matrices of a transformer lie.
#include "quantize/tensors.h"

#include <ATen/ATen.h>

#include <stdexcept>

#include "core/text.h"

namespace kompakt {
namespace {

// '*' stands for any run of characters.
bool tensors_match(std::string_view pattern, std::string_view name) {
  if (pattern.empty()) return name.empty();
  if (pattern.front() == '*') return tensors_match(pattern.substr(1), name) || (!name.empty() && tensors_match(pattern, name.substr(1)));
  return !name.empty() && pattern.front() == name.front() && tensors_match(pattern.substr(1), name.substr(1));
}

}  // namespace

std::vector<QuantizableTensor> quantizable_tensors(Transformer& model) {
  std::vector<QuantizableTensor> out;
  out.push_back({model.tokens.name, QuantizableRole::embedding, &model.tokens.weight, &model.tokens.transform});
  for (Linear* linear : model.linears()) out.push_back({linear->name, QuantizableRole::linear, &linear->weight, &linear->transform});
  for (Linear* head : {&model.pooler, &model.classifier, &model.lm_head})
    if (head->weight.defined()) out.push_back({head->name, QuantizableRole::head, &head->weight, &head->transform});
  return out;
}

Quantized rows_of(const Quantized& quantized, std::int64_t first, std::int64_t end) {
  return {quantized.codes.slice(0, first, end), quantized.scales.slice(0, first, end), quantized.offsets.defined() ? quantized.offsets.slice(0, first, end) : at::Tensor()};
}

QuantizableTensor find_quantizable(Transformer& model, const std::string& name) {
  for (const QuantizableTensor& tensor : quantizable_tensors(model))
    if (tensor.name == name) return tensor;
  throw std::logic_error("the model has no quantizable matrix \"" + name + "\"");
}

std::set<std::string> kept_in_float(const std::vector<QuantizableTensor>& tensors, const std::vector<std::string>& patterns, Problems& problems) {
  std::set<std::string> kept;
  for (const std::string& pattern : patterns) {
    bool used = false;
    for (const QuantizableTensor& tensor : tensors)
      if (tensors_match(pattern, tensor.name) || tensors_match(pattern, tensor.name + ".weight")) kept.insert(tensor.name), used = true;
    if (used) continue;
    std::vector<std::string> names;
    for (const QuantizableTensor& tensor : tensors) names.push_back(tensor.name);
    problems.add(Error(str("no tensor of the model matches \"", pattern, "\"", did_you_mean(pattern, names))).at("quantize.keep_float").given(pattern).allowed("names such as " + names[names.size() / 2] + "; * stands for anything"));
  }
  return kept;
}

}  // namespace kompakt
