// Where the quantizable matrices of a transformer lie.
#include "quantize/tensors.h"

#include <stdexcept>

namespace kompakt {

std::vector<QuantizableTensor> quantizable_tensors(Transformer& model) {
  std::vector<QuantizableTensor> out;
  out.push_back({model.tokens.name, QuantizableRole::embedding, &model.tokens.weight, &model.tokens.transform});
  for (Linear* linear : model.linears()) out.push_back({linear->name, QuantizableRole::linear, &linear->weight, &linear->transform});
  for (Linear* head : {&model.pooler, &model.classifier, &model.lm_head})
    if (head->weight.defined()) out.push_back({head->name, QuantizableRole::head, &head->weight, &head->transform});
  return out;
}

QuantizableTensor find_quantizable(Transformer& model, const std::string& name) {
  for (const QuantizableTensor& tensor : quantizable_tensors(model))
    if (tensor.name == name) return tensor;
  throw std::logic_error("the model has no quantizable matrix \"" + name + "\"");
}

}  // namespace kompakt
