// Parameter groups and the fused AdamW step.
#include "train/optimizer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <set>

#include "core/error.h"
#include "core/text.h"

namespace kompakt {

bool matches_pattern(std::string_view name, std::string_view pattern) {
  // Greedy with one point of return: linear in practice, no recursion.
  std::size_t n = 0, p = 0, star = std::string_view::npos, mark = 0;
  while (n < name.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      mark = n;
    } else if (p < pattern.size() && pattern[p] == name[n]) {
      ++p;
      ++n;
    } else if (star != std::string_view::npos) {
      p = star + 1;
      n = ++mark;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

std::vector<TrainableParameter> trainable_parameters(Transformer& model, const TrainOptions& options) {
  const auto rate_or_default = [&](double rate) { return rate > 0 ? rate : options.learning_rate; };
  const std::set<const at::Tensor*> embeddings = {&model.tokens.weight, &model.positions, &model.token_types};
  std::set<const at::Tensor*> matrices = {&model.pooler.weight, &model.classifier.weight, &model.lm_head.weight};
  for (Linear* linear : model.linears()) matrices.insert(&linear->weight);

  std::vector<NamedParameter> all = model.parameters();
  std::vector<std::string> names;
  for (const NamedParameter& parameter : all) names.push_back(parameter.name);
  Problems problems;
  for (const std::string& pattern : options.freeze) {
    if (std::none_of(names.begin(), names.end(), [&](const std::string& name) { return matches_pattern(name, pattern); })) {
      problems.add(Error(str("no parameter matches the pattern \"", pattern, "\"", did_you_mean(pattern, names)))
                       .at("freeze").given(pattern).allowed(str("names such as ", names.front(), " and ", names.back(), "; * stands for anything"))
                       .hint("list the names with: kompakt inspect MODEL"));
    }
  }
  problems.throw_if_any("patterns of frozen parameters");

  std::vector<TrainableParameter> out;
  for (const NamedParameter& parameter : all) {
    const bool classifier = parameter.value == &model.classifier.weight || parameter.value == &model.classifier.bias;
    const bool frozen = (options.has_lora && !classifier) || std::any_of(options.freeze.begin(), options.freeze.end(), [&](const std::string& pattern) { return matches_pattern(parameter.name, pattern); });
    parameter.value->requires_grad_(!frozen);
    if (frozen) continue;
    TrainableParameter row{parameter.name, *parameter.value, options.learning_rate, 0};
    if (parameter.value->dim() == 1) row.learning_rate = rate_or_default(options.norm_learning_rate);
    if (classifier) row.learning_rate = rate_or_default(options.head_learning_rate);
    if (embeddings.count(parameter.value)) row.learning_rate = rate_or_default(options.embedding_learning_rate);
    if (matrices.count(parameter.value)) row.weight_decay = options.weight_decay;
    out.push_back(std::move(row));
  }
  if (out.empty() && !options.has_lora) {
    throw Error("every parameter is frozen: nothing is left to train").at("freeze").given(join(options.freeze, ", ")).allowed("patterns that leave at least one parameter").hint("remove a pattern");
  }
  return out;
}

AdamW::AdamW(std::vector<TrainableParameter> parameters, double beta1, double beta2, double epsilon)
    : parameters_(std::move(parameters)), beta1_(beta1), beta2_(beta2), epsilon_(epsilon) {
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const TrainableParameter& parameter = parameters_[i];
    first_.push_back(at::zeros_like(parameter.value.detach(), at::MemoryFormat::Contiguous));
    second_.push_back(at::zeros_like(parameter.value.detach(), at::MemoryFormat::Contiguous));
    steps_.push_back(at::zeros({}, parameter.value.options().dtype(at::kFloat).requires_grad(false)));
    auto group = std::find_if(groups_.begin(), groups_.end(), [&](const Group& g) { return g.learning_rate == parameter.learning_rate && g.weight_decay == parameter.weight_decay; });
    if (group == groups_.end()) group = groups_.insert(groups_.end(), Group{parameter.learning_rate, parameter.weight_decay, {}});
    group->members.push_back(i);
  }
}

void AdamW::step(double factor, const at::Tensor& gradient_divisor) {
  at::NoGradGuard no_grad;
  for (const Group& group : groups_) {
    std::vector<at::Tensor> values, gradients, first, second, steps;
    for (std::size_t i : group.members) {
      const at::Tensor& gradient = parameters_[i].value.grad();
      if (!gradient.defined()) continue;
      values.push_back(parameters_[i].value);
      gradients.push_back(gradient);
      first.push_back(first_[i]);
      second.push_back(second_[i]);
      steps.push_back(steps_[i]);
    }
    if (values.empty()) continue;
    at::_foreach_add_(steps, 1);
    const std::optional<at::Tensor> divisor = gradient_divisor.defined() ? std::optional<at::Tensor>(gradient_divisor) : std::nullopt;
    at::_fused_adamw_(values, gradients, first, second, {}, steps, group.learning_rate * factor, beta1_, beta2_, group.weight_decay, epsilon_, false, false, divisor, std::nullopt);
  }
}

void AdamW::zero_grad() {
  // Undefined instead of zero: the first backward then hands its buffer over instead of adding to it.
  for (TrainableParameter& parameter : parameters_) parameter.value.mutable_grad() = at::Tensor();
}

std::vector<at::Tensor> AdamW::gradients() const {
  std::vector<at::Tensor> out;
  for (const TrainableParameter& parameter : parameters_) {
    if (parameter.value.grad().defined()) out.push_back(parameter.value.grad());
  }
  return out;
}

std::vector<std::pair<std::string, at::Tensor>> AdamW::state() const {
  std::vector<std::pair<std::string, at::Tensor>> out;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    out.emplace_back("first_moment." + parameters_[i].name, first_[i]);
    out.emplace_back("second_moment." + parameters_[i].name, second_[i]);
    out.emplace_back("steps." + parameters_[i].name, steps_[i]);
  }
  return out;
}

}  // namespace kompakt
