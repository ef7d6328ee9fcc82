#include "quantize/tune.h"

#include <algorithm>

#include "core/error.h"
#include "core/text.h"
#include "model/families.h"
#include "model/rounding.h"
#include "quantize/kl_tune.h"
#include "train/teacher.h"

namespace kompakt {
namespace {

std::vector<std::string> tune_stage_modes() {
  std::vector<std::string> names = tune_mode_names();
  std::erase(names, "none");
  return names;
}

}  // namespace

void fields(FieldVisitor& visitor, TuneOptions& options) {
  visitor.choice("mode", options.mode, "what learns: group scales, norms and biases, or latent weights too", tune_stage_modes());
  fields(visitor, options.tuning);
  visitor.subtree("objective", options.objective, "list of losses, as in distill; the divergence from the teacher when left out");
}

void check_tune(const ModelConfig& config, const std::map<std::string, GridSpec>& grids, const TuneOptions& options, const std::string& place, Problems& problems) {
  if (options.mode == "scales" && options.tuning.scale_learning_rate > 0)
    problems.add(Error("mode scales has one rate, that of scales").at(place).given(str("scale_learning_rate: ", shortest(options.tuning.scale_learning_rate))).allowed("learning_rate").hint("set learning_rate instead"));
  if (options.tuning.margin != KlTuneOptions().margin)
    problems.add(Error("latents start in the middle of their codes here, as the float weights are not known any more: a margin would not be used").at(place).given(str("margin: ", shortest(options.tuning.margin))).hint("leave margin out, or tune in the stage quantize itself (quantize.tune: weights)"));
  if (config.family->encoder || config.is_classifier())
    problems.add(Error("tuning towards the teacher's predictions works on decoders and calibration text").at(place).given(config.is_classifier() ? "a classifier" : "an encoder").hint("quantize with method: qad trains on labelled examples under the teacher"));
  if (grids.empty()) {
    problems.add(Error("there are no codes to tune: no stage before this one has quantized the model, or a later one has changed its weights").at(place).hint("put the stage behind quantize"));
    return;
  }
  const auto even = [](const auto& entry) { return !entry.second.grid->levels && !entry.second.grid->kquant; };
  if (std::none_of(grids.begin(), grids.end(), even))
    problems.add(Error("tuning moves between even levels and every scale on its own, and no tensor of the model is on such a grid").at(place).given(std::string(grids.begin()->second.grid->name)).hint("quantize with a grid of this size that has free scales, such as q4_0, q5_0 or q2_0"));
  if (!rounding_of(config).empty())
    problems.add(Error("the stage before rounds activations or the cache of keys and values, and gradients do not pass through that").at(place).hint("tune in the stage quantize itself (quantize.tune): it comes before that rounding"));
}

void tune(Transformer& model, QuantizedModel& quantized, const TuneOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives, StageContext& context) {
  Problems problems;
  check_tune(model.config(), quantized.plan.tensors, options, context.title, problems);
  problems.throw_if_any("the stage cannot run as it is asked to");
  if (!context.masks.empty()) throw Error("tuning would fill weights that an earlier stage has pruned").at(context.title).hint("quantize with method: qad, which keeps them zero while it trains");
  if (!context.teacher) throw Error("tuning needs the teacher's predictions, and the run has no teacher that is fit for the task").at(context.title).hint("begin the run with the float model as teacher");
  const TuningText text = tuning_text(context, options.tuning.holdout);
  StageContext inner = context;
  inner.work = context.work / "tune";
  const Json tuning = kl_tune(model, quantized, {}, options.mode, options.tuning, objectives, text, inner);
  if (!context.details) return;
  std::int64_t bytes = 0;
  for (const auto& [name, values] : quantized.tensors) bytes += stored_bytes(quantized.plan.tensors.at(name), values);
  (*context.details)["tuning"] = tuning;
  (*context.details)["packed_bytes"] = bytes;
}

}  // namespace kompakt
