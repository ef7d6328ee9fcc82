// Tiny models and data with a learnable rule, for tests of stages: everything from the counter-based generator.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <memory>
#include <string>
#include <vector>

#include "core/json.h"
#include "core/random.h"
#include "core/text.h"
#include "model/config.h"
#include "model/transformer.h"
#include "train/context.h"

namespace kompakt::testing {

// Weights large enough that outputs differ clearly between tokens, biases and norms not at their neutral values.
inline void stir(Transformer& model, std::uint64_t seed) {
  const at::NoGradGuard no_grad;
  for (const NamedParameter& parameter : model.parameters()) {
    at::Tensor& value = *parameter.value;
    const CounterRandom random(seed, "stir/" + parameter.name);
    const double center = value.dim() == 1 && ends_with(parameter.name, "weight") ? 1 : 0, scale = value.dim() == 1 ? 0.1 : 0.35;
    at::Tensor fresh = at::empty(value.sizes(), at::kFloat);
    for (std::int64_t i = 0; i < fresh.numel(); ++i) fresh.data_ptr<float>()[i] = static_cast<float>(center + scale * random.normal(static_cast<std::uint64_t>(i)));
    value.copy_(fresh);
  }
}

// BERT of 4 layers, hidden 24, 6 heads of 4, feed-forward 48, vocabulary 50, three classes.
inline std::unique_ptr<Transformer> tiny_encoder(std::uint64_t seed, std::int64_t layers = 4) {
  Json json = {{"model_type", "bert"}, {"hidden_size", 24}, {"num_hidden_layers", layers}, {"num_attention_heads", 6}, {"intermediate_size", 48},
               {"vocab_size", 50}, {"max_position_embeddings", 16}, {"type_vocab_size", 2}, {"hidden_act", "gelu"}, {"pad_token_id", 0}};
  auto model = std::make_unique<Transformer>(config_from_json(json, "tiny"), seed);
  model->add_classifier({"a", "b", "c"}, "mean");
  stir(*model, seed);
  return model;
}

// Llama of 3 layers, hidden 24, 6 query heads in 3 groups of 2, head size 4, feed-forward 40, vocabulary 50.
inline std::unique_ptr<Transformer> tiny_decoder(std::uint64_t seed, bool tied = false, std::int64_t layers = 3) {
  Json json = {{"model_type", "llama"}, {"hidden_size", 24}, {"num_hidden_layers", layers}, {"num_attention_heads", 6}, {"num_key_value_heads", 3}, {"intermediate_size", 40},
               {"vocab_size", 50}, {"max_position_embeddings", 64}, {"hidden_act", "silu"}, {"rms_norm_eps", 1e-5}, {"tie_word_embeddings", tied},
               {"bos_token_id", 1}, {"eos_token_id", {2, 7}}};
  auto model = std::make_unique<Transformer>(config_from_json(json, "tiny"), seed);
  stir(*model, seed);
  return model;
}

// Texts of 3 to 9 tokens from 3..49; the class is the largest id modulo 3: a bag of words can learn it.
inline TokenizedExamples tiny_examples(std::int64_t count, std::uint64_t seed) {
  TokenizedExamples out;
  const CounterRandom random(seed, "tiny-examples");
  std::uint64_t at = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    std::vector<std::int64_t> ids;
    const std::int64_t length = 3 + static_cast<std::int64_t>(random.below(at++, 7));
    std::int64_t largest = 0;
    for (std::int64_t t = 0; t < length; ++t) {
      ids.push_back(3 + static_cast<std::int64_t>(random.below(at++, 47)));
      largest = std::max(largest, ids.back());
    }
    out.labels.push_back(largest % 3);
    out.ids.push_back(std::move(ids));
  }
  return out;
}

inline TaskData tiny_classification(std::int64_t count = 64, std::uint64_t seed = 1) {
  TaskData data;
  data.kind = TaskData::Kind::classification;
  data.labels = {"a", "b", "c"};
  data.train = tiny_examples(count, seed);
  data.hash = "tiny-" + std::to_string(seed);
  return data;
}

inline TaskData tiny_text(std::uint64_t seed = 1) {
  TaskData data;
  data.kind = TaskData::Kind::text;
  const CounterRandom random(seed, "tiny-text");
  std::uint64_t at = 0;
  for (int d = 0; d < 6; ++d) {
    std::vector<std::int64_t> ids;
    for (int t = 0; t < 60; ++t) ids.push_back(3 + static_cast<std::int64_t>(random.below(at++, 47)));
    data.train_documents.push_back(ids);
    data.calibration.emplace_back(ids.begin(), ids.begin() + 16);
  }
  data.hash = "tiny-text-" + std::to_string(seed);
  return data;
}

// A row-major batch of equally long texts as model input.
inline ModelInput tiny_input(const std::vector<std::vector<std::int64_t>>& rows) {
  std::vector<std::int64_t> flat;
  for (const auto& row : rows) flat.insert(flat.end(), row.begin(), row.end());
  ModelInput input;
  input.ids = at::tensor(at::ArrayRef<std::int64_t>(flat), at::kLong).reshape({static_cast<std::int64_t>(rows.size()), -1});
  return input;
}

inline std::vector<std::pair<std::string, at::Tensor>> copy_of(const Transformer& model) {
  auto list = model.parameters();
  for (auto& [name, value] : list) value = value.detach().clone();
  return list;
}

inline bool same_parameters(const std::vector<std::pair<std::string, at::Tensor>>& a, const std::vector<std::pair<std::string, at::Tensor>>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i)
    if (a[i].first != b[i].first || a[i].second.sizes() != b[i].second.sizes() || !at::equal(a[i].second, b[i].second)) return false;
  return true;
}

}  // namespace kompakt::testing
