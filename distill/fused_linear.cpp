// Token-chunked linear + divergence as an autograd function that keeps only the gradients of its inputs.
#include "distill/fused_linear.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <stdexcept>

namespace kompakt {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

struct FusedCall {
  const LogitLoss& loss;
  const FusedTeacher& teacher;
  const LogitLossOptions& options;
  Tensor valid;  // row indices that count, undefined = all
  bool has_bias;  // autograd functions take no undefined tensor: without a bias an empty one stands in
  std::int64_t chunk;
  double divisor;
};

Tensor fused_rows(const Tensor& x, const Tensor& valid, std::int64_t begin, std::int64_t size) {
  return valid.defined() ? x.index_select(0, valid.narrow(0, begin, size)) : x.narrow(0, begin, size);
}

// The type of the matrix products: what autocast would choose, else the type of the hidden states.
at::ScalarType fused_product_type(const Tensor& hidden) {
  const at::DeviceType device = hidden.device().type();
  if (hidden.scalar_type() == at::kDouble || !at::autocast::is_autocast_enabled(device)) return hidden.scalar_type();
  return at::autocast::get_autocast_dtype(device);
}

struct FusedFunction : torch::autograd::Function<FusedFunction> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& hidden, const Tensor& weight, const Tensor& bias, const FusedCall* call) {
    const at::ScalarType type = fused_product_type(hidden);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const at::ScalarType sums = type == at::kDouble ? at::kDouble : at::kFloat;
    const bool to_hidden = hidden.requires_grad(), to_weight = weight.requires_grad(), to_bias = call->has_bias && bias.requires_grad();
    const bool gradient = to_hidden || to_weight || to_bias;
    const Tensor w = weight.detach().to(type), h = hidden.detach().to(type);
    const Tensor b = call->has_bias ? bias.detach().to(sums) : Tensor();
    const FusedTeacher& teacher = call->teacher;
    const Tensor tw = teacher.logits.defined() ? Tensor() : teacher.weight.detach().to(type);
    const std::int64_t rows = call->valid.defined() ? call->valid.numel() : h.size(0);

    Tensor grad_hidden = to_hidden ? at::zeros(h.sizes(), h.options().dtype(sums)) : Tensor();
    Tensor grad_weight = to_weight ? at::zeros(w.sizes(), w.options().dtype(sums)) : Tensor();
    Tensor grad_bias = to_bias ? at::zeros(b.sizes(), b.options()) : Tensor();
    Tensor total = at::zeros({}, h.options().dtype(at::kDouble));
    for (std::int64_t begin = 0; begin < rows; begin += call->chunk) {
      const std::int64_t size = std::min(call->chunk, rows - begin);
      const Tensor x = fused_rows(h, call->valid, begin, size);
      Tensor logits = at::mm(x, w.t()).to(sums);
      if (b.defined()) logits.add_(b);
      Tensor target;
      if (teacher.logits.defined()) {
        target = fused_rows(teacher.logits.detach(), call->valid, begin, size);
      } else {
        target = at::mm(fused_rows(teacher.hidden.detach(), call->valid, begin, size).to(type), tw.t()).to(sums);
        if (teacher.bias.defined()) target.add_(teacher.bias.detach().to(sums));
      }
      Divergence part = evaluate_logits(call->loss, logits, target, call->options, gradient);
      logits.reset();
      target.reset();
      total.add_(part.value.sum(at::kDouble));
      if (!gradient) continue;
      part.gradient.div_(call->divisor);
      if (to_bias) grad_bias.add_(part.gradient.sum(0));
      const Tensor d = part.gradient.to(type);
      if (to_hidden) {
        const Tensor dx = at::mm(d, w).to(sums);
        if (call->valid.defined()) grad_hidden.index_copy_(0, call->valid.narrow(0, begin, size), dx);
        else grad_hidden.narrow(0, begin, size).copy_(dx);
      }
      if (to_weight) {
        if (type == sums) grad_weight.addmm_(d.t(), x);
        else grad_weight.add_(at::mm(d.t(), x));
      }
    }
    variable_list saved;
    for (const auto& [grad, input] : {std::pair{grad_hidden, hidden}, std::pair{grad_weight, weight}, std::pair{grad_bias, bias}})
      saved.push_back(grad.defined() ? grad.to(input.scalar_type()) : Tensor());
    context->save_for_backward(std::move(saved));
    return total.div_(call->divisor).to(sums);
  }
  static variable_list backward(torch::autograd::AutogradContext* context, variable_list gradients) {
    variable_list out;
    for (const Tensor& saved : context->get_saved_variables()) out.push_back(saved.defined() ? saved * gradients.at(0).to(saved.scalar_type()) : Tensor());
    out.push_back({});
    return out;
  }
};

}  // namespace

std::int64_t fused_chunk(std::int64_t vocabulary) {
  const std::int64_t bytes = 32ll << 20;
  return std::clamp<std::int64_t>(bytes / (4 * std::max<std::int64_t>(1, vocabulary)), 32, 1024);
}

Tensor fused_linear_loss(const LogitLoss& loss, const Tensor& hidden, const Tensor& weight, const Tensor& bias, const FusedTeacher& teacher, const LogitLossOptions& options, std::int64_t chunk) {
  if (hidden.dim() != 2 || weight.dim() != 2 || hidden.size(1) != weight.size(1)) throw std::logic_error("fused loss: hidden [n, d] and weight [V, d] are needed");
  const Tensor& other = teacher.logits.defined() ? teacher.logits : teacher.hidden;
  if (other.dim() != 2 || other.size(0) != hidden.size(0)) throw std::logic_error("fused loss: student and teacher hold different positions");
  FusedCall call{loss, teacher, options, {}, bias.defined(), chunk > 0 ? chunk : fused_chunk(weight.size(0)), options.count};
  std::int64_t rows = hidden.size(0);
  if (options.mask.defined()) {
    const Tensor valid = options.mask.reshape({-1}).nonzero().squeeze(-1);
    if (options.mask.numel() != rows) throw std::logic_error("fused loss: the mask does not fit the positions");
    if (valid.numel() < rows) call.valid = valid, rows = valid.numel();
  }
  if (!(call.divisor > 0)) call.divisor = static_cast<double>(std::max<std::int64_t>(1, rows));
  return FusedFunction::apply(hidden, weight, bias.defined() ? bias : at::empty({0}, weight.options()), &call);
}

}  // namespace kompakt
