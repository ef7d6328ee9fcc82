// Chunks forward, the same chunks again backward.
#include "distill/token_log_probs.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "distill/fused_linear.h"
#include "train/logit_chunk.h"
#include "train/precision.h"

namespace kompakt {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

// [size, V] log-softmax of rows `begin` and following, in the type of the sums.
Tensor token_log_softmax(const Tensor& hidden, const Tensor& weight, const Tensor& bias, at::ScalarType type, std::int64_t begin, std::int64_t size) {
  const at::ScalarType sums = type == at::kDouble ? at::kDouble : at::kFloat;
  Tensor logits = at::mm(hidden.narrow(0, begin, size).to(type), weight.t()).to(sums);
  if (bias.numel() > 0) logits.add_(bias.to(sums));
  return at::log_softmax(logits, -1);
}

struct TokenLogProbs : torch::autograd::Function<TokenLogProbs> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& tokens, std::int64_t chunk) {
    const at::ScalarType type = fused_product_type(hidden);
    const NoAutocast float32;
    const Tensor w = weight.detach().to(type);
    std::vector<Tensor> parts;
    for (std::int64_t begin = 0; begin < hidden.size(0); begin += chunk) {
      const std::int64_t size = std::min(chunk, hidden.size(0) - begin);
      parts.push_back(token_log_softmax(hidden.detach(), w, bias.detach(), type, begin, size).gather(1, tokens.narrow(0, begin, size).unsqueeze(1)).squeeze(1));
    }
    context->save_for_backward({hidden, weight, bias, tokens});
    context->saved_data["chunk"] = chunk;
    context->saved_data["type"] = static_cast<std::int64_t>(type);
    return at::cat(parts);
  }
  static variable_list backward(torch::autograd::AutogradContext* context, variable_list gradients) {
    const at::NoGradGuard no_grad;
    const NoAutocast float32;
    const variable_list saved = context->get_saved_variables();
    const Tensor &hidden = saved[0], &weight = saved[1], &bias = saved[2], &tokens = saved[3], &upstream = gradients[0];
    const std::int64_t chunk = context->saved_data["chunk"].toInt();
    const auto type = static_cast<at::ScalarType>(context->saved_data["type"].toInt());
    const at::ScalarType sums = type == at::kDouble ? at::kDouble : at::kFloat;
    const Tensor w = weight.to(type);
    Tensor grad_hidden = at::zeros(hidden.sizes(), hidden.options().dtype(sums)), grad_weight = weight.requires_grad() ? at::zeros(weight.sizes(), weight.options().dtype(sums)) : Tensor(), grad_bias = at::zeros(bias.sizes(), bias.options().dtype(sums));
    for (std::int64_t begin = 0; begin < hidden.size(0); begin += chunk) {
      const std::int64_t size = std::min(chunk, hidden.size(0) - begin);
      const Tensor g = upstream.narrow(0, begin, size).to(sums).unsqueeze(1);
      Tensor slope = token_log_softmax(hidden, w, bias, type, begin, size).exp_().mul_(-g);  // g (onehot - softmax)
      slope.scatter_add_(1, tokens.narrow(0, begin, size).unsqueeze(1), g);
      if (bias.numel() > 0) grad_bias.add_(slope.sum(0));
      const Tensor d = slope.to(type);
      grad_hidden.narrow(0, begin, size).copy_(at::mm(d, w));
      if (grad_weight.defined()) grad_weight.add_(at::mm(d.t(), hidden.narrow(0, begin, size).to(type)));
    }
    return {grad_hidden.to(hidden.scalar_type()), grad_weight.defined() ? grad_weight.to(weight.scalar_type()) : Tensor(), bias.numel() > 0 ? grad_bias.to(bias.scalar_type()) : Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

Tensor token_log_probs(const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& tokens, std::int64_t chunk) {
  if (tokens.numel() == 0) return hidden.sum(-1);  // [0]
  return TokenLogProbs::apply(hidden, weight, bias.defined() ? bias : at::empty({0}, weight.options()), tokens, chunk > 0 ? chunk : logit_chunk(weight.device().type(), weight.size(0), 2));
}

}  // namespace kompakt
