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
#include "quantize/hadamard.h"
#include "quantize/invariance.h"
#include "quantize/stage.h"

namespace kompakt {
namespace {

void basis_fold_where_legal(BasisChange& change) {
  const std::string obstacle = fold_obstacle(change.model.config());
  if (!obstacle.empty()) {
    change.notes.push_back("norms not folded: " + obstacle);
    return;
  }
  const bool tied = !change.model.lm_head.weight.defined();
  change.parts.push_back(str(fold_norms(change.model).size(), " norms folded into the linears behind them"));
  if (tied) change.notes.push_back("the final norm keeps its weight: its linear is the embedding");
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
  std::string construction;
  rotate_values(model, [&](std::int64_t layer, std::int64_t head) {
    Rotation rotation = random_rotation(model.config().head_dim, seed, str("basis.values.", layer, ".", head));
    construction = rotation.construction;
    return rotation.matrix;
  });
  change.parts.push_back(str("values of every key/value head rotated: ", construction));
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
}

std::span<const Basis> bases() {
  static constexpr Basis table[] = {
      {"none", "the model as it is", basis_none},
      {"fold", "norm weights folded into the linears behind them: exact, costs nothing", basis_fold},
      {"hadamard", "norms folded, then residual stream and values rotated by random Hadamard matrices, as far as the model allows", basis_hadamard},
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
  if (context.details) (*context.details)["basis"] = Json{{"name", std::string(basis->name)}, {"parts", change.parts}, {"notes", change.notes}, {"largest_relative_logit_difference", difference}};
}

}  // namespace kompakt
