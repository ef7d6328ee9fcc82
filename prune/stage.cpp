// The stage `prune`: importance, cut, refit, recovery; the shape it leads to; its part of the report.
#include "prune/stage.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <stdexcept>

#include "core/error.h"
#include "core/log.h"
#include "core/text.h"
#include "model/families.h"
#include "prune/channels.h"
#include "prune/criteria.h"
#include "prune/stream_refit.h"
#include "prune/structured.h"
#include "train/mask.h"
#include "train/objective.h"

namespace kompakt {
namespace {

constexpr std::int64_t stage_heat_bins = 32;
constexpr double stage_ridge = 1e-3;  // of refits to the stream

// Mean importance of `bins` equal parts of the units, most important first, relative to the layer's mean: a row of the heat map.
Json stage_heat_row(const at::Tensor& scores, std::int64_t bins) {
  const at::Tensor sorted = std::get<0>(scores.to(at::kCPU, at::kDouble).sort(/*stable=*/true, /*dim=*/0, /*descending=*/true)).contiguous();
  const double mean = sorted.mean().item<double>();
  const std::int64_t n = sorted.numel(), parts = std::min(bins, n);
  Json row = Json::array();
  for (std::int64_t i = 0; i < parts; ++i) {
    const double value = sorted.slice(0, i * n / parts, (i + 1) * n / parts).mean().item<double>();
    row.push_back(mean > 0 ? value / mean : 0.0);
  }
  return row;
}

double stage_share_kept(const at::Tensor& scores, const std::vector<std::int64_t>& kept) {
  const double all = scores.sum().item<double>();
  return all > 0 ? scores.index_select(0, at::tensor(at::ArrayRef<std::int64_t>(kept), at::kLong)).sum().item<double>() / all : 1;
}

}  // namespace

Json describe_importance(const std::string& criterion, const UnitScores& scores, const std::vector<KeptUnits>& kept, std::size_t examples) {
  Json out = Json::object();
  out["criterion"] = criterion;
  out["samples"] = examples;
  out["ffn"] = Json::array();
  out["heads"] = Json::array();
  out["kept_heads"] = Json::array();
  out["ffn_share_kept"] = Json::array();
  out["heads_share_kept"] = Json::array();
  for (std::size_t i = 0; i < kept.size(); ++i) {
    out["ffn"].push_back(stage_heat_row(scores.ffn[i], stage_heat_bins));
    Json heads = Json::array();
    for (std::int64_t h = 0; h < scores.heads[i].numel(); ++h) heads.push_back(scores.heads[i][h].item<double>());
    out["heads"].push_back(heads);
    out["kept_heads"].push_back(kept[i].heads);
    out["ffn_share_kept"].push_back(stage_share_kept(scores.ffn[i], kept[i].ffn));
    out["heads_share_kept"].push_back(stage_share_kept(scores.heads[i], kept[i].heads));
  }
  return out;
}

std::vector<std::int64_t> layer_map_without(const std::vector<std::int64_t>& map, const std::vector<std::int64_t>& gone) {
  std::vector<std::int64_t> out;
  for (std::size_t i = 0; i < map.size(); ++i) {
    if (std::find(gone.begin(), gone.end(), static_cast<std::int64_t>(i)) == gone.end()) out.push_back(map[i]);
    else if (!out.empty()) out.back() = map[i];
  }
  return out;
}

namespace {

std::vector<std::string> stage_sparse_linears(Transformer& model, const UnstructuredOptions& options) {
  const std::set<std::string> dense = dense_linears(model, options, "unstructured");
  std::vector<std::string> out;
  for (const Linear* linear : model.linears())
    if (!dense.count(linear->name)) out.push_back(linear->name);
  return out;
}

// Masks that grew in the training go where those of a cut at once go: into the context, and into the report.
void stage_keep_grown(Transformer& model, const PruneOptions& options, WeightMasks grown, StageContext& context) {
  Json rows = Json::array();
  std::int64_t weights = 0, zeros = 0;
  for (const Linear* linear : model.linears()) {
    const auto found = grown.find(linear->name);
    if (found == grown.end()) continue;
    const std::int64_t all = found->second.numel(), gone = all - found->second.sum().item<std::int64_t>();
    rows.push_back(Json{{"layer", linear->name}, {"sparsity", static_cast<double>(gone) / static_cast<double>(all)}});
    weights += all, zeros += gone;
    if (const auto earlier = context.masks.find(linear->name); earlier != context.masks.end()) earlier->second = earlier->second.to(at::kCPU).logical_and(found->second);
    else context.masks[linear->name] = std::move(found->second);
  }
  if (context.details) (*context.details)["sparsity"] = Json{{"criterion", "magnitude"}, {"pattern", shortest(options.unstructured.sparsity)}, {"schedule", options.schedule.type}, {"refit", "none"}, {"weights", weights}, {"zeros", zeros}, {"layers", rows}, {"dense", Json::array()}};
  log_info(str(context.title, ": ", fixed(100.0 * static_cast<double>(zeros) / static_cast<double>(std::max<std::int64_t>(1, weights)), 2), "% of ", rows.size(), " matrices is zero (grown during the recovery, ", options.schedule.type, ")"));
}

// Objectives are made before the cut: those that look at layers would look at the wrong ones after some are gone.
void stage_check_objectives(const PruneOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives, const StageContext& context) {
  if (!options.has_recover || !options.has_structured || (options.structured.layers == 0 && options.structured.hidden == 1)) return;
  std::set<std::string> student, teacher;
  for (const auto& objective : objectives) objective->request_taps(student, teacher);
  for (const std::string& tap : student)
    if (options.structured.layers > 0 && starts_with(tap, "layer.")) throw Error("hidden and relation losses cannot be used in the recovery of a stage that removes layers: which ones go is not known yet").at(context.title).hint("recover with logits and labels, or in a stage distill of its own");
    else if (options.structured.hidden < 1) throw Error(str("a loss compares inner states of the model (", tap, "), and the stage leaves fewer channels than they were made for")).at(context.title).hint("recover with logits and labels, or in a stage distill of its own");
}

// Of the channels: importance, or (rotated) the energy of each; share of it that stays.
Json stage_hidden_json(const StructuredOptions& options, const std::string& criterion, const at::Tensor& scores, const std::vector<std::int64_t>& kept, std::size_t examples) {
  Json out{{"by", options.hidden_by}, {"samples", examples}, {"scores", stage_heat_row(scores, stage_heat_bins)}, {"share_kept", stage_share_kept(scores, kept)}};
  if (options.hidden_by == "select") out["criterion"] = criterion, out["kept"] = kept;
  return out;
}

void stage_cut(Transformer& model, const PruneOptions& options, StageContext& context) {
  const StructuredOptions& structured = options.structured;
  const ModelConfig before = model.config(), after = pruned_config(before, options);  // refuses before anything is computed
  const Criterion* criterion = find_criterion(options.criterion);
  if (!criterion) throw std::logic_error("prune: unknown criterion " + options.criterion);
  for (const Linear* linear : model.linears())
    if (linear->transform || linear->input_transform) throw std::logic_error(str("prune: a transform is attached to ", linear->name));
  std::vector<TokenBatch> batches;
  if (context.data) batches = measuring_batches(*context.data, options.samples, context.seed);
  std::size_t examples = 0;
  for (const TokenBatch& batch : batches) examples += static_cast<std::size_t>(batch.rows);

  const bool to_stream = options.compensate == "stream", narrows = after.hidden < before.hidden, rotates = narrows && structured.hidden_by == "rotate";
  at::Tensor energies;
  if (rotates) energies = rotate_to_principal(model, batches, structured.untie);  // what follows is in the new basis
  const std::unique_ptr<Transformer> original = to_stream ? model.clone() : nullptr;
  std::vector<std::int64_t> left(static_cast<std::size_t>(before.layers));
  std::iota(left.begin(), left.end(), 0);
  Json removed = Json::object();
  if (structured.layers > 0) {
    const std::vector<std::int64_t> gone = remove_layers(model, structured.layers, batches, structured.depth);
    context.layer_map = layer_map_without(context.layer_map.empty() ? left : context.layer_map, gone);  // empty: layer i follows layer i
    std::erase_if(left, [&](std::int64_t layer) { return std::find(gone.begin(), gone.end(), layer) != gone.end(); });
    removed["layers"] = gone;
    removed["depth"] = {before.layers, model.config().layers};
    log_info(str(context.title, ": removed ", gone.size(), " of ", before.layers, " layers (", structured.depth, ")"));
  }
  if (after.ffn < before.ffn || after.heads < before.heads) {
    const UnitScores scores = measure_units(*criterion, model, batches, context.seed);
    const std::vector<KeptUnits> kept = choose_units(model, scores, after.ffn, {after.heads, after.kv_heads});
    if (options.compensate == "ls") cut_units_with_refit(model, kept, batches);
    else cut_units(model, kept);
    removed["ffn"] = Json::array();
    removed["heads"] = Json::array();
    for (std::int64_t i = 0; i < model.config().layers; ++i) {
      removed["ffn"].push_back({i, before.ffn, after.ffn});
      removed["heads"].push_back({i, before.heads, after.heads});
    }
    if (after.kv_heads < before.kv_heads && before.kv_heads < before.heads) removed["kv_heads"] = {before.kv_heads, after.kv_heads};
    if (context.details) (*context.details)["importance"] = describe_importance(options.criterion, scores, kept, examples);
    log_info(str(context.title, ": feed-forward ", before.ffn, " -> ", after.ffn, ", heads ", before.heads, " -> ", after.heads, " (", options.criterion, ", ", examples, " examples)"));
  }
  std::vector<std::int64_t> channels;
  std::unique_ptr<Transformer> wide;  // with all channels
  if (narrows) {
    if (rotates) {
      channels.resize(static_cast<std::size_t>(after.hidden));
      std::iota(channels.begin(), channels.end(), 0);
    } else {
      energies = measure_channels(*criterion, model, batches, context.seed);
      channels = best_channels(energies, after.hidden);
    }
    wide = model.clone();
    cut_hidden(model, channels);
    removed["hidden"] = {before.hidden, after.hidden};
    const Json details = stage_hidden_json(structured, options.criterion, energies, channels, examples);
    log_info(str(context.title, ": hidden size ", before.hidden, " -> ", after.hidden, " (", rotates ? "rotated" : options.criterion.c_str(), ", ", examples, " examples), ", fixed(100 * details.at("share_kept").get<double>(), 1), "% of the ", rotates ? "energy" : "importance", " stays"));
    if (context.details) (*context.details)["hidden"] = details;
  }
  if (narrows || (to_stream && (after.layers < before.layers || after.ffn < before.ffn || after.heads < before.heads))) {
    const CalibrationSet set = calibration_set(context, options.samples, narrows ? "structured.hidden: 1" : "compensate: none");
    const NarrowStream narrow{narrows ? *wide : model, channels, options.compensate != "none", to_stream};
    std::vector<std::int64_t> all(static_cast<std::size_t>(model.config().layers));
    std::iota(all.begin(), all.end(), 0);
    refit_to_stream(model, to_stream ? *original : *wide, to_stream ? left : all, set, stage_ridge, narrows ? &narrow : nullptr);
    if (context.details) (*context.details)["calibration"] = Json{{"sequences", set.sequences}, {"tokens", set.tokens}, {"sha256", set.hash}};
  }
  if (after.heads < before.heads && after.family && after.family->encoder)
    log_warning(str(context.title, ": ", after.heads, " heads of size ", after.head_dim, " do not make up the hidden size ", after.hidden, "; the Hugging Face class of this family cannot express that, so transformers will not load this checkpoint (kompakt does)"));
  if (context.details) {
    for (auto& [key, value] : removed.items()) (*context.details)["removed"][key] = value;
    (*context.details)["parameters"] = {count_parameters(before).total, count_parameters(model.config()).total};
  }
}

}  // namespace

void channel_fields(FieldVisitor& visitor, StructuredOptions& options) {
  visitor.choice("hidden_by", options.hidden_by, "channels chosen by criterion (select), or the stream rotated to its principal components, of which the first stay (rotate)", {"select", "rotate"});
  visitor.flag("untie", options.untie, "hidden_by rotate: give a tied head a matrix of its own, without which the stream cannot be rotated");
}

void importance_fields(FieldVisitor& visitor, PruneOptions& options) {
  visitor.choice("criterion", options.criterion, "importance of a neuron, a head or a selected channel", criterion_names());
  visitor.integer("samples", options.samples, "training examples or calibration windows that importance is measured on", {.min = 1.0});
}

void compensate_field(FieldVisitor& visitor, PruneOptions& options) {
  visitor.choice("compensate", options.compensate, "least-squares refit after the cut: of output and down projections, and of what reads a narrower stream, to their own outputs (ls), or to the residual stream of the uncut model, removed layers included (stream)", {"none", "ls", "stream"});
}

void fields(FieldVisitor& visitor, PruneOptions& options) {
  visitor.section("structured", options.has_structured, "neurons, heads, layers and channels that are really removed", [&](FieldVisitor& inner) {
    inner.number("ffn", options.structured.ffn, "share of feed-forward neurons kept", {.min = 0.0, .max = 1.0, .open_min = true});
    inner.number("heads", options.structured.heads, "share of attention heads kept; with grouped queries whole groups, or equally many heads of each", {.min = 0.0, .max = 1.0, .open_min = true});
    inner.integer("layers", options.structured.layers, "layers to remove", {.min = 0.0});
    inner.choice("depth", options.structured.depth, "which layers go", depth_criterion_names());
    inner.number("hidden", options.structured.hidden, "share of the hidden size kept: channels of the residual stream (decoders)", {.min = 0.0, .max = 1.0, .open_min = true});
    channel_fields(inner, options.structured);
  });
  visitor.section("unstructured", options.has_unstructured, "single weights set to zero; the masks are kept by every later stage", [&](FieldVisitor& inner) { fields(inner, options.unstructured); });
  visitor.section("vocabulary", options.has_vocabulary, "rows of the embedding that no training text uses are removed, the tokenizer is rewritten", [&](FieldVisitor& inner) {
    inner.integer("first_ids", options.vocabulary.first_ids, "keep all ids below this besides the used ones (vocabularies are sorted by frequency)", {.min = 0.0});
    inner.integer("max_positions", options.vocabulary.max_positions, "rows of learned position embeddings to keep: the longest text in tokens; 0 = all", {.min = 0.0});
    inner.integer("multiple_of", options.vocabulary.multiple_of, "fill the kept ids up to a multiple of this, with the lowest of those that would go", {.min = 1.0});
  });
  importance_fields(visitor, options);
  visitor.integer("multiple_of", options.multiple_of, "feed-forward width and hidden size are rounded to a multiple (256 suits all GGUF types)", {.min = 1.0});
  compensate_field(visitor, options);
  visitor.section("schedule", options.has_schedule, "the sparsity of unstructured grows during the recovery, by magnitude, instead of at once before it", [&](FieldVisitor& inner) { fields(inner, options.schedule); });
  visitor.section("recover", options.has_recover, "training after the cut", [&](FieldVisitor& inner) { fields(inner, options.recover); });
  visitor.subtree("objective", options.objective, "objectives of the recovery, as in distill");
}

namespace {

void stage_check_hidden(const ModelConfig& config, const PruneOptions& options) {
  const StructuredOptions& structured = options.structured;
  if (const std::string obstacle = hidden_obstacle(config); !obstacle.empty()) throw Error(str("the residual stream cannot be made narrower: ", obstacle)).at("structured.hidden").given(shortest(structured.hidden)).allowed("1").hint("cut ffn, heads, layers or the vocabulary");
  if (structured.hidden_by == "rotate") {
    if (const std::string obstacle = hidden_rotation_obstacle(config, structured.untie); !obstacle.empty())
      throw Error(str("the residual stream cannot be rotated: ", obstacle)).at("structured.hidden_by").given("rotate").allowed(hidden_rotation_obstacle(config, true).empty() ? "rotate with untie: true, or select" : "select");
    return;
  }
  if (structured.untie) throw Error("a head is untied for a rotation of the stream only").at("structured.untie").given("hidden_by: select").hint("write hidden_by: rotate, or leave untie out");
  if (const Criterion* criterion = find_criterion(options.criterion); criterion && !criterion->channels)
    throw Error(str("the criterion ", options.criterion, " measures no channels of the residual stream")).at("prune.criterion").given(options.criterion).allowed(join(channel_criterion_names(), ", ")).hint("or take hidden_by: rotate, which needs none");
}

}  // namespace

ModelConfig pruned_config(const ModelConfig& config, const PruneOptions& options) {
  check_schedule(options);
  ModelConfig out = config;
  if (options.has_vocabulary && options.vocabulary.max_positions > 0 && config.family->learned_positions) out.max_positions = std::min(out.max_positions, options.vocabulary.max_positions);
  if (options.has_unstructured && options.unstructured.calibration_precision != "float32" && options.unstructured.criterion == "magnitude" && options.unstructured.refit == "none")
    throw Error("magnitude makes no pass over calibration text").at("unstructured.calibration_precision").given(str("criterion: magnitude, refit: none, calibration_precision: ", options.unstructured.calibration_precision)).allowed("float32").hint("leave the key out");
  if (!options.has_structured) {
    if (options.has_unstructured) check_sparsity(out, options.unstructured, "unstructured");
    return out;
  }
  const StructuredOptions& structured = options.structured;
  if (structured.layers > 0 && structured.layers >= config.layers)
    throw Error(str("removing ", structured.layers, " of ", config.layers, " layers leaves nothing")).at("structured.layers").given(str(structured.layers)).allowed(str("0 to ", config.layers - 1));
  out = with_layers(std::move(out), config.layers - structured.layers);  // which layers go is known after measuring
  if (const Criterion* criterion = find_criterion(options.criterion); criterion && (structured.ffn < 1 || structured.heads < 1 || (structured.hidden < 1 && structured.hidden_by == "select"))) check_criterion_loss(*criterion, config);
  out.ffn = plan_width(config.ffn, structured.ffn, options.multiple_of);
  const HeadPlan heads = plan_heads(config.heads, config.kv_heads, structured.heads);
  out.heads = heads.heads;
  out.kv_heads = heads.kv_heads;
  if (structured.hidden < 1) {
    stage_check_hidden(config, options);
    out.hidden = plan_width(config.hidden, structured.hidden, options.multiple_of, hidden_words);
    if (config.embedding_scale != 1) out.embedding_scale *= std::sqrt(static_cast<double>(out.hidden) / static_cast<double>(config.hidden));
    if (structured.hidden_by == "rotate") out.tied = false;
  } else if (structured.hidden_by != "select" || structured.untie) {
    throw Error("no channel of the residual stream is removed").at(structured.untie ? "structured.untie" : "structured.hidden_by").given("hidden: 1").hint("write hidden: 0.75, or leave the key out");
  }
  if (options.has_unstructured) check_sparsity(out, options.unstructured, "unstructured");
  return out;
}

void check_schedule(const PruneOptions& options) {
  if (!options.has_schedule) return;
  const auto refuse = [](const char* what, const std::string& given, const char* hint) { throw Error(what).at("prune.schedule").given(given).hint(hint); };
  if (!options.has_unstructured || options.unstructured.sparsity == 0) refuse("a schedule makes the sparsity of single weights grow", options.unstructured.pattern.empty() ? "no unstructured.sparsity" : str("pattern ", options.unstructured.pattern), "write unstructured: {sparsity: 0.5, criterion: magnitude}; N:M patterns are made at once");
  if (!options.has_recover) refuse("the sparsity grows while the model trains", "no recover", "add recover: {epochs: 1}, or leave the schedule out");
  if (options.unstructured.criterion != "magnitude" || options.unstructured.refit != "none") refuse("weights that go during training are chosen by their magnitude", str("criterion ", options.unstructured.criterion, ", refit ", options.unstructured.refit), "write criterion: magnitude, refit: none");
  if (options.schedule.begin >= options.schedule.end) refuse("the sparsity would have no time to grow", str("begin ", shortest(options.schedule.begin), ", end ", shortest(options.schedule.end)), "choose begin below end");
  if (options.schedule.initial >= options.unstructured.sparsity) refuse("the sparsity would not grow", str("initial ", shortest(options.schedule.initial), " of ", shortest(options.unstructured.sparsity)), "choose an initial sparsity below unstructured.sparsity");
  if (options.recover.find_learning_rate) refuse("the sweep would choose the weights that go", "recover.find_learning_rate", "leave it out");
  if (options.recover.stop_after > 0 || options.recover.keep == "best") refuse("a training that ends early, or goes back to an earlier state, would not have the whole sparsity", options.recover.stop_after > 0 ? "recover.stop_after" : "recover.keep: best", "leave it out");
}

bool prunes_by_blocks(const PruneOptions& options) { return options.has_unstructured && !options.has_structured && !options.has_vocabulary && !options.has_recover; }

void prune(Transformer& model, const PruneOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives, StageContext& context) {
  stage_check_objectives(options, objectives, context);
  if (options.has_structured) {
    refuse_masks(context, "structured pruning cuts matrices");
    stage_cut(model, options, context);
  }
  check_schedule(options);
  if (options.has_unstructured && !options.has_schedule) {
    check_sparsity(model.config(), options.unstructured, "unstructured");
    prune_unstructured(model, options.unstructured, options.samples, context);
  }
  if (!options.has_recover) {
    if (!options.objective.is_null()) throw Error("the stage prune has an objective but no recovery that would use it").at(context.title).hint("add \"recover: {epochs: 1}\", or remove \"objective\"");
    return;
  }
  std::vector<std::shared_ptr<Objective>> losses = objectives;
  if (losses.empty()) losses.push_back(label_cross_entropy(options.recover.label_smoothing));
  else if (options.recover.label_smoothing > 0) throw Error("label_smoothing of the recovery would not be used").at(context.title).given(str(options.recover.label_smoothing)).hint("write it into the objective: {labels: cross_entropy, label_smoothing: ...}");
  std::vector<std::shared_ptr<Constraint>> constraints;
  WeightMasks grown;
  if (options.has_schedule) constraints.push_back(gradual_masks(options.schedule, options.unstructured.sparsity, stage_sparse_linears(model, options.unstructured), grown));
  const TrainResult result = train(model, options.recover, losses, constraints, context);
  if (options.has_schedule) stage_keep_grown(model, options, std::move(grown), context);
  if (context.details) (*context.details)["recovery"] = {{"steps", result.steps}, {"final_loss", result.final_loss}, {"seconds", result.seconds}};
}

}  // namespace kompakt
