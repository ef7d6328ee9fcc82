// The table of bases, and the check that a change of basis changed nothing else.
#include "quantize/basis.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <set>

#include "core/error.h"
#include "core/log.h"
#include "core/text.h"
#include "evaluate/inputs.h"
#include "model/families.h"
#include "quantize/channel_scales.h"
#include "quantize/hadamard.h"
#include "model/invariance.h"
#include "quantize/stage.h"
#include "train/calibration.h"

namespace kompakt {
namespace {

// Gains that were folded, by the norm's name; empty where folding is illegal.
std::map<std::string, at::Tensor> basis_fold_where_legal(BasisChange& change) {
  const std::string obstacle = fold_obstacle(change.model.config());
  if (!obstacle.empty()) {
    change.notes.push_back("norms not folded: " + obstacle);
    return {};
  }
  const bool tied = !change.model.lm_head.weight.defined();
  auto folded = fold_norms(change.model);
  change.parts.push_back(str(folded.size(), " norms folded into the linears behind them"));
  if (tied) change.notes.push_back("the final norm keeps its weight: its linear is the embedding");
  return folded;
}

// The first batches of the calibration set, about as many tokens as the recipe says.
CalibrationSet basis_calibration(const BasisChange& change) {
  const TaskData* data = change.context.data;
  const std::int64_t length = data && data->kind == TaskData::Kind::text && !data->calibration.empty() ? static_cast<std::int64_t>(data->calibration.front().size()) : 1;
  CalibrationSet set = calibration_set(change.context, std::min(change.options.calibration_sequences, std::max<std::int64_t>(1, change.options.basis.tokens / length)));
  std::int64_t tokens = 0;
  std::size_t batches = 0;
  for (; batches < set.inputs.size() && tokens < change.options.basis.tokens; ++batches)
    tokens += set.valid[batches].defined() ? set.valid[batches].numel() : set.inputs[batches].ids.numel();
  set.inputs.resize(batches), set.valid.resize(batches);
  set.tokens = tokens;
  return set;
}

void basis_none(BasisChange&) {}

void basis_fold(BasisChange& change) {
  if (const std::string obstacle = fold_obstacle(change.model.config()); !obstacle.empty())
    throw Error("norms cannot be folded: " + obstacle).at("quantize.basis").given("fold").allowed("none or hadamard for this model");
  basis_fold_where_legal(change);
}

void basis_hadamard(BasisChange& change) {
  Transformer& model = change.model;
  const std::uint64_t seed = change.context.seed;
  const bool untied = basis_config(model.config(), change.options.basis).tied != model.config().tied;
  if (untied) {
    untie_head(model);
    change.parts.push_back(str("the head has its own matrix of ", model.lm_head.weight.numel(), " weights (", human_bytes(4.0 * static_cast<double>(model.lm_head.weight.numel())), " in float, or what the key head makes of them)"));
  }
  basis_fold_where_legal(change);
  if (const std::string obstacle = residual_rotation_obstacle(model); !obstacle.empty()) {
    change.notes.push_back("residual stream not rotated: " + obstacle);
  } else {
    const Rotation rotation = random_rotation(model.config().hidden, seed, "basis.residual");
    rotate_residual(model, rotation.matrix);
    change.parts.push_back("residual stream rotated: " + rotation.construction);
  }
  if (model.config().sub_norms) {
    change.notes.push_back("values not rotated: the sub-norm in front of the output projection has a gain of its own for every channel");
    return;
  }
  std::string construction;
  rotate_values(model, [&](std::int64_t layer, std::int64_t head) {
    Rotation rotation = random_rotation(model.config().head_dim, seed, str("basis.values.", layer, ".", head));
    construction = rotation.construction;
    return rotation.matrix;
  });
  change.parts.push_back(str("values of every key/value head rotated: ", construction));
}

void basis_awq(BasisChange& change) {
  const QuantizationPlan plan = plan_quantization(change.model.config(), change.options);
  const auto folded = basis_fold_where_legal(change);
  const CalibrationSet set = basis_calibration(change);
  Json rows = search_scales(change.model, set, {plan.tensors, folded, change.options.basis.points, change.search_blocks});
  std::int64_t kept = 0;
  for (const Json& row : rows) kept += row.at("choice") == "identity";
  change.parts.push_back(str("scales searched for ", rows.size(), " groups of linears on ", set.tokens, " tokens; ", kept, " stay as they are"));
  change.figures["mappings"] = std::move(rows);
}

void basis_smoothquant(BasisChange& change) {
  if (const std::string obstacle = fold_obstacle(change.model.config()); !obstacle.empty())
    throw Error("SmoothQuant scales norms against the linears behind them: " + obstacle).at("quantize.basis").given("smoothquant").allowed("none, awq or hadamard for this model");
  const CalibrationSet set = basis_calibration(change);
  const std::int64_t count = smooth_scales(change.model, set, change.options.basis.alpha);
  change.parts.push_back(str("SmoothQuant scales behind ", count, " norms, alpha ", shortest(change.options.basis.alpha), ", largest activations over ", set.tokens, " tokens"));
}

void basis_auto(BasisChange& change) {
  const std::string name = choose_basis(change);
  change.parts.push_back("chosen: " + name);
  find_basis(name)->apply(change);
}

// Logits of one text: of the calibration set, or ids spread over the vocabulary.
at::Tensor basis_logits(const Transformer& model, const StageContext& context) {
  std::vector<std::int64_t> ids;
  if (context.data && !context.data->calibration.empty()) ids = context.data->calibration.front();
  else if (context.data && !context.data->train.ids.empty()) ids = context.data->train.ids.front();
  if (ids.empty())
    for (std::int64_t i = 0; i < 64; ++i) ids.push_back(i * 7919 % model.config().vocab);
  const std::int64_t limit = model.config().max_positions > 0 ? std::min<std::int64_t>(128, model.config().max_positions) : 128;
  if (static_cast<std::int64_t>(ids.size()) > limit) ids.resize(static_cast<std::size_t>(limit));
  return model.forward(window_input({ids}, 0, 1, model.device())).to(at::kDouble);
}

// Losses on states of the stream compare the student's channels with the teacher's: a rotated stream has others.
void basis_check_objectives(const QuantizeOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives) {
  std::set<std::string> student, teacher;
  for (const auto& objective : objectives) objective->request_taps(student, teacher);
  if (!student.empty())
    throw Error(str("a loss compares inner states of the model (", *student.begin(), "), and the basis rotates the residual stream")).at("quantize.basis").given(options.basis.basis).allowed("losses over logits and labels, or a basis that leaves the stream: fold").hint("leave untie out, or take the loss out of quantize.objective");
}

}  // namespace

void fields(FieldVisitor& visitor, BasisOptions& options) {
  visitor.choice("basis", options.basis, "change of basis before quantization that leaves the model's function as it is", basis_names());
  visitor.flag("untie", options.untie, "basis hadamard: give a tied head a matrix of its own, so that the residual stream can be rotated too; the key head says how it is stored");
  visitor.number("basis_alpha", options.alpha, "basis smoothquant: share of the activations in the scales, the rest is the weights'", {.min = 0, .max = 1});
  visitor.integer("basis_points", options.points, "basis awq: exponents between 0 and 1 that are tried for every group of linears", {.min = 1, .max = 101});
  visitor.integer("basis_tokens", options.tokens, "calibration tokens that awq, smoothquant and the probes of auto look at", {.min = 64});
  visitor.integer("basis_blocks", options.blocks, "basis auto: the first so many blocks are quantized to compare the bases", {.min = 1});
}

std::span<const Basis> bases() {
  static constexpr Basis table[] = {
      {"none", "the model as it is", true, basis_none},
      {"fold", "norm weights folded into the linears behind them: exact, costs nothing", true, basis_fold},
      {"awq", "norms folded, then scales per channel searched for every group of linears by the error of the module they belong to", true, basis_awq},
      {"smoothquant", "scales per channel that move outliers of activations into the weights, for 8-bit activations", false, basis_smoothquant},
      {"hadamard", "norms folded, then residual stream and values rotated by random Hadamard matrices, as far as the model allows", true, basis_hadamard},
      {"auto", "the best of none, fold, awq and hadamard (never untied) by the divergence that a probe of the first blocks measures", false, basis_auto},
  };
  return table;
}

const Basis* find_basis(std::string_view name) {
  for (const Basis& row : bases())
    if (row.name == name) return &row;
  return nullptr;
}

std::vector<std::string> basis_names() {
  std::vector<std::string> names;
  for (const Basis& row : bases()) names.emplace_back(row.name);
  return names;
}

ModelConfig basis_config(const ModelConfig& config, const BasisOptions& options) {
  ModelConfig out = config;
  const Family& family = *config.family;
  if (options.basis == "hadamard" && options.untie && !family.post_norm && family.rms_norm && !family.sandwich_norms) out.tied = false;
  return out;
}

void change_basis(Transformer& model, const QuantizeOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives, StageContext& context) {
  const Basis* basis = find_basis(options.basis.basis);
  if (!basis) throw Error(str("unknown basis \"", options.basis.basis, "\"", did_you_mean(options.basis.basis, basis_names()))).at("quantize.basis").given(options.basis.basis).allowed(join(basis_names(), ", "));
  if (basis->apply == basis_none) return;
  const at::NoGradGuard no_grad;
  const at::Tensor before = basis_logits(model, context), stream = model.tokens.weight;
  BasisChange change{model, options, context};
  basis->apply(change);
  if (!model.tokens.weight.is_same(stream)) basis_check_objectives(options, objectives);
  const double difference = (basis_logits(model, context) - before).abs().max().item<double>() / std::max(before.abs().max().item<double>(), 1e-30);
  for (const Json& sentence : change.parts) log_info(str(context.title, ": basis: ", sentence.get<std::string>()));
  for (const Json& sentence : change.notes) log_info(str(context.title, ": basis: ", sentence.get<std::string>()));
  if (!(difference < 1e-3))
    throw Error(str("the change of basis \"", basis->name, "\" changed what the model computes"), ExitCode::bug).at(context.title).given(str("largest relative logit difference ", shortest(difference))).allowed("below 1e-3").hint("nothing was written; please report this, and take basis: none");
  if (context.details) (*context.details)["basis"] = Json{{"name", std::string(basis->name)}, {"parts", change.parts}, {"notes", change.notes}, {"figures", change.figures}, {"largest_relative_logit_difference", difference}};
}

}  // namespace kompakt
