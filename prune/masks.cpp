// Masks by magnitude and by Wanda's score, and the constraint that re-applies them.
#include "prune/masks.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <stdexcept>

#include "core/error.h"
#include "core/text.h"

namespace kompakt {
namespace {

using at::Tensor;

// scores [N,K] -> mask. Groups are whole rows or runs of m columns.
Tensor masks_from_scores(const Tensor& scores, const SparsityPattern& pattern) {
  const std::int64_t columns = scores.size(1);
  const bool grouped = pattern.m > 0;
  if (grouped && (pattern.n < 1 || pattern.n > pattern.m)) throw Error(str("the pattern ", pattern.n, ":", pattern.m, " keeps no valid number of weights")).given(str(pattern.n, ":", pattern.m)).allowed(str("1:", pattern.m, " to ", pattern.m, ":", pattern.m));
  if (grouped && columns % pattern.m != 0) throw Error(str("a row of ", columns, " weights does not divide into groups of ", pattern.m)).given(str(pattern.n, ":", pattern.m)).hint("leave this weight dense, or choose another pattern");
  if (!grouped && !(pattern.sparsity >= 0 && pattern.sparsity < 1)) throw Error("the sparsity leaves nothing").given(shortest(pattern.sparsity)).allowed("0 to less than 1");
  const std::int64_t width = grouped ? pattern.m : columns;
  const std::int64_t keep = grouped ? pattern.n : columns - static_cast<std::int64_t>(std::floor(pattern.sparsity * static_cast<double>(columns)));
  const Tensor groups = scores.reshape({-1, width});
  const Tensor order = std::get<1>(groups.sort(/*stable=*/true, /*dim=*/-1, /*descending=*/true)).narrow(1, 0, keep);
  return at::zeros_like(groups, at::kBool).scatter_(1, order, true).reshape(scores.sizes());
}

class MaskConstraint final : public Constraint {
 public:
  explicit MaskConstraint(std::map<std::string, Tensor> masks) : masks_(std::move(masks)) {}
  std::string name() const override { return "mask"; }
  void attach(Transformer& model) override {
    targets_.clear();
    for (const auto& [name, mask] : masks_) {
      Linear* linear = model.find_linear(name);
      if (!linear) throw std::logic_error(str("mask: the model has no linear ", name));
      if (linear->weight.sizes() != mask.sizes()) throw std::logic_error(str("mask: ", name, " has another shape than its mask"));
      targets_.emplace_back(name, mask.to(linear->weight.device()).logical_not());
    }
    apply(model);
  }
  void detach(Transformer& model) override {
    apply(model);
    targets_.clear();
  }
  void after_step(Transformer& model) override { apply(model); }

 private:
  void apply(Transformer& model) const {
    const at::NoGradGuard no_grad;
    for (const auto& [name, zeros] : targets_) model.find_linear(name)->weight.masked_fill_(zeros, 0);
  }
  std::map<std::string, Tensor> masks_;
  std::vector<std::pair<std::string, Tensor>> targets_;  // true = set to zero
};

}  // namespace

Tensor magnitude_mask(const Tensor& weight, const SparsityPattern& pattern) { return masks_from_scores(weight.detach().abs(), pattern); }

Tensor wanda_mask(const Tensor& weight, const Tensor& input_square, const SparsityPattern& pattern) {
  if (input_square.numel() != weight.size(1)) throw std::logic_error("wanda_mask: one input statistic a column is needed");
  return masks_from_scores(weight.detach().abs() * input_square.to(weight.scalar_type()).sqrt().unsqueeze(0), pattern);
}

std::shared_ptr<Constraint> mask_constraint(std::map<std::string, Tensor> masks) { return std::make_shared<MaskConstraint>(std::move(masks)); }

}  // namespace kompakt
