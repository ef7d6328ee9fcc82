// The matrices of a model that a grid can take: linears of blocks, classifier, head, token embedding. By name.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "core/error.h"
#include "model/transformer.h"
#include "quantize/grids.h"

namespace kompakt {

enum class QuantizableRole { linear, embedding, head };  // head: classifier, pooler, untied output over the vocabulary

struct QuantizableTensor {
  std::string name;
  QuantizableRole role = QuantizableRole::linear;
  at::Tensor* weight = nullptr;         // [N,K]; the whole table of an embedding is model.tokens.full_weight()
  WeightTransform* transform = nullptr;
};

std::vector<QuantizableTensor> quantizable_tensors(Transformer& model);
Quantized rows_of(const Quantized& quantized, std::int64_t first, std::int64_t end);  // views
// std::logic_error when the model has no such matrix: plans are made from the model's own names.
QuantizableTensor find_quantizable(Transformer& model, const std::string& name);

// Names that one of the patterns matches, with or without ".weight"; * stands for any run of characters. A pattern that matches
// nothing is a problem.
std::set<std::string> kept_in_float(const std::vector<QuantizableTensor>& tensors, const std::vector<std::string>& patterns, Problems& problems);

}  // namespace kompakt
