// A live teacher: one forward pass on every batch, without gradients and without memory of earlier batches.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "core/error.h"
#include "core/text.h"
#include "model/checkpoint.h"
#include "model/families.h"
#include "train/chunked_loss.h"
#include "train/teacher.h"

namespace kompakt {
namespace {

class LiveTeacher final : public TeacherSource {
 public:
  explicit LiveTeacher(std::shared_ptr<const Transformer> teacher) : teacher_(std::move(teacher)) {}

  void prepare(const std::set<std::string>& taps) override { taps_ = taps; }

  TeacherTargets targets(const TokenBatch& batch) override {
    at::NoGradGuard no_grad;
    TapMap taps(taps_);
    TeacherTargets out;
    const ModelInput input = to_input(batch, teacher_->device());
    if (teacher_->config().family->encoder) {
      out.logits = teacher_->forward(input, &taps).to(at::kFloat);
    } else {  // logits of all tokens at once would be the largest tensor of the step
      const HeadWeights head = head_weights(*teacher_);
      const InputTransform& transform = teacher_->lm_head.input_transform;
      out.hidden = teacher_->hidden(input, &taps);
      if (transform) out.hidden = transform(out.hidden);
      out.head_weight = head.weight, out.head_bias = head.bias;
    }
    for (const std::string& name : taps_) {
      if (!taps.values().count(name)) throw Error(str("the teacher has no value \"", name, "\"")).at("taps").given(name).hint("layers count from 0; see docs for the names of taps");
      out.taps[name] = taps.at(name).to(at::kFloat);
    }
    return out;
  }

  const ModelConfig& config() const override { return teacher_->config(); }

  std::string fingerprint() const override {
    if (fingerprint_.empty()) fingerprint_ = kompakt::fingerprint(*teacher_);
    return fingerprint_;
  }

 private:
  std::shared_ptr<const Transformer> teacher_;
  std::set<std::string> taps_;
  mutable std::string fingerprint_;
};

}  // namespace

std::unique_ptr<TeacherSource> live_teacher(std::shared_ptr<const Transformer> teacher) { return std::make_unique<LiveTeacher>(std::move(teacher)); }

}  // namespace kompakt
