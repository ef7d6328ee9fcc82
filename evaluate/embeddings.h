// Vectors of texts from an encoder without classes, and how two models place the same texts beside each other.
//
// Vectors of different models have no axis in common, and a student's may be narrower. What a search or a clustering sees are similarities
// between texts, so these are what is compared.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "data/batches.h"
#include "model/transformer.h"

namespace kompakt {

// Pooled vectors, each divided by its length (one of zeros stays): [N,d] float32 on the CPU in the order of `examples`.
// `progress` (may be empty) is told the number of texts done. Error where a value is not finite, with the text's number, which `number` makes of
// its place among the examples (empty: counted from 1).
at::Tensor embed_texts(const Transformer& model, const TokenizedExamples& examples, std::int64_t pad, std::int64_t batch_size = 64, const std::function<void(std::int64_t)>& progress = {},
                       const std::function<std::int64_t(std::int64_t)>& number = {});

// Per text, over the cosines of its vector with those of all other texts.
struct EmbeddingComparison {
  std::vector<double> rank_correlation;      // Spearman's, ties at their mean rank; of texts whose cosines are all the same in one model: 0
  std::vector<std::int64_t> same_nearest;    // 1 where both models have the same nearest text (the first of equals)
  std::vector<double> cosine;                // of the two vectors of a text; empty where the models' widths differ
};
// a [N,d], b [N,e], rows of length 1, N >= 3. Memory: N floats a text at a time; N^2 (d + e) multiplications.
EmbeddingComparison compare_embeddings(const at::Tensor& a, const at::Tensor& b);

}  // namespace kompakt
