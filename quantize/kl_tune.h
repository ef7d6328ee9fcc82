// Tuning of the whole quantized model on its grid: KL to the teacher over the calibration text, through the training loop. Group
// scales, norms and biases learn and codes stay (scales), or latent weights learn too, straight through (weights). A part of the
// text is held out; what is kept is the candidate, the untuned model included, whose decoded weights have the smallest KL on it.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/json.h"
#include "quantize/stage.h"
#include "train/context.h"

namespace kompakt {

struct TuneMode {
  std::string_view name, summary;
  bool codes_learn;
  double learning_rate;  // default: of latents (in codes), or of scales (as a share of the scale) where codes stay
  double scale_rate;     // of scales / learning_rate
  double norm_rate;      // of norms and biases / learning_rate
};
const TuneMode* find_tune_mode(std::string_view name);  // null for "none"
std::vector<std::string> tune_mode_names();             // with "none"

// Calibration windows by their position: the last ones are held out, unless the data has held-out windows of its own.
struct TuningText {
  std::vector<std::vector<std::int64_t>> tuning, heldout;
  bool own_heldout = false;
};
std::int64_t held_out_windows(std::int64_t windows, double holdout);  // how many of them
// Error where the run has no calibration text, or too little to hold a part of it out.
TuningText tuning_text(const StageContext& context, double holdout);

// Mean of sum_v p_teacher (log p_teacher - log p_model) in nats over the positions that have a next token; sums in double, logits
// of some positions at a time.
double mean_divergence(const Transformer& model, TeacherSource& teacher, const std::vector<std::vector<std::int64_t>>& windows);

// `model` holds the decoded weights of `quantized`; both hold the best candidate afterwards. Linears of blocks on grids of even
// levels take part; everything else, the embedding included, stays. `mode`: a row of the table. `original`: their float weights by name,
// from which the latents of mode weights start; those without an entry start in the middle of their codes.
// Codes that are stored by their entropy are scored, and kept, as such that take no more bytes than those of the start
// (quantize/code_price.h). State for resuming lies in context.work, which must be this call's own; context.teacher must be set.
// Returns the part of the report: {mode, steps, winner, candidates: [{name, step, heldout_kl, calibration_kl (start and winner),
// coded: {bytes, untuned_bytes, price}}], ...}.
Json kl_tune(Transformer& model, QuantizedModel& quantized, const std::map<std::string, at::Tensor>& original, const std::string& mode, const KlTuneOptions& tuning, const std::vector<std::shared_ptr<Objective>>& objectives,
             const TuningText& text, StageContext& context);

// The loop's options for `windows` windows of `length` tokens (freezing apart); also what `plan` predicts from.
TrainOptions kl_train_options(const std::string& mode, const KlTuneOptions& tuning, std::int64_t windows, std::int64_t length);

}  // namespace kompakt
