// The part of the gradient of reverse KL between whole texts that single tokens do not have.
//
// MiniLLM (Gu et al. 2023, arXiv 2306.08543) splits the policy gradient of KL(q || p) over texts y ~ q into a single-step part, the sum
// over positions of the gradient of KL(q(. | y<t) || p(. | y<t)), which {logits: reverse_kl} computes exactly, and a long part,
//   - sum_t R_{t+1} grad log q(y_t | y<t),   R_{t+1} = mean over t' > t of log p(y_t' | y<t') - log q(y_t' | y<t')
// with the rewards' mean in place of their sum (its length normalization). Here the long part is a surrogate loss whose gradient this is.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "distill/objective_item.h"
#include "distill/token_log_probs.h"
#include "train/chunked_loss.h"
#include "train/targets.h"

namespace kompakt {

at::Tensor PolicyObjective::loss(const ObjectiveInput& input, std::vector<LossPart>& parts) {
  const TokenBatch& batch = input.batch;
  const InputTransform& transform = input.student.lm_head.input_transform;
  const at::Tensor hidden = (transform ? transform(input.hidden) : input.hidden).flatten(0, 1);
  std::vector<std::int64_t> positions, tokens, rows;
  if (!batch.prompts.empty()) {  // what the data say was not drawn from the student
    const std::vector<std::int64_t> targets = next_tokens(batch);
    for (std::size_t i = 0; i < targets.size(); ++i) {
      if (targets[i] == no_target) continue;
      positions.push_back(static_cast<std::int64_t>(i));
      tokens.push_back(targets[i]);
      rows.push_back(static_cast<std::int64_t>(i) / batch.columns);
    }
  }
  if (positions.empty()) {
    parts.push_back({"policy", at::zeros({}, hidden.options().dtype(at::kFloat))});
    return hidden.sum() * 0;
  }
  const auto tensor = [&](const std::vector<std::int64_t>& values) { return at::tensor(at::ArrayRef<std::int64_t>(values), at::kLong).to(hidden.device()); };
  const at::Tensor at_positions = tensor(positions), wanted = tensor(tokens);
  // Padding rows of a head are never drawn: the distributions are those over the tokenizer's ids.
  const auto among = [&](const at::Tensor& states, const at::Tensor& weight, const at::Tensor& bias) {
    const std::int64_t rows = tokens_ > 0 ? std::min(tokens_, weight.size(0)) : weight.size(0);
    return token_log_probs(states.index_select(0, at_positions), weight.narrow(0, 0, rows), bias.defined() ? bias.narrow(0, 0, rows) : bias, wanted);
  };
  const HeadWeights head = head_weights(input.student);
  const at::Tensor student = among(hidden, head.weight, head.bias);
  at::Tensor reward;
  {
    const at::NoGradGuard no_grad;
    const TeacherTargets& teacher = objective_teacher(input);
    reward = (among(teacher.hidden.flatten(0, 1), teacher.head_weight, teacher.head_bias) - student.detach()).to(at::kCPU, at::kDouble);
  }
  at::Tensor later = at::zeros_like(reward);
  const double* r = reward.const_data_ptr<double>();
  double sum = 0, count = 0;
  for (std::size_t i = positions.size(); i-- > 0;) {
    if (i + 1 < rows.size() && rows[i + 1] != rows[i]) sum = count = 0;
    later.data_ptr<double>()[i] = count > 0 ? sum / count : 0;
    sum += r[i], count += 1;
  }
  const at::Tensor value = (later.to(student.device(), student.scalar_type()) * student).mean().neg();
  parts.push_back({"policy", value});
  return value * weight_;
}

}  // namespace kompakt
