// Norm folding and untying.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <stdexcept>

#include "core/text.h"
#include "model/families.h"
#include "model/invariance.h"

namespace kompakt {
namespace {

void fold_into(Norm& norm, std::initializer_list<Linear*> readers, std::map<std::string, at::Tensor>& folded) {
  const at::Tensor gain = norm_gain(norm);
  for (Linear* reader : readers)
    if (reader->weight.defined()) reader->weight = (reader->weight.detach().to(at::kDouble) * gain).to(reader->weight.scalar_type());
  set_norm_gain(norm, at::ones_like(gain));
  folded[norm.name] = gain;
}

}  // namespace

at::Tensor norm_gain(const Norm& norm) {
  const at::Tensor weight = norm.weight.detach().to(at::kDouble);
  return norm.plus_one ? weight + 1 : weight;
}

void set_norm_gain(Norm& norm, const at::Tensor& gain) { norm.weight = (norm.plus_one ? gain - 1 : gain).to(norm.weight.scalar_type()); }

std::string fold_obstacle(const ModelConfig& config) {
  const Family& family = *config.family;
  if (family.post_norm) return str("the norms of a ", family.name, " model stand behind attention and MLP: what they put out also goes on along the residual, so their weights cannot move into the linears");
  if (!family.rms_norm) return "LayerNorm subtracts a mean and adds a bias, which the linears behind it have no place for";
  return {};
}

std::map<std::string, at::Tensor> fold_norms(Transformer& model) {
  if (const std::string obstacle = fold_obstacle(model.config()); !obstacle.empty()) throw std::logic_error("fold_norms: " + obstacle);
  const at::NoGradGuard no_grad;
  std::map<std::string, at::Tensor> folded;
  for (Block& block : model.blocks) {
    fold_into(block.attention_norm, {&block.attention.query, &block.attention.key, &block.attention.value}, folded);
    fold_into(block.mlp_norm, {&block.mlp.gate, &block.mlp.up}, folded);
  }
  if (model.lm_head.weight.defined()) fold_into(model.final_norm, {&model.lm_head}, folded);
  return folded;
}

void untie_head(Transformer& model) {
  const Family& family = *model.config().family;
  if (family.encoder || model.lm_head.weight.defined()) throw std::logic_error("untie_head: the head is not tied");
  model.lm_head.name = find_role(family, "lm_head")->hf;
  model.lm_head.weight = model.tokens.full_weight().detach().clone();
  model.config().tied = false;
}

}  // namespace kompakt
