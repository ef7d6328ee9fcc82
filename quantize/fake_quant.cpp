// Fake quantization while training. The weight that computes is exactly decode(encode(master)), the same pair that the
// exporter packs; scales are fitted anew from the master weight at every step, so nothing has to be learned about them.
#include "quantize/fake_quant.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <stdexcept>

#include "core/text.h"
#include "quantize/tensors.h"

namespace kompakt {
namespace {

constexpr std::array gradual_rows = {
    GradualSchedule{"linear", "in equal steps", [](double t) { return t; }},
    GradualSchedule{"cosine", "along half a cosine: slow at both ends", [](double t) { return t < 1 ? 0.5 * (1 - std::cos(std::numbers::pi * t)) : 1.0; }},
};

class FakeQuantization final : public Constraint {
 public:
  FakeQuantization(QuantizationPlan plan, const GradualOptions& gradual) : plan_(std::move(plan)), share_(gradual.share), schedule_(*find_gradual_schedule(gradual.schedule)) {}

  std::string name() const override {
    std::string text = "fake_quantization";
    if (share_ > 0) text += str(" gradual=", shortest(share_), " ", schedule_.name);
    for (const auto& [tensor, spec] : plan_.tensors) text += str(" ", tensor, "=", spec.grid->name, ":", spec.group);
    return text;
  }

  void attach(Transformer& model) override {
    if (!slots_.empty()) throw std::logic_error("fake_quantization: attached twice");
    for (const auto& [tensor, spec] : plan_.tensors) {
      Slot& slot = slots_[tensor];
      const QuantizableTensor found = find_quantizable(model, tensor);
      slot.spec = spec;
      slot.before = *found.transform;
      // An earlier constraint (a mask) acts first: what it removes stays on the grid's zero.
      *found.transform = [this, &slot](const at::Tensor& weight) { return apply(slot, slot.before ? slot.before(weight) : weight); };
      // Scales belong to rows, and a batch looks up few of them. A tied head needs them all anyway.
      if (found.role == QuantizableRole::embedding && !slot.before && !model.config().tied) {
        slot.keep = false;
        model.tokens.transform_by_row = true;
      }
    }
  }

  void detach(Transformer& model) override {
    for (auto& [tensor, slot] : slots_) *find_quantizable(model, tensor).transform = slot.before;
    slots_.clear();
    model.tokens.transform_by_row = false;
  }

  void before_forward(Transformer&, std::int64_t step, std::int64_t steps) override {
    strength_ = gradual_strength(schedule_, share_, step, steps);
    forget();
  }

  void after_step(Transformer&) override {
    strength_ = 1.0;  // whatever is evaluated between steps is the deployed model
    forget();
  }

 private:
  struct Slot {
    GridSpec spec;
    WeightTransform before;
    bool keep = true;
    at::Tensor rounded;  // of this step, when `keep`: micro batches share it
  };

  void forget() {
    for (auto& [tensor, slot] : slots_) slot.rounded = at::Tensor();
  }

  at::Tensor round(const GridSpec& spec, const at::Tensor& weight) const {
    const at::NoGradGuard no_grad;
    const at::Tensor rounded = round_to_grid(spec, weight);
    return gradual_weight(weight, rounded, strength_);
  }

  at::Tensor apply(Slot& slot, const at::Tensor& weight) const {
    if (!slot.keep) return straight_through(weight, round(slot.spec, weight));
    if (!slot.rounded.defined()) slot.rounded = round(slot.spec, weight);
    return straight_through(weight, slot.rounded);
  }

  QuantizationPlan plan_;
  const double share_;
  const GradualSchedule& schedule_;
  double strength_ = 1.0;
  std::map<std::string, Slot> slots_;  // nodes of a map stay where they are: transforms hold references
};

}  // namespace

std::span<const GradualSchedule> gradual_schedules() { return gradual_rows; }

const GradualSchedule* find_gradual_schedule(std::string_view name) {
  for (const GradualSchedule& row : gradual_rows)
    if (row.name == name) return &row;
  return nullptr;
}

std::vector<std::string> gradual_schedule_names() {
  std::vector<std::string> names;
  for (const GradualSchedule& row : gradual_rows) names.emplace_back(row.name);
  return names;
}

double gradual_strength(const GradualSchedule& schedule, double share, std::int64_t step, std::int64_t steps) {
  const double end = share * static_cast<double>(steps), done = static_cast<double>(step + 1);
  return done < end ? schedule.strength(done / end) : 1.0;
}

at::Tensor gradual_weight(const at::Tensor& weight, const at::Tensor& rounded, double strength) {
  const at::NoGradGuard no_grad;
  return strength < 1 ? weight + (rounded - weight) * strength : rounded;
}

std::shared_ptr<Constraint> fake_quantization(const QuantizationPlan& plan, const GradualOptions& gradual) {
  if (!find_gradual_schedule(gradual.schedule)) throw std::logic_error("fake_quantization: no gradual schedule " + gradual.schedule);
  return std::make_shared<FakeQuantization>(plan, gradual);
}

}  // namespace kompakt
