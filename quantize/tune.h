// The stage `tune`: goes on from the codes that an earlier stage quantize has stored, with the last rung of its ladder alone
// (quantize/kl_tune.h). The method's work is not repeated when only the tuning changes, and the report measures the model before and
// after.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/fields.h"
#include "quantize/stage.h"
#include "train/context.h"

namespace kompakt {

struct TuneOptions {
  std::string mode = "scales";  // row of the table of tune modes: scales | weights
  KlTuneOptions tuning;
  Node objective;               // as in distill; none = forward KL
};
void fields(FieldVisitor& visitor, TuneOptions& options);

// `grids`: of the model's tensors by name; empty where no stage has quantized it. Problems name `place`.
void check_tune(const ModelConfig& config, const std::map<std::string, GridSpec>& grids, const TuneOptions& options, const std::string& place, Problems& problems);

// `model` holds the decoded weights of `quantized`; both hold the best candidate by held-out text afterwards, the start included.
// Grids stay, and so does everything that is not on one, norms and biases apart. Mode weights starts its latents in the middle of their
// codes: the float weights are not known any more. Needs context.teacher and context.work. Error where the model's activations are
// rounded already: gradients do not pass through that.
void tune(Transformer& model, QuantizedModel& quantized, const TuneOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives, StageContext& context);

}  // namespace kompakt
