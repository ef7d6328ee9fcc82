// A live teacher: one forward pass on every batch, without gradients and without memory of earlier batches.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "core/error.h"
#include "core/text.h"
#include "model/families.h"
#include "train/chunked_loss.h"
#include "train/teacher.h"

namespace kompakt {
namespace {

class LiveTeacher final : public TeacherSource {
 public:
  explicit LiveTeacher(FrozenTeacher teacher) : teacher_(std::move(teacher)) {}

  void prepare(const std::set<std::string>& taps) override { taps_ = taps; }

  TeacherTargets targets(const TokenBatch& batch) override {
    at::NoGradGuard no_grad;
    TapMap taps(taps_);
    TeacherTargets out;
    const std::shared_ptr<const Transformer> model = teacher_.model();
    const ModelInput input = to_input(batch, teacher_.device());
    if (teacher_.config().family->encoder) {
      out.logits = model->forward(input, &taps).to(at::kFloat);
    } else {  // logits of all tokens at once would be the largest tensor of the step
      const HeadWeights head = head_weights(*model);
      const InputTransform& transform = model->lm_head.input_transform;
      out.hidden = model->hidden(input, &taps);
      if (transform) out.hidden = transform(out.hidden);
      out.head_weight = head.weight, out.head_bias = head.bias;
    }
    for (const std::string& name : taps_) {
      if (!taps.values().count(name)) throw Error(str("the teacher has no value \"", name, "\"")).at("taps").given(name).hint("layers count from 0; see docs for the names of taps");
      out.taps[name] = taps.at(name).to(at::kFloat);
    }
    return out;
  }

  const ModelConfig& config() const override { return teacher_.config(); }

  std::string fingerprint() const override { return teacher_.fingerprint(); }

 private:
  FrozenTeacher teacher_;
  std::set<std::string> taps_;
};

}  // namespace

std::unique_ptr<TeacherSource> live_teacher(FrozenTeacher teacher) { return std::make_unique<LiveTeacher>(std::move(teacher)); }

}  // namespace kompakt
