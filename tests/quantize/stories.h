// The 260-thousand-weight model of ../shared/data (trained by llama2.c on TinyStories) as a Transformer, and text that it writes.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cstdlib>
#include <cstring>
#include <memory>

#include "core/files.h"
#include "core/random.h"
#include "model/config.h"
#include "model/transformer.h"
#include "tests/support.h"
#include "train/calibration.h"

namespace kompakt::testing {

// Null (and a message) where the file is absent.
inline std::unique_ptr<Transformer> stories_model() {
  const auto file = shared_data("models/stories260K/stories260K.bin");
  if (!file) {
    skip("models/stories260K/stories260K.bin is not there");
    return nullptr;
  }
  const std::string bytes = read_text(*file);
  std::int32_t head[7];  // dim, hidden, layers, heads, kv heads, vocabulary (negative: an untied head), positions
  std::memcpy(head, bytes.data(), sizeof head);
  const std::int64_t d = head[0], f = head[1], layers = head[2], heads = head[3], kv = head[4], vocab = std::abs(head[5]), hd = d / heads;
  const Json json = {{"model_type", "llama"}, {"hidden_size", d}, {"intermediate_size", f}, {"num_hidden_layers", layers}, {"num_attention_heads", heads}, {"num_key_value_heads", kv},
                     {"vocab_size", vocab}, {"max_position_embeddings", head[6]}, {"rms_norm_eps", 1e-5}, {"rope_theta", 10000.0}, {"hidden_act", "silu"}, {"tie_word_embeddings", true}};
  auto model = std::make_unique<Transformer>(config_from_json(json, "stories260K"), 0);
  std::size_t at = sizeof head;
  const auto take = [&](at::IntArrayRef shape) {
    at::Tensor t = at::empty(shape, at::kFloat);
    std::memcpy(t.data_ptr<float>(), bytes.data() + at, static_cast<std::size_t>(t.nbytes()));
    at += static_cast<std::size_t>(t.nbytes());
    return t;
  };
  // llama2.c rotates neighbouring pairs, Hugging Face the two halves of a head.
  const auto halves = [&](const at::Tensor& w, std::int64_t count) { return w.view({count, hd / 2, 2, d}).transpose(1, 2).reshape({count * hd, d}).contiguous(); };
  model->tokens.weight = take({vocab, d});
  const at::Tensor attention_norms = take({layers, d}), q = take({layers, d, d}), k = take({layers, kv * hd, d}), v = take({layers, kv * hd, d}), o = take({layers, d, d}), mlp_norms = take({layers, d}),
                   gate = take({layers, f, d}), down = take({layers, d, f}), up = take({layers, f, d});
  for (std::int64_t i = 0; i < layers; ++i) {
    Block& block = model->blocks[static_cast<std::size_t>(i)];
    block.attention_norm.weight = attention_norms[i].clone(), block.mlp_norm.weight = mlp_norms[i].clone();
    block.attention.query.weight = halves(q[i], heads), block.attention.key.weight = halves(k[i], kv), block.attention.value.weight = v[i].clone(), block.attention.output.weight = o[i].clone();
    block.mlp.gate.weight = gate[i].clone(), block.mlp.down.weight = down[i].clone(), block.mlp.up.weight = up[i].clone();
  }
  model->final_norm.weight = take({d});
  return model;
}

// Texts that the model itself writes: `rows` of `length` tokens from its own probabilities.
inline CalibrationSet written_text(const Transformer& model, std::int64_t rows, std::int64_t length, std::uint64_t seed) {
  const at::NoGradGuard no_grad;
  const CounterRandom random(seed, "written-text");
  at::Tensor ids = at::ones({rows, 1}, at::kLong);
  for (std::int64_t t = 1; t < length; ++t) {
    const at::Tensor running = at::softmax(model.forward({ids, {}, {}, {}}).select(1, -1), -1).cumsum(1, at::kDouble);
    at::Tensor u = at::empty({rows, 1}, at::kDouble);
    for (std::int64_t r = 0; r < rows; ++r) u.data_ptr<double>()[r] = random.uniform(static_cast<std::uint64_t>(r * length + t)) * 0.999999;
    ids = at::cat({ids, running.lt(u).sum(1, true)}, 1);
  }
  CalibrationSet set;
  set.inputs.push_back({ids, {}, {}, {}});
  set.valid.emplace_back();
  set.sequences = rows, set.tokens = rows * length, set.hash = "written";
  return set;
}

}  // namespace kompakt::testing
