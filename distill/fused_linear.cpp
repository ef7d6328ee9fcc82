// Token-chunked linear + divergence as an autograd function that keeps only the gradients of its inputs.
#include "distill/fused_linear.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "distill/kl_rows.h"
#include "distill/row_terms.h"
#include "model/products.h"
#include "train/logit_chunk.h"
#include "train/precision.h"
#include "train/row_losses.h"

namespace kompakt {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

struct FusedCall {
  std::span<const LogitTerm> terms;
  const FusedTeacher& teacher;
  std::int64_t vocabulary;
  Tensor valid;  // row indices that count, undefined = all
  bool has_bias;  // autograd functions take no undefined tensor: without a bias an empty one stands in
  std::int64_t chunk;
  double divisor;
  const PositionLoss* loss = nullptr;  // in place of the terms
};

Tensor fused_rows(const Tensor& x, const Tensor& valid, std::int64_t begin, std::int64_t size) {
  return valid.defined() ? x.index_select(0, valid.narrow(0, begin, size)) : x.narrow(0, begin, size);
}

SparseTargets fused_sparse_rows(const SparseTargets& all, const Tensor& valid, std::int64_t begin, std::int64_t size) {
  const auto rows = [&](const Tensor& x) { return fused_rows(x, valid, begin, size); };
  return {rows(all.ids), rows(all.log_p), rows(all.log_rest), rows(all.draws), rows(all.draw_log_p), all.vocabulary};
}

// x w^T as `kept`, in the buffer where the type allows. `part`: fewer rows than the buffer holds.
Tensor fused_product(const Tensor& x, const Tensor& w, at::ScalarType kept, Tensor& buffer, bool part) {
  if (x.scalar_type() != kept) return at::mm(x, w.t()).to(kept);
  if (!buffer.defined()) buffer = at::empty({x.size(0), w.size(0)}, x.options());
  Tensor out = part ? buffer.narrow(0, 0, x.size(0)) : buffer;
  matrix_product(out, x, w.t());
  return out;
}

// What the kernels of the device compute, where they do: the terms, and the type of the logits that they read and overwrite. Products in
// bfloat16 stay so, unless a bias (float32) is added or the teacher's logits are others.
struct FusedKernel {
  std::optional<rows::RowTerms> terms;
  at::ScalarType type = at::kFloat;
};
FusedKernel fused_kernel(const FusedCall& call, c10::Device device, at::ScalarType product, at::ScalarType sums) {
  if (call.loss || call.teacher.sparse) return {};
  const Tensor& logits = call.teacher.logits;
  const bool half = product == at::kBFloat16 && !call.has_bias && !call.teacher.bias.defined() && (!logits.defined() || logits.scalar_type() == product);
  const at::ScalarType type = half ? product : sums;
  if (!has_row_kernels(device, type)) return {};
  return {row_terms(call.terms, 1 / call.divisor), type};
}

struct FusedFunction : torch::autograd::Function<FusedFunction> {
  static variable_list forward(torch::autograd::AutogradContext* context, const Tensor& hidden, const Tensor& weight, const Tensor& bias, const FusedCall* call) {
    const at::ScalarType type = fused_product_type(hidden);
    const NoAutocast float32;
    const at::ScalarType sums = type == at::kDouble ? at::kDouble : at::kFloat;
    const bool to_hidden = hidden.requires_grad(), to_weight = weight.requires_grad(), to_bias = call->has_bias && bias.requires_grad();
    const bool gradient = to_hidden || to_weight || to_bias;
    const Tensor w = weight.detach().to(type), h = hidden.detach().to(type);
    const Tensor b = call->has_bias ? bias.detach().to(sums) : Tensor();
    const FusedTeacher& teacher = call->teacher;
    const Tensor tw = teacher.logits.defined() || teacher.sparse ? Tensor() : teacher.weight.detach().to(type);
    const std::int64_t rows = call->valid.defined() ? call->valid.numel() : h.size(0);
    const FusedKernel kernel = fused_kernel(*call, h.device(), type, sums);
    const at::ScalarType kept = kernel.terms ? kernel.type : sums;

    Tensor grad_hidden = to_hidden ? at::empty(h.sizes(), h.options().dtype(sums)) : Tensor();
    if (to_hidden && call->valid.defined()) grad_hidden.zero_();  // rows that do not count
    Tensor grad_weight = to_weight ? at::empty(w.sizes(), w.options().dtype(sums)) : Tensor();
    if (to_weight && rows == 0) grad_weight.zero_();
    Tensor grad_bias = to_bias ? at::zeros(b.sizes(), b.options()) : Tensor();
    Tensor values = at::zeros({static_cast<std::int64_t>(call->terms.size()) + 2}, h.options().dtype(at::kDouble));
    Tensor logit_buffer, target_buffer;  // of all chunks, where nobody keeps what is in them
    for (std::int64_t begin = 0; begin < rows; begin += call->chunk) {
      const std::int64_t size = std::min(call->chunk, rows - begin);
      const Tensor x = fused_rows(h, call->valid, begin, size);
      Tensor logits = fused_product(x, w, kept, logit_buffer, size < std::min(rows, call->chunk));
      if (b.defined()) logits.add_(b);
      LogitSums part;
      bool divided = false;
      if (teacher.sparse) {
        part = evaluate_sparse_terms(call->terms, logits, fused_sparse_rows(*teacher.sparse, call->valid, begin, size), call->vocabulary, gradient);
      } else {
        const bool by_rows = !kernel.terms && !call->loss && fits_kl_rows(call->terms, logits);
        Tensor target;
        if (teacher.logits.defined()) {
          target = fused_rows(teacher.logits.detach(), call->valid, begin, size);
          if (kernel.terms || by_rows) target = target.to(kept, /*non_blocking=*/false, /*copy=*/by_rows).contiguous();
        } else {
          target = fused_product(fused_rows(teacher.hidden.detach(), call->valid, begin, size).to(type), tw, kept, target_buffer, size < std::min(rows, call->chunk));
          if (teacher.bias.defined()) target.add_(teacher.bias.detach().to(sums));
        }
        if (kernel.terms) part = evaluate_row_terms(*kernel.terms, logits, target, call->vocabulary, gradient);
        else if (by_rows) part = evaluate_kl_rows(call->terms[0], logits, target, call->vocabulary, gradient, 1 / call->divisor);
        else part = call->loss ? (*call->loss)(logits, target, gradient) : evaluate_terms(call->terms, logits, target, call->vocabulary, gradient);
        divided = kernel.terms || by_rows;
      }
      logits.reset();
      values.add_(part.values);
      if (!gradient) continue;
      if (!divided) part.gradient.div_(call->divisor);
      if (to_bias) grad_bias.add_(part.gradient.sum(0));
      const Tensor d = part.gradient.to(type);
      if (to_hidden) {
        Tensor to = grad_hidden.narrow(0, begin, size);
        if (call->valid.defined()) grad_hidden.index_copy_(0, call->valid.narrow(0, begin, size), at::mm(d, w).to(sums));
        else if (type == sums) matrix_product(to, d, w);
        else to.copy_(at::mm(d, w));
      }
      if (to_weight) {
        if (type != sums) begin == 0 ? grad_weight.copy_(at::mm(d.t(), x)) : grad_weight.add_(at::mm(d.t(), x));
        else matrix_product(grad_weight, d.t(), x, begin > 0);
      }
    }
    variable_list saved;
    for (const auto& [grad, input] : {std::pair{grad_hidden, hidden}, std::pair{grad_weight, weight}, std::pair{grad_bias, bias}})
      saved.push_back(grad.defined() ? grad.to(input.scalar_type()) : Tensor());
    context->save_for_backward(std::move(saved));
    values.div_(call->divisor);
    context->mark_non_differentiable({values});
    return {(call->loss ? values[0] : weighted_total(call->terms, values)).to(sums), values};
  }
  static variable_list backward(torch::autograd::AutogradContext* context, variable_list gradients) {
    variable_list out;
    // The whole loss alone is the usual case, and its factor 1 is worth the look: the head's gradient is the largest of all.
    const bool whole = gradients.at(0).is_cpu() && gradients.at(0).item<double>() == 1;
    for (const Tensor& saved : context->get_saved_variables()) out.push_back(!saved.defined() || whole ? saved : saved * gradients.at(0).to(saved.scalar_type()));
    out.push_back({});
    return out;
  }
};

}  // namespace

at::ScalarType fused_product_type(const Tensor& hidden) {
  const at::DeviceType device = hidden.device().type();
  if (hidden.scalar_type() == at::kDouble || !at::autocast::is_autocast_enabled(device)) return hidden.scalar_type();
  return at::autocast::get_autocast_dtype(device);
}

namespace {

LogitMeans fused_apply(const FusedCall& call, const Tensor& hidden, const Tensor& weight, const Tensor& bias) {
  // Inside of forward() nobody can tell whether gradients are wanted: there they are always off.
  const auto input = [on = at::GradMode::is_enabled()](const Tensor& x) { return on ? x : x.detach(); };
  const variable_list out = FusedFunction::apply(input(hidden), input(weight), bias.defined() ? input(bias) : at::empty({0}, weight.options()), &call);
  return {out[0], out[1]};
}

}  // namespace

LogitMeans fused_position_loss(const PositionLoss& loss, const Tensor& hidden, const Tensor& weight, const Tensor& bias, const FusedTeacher& teacher) {
  FusedCall call{{}, teacher, 0, {}, bias.defined(), logit_chunk(weight.device().type(), weight.size(0), 2), static_cast<double>(std::max<std::int64_t>(1, hidden.size(0)))};
  call.loss = &loss;
  return fused_apply(call, hidden, weight, bias);
}

LogitMeans fused_linear_terms(std::span<const LogitTerm> terms, const Tensor& hidden, const Tensor& weight, const Tensor& bias, const FusedTeacher& teacher, const LogitLossOptions& frame, std::int64_t chunk) {
  if (hidden.dim() != 2 || weight.dim() != 2 || hidden.size(1) != weight.size(1)) throw std::logic_error("fused loss: hidden [n, d] and weight [V, d] are needed");
  const Tensor& other = teacher.logits.defined() ? teacher.logits : teacher.sparse ? teacher.sparse->ids : teacher.hidden;
  if (other.dim() != 2 || other.size(0) != hidden.size(0)) throw std::logic_error("fused loss: student and teacher hold different positions");
  FusedCall call{terms, teacher, frame.vocabulary, {}, bias.defined(), chunk > 0 ? chunk : logit_chunk(weight.device().type(), weight.size(0), 2), frame.count};
  std::int64_t rows = hidden.size(0);
  if (frame.mask.defined()) {
    const Tensor valid = frame.mask.reshape({-1}).nonzero().squeeze(-1);
    if (frame.mask.numel() != rows) throw std::logic_error("fused loss: the mask does not fit the positions");
    if (valid.numel() < rows) call.valid = valid, rows = valid.numel();
  }
  if (!(call.divisor > 0)) call.divisor = static_cast<double>(std::max<std::int64_t>(1, rows));
  return fused_apply(call, hidden, weight, bias);
}

Tensor fused_linear_loss(const LogitLoss& loss, const Tensor& hidden, const Tensor& weight, const Tensor& bias, const FusedTeacher& teacher, const LogitLossOptions& options, std::int64_t chunk) {
  const LogitTerm term{&loss, options, 1};
  return fused_linear_terms({&term, 1}, hidden, weight, bias, teacher, options, chunk).total;
}

}  // namespace kompakt
