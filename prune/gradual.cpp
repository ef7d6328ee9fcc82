#include "prune/gradual.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "core/text.h"
#include "prune/masks.h"

namespace kompakt {
namespace {

constexpr std::array<SparsitySchedule, 2> gradual_table{{
    {"cubic", "fast at first, when much is superfluous, then ever slower: 1 - (1 - t)^3", [](double t) { return 1 - (1 - t) * (1 - t) * (1 - t); }},
    {"linear", "equal steps", [](double t) { return t; }},
}};

class GradualMasks final : public Constraint {
 public:
  GradualMasks(const GradualOptions& options, double final_sparsity, std::vector<std::string> linears, WeightMasks& masks) : options_(options), final_(final_sparsity), linears_(std::move(linears)), masks_(masks) {}
  std::string name() const override {
    std::string all;
    for (const std::string& linear : linears_) all += linear + " ";
    return str("gradual ", options_.type, " ", shortest(options_.initial), " to ", shortest(final_), " from ", shortest(options_.begin), " to ", shortest(options_.end), " every ", options_.every, " ", all);
  }
  void attach(Transformer&) override { zeros_.clear(); }
  void detach(Transformer& model) override {
    zero(model);
    for (const auto& [name, zeros] : zeros_) masks_[name] = zeros.logical_not().cpu();
    zeros_.clear();
  }
  void before_forward(Transformer& model, std::int64_t step, std::int64_t steps) override {
    // The first call of a process: what is zero was chosen before it was interrupted.
    const bool resumed = zeros_.empty();
    const at::NoGradGuard no_grad;
    if (resumed)
      for (const std::string& name : linears_) zeros_[name] = model.find_linear(name)->weight.detach().eq(0);
    // Due: at every multiple, and when the growth ends.
    const auto last = static_cast<std::int64_t>(std::ceil(options_.end * static_cast<double>(steps)));
    const bool due = (step % options_.every == 0 && step <= last) || step == std::min(last, steps - 1);
    if (!due) return;
    const double sparsity = step >= std::min(last, steps - 1) ? final_ : gradual_sparsity(options_, final_, step, steps);
    if (sparsity <= 0) return;
    for (const std::string& name : linears_) {
      const at::Tensor weight = model.find_linear(name)->weight.detach();
      const at::Tensor chosen = magnitude_mask(weight.to(at::kCPU, at::kFloat), SparsityPattern{sparsity}).logical_not();
      zeros_[name] = zeros_[name].logical_or(chosen.to(weight.device()));
    }
    zero(model);
  }
  void after_step(Transformer& model) override { zero(model); }

 private:
  void zero(Transformer& model) const {
    const at::NoGradGuard no_grad;
    for (const auto& [name, zeros] : zeros_) model.find_linear(name)->weight.masked_fill_(zeros, 0);
  }
  GradualOptions options_;
  double final_;
  std::vector<std::string> linears_;
  WeightMasks& masks_;
  std::map<std::string, at::Tensor> zeros_;  // true = gone
};

}  // namespace

void fields(FieldVisitor& visitor, GradualOptions& options) {
  visitor.choice("type", options.type, "how the sparsity grows", sparsity_schedule_names());
  visitor.number("initial", options.initial, "sparsity at the beginning", {.min = 0, .max = 0.99});
  visitor.number("begin", options.begin, "share of the recovery's steps before the sparsity grows", {.min = 0, .max = 1});
  visitor.number("end", options.end, "share of the recovery's steps after which it has its final value", {.min = 0, .max = 1});
  visitor.integer("every", options.every, "steps between two choices of weights", {.min = 1});
}

std::span<const SparsitySchedule> sparsity_schedules() { return gradual_table; }

const SparsitySchedule* find_sparsity_schedule(std::string_view name) {
  for (const SparsitySchedule& row : gradual_table)
    if (row.name == name) return &row;
  return nullptr;
}

std::vector<std::string> sparsity_schedule_names() {
  std::vector<std::string> names;
  for (const SparsitySchedule& row : gradual_table) names.emplace_back(row.name);
  return names;
}

double gradual_sparsity(const GradualOptions& options, double final_sparsity, std::int64_t step, std::int64_t steps) {
  const double time = steps > 0 ? static_cast<double>(step) / static_cast<double>(steps) : 1, span = options.end - options.begin;
  const double progress = span > 0 ? std::clamp((time - options.begin) / span, 0.0, 1.0) : (time >= options.end ? 1.0 : 0.0);
  return options.initial + (final_sparsity - options.initial) * find_sparsity_schedule(options.type)->grown(progress);
}

std::shared_ptr<Constraint> gradual_masks(const GradualOptions& options, double final_sparsity, std::vector<std::string> linears, WeightMasks& masks) {
  return std::make_shared<GradualMasks>(options, final_sparsity, std::move(linears), masks);
}

}  // namespace kompakt
