// A Transformer as a set of parameters: shapes from the config, initial values, the walk over all of them, moving and copying.
// The forward pass is in forward.cpp.
#include "model/transformer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <stdexcept>

#include "core/error.h"
#include "core/random.h"
#include "core/text.h"
#include "model/families.h"
#include "model/parallel.h"
#include "model/rounding.h"

namespace kompakt {

namespace {

// Calls `visit(name, tensor)` for every parameter that the model has, in the order of checkpoints.
template <class Model, class Visit>
void walk_parameters(Model& model, const Visit& visit) {
  const Family& family = *model.config().family;
  const auto module = [&](auto& part) {
    if (part.weight.defined()) visit(part.name + ".weight", part.weight);
    if constexpr (requires { part.bias; }) {
      if (part.bias.defined()) visit(part.name + ".bias", part.bias);
    }
  };
  const auto table = [&](std::string_view role, auto& value) {
    if (value.defined()) visit(std::string(find_role(family, role)->hf) + ".weight", value);
  };
  module(model.tokens);
  table("positions", model.positions);
  table("token_types", model.token_types);
  module(model.embedding_norm);
  for (auto& block : model.blocks) {
    if (!family.post_norm) module(block.attention_norm);
    module(block.attention.query);
    module(block.attention.key);
    module(block.attention.value);
    module(block.attention.output);
    module(block.attention.query_norm);
    module(block.attention.key_norm);
    module(block.attention.sub_norm);
    if (family.post_norm) module(block.attention_norm);
    module(block.post_attention_norm);
    if (!family.post_norm) module(block.mlp_norm);
    module(block.mlp.gate);
    module(block.mlp.up);
    module(block.mlp.sub_norm);
    module(block.mlp.down);
    if (family.post_norm) module(block.mlp_norm);
    module(block.post_mlp_norm);
  }
  module(model.final_norm);
  module(model.lm_head);
  module(model.pooler);
  module(model.classifier);
}

// Empty parameters in the shapes of a config.
class TransformerBuilder {
 public:
  TransformerBuilder(const ModelConfig& config, c10::Device device)
      : config_(config), family_(*config.family), options_(at::TensorOptions().dtype(at::kFloat).device(device)) {}

  at::Tensor empty(std::initializer_list<std::int64_t> shape) const { return at::empty(shape, options_); }

  std::string name(std::string_view role, std::int64_t layer = 0) const {
    const NameMap* row = find_role(family_, role);
    if (!row) throw std::logic_error("family " + std::string(family_.name) + " has no name for " + std::string(role));
    return tensor_name(row->hf, layer);
  }

  Linear linear(std::string_view role, std::int64_t in, std::int64_t out, bool bias, std::int64_t layer = 0) const {
    Linear part;
    part.name = name(role, layer);
    part.weight = empty({out, in});
    if (bias) part.bias = empty({out});
    return part;
  }

  Norm norm(std::string_view role, std::int64_t size, std::int64_t layer = 0) const {
    Norm part;
    part.name = name(role, layer);
    part.weight = empty({size});
    if (!family_.rms_norm) part.bias = empty({size});
    part.eps = config_.norm_eps;
    part.rms = family_.rms_norm;
    part.plus_one = family_.norm_plus_one;
    return part;
  }

  // RMS in every family, LayerNorm ones included: what the projection sees is scaled, its mean stays.
  Norm sub_norm(std::string_view role, std::int64_t size, std::int64_t layer) const {
    Norm part = norm(role, size, layer);
    part.bias = at::Tensor();
    part.rms = true;
    return part;
  }

  void add_sub_norms(Block& b, std::int64_t i) const {
    b.attention.sub_norm = sub_norm("block.attention_sub_norm", config_.heads * config_.head_dim, i);
    b.mlp.sub_norm = sub_norm("block.mlp_sub_norm", config_.ffn, i);
  }

  Block block(std::int64_t i) const {
    const ModelConfig& c = config_;
    const std::int64_t inner = c.heads * c.head_dim, inner_kv = c.kv_heads * c.head_dim;
    Block b;
    b.attention_norm = norm("block.attention_norm", c.hidden, i);
    b.attention.query = linear("block.query", c.hidden, inner, c.qkv_bias, i);
    b.attention.key = linear("block.key", c.hidden, inner_kv, c.qkv_bias, i);
    b.attention.value = linear("block.value", c.hidden, inner_kv, c.qkv_bias, i);
    b.attention.output = linear("block.output", inner, c.hidden, c.out_bias, i);
    b.attention.heads = c.heads;
    b.attention.kv_heads = c.kv_heads;
    b.attention.head_dim = c.head_dim;
    if (family_.qk_norm) {
      b.attention.query_norm = norm("block.query_norm", c.head_dim, i);
      b.attention.key_norm = norm("block.key_norm", c.head_dim, i);
    }
    if (family_.sandwich_norms) {
      b.post_attention_norm = norm("block.post_attention_norm", c.hidden, i);
      b.post_mlp_norm = norm("block.post_mlp_norm", c.hidden, i);
    }
    b.mlp_norm = norm("block.mlp_norm", c.hidden, i);
    if (family_.gated_mlp) b.mlp.gate = linear("block.gate", c.hidden, c.ffn, c.mlp_bias, i);
    b.mlp.up = linear("block.up", c.hidden, c.ffn, c.mlp_bias, i);
    b.mlp.down = linear("block.down", c.ffn, c.hidden, c.mlp_bias, i);
    if (c.sub_norms) add_sub_norms(b, i);
    return b;
  }

 private:
  const ModelConfig& config_;
  const Family& family_;
  at::TensorOptions options_;
};

void transformer_fill_normal(at::Tensor& tensor, std::uint64_t seed, const std::string& name) {
  at::Tensor values = at::empty(tensor.sizes(), at::kFloat);
  float* out = values.mutable_data_ptr<float>();
  const CounterRandom random(seed, name);
  at::parallel_for(0, values.numel(), 1 << 14, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) out[i] = static_cast<float>(0.02 * random.normal(static_cast<std::uint64_t>(i)));
  });
  tensor.copy_(values);
}

}  // namespace

Transformer::Transformer(ModelConfig config, std::uint64_t seed, c10::Device device) : config_(std::move(config)) {
  if (!config_.family) throw std::logic_error("Transformer: the config has no family");
  const ModelConfig& c = config_;
  const Family& family = *c.family;
  const TransformerBuilder build(c, device);
  tokens.name = build.name("tokens");
  tokens.weight = build.empty({c.vocab, c.hidden});
  if (family.learned_positions) positions = build.empty({c.max_positions, c.hidden});
  if (c.type_vocab > 0) token_types = build.empty({c.type_vocab, c.hidden});
  if (family.post_norm) embedding_norm = build.norm("embedding_norm", c.hidden);
  for (std::int64_t i = 0; i < c.layers; ++i) blocks.push_back(build.block(i));
  if (!family.post_norm) final_norm = build.norm("final_norm", c.hidden);
  if (!family.encoder && !c.tied) lm_head = build.linear("lm_head", c.hidden, c.vocab, false);
  if (c.is_classifier()) {
    if (c.pooling == "pooler") pooler = build.linear("pooler", c.hidden, c.hidden, true);
    classifier = build.linear("classifier", c.hidden, static_cast<std::int64_t>(c.labels.size()), true);
  }
  install_rounding(*this);
  if (device.is_meta()) return;
  for (NamedParameter& parameter : parameters()) {
    at::Tensor& value = *parameter.value;
    const bool is_bias = ends_with(parameter.name, ".bias");
    const bool is_norm = value.dim() == 1 && !is_bias;
    if (is_norm) {
      value.fill_(family.norm_plus_one ? 0.0 : 1.0);
    } else if (is_bias) {
      value.zero_();
    } else {
      transformer_fill_normal(value, seed, parameter.name);
    }
  }
}

std::vector<NamedParameter> Transformer::parameters() {
  std::vector<NamedParameter> list;
  walk_parameters(*this, [&](std::string name, at::Tensor& value) { list.push_back({std::move(name), &value}); });
  return list;
}

std::vector<std::pair<std::string, at::Tensor>> Transformer::parameters() const {
  std::vector<std::pair<std::string, at::Tensor>> list;
  walk_parameters(*this, [&](std::string name, const at::Tensor& value) { list.emplace_back(std::move(name), value); });
  return list;
}

std::vector<Linear*> Transformer::linears() {
  std::vector<Linear*> list;
  for (Block& block : blocks) {
    for (Linear* part : {&block.attention.query, &block.attention.key, &block.attention.value, &block.attention.output, &block.mlp.gate,
                         &block.mlp.up, &block.mlp.down}) {
      if (part->weight.defined()) list.push_back(part);
    }
  }
  return list;
}

Linear* Transformer::find_linear(const std::string& name) {
  for (Linear* part : linears()) {
    if (part->name == name) return part;
  }
  for (Linear* part : {&lm_head, &pooler, &classifier}) {
    if (part->weight.defined() && part->name == name) return part;
  }
  return nullptr;
}

c10::Device Transformer::device() const { return tokens.weight.device(); }

void Transformer::to(c10::Device device) {
  tokens.expand();
  for (NamedParameter& parameter : parameters()) {
    const bool grad = parameter.value->requires_grad();
    *parameter.value = parameter.value->detach().to(device).requires_grad_(grad);
  }
}

void Transformer::requires_grad(bool on) {
  for (NamedParameter& parameter : parameters())
    if (parameter.value->requires_grad() != on) parameter.value->requires_grad_(on);
}

std::unique_ptr<Transformer> Transformer::clone() const {
  auto copy = std::make_unique<Transformer>(config_, 0, c10::Device(c10::kMeta));
  copy->dropout = dropout;
  const auto from = parameters();
  const auto into = copy->parameters();
  for (std::size_t i = 0; i < into.size(); ++i) *into[i].value = from[i].second.detach().clone();
  if (tokens.compacted()) copy->tokens.weight = tokens.full_weight().detach();
  return copy;
}

void Transformer::add_sub_norms() {
  if (config_.sub_norms) throw std::logic_error("add_sub_norms: the model has them");
  config_.sub_norms = true;
  const TransformerBuilder build(config_, device());
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    build.add_sub_norms(blocks[i], static_cast<std::int64_t>(i));
    for (Norm* norm : {&blocks[i].attention.sub_norm, &blocks[i].mlp.sub_norm})
      norm->weight.fill_(norm->plus_one ? 0.0 : 1.0).requires_grad_(blocks[i].attention.output.weight.requires_grad());
  }
}

void Transformer::add_classifier(std::vector<std::string> labels, const std::string& pooling) {
  if (!config_.family->encoder) {
    throw Error(str("a ", config_.family->name, " model cannot carry a classifier")).allowed("an encoder (bert)");
  }
  if (labels.size() < 2) throw Error(str("a classifier needs at least 2 labels, not ", labels.size()));
  if (pooling != "mean" && pooling != "cls" && pooling != "pooler") {
    throw Error("unknown pooling").given(pooling).allowed("mean, cls, pooler");
  }
  config_.labels = std::move(labels);
  config_.pooling = pooling;
  const TransformerBuilder build(config_, device());
  const bool grad = blocks.empty() ? false : blocks.front().attention.query.weight.requires_grad();
  if (pooling != "pooler") {
    pooler = Linear();
  } else if (!pooler.weight.defined()) {
    pooler = build.linear("pooler", config_.hidden, config_.hidden, true);
    if (!device().is_meta()) {
      transformer_fill_normal(pooler.weight, 0, pooler.name + ".weight");
      pooler.bias.zero_();
    }
    pooler.weight.requires_grad_(grad);
    pooler.bias.requires_grad_(grad);
  }
  classifier = build.linear("classifier", config_.hidden, static_cast<std::int64_t>(config_.labels.size()), true);
  classifier.weight.zero_().requires_grad_(grad);
  classifier.bias.zero_().requires_grad_(grad);
}

}  // namespace kompakt
