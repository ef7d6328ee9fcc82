// Tiny models and data sets for the tests of the training loop.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "core/files.h"
#include "core/json.h"
#include "core/random.h"
#include "core/text.h"
#include "model/transformer.h"
#include "train/loop.h"

namespace kompakt::testing {

inline std::unique_ptr<Transformer> tiny_bert(std::int64_t classes = 3, std::uint64_t seed = 5) {
  const Json json = {{"model_type", "bert"}, {"hidden_size", 16}, {"num_hidden_layers", 2}, {"num_attention_heads", 2}, {"intermediate_size", 32}, {"vocab_size", 50},
                     {"max_position_embeddings", 24}, {"type_vocab_size", 2}, {"layer_norm_eps", 1e-12}, {"hidden_act", "gelu"}, {"pad_token_id", 0}};
  auto model = std::make_unique<Transformer>(config_from_json(json, "tiny"), seed);
  std::vector<std::string> labels;
  for (std::int64_t c = 0; c < classes; ++c) labels.push_back(str("label", c));
  if (classes > 0) model->add_classifier(labels, "mean");
  return model;
}

inline std::unique_ptr<Transformer> tiny_llama(bool tied = true, std::uint64_t seed = 5) {
  const Json json = {{"model_type", "llama"}, {"hidden_size", 16}, {"num_hidden_layers", 2}, {"num_attention_heads", 2}, {"num_key_value_heads", 1}, {"intermediate_size", 32},
                     {"vocab_size", 50}, {"max_position_embeddings", 64}, {"rms_norm_eps", 1e-5}, {"hidden_act", "silu"}, {"tie_word_embeddings", tied}};
  return std::make_unique<Transformer>(config_from_json(json, "tiny"), seed);
}

// Label = the class of the only informative token.
inline TokenizedExamples tiny_examples(std::int64_t count, std::int64_t classes = 3, std::uint64_t seed = 1, std::int64_t vocabulary = 40) {
  const CounterRandom random(seed, "examples");
  TokenizedExamples out;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t label = i % classes, length = 3 + static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(i), 6));
    std::vector<std::int64_t> ids = {1, 3 + label};
    for (std::int64_t t = 2; t < length; ++t) ids.push_back(10 + static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(1000 + i * 16 + t), static_cast<std::uint64_t>(vocabulary - 10))));
    out.ids.push_back(ids);
    out.labels.push_back(label);
  }
  return out;
}

inline TaskData tiny_data(std::int64_t train = 48, std::int64_t dev = 12) {
  TaskData data;
  data.labels = {"label0", "label1", "label2"};
  data.train = tiny_examples(train);
  data.dev = tiny_examples(dev, 3, 2);
  data.hash = str("tiny-", train, "-", dev);
  return data;
}

inline TaskData tiny_text(std::int64_t documents = 6, std::int64_t length = 40) {
  TaskData data;
  data.kind = TaskData::Kind::text;
  for (std::int64_t d = 0; d < documents; ++d) {
    std::vector<std::int64_t> ids;
    for (std::int64_t t = 0; t < length; ++t) ids.push_back(1 + (d * 7 + t * 3) % 45);
    data.train_documents.push_back(ids);
  }
  data.heldout = {{1, 4, 7, 10, 13, 16, 19, 22}, {2, 5, 8, 11, 14, 17, 20, 23}};
  data.hash = "tiny-text";
  return data;
}

inline TrainOptions tiny_options() {
  TrainOptions options;
  options.epochs = 2;
  options.batch_size = 8;
  options.learning_rate = 1e-2;
  options.precision = "float32";
  options.save_every_steps = 1000;
  return options;
}

inline StageContext tiny_context(const TaskData& data, const std::filesystem::path& work, Json* details = nullptr) {
  StageContext context;
  context.title = "01-finetune";
  context.work = work;
  context.seed = 17;
  context.data = &data;
  context.details = details;
  return context;
}

// All weights as one string of bytes.
inline std::string weight_bytes(const Transformer& model) {
  std::string out;
  for (const auto& [name, value] : model.parameters()) {
    const at::Tensor flat = value.detach().contiguous();
    out += name;
    out.append(static_cast<const char*>(flat.const_data_ptr()), flat.nbytes());
  }
  return out;
}

inline TrainResult train_labels(Transformer& model, const TrainOptions& options, StageContext& context) {
  return train(model, options, {std::shared_ptr<Objective>(label_cross_entropy())}, {}, context);
}

}  // namespace kompakt::testing
