// Weights held in fewer bits: what is decoded is what the grid says, a model held so computes what one of rounded floats computes.
#include "tests/catch_torch.h"

#include <ATen/core/grad_mode.h>

#include "core/error.h"
#include "core/files.h"
#include "model/checkpoint.h"
#include "quantize/grids.h"
#include "quantize/held_weights.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

// The same values as plain floats.
void round_weights(Transformer& model, const HeldPrecision& row) {
  const at::NoGradGuard no_grad;
  for (const NamedParameter& parameter : model.parameters()) {
    if (parameter.value->dim() != 2) continue;
    const bool table = parameter.name.find("embed_tokens") != std::string::npos || parameter.name.find("lm_head") != std::string::npos;
    const std::string_view grid = table ? row.tables : row.linears;
    if (!grid.empty()) *parameter.value = round_to_grid({find_grid(grid), table ? 0 : row.group}, *parameter.value);
    else if (row.halves) *parameter.value = parameter.value->to(at::kBFloat16).to(at::kFloat);
  }
}

ModelInput some_input() { return {.ids = at::arange(3, 27).view({2, 12})}; }

// Llama with rows that are no multiple of a group, or odd.
std::unique_ptr<Transformer> odd_decoder(bool tied) {
  const Json json = {{"model_type", "llama"}, {"hidden_size", 70}, {"num_hidden_layers", 2}, {"num_attention_heads", 2}, {"num_key_value_heads", 1}, {"head_dim", 36}, {"intermediate_size", 75},
                     {"vocab_size", 51}, {"max_position_embeddings", 64}, {"hidden_act", "silu"}, {"rms_norm_eps", 1e-5}, {"tie_word_embeddings", tied}};
  auto model = std::make_unique<Transformer>(config_from_json(json, "odd"), 5);
  stir(*model, 5);
  return model;
}

}  // namespace

TEST_CASE("held weights: a model computes what one of rounded floats computes, whatever its shape and head") {
  const at::NoGradGuard no_grad;
  for (const HeldPrecision& row : held_precisions()) {
    for (const bool tied : {false, true}) {
      INFO(row.name << (tied ? " tied" : ""));
      const auto held = odd_decoder(tied), rounded = odd_decoder(tied);
      held->blocks[0].mlp.up.weight[3].zero_(), rounded->blocks[0].mlp.up.weight[3].zero_();  // a row without a scale
      const at::Tensor before = held->forward(some_input());
      hold_weights(*held, row);
      round_weights(*rounded, row);
      CHECK(at::equal(held->forward(some_input()), rounded->forward(some_input())));
      CHECK(at::equal(held->forward(some_input()), before) == (row.name == "float32"));
      CHECK(at::equal(held->tokens.effective_weight(), rounded->tokens.weight));
      // Decoding gives memory away again: what stays is smaller.
      std::int64_t bytes = 0, largest = 0;
      for (const NamedParameter& parameter : held->parameters()) bytes += static_cast<std::int64_t>(parameter.value->nbytes());
      for (const NamedParameter& parameter : rounded->parameters())
        if (parameter.value->dim() == 2) largest = std::max(largest, parameter.value->numel() * 4);
      CHECK(held_bytes(held->config(), row) == bytes + (row.name == "float32" ? 0 : largest));
    }
  }
}

TEST_CASE("held weights: read from a file matrix by matrix, the same") {
  const at::NoGradGuard no_grad;
  const TemporaryFolder folder;
  const auto model = odd_decoder(true);
  save_model(*model, folder.path());
  for (const HeldPrecision& row : held_precisions()) {
    INFO(row.name);
    const auto memory = odd_decoder(true), file = load_held_model(folder.path(), row);
    hold_weights(*memory, row);
    CHECK(at::equal(memory->forward(some_input()), file->forward(some_input())));
  }
  CHECK(fingerprint(folder.path()) == fingerprint(*load_model(folder.path())));
  CHECK(contains_all(error_text([] { find_held_precision("int5"); }), {"int5", "did you mean \"int", "float32, bf16, int8, int4"}));
}

TEST_CASE("held weights: a classifier and an encoder's tables") {
  const at::NoGradGuard no_grad;
  const auto held = tiny_encoder(3), plain = tiny_encoder(3);
  hold_weights(*held, find_held_precision("int8"));
  const ModelInput input{.ids = at::arange(3, 15).view({2, 6}), .lengths = at::tensor({6, 4}, at::kLong)};
  const at::Tensor a = held->forward(input), b = plain->forward(input);
  CHECK(at::allclose(a, b, 0, 0.1));
  CHECK(!at::equal(a, b));
}
