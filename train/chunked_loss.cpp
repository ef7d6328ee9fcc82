// Chunked linear + cross entropy with a hand-written backward pass.
#include "train/chunked_loss.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "train/logit_chunk.h"
#include "train/row_losses.h"

namespace kompakt {
namespace {

// Sum of the losses of a chunk; with `gradients` its logits [n,V] become the gradient of that sum.
at::Tensor cross_entropy_by_softmax(at::Tensor& logits, const at::Tensor& wanted, double smoothing, bool gradients) {
  const at::Tensor log_sum = at::logsumexp(logits, 1, true);  // [n,1]
  at::Tensor loss = (log_sum - logits.gather(1, wanted)).sum() * (1 - smoothing);
  if (smoothing > 0) loss = loss + (log_sum.squeeze(1) - logits.mean(1)).sum() * smoothing;
  if (!gradients) return loss;
  logits.sub_(log_sum).exp_();  // softmax, in place
  logits.scatter_add_(1, wanted, at::full({logits.size(0), 1}, smoothing - 1, logits.options()));
  if (smoothing > 0) logits.sub_(smoothing / static_cast<double>(logits.size(1)));
  return loss;
}

class ChunkedCrossEntropy : public torch::autograd::Function<ChunkedCrossEntropy> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            const at::Tensor& targets, double smoothing, bool gradients, std::int64_t chunk) {
    const std::int64_t tokens = hidden.size(0), vocabulary = weight.size(0);
    if (chunk <= 0) chunk = logit_chunk(hidden.device().type(), vocabulary, 1);
    const at::ScalarType wide = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    at::Tensor total = at::zeros({}, hidden.options().dtype(wide));
    at::Tensor hidden_gradient, weight_gradient, bias_gradient;
    if (gradients) {
      hidden_gradient = at::empty_like(hidden);
      weight_gradient = at::zeros_like(weight);
      if (bias) bias_gradient = at::zeros_like(*bias);
    }
    for (std::int64_t start = 0; start < tokens; start += chunk) {
      const std::int64_t count = std::min(chunk, tokens - start);
      const at::Tensor part = hidden.narrow(0, start, count);
      const at::Tensor wanted = targets.narrow(0, start, count);  // [n]
      at::Tensor slope = at::linear(part, weight, bias);          // [n,V]: logits, then their gradient
      if (has_row_kernels(slope.device(), slope.scalar_type())) {
        total.add_(cross_entropy_rows(slope, wanted.contiguous(), smoothing, 1 / static_cast<double>(tokens), gradients).sum());
      } else {
        slope = slope.to(wide);
        total.add_(cross_entropy_by_softmax(slope, wanted.unsqueeze(1), smoothing, gradients));
        if (gradients) slope.div_(static_cast<double>(tokens));
      }
      if (!gradients) continue;
      hidden_gradient.narrow(0, start, count).copy_(at::matmul(slope, weight));
      weight_gradient.add_(at::matmul(slope.t(), part));
      if (bias_gradient.defined()) bias_gradient.add_(slope.sum(0, /*keepdim=*/false, wide));
    }
    context->saved_data["gradients"] = gradients;
    if (gradients) context->save_for_backward({hidden_gradient, weight_gradient, bias_gradient});
    return total.div_(static_cast<double>(tokens));
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context, torch::autograd::variable_list outputs) {
    const auto saved = context->get_saved_variables();
    const at::Tensor& scale = outputs[0];
    const auto scaled = [&](const at::Tensor& gradient) { return gradient.defined() ? gradient * scale.to(gradient.scalar_type()) : at::Tensor(); };
    return {scaled(saved[0]), scaled(saved[1]), scaled(saved[2]), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor chunked_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& targets, double label_smoothing, std::int64_t chunk) {
  const bool gradients = at::GradMode::is_enabled() && (hidden.requires_grad() || weight.requires_grad() || (bias.defined() && bias.requires_grad()));
  return ChunkedCrossEntropy::apply(hidden, weight, bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt, targets, label_smoothing, gradients, chunk);
}

HeadWeights head_weights(const Transformer& model) {
  if (model.lm_head.weight.defined()) return {model.lm_head.effective_weight(), model.lm_head.bias};
  return {model.tokens.effective_weight(), {}};
}

}  // namespace kompakt
