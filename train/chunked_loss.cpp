// Chunked linear + cross entropy with a hand-written backward pass.
#include "train/chunked_loss.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

namespace kompakt {
namespace {

constexpr std::int64_t chunk_elements = std::int64_t{1} << 24;  // logits of a chunk: 64 MiB in float32

class ChunkedCrossEntropy : public torch::autograd::Function<ChunkedCrossEntropy> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            const at::Tensor& targets, double smoothing, bool gradients, std::int64_t chunk) {
    const std::int64_t tokens = hidden.size(0), vocabulary = weight.size(0);
    if (chunk <= 0) chunk = std::max<std::int64_t>(chunk_elements / vocabulary, 16);
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
      const at::Tensor wanted = targets.narrow(0, start, count).unsqueeze(1);                    // [n,1]
      at::Tensor logits = at::linear(part, weight, bias).to(wide);  // [n,V]
      const at::Tensor log_sum = at::logsumexp(logits, 1, true);                                 // [n,1]
      at::Tensor loss = (log_sum - logits.gather(1, wanted)).sum() * (1 - smoothing);
      if (smoothing > 0) loss = loss + (log_sum.squeeze(1) - logits.mean(1)).sum() * smoothing;
      total.add_(loss);
      if (!gradients) continue;
      at::Tensor slope = logits.sub_(log_sum).exp_();                                            // softmax, in place
      slope.scatter_add_(1, wanted, at::full({count, 1}, smoothing - 1, slope.options()));
      if (smoothing > 0) slope.sub_(smoothing / static_cast<double>(vocabulary));
      slope.div_(static_cast<double>(tokens));
      hidden_gradient.narrow(0, start, count).copy_(at::matmul(slope, weight));
      weight_gradient.add_(at::matmul(slope.t(), part));
      if (bias_gradient.defined()) bias_gradient.add_(slope.sum(0));
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
