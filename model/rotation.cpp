// Rotations merged into the weights: residual stream (R1) and values of each head (R2) of QuaRot and SpinQuant.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <stdexcept>

#include "core/text.h"
#include "model/families.h"
#include "model/invariance.h"

namespace kompakt {
namespace {

constexpr std::int64_t rotation_rows = 8192;  // of a matrix in double at a time: an embedding need not exist twice

// w R, [N,d] x [d,d].
at::Tensor rotation_of_columns(const at::Tensor& w, const at::Tensor& rotation) {
  at::Tensor out = at::empty_like(w.detach());
  for (std::int64_t first = 0; first < w.size(0); first += rotation_rows) {
    const std::int64_t last = std::min(first + rotation_rows, w.size(0));
    out.slice(0, first, last).copy_(at::matmul(w.detach().slice(0, first, last).to(at::kDouble), rotation));
  }
  return out;
}

// R^T w, [d,d] x [d,K] or [d].
at::Tensor rotation_of_rows(const at::Tensor& w, const at::Tensor& rotation) { return at::matmul(rotation.t(), w.detach().to(at::kDouble)).to(w.scalar_type()); }

bool rotation_constant(const Norm& norm) {
  const at::Tensor gain = norm_gain(norm);
  return gain.eq(gain.select(0, 0)).all().item<bool>();
}

}  // namespace

std::string residual_rotation_obstacle(const Transformer& model) {
  const Family& family = *model.config().family;
  if (family.post_norm) return "LayerNorm behind every block subtracts a mean and has a weight per channel, which a rotation of the stream does not pass";
  if (!family.rms_norm) return "LayerNorm subtracts the mean over channels, which a rotation of the stream does not keep";
  if (family.sandwich_norms) return str("a ", family.name, " model has norms with a weight per channel between each block and the stream, which a rotation of the stream does not pass");
  if (!model.lm_head.weight.defined() && !rotation_constant(model.final_norm)) return "the head shares the embedding and the final norm has a weight per channel: exact only with a head of its own (untie: true)";
  return {};
}

void rotate_residual(Transformer& model, const at::Tensor& rotation) {
  if (const std::string obstacle = residual_rotation_obstacle(model); !obstacle.empty()) throw std::logic_error("rotate_residual: " + obstacle);
  if (model.tokens.compacted()) throw std::logic_error("rotate_residual: the embedding is compacted");
  const at::NoGradGuard no_grad;
  const at::Tensor r = rotation.to(model.device());
  const auto reads = [&](Linear& linear) {
    if (linear.weight.defined()) linear.weight = rotation_of_columns(linear.weight, r);
  };
  const auto writes = [&](Linear& linear) {
    linear.weight = rotation_of_rows(linear.weight, r);
    if (linear.bias.defined()) linear.bias = rotation_of_rows(linear.bias, r);
  };
  model.tokens.weight = rotation_of_columns(model.tokens.weight, r);
  for (Block& block : model.blocks) {
    for (const Norm* norm : {&block.attention_norm, &block.mlp_norm})
      if (!rotation_constant(*norm)) throw std::logic_error("rotate_residual: fold_norms has to come first");
    for (Linear* linear : {&block.attention.query, &block.attention.key, &block.attention.value, &block.mlp.gate, &block.mlp.up}) reads(*linear);
    writes(block.attention.output);
    writes(block.mlp.down);
  }
  if (!rotation_constant(model.final_norm)) throw std::logic_error("rotate_residual: fold_norms has to come first");
  reads(model.lm_head);
}

void rotate_values(Transformer& model, const std::function<at::Tensor(std::int64_t, std::int64_t)>& rotation) {
  const at::NoGradGuard no_grad;
  for (std::size_t layer = 0; layer < model.blocks.size(); ++layer) {
    Attention& a = model.blocks[layer].attention;
    const std::int64_t heads = a.kv_heads, size = a.head_dim, group = a.heads / heads;
    std::vector<at::Tensor> list;
    for (std::int64_t h = 0; h < heads; ++h) list.push_back(rotation(static_cast<std::int64_t>(layer), h));
    const at::Tensor r = at::stack(list).to(model.device());  // [Hkv,hd,hd]
    const auto rows = [&](const at::Tensor& w) {              // [Hkv*hd, ..]: R^T from the left, head by head
      return at::bmm(r.transpose(1, 2), w.detach().to(at::kDouble).reshape({heads, size, -1})).reshape(w.sizes()).to(w.scalar_type());
    };
    a.value.weight = rows(a.value.weight);
    if (a.value.bias.defined()) a.value.bias = rows(a.value.bias);
    // Columns of the output projection [d, Hkv, group, hd]: R from the right for every query head of the group.
    const at::Tensor w = a.output.weight;
    const at::Tensor columns = w.detach().to(at::kDouble).reshape({w.size(0), heads, group, size}).permute({1, 0, 2, 3}).reshape({heads, -1, size});
    a.output.weight = at::bmm(columns, r).reshape({heads, w.size(0), group, size}).permute({1, 0, 2, 3}).reshape(w.sizes()).to(w.scalar_type());
  }
}

}  // namespace kompakt
