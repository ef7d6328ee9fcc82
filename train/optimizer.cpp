// Parameter groups and the fused AdamW step.
#include "train/optimizer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <set>
#include <stdexcept>

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

namespace {

struct OptimizerRow {
  const char* name;
  bool eight_bit;
};
constexpr OptimizerRow optimizers[] = {{"adamw", false}, {"adamw_8bit", true}};

}  // namespace

std::vector<std::string> optimizer_names() {
  std::vector<std::string> names;
  for (const OptimizerRow& row : optimizers) names.emplace_back(row.name);
  return names;
}

bool optimizer_is_8bit(const std::string& name) {
  for (const OptimizerRow& row : optimizers)
    if (row.name == name) return row.eight_bit;
  throw std::logic_error("optimizer_is_8bit: no row " + name);
}

AdamW::AdamW(std::vector<TrainableParameter> parameters, const AdamWOptions& options, std::vector<bool> mine) : parameters_(std::move(parameters)), options_(options), mine_(std::move(mine)) {
  if (mine_.empty()) mine_.assign(parameters_.size(), true);
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const TrainableParameter& parameter = parameters_[i];
    moments_.push_back(mine_[i] ? make_moments(parameter.value) : Moments());
    auto group = std::find_if(groups_.begin(), groups_.end(), [&](const Group& g) { return g.learning_rate == parameter.learning_rate && g.weight_decay == parameter.weight_decay; });
    if (group == groups_.end()) group = groups_.insert(groups_.end(), Group{parameter.learning_rate, parameter.weight_decay, {}});
    if (mine_[i]) group->members.push_back(i);
  }
}

AdamW::Moments AdamW::make_moments(const at::Tensor& value) const {
  Moments out;
  out.eight_bit = options_.eight_bit && value.numel() >= least_8bit_size && value.scalar_type() == at::kFloat;
  if (out.eight_bit) {
    out.first_8bit = zero_moment(value.numel(), true, value.device());
    out.second_8bit = zero_moment(value.numel(), false, value.device());
  } else {
    out.first = at::zeros_like(value.detach(), at::MemoryFormat::Contiguous);
    out.second = at::zeros_like(value.detach(), at::MemoryFormat::Contiguous);
  }
  out.steps = at::zeros({}, value.options().dtype(at::kFloat).requires_grad(false));
  return out;
}

void AdamW::step(double factor, const at::Tensor& gradient_divisor) {
  at::NoGradGuard no_grad;
  for (const Group& group : groups_) {
    std::vector<at::Tensor> values, gradients, first, second, steps;
    for (std::size_t i : group.members) {
      const at::Tensor& gradient = parameters_[i].value.grad();
      if (!gradient.defined() || moments_[i].eight_bit) continue;
      values.push_back(parameters_[i].value);
      gradients.push_back(gradient);
      first.push_back(moments_[i].first);
      second.push_back(moments_[i].second);
      steps.push_back(moments_[i].steps);
    }
    if (options_.eight_bit) step_8bit(group, factor, gradient_divisor);
    if (values.empty()) continue;
    at::_foreach_add_(steps, 1);
    const std::optional<at::Tensor> divisor = gradient_divisor.defined() ? std::optional<at::Tensor>(gradient_divisor) : std::nullopt;
    at::_fused_adamw_(values, gradients, first, second, {}, steps, group.learning_rate * factor, options_.beta1, options_.beta2, group.weight_decay, options_.epsilon, false, false, divisor, std::nullopt);
  }
}

void AdamW::step_8bit(const Group& group, double factor, const at::Tensor& gradient_divisor) {
  AdamStep step{group.learning_rate * factor, options_.beta1, options_.beta2, group.weight_decay, options_.epsilon};
  step.divisor = gradient_divisor.defined() ? gradient_divisor.item<double>() : 1.0;
  for (std::size_t i : group.members) {
    Moments& moments = moments_[i];
    const at::Tensor& gradient = parameters_[i].value.grad();
    if (!gradient.defined() || !moments.eight_bit) continue;
    moments.steps.add_(1);
    step.step = moments.steps.item<double>();
    adamw_8bit_step(parameters_[i].value, gradient, moments.first_8bit, moments.second_8bit, step);
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

std::vector<std::pair<std::string, at::Tensor>> AdamW::state_of(std::size_t i) const {
  const Moments moments = mine_[i] ? moments_[i] : make_moments(parameters_[i].value);
  const std::string& name = parameters_[i].name;
  std::vector<std::pair<std::string, at::Tensor>> out;
  if (moments.eight_bit) {
    out = {{"first_moment." + name, moments.first_8bit.codes}, {"first_scales." + name, moments.first_8bit.scales}, {"second_moment." + name, moments.second_8bit.codes}, {"second_scales." + name, moments.second_8bit.scales}};
  } else {
    out = {{"first_moment." + name, moments.first}, {"second_moment." + name, moments.second}};
  }
  out.emplace_back("steps." + name, moments.steps);
  return out;
}

std::vector<std::pair<std::string, at::Tensor>> AdamW::state() const {
  std::vector<std::pair<std::string, at::Tensor>> out;
  for (std::size_t i = 0; i < parameters_.size(); ++i)
    for (auto& entry : state_of(i)) out.push_back(std::move(entry));
  return out;
}

}  // namespace kompakt
