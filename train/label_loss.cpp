// The objective of plain fine-tuning: cross entropy with class labels or with the next token.
#include <ATen/ATen.h>

#include <vector>

#include "train/chunked_loss.h"
#include "train/objective.h"
#include "train/targets.h"

namespace kompakt {
namespace {

class LabelCrossEntropy final : public Objective {
 public:
  explicit LabelCrossEntropy(double smoothing) : smoothing_(smoothing) {}
  bool needs_logits() const override { return false; }  // of a classifier they are always there

  at::Tensor loss(const ObjectiveInput& input, std::vector<LossPart>& parts) override {
    const at::Tensor value = input.batch.labels.empty() ? text(input) : classes(input);
    parts.push_back({"cross_entropy", value});
    return value;
  }

 private:
  at::Tensor classes(const ObjectiveInput& input) const {
    const at::Tensor labels = at::tensor(at::ArrayRef<std::int64_t>(input.batch.labels), at::kLong).to(input.logits.device());
    return at::cross_entropy_loss(wide(input.logits), labels, {}, at::Reduction::Mean, no_target, smoothing_);
  }

  at::Tensor text(const ObjectiveInput& input) const {
    const std::vector<std::int64_t> targets = next_tokens(input.batch);
    std::vector<std::int64_t> places, wanted;
    for (std::size_t i = 0; i < targets.size(); ++i) {
      if (targets[i] == no_target) continue;
      places.push_back(static_cast<std::int64_t>(i));
      wanted.push_back(targets[i]);
    }
    const c10::Device device = input.hidden.device();
    const at::Tensor rows = at::tensor(at::ArrayRef<std::int64_t>(places), at::kLong).to(device);
    const at::Tensor labels = at::tensor(at::ArrayRef<std::int64_t>(wanted), at::kLong).to(device);
    if (input.logits.defined()) {  // another objective needs them: use what is there
      return at::cross_entropy_loss(wide(input.logits.flatten(0, 1).index_select(0, rows)), labels, {}, at::Reduction::Mean, no_target, smoothing_);
    }
    const InputTransform& transform = input.student.lm_head.input_transform;
    const at::Tensor hidden = transform ? transform(input.hidden) : input.hidden;
    const HeadWeights head = head_weights(input.student);
    return chunked_cross_entropy(hidden.flatten(0, 1).index_select(0, rows), head.weight, head.bias, labels, smoothing_);
  }

  static at::Tensor wide(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? x : x.to(at::kFloat); }

  double smoothing_;
};

}  // namespace

std::unique_ptr<Objective> label_cross_entropy(double label_smoothing) { return std::make_unique<LabelCrossEntropy>(label_smoothing); }

}  // namespace kompakt
