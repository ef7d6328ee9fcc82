// The linear layer and the embedding on which masks and fake quantization act. Plain structs, no torch::nn.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>

#include "model/taps.h"

namespace kompakt {

// Maps the float master weight to the weight that the forward pass uses (mask, fake quantization); differentiable.
using WeightTransform = std::function<at::Tensor(const at::Tensor& weight)>;
using InputTransform = std::function<at::Tensor(const at::Tensor& input)>;

struct Linear {
  std::string name;   // Hugging Face module name without ".weight": "encoder.layer.0.attention.self.query"
  at::Tensor weight;  // [out, in]
  at::Tensor bias;    // [out] or undefined
  WeightTransform transform;       // empty = identity
  InputTransform input_transform;  // empty = identity (activation quantization)
  InputTransform side;             // [.., in] -> [.., out], added to the output (low-rank adapters); empty = nothing

  std::int64_t in_features() const { return weight.size(1); }
  std::int64_t out_features() const { return weight.size(0); }
  at::Tensor effective_weight() const;  // transform applied
  // x [.., in] -> [.., out]; offers "input:<name>" and "output:<name>" to the sink.
  at::Tensor forward(const at::Tensor& x, TapSink* taps = nullptr) const;
};

struct Embedding {
  std::string name;    // "embeddings.word_embeddings"
  at::Tensor weight;   // [vocab, d], or [kept, d] while compacted
  at::Tensor row_map;  // [vocab] int64 -> row of weight while compacted, else undefined
  WeightTransform transform;
  bool transform_by_row = false;  // the transform treats every row alone: forward() applies it to the rows that it looks up only

  at::Tensor effective_weight() const;
  at::Tensor forward(const at::Tensor& ids) const;  // [B,T] int64 -> [B,T,d]
  // Training touches few rows: keep only `ids` (sorted, unique) in `weight`; the rest returns unchanged with expand().
  // Exact as long as untouched rows get no gradient and no weight decay.
  void compact(const at::Tensor& ids);
  void expand();
  at::Tensor full_weight() const;  // [vocab, d]: `weight`, or a new table with the compacted rows put back
  bool compacted() const { return row_map.defined(); }

 private:
  at::Tensor full_;  // [vocab, d], the whole table while compacted
  at::Tensor kept_;  // [kept] int64, the ids whose rows are in weight
};

}  // namespace kompakt
