#include "pipeline/stages.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <functional>
#include <set>

#include "core/error.h"
#include "core/log.h"
#include "core/text.h"
#include "distill/stage.h"
#include "export/exporters.h"
#include "model/checkpoint.h"
#include "model/families.h"
#include "model/rounding.h"
#include "pipeline/budget_target.h"
#include "pipeline/recipe.h"
#include "pipeline/search.h"
#include "pipeline/shape_target.h"
#include "pipeline/stage_common.h"
#include "pipeline/stage_options.h"
#include "pipeline/student_width.h"
#include "pipeline/task_data.h"
#include "prune/shape_planner.h"
#include "prune/stage.h"
#include "quantize/activation_rounding.h"
#include "quantize/budget.h"
#include "quantize/cost.h"
#include "quantize/kl_tune.h"
#include "quantize/methods.h"
#include "quantize/stage.h"
#include "quantize/tune.h"
#include "train/mask.h"
#include "train/sparse_codec.h"
#include "train/teacher.h"

namespace kompakt {
void add_training(const PlanInput& input, const TrainOptions& train, const Node* objective, PlannedModel& model) {
  const TrainCost cost = predict_cost(model.config, train, input.train_examples, input.tokens_per_example, input.touched_vocabulary, objective ? &model.teacher : nullptr);
  model.seconds += input.gigaflops > 0 ? cost.flops / (input.gigaflops * 1e9) : 0;
  model.memory_bytes = std::max(model.memory_bytes, cost.memory_bytes);
  model.trained = true, model.halves = false;
  if (!objective || !model.config.is_classifier()) return;
  std::vector<std::int64_t> layer_map = model.layer_map;
  for (std::int64_t layer = 0; model.layer_map.empty() && layer < model.config.layers; ++layer) layer_map.push_back(layer);
  std::set<std::string> student_taps, teacher_taps;
  Problems problems;
  for (const auto& row : build_objectives(objective->is_null() ? default_objective(true) : *objective, layer_map, problems)) row->request_taps(student_taps, teacher_taps);
  const double tokens = static_cast<double>(input.train_examples) * input.tokens_per_example;
  model.cache_bytes = static_cast<std::int64_t>(2.0 * tokens * static_cast<double>(teacher_taps.size()) * static_cast<double>(model.teacher.hidden)) +
                      4 * input.train_examples * static_cast<std::int64_t>(model.teacher.labels.size());
}

void refuse_other_tokens(const std::string& stage) {
  throw Error("the stage compares model and teacher token by token, and the ids of the model are not the teacher's any more").at(str("stage \"", stage, "\""))
      .hint("cut the vocabulary behind the last stage that learns from the teacher, or take its objective from the text alone: [{labels: cross_entropy}]");
}

namespace {

bool asks_teacher(const Node& objective) {
  Problems problems;
  const auto rows = build_objectives(objective.is_null() ? default_objective(false) : objective, {}, problems);
  return std::any_of(rows.begin(), rows.end(), [](const auto& row) { return row->needs_teacher(); });
}

}  // namespace

void plan_teacher_tokens(const PlanInput& input, const Node& objective, const PlannedModel& model, const std::string& stage) {
  if (model.other_tokens && !input.recipe.has_labels() && asks_teacher(objective)) refuse_other_tokens(stage);
}

namespace {

// The four adapters below are the same for every stage; what differs is the option struct and the function that runs it.
template <class Options>
void describe_stage(FieldVisitor& visitor) {
  Options options;
  fields(visitor, options);
}

template <class Options>
Node check_stage(const Node& node, const std::string& context, Problems& problems) {
  Options options;
  read_fields(node, context, problems, [&](FieldVisitor& v) { fields(v, options); });
  if constexpr (requires { options.objective; }) {
    if constexpr (std::is_same_v<Options, DistillRecipe>) check_distill(options, false, node.place, problems), check_width(options, node.place, problems);
    else if (!options.objective.is_null()) build_objectives(options.objective, {}, problems);
  }
  if constexpr (std::is_same_v<Options, QuantizeOptions>) {
    check_budget(options, node.place.text(), problems);
    check_grid_training(options, std::nullopt, node.place.text(), problems);
  }
  if constexpr (std::is_same_v<Options, EvaluateOptions>)
    if (options.has_cache && options.cache.tail % 2 != 0) problems.add(Error("cache.tail must be even: each half of the draws is independent of the other").at(node.place.text()).given(str(options.cache.tail)).allowed(str(options.cache.tail + 1)));
  if constexpr (std::is_same_v<Options, SearchOptions>) check_search(options, node.place.text(), problems);
  if constexpr (std::is_same_v<Options, ExportOptions>) {
    for (const std::string& format : options.formats)
      if (!find_exporter(format)) problems.add(Error(str("unknown format \"", format, "\" in ", context, did_you_mean(format, exporter_names()))).at(node.place.text()).allowed(join(exporter_names(), ", ")));
    if (options.formats.empty()) problems.add(Error(str(context, " names no format")).at(node.place.text()).allowed(join(exporter_names(), ", ")));
  }
  return write_fields([&](FieldVisitor& v) { fields(v, options); });
}

// The passes over calibration data that the method itself makes.
void add_calibration(const PlanInput& input, const QuantizeOptions& options, PlannedModel& model) {
  const bool text = !input.recipe.is_classification();
  const QuantizeCost cost = predict_quantize_cost(model.config, options, text ? input.calibration_windows : input.train_examples, text ? static_cast<double>(input.calibration_length) : input.tokens_per_example);
  model.seconds += input.gigaflops > 0 ? cost.flops / (input.gigaflops * 1e9) : 0;
  model.memory_bytes = std::max(model.memory_bytes, cost.memory_bytes);
}

// Objectives of a stage that trains; the teacher layer that each student layer follows comes from the distillation before.
std::vector<std::shared_ptr<Objective>> stage_objectives(const Node& list, StageRun& run) {
  Node chosen = list;
  if (chosen.is_null()) {
    // Without a teacher that is fit for the task there are only the labels.
    if (run.context.teacher) chosen = default_objective(run.current.model->config());
    else chosen = parse_yaml("[{labels: cross_entropy, weight: 1}]", "default objective");
  }
  Problems problems;
  if (run.context.layer_map.empty() && run.context.teacher && run.context.teacher->config().layers == run.current.model->config().layers)
    for (std::int64_t layer = 0; layer < run.current.model->config().layers; ++layer) run.context.layer_map.push_back(layer);
  ObjectiveShapes shapes = run.context.teacher ? objective_shapes(*run.current.model, run.context.teacher->config(), run.context.seed) : ObjectiveShapes{};
  if (shapes.decoder) shapes.tokens = run.current.tokenizer->vocab_size();
  auto objectives = build_objectives(chosen, run.context.layer_map, problems, shapes);
  problems.throw_if_any("the objective is not valid");
  if (run.context.teacher && !run.recipe.has_labels() && run.teacher_tokenizer && run.teacher_tokenizer->fingerprint() != run.current.tokenizer->fingerprint() &&
      std::any_of(objectives.begin(), objectives.end(), [](const auto& row) { return row->needs_teacher(); }))
    refuse_other_tokens(run.context.title);
  for (const auto& objective : objectives)
    if (objective->needs_teacher() && !run.context.teacher) throw Error("the objective asks for a teacher, and the run has none that is fit for the task").at("stage \"" + run.context.title + "\"").hint("put a finetune stage before it, or use {labels: cross_entropy}");
  return objectives;
}

void plan_finetune(const Node& node, const PlanInput& input, PlannedModel& model) {
  set_rounding(model.config, RuntimeRounding());  // weights change, and with them what is rounded how
  const auto options = read_stage<FinetuneOptions>(node);
  if (input.recipe.is_classification() && input.labels && !input.labels->empty()) model.config.labels = *input.labels;
  add_training(input, options.train, nullptr, model);
  model.layer_map.clear();
  model.bytes = float_bytes(model.config);
}

void run_finetune(const Node& node, StageRun& run) {
  set_rounding(*run.current.model, RuntimeRounding());
  finetune(*run.current.model, read_stage<FinetuneOptions>(node), run.context);
  run.context.layer_map.clear();  // the result is the teacher from here on: every layer follows itself
  run.current.quantized.clear();
}

void plan_prune(const Node& node, const PlanInput& input, PlannedModel& model) {
  set_rounding(model.config, RuntimeRounding());
  const auto options = read_stage<PruneOptions>(node);
  if (options.has_structured || options.has_vocabulary) {
    const ShapeTarget target = shape_target(input.recipe, input.stage, *input.tokenizer, input.pruned_tokenizer);
    check_shape(model.config, options, target);
    model.shapes = shapes_json(plan_shapes(model.config, options, target, options.has_vocabulary ? input.vocabulary_kept : 0));
  }
  model.config = pruned_config(model.config, options);
  if (options.has_vocabulary && input.vocabulary_kept > 0) model.config.vocab = input.vocabulary_kept;
  if (options.has_recover) plan_teacher_tokens(input, options.objective, model, "prune");
  if (options.has_recover) add_training(input, options.recover, &options.objective, model);
  if (options.has_vocabulary) model.other_tokens = true;
  if (options.compensate != "none") model.trained = true, model.halves = false;
  model.bytes = float_bytes(model.config);
}

void run_prune(const Node& node, StageRun& run) {
  set_rounding(*run.current.model, RuntimeRounding());
  const auto options = read_stage<PruneOptions>(node);
  if (options.has_structured || options.has_unstructured || options.has_recover) prune(*run.current.model, options, options.has_recover ? stage_objectives(options.objective, run) : std::vector<std::shared_ptr<Objective>>{}, run.context);
  if (options.has_vocabulary) {
    const TaskData& data = *run.context.data;
    std::vector<std::vector<std::int64_t>> texts = data.train.ids;
    texts.insert(texts.end(), data.train_documents.begin(), data.train_documents.end());
    texts.insert(texts.end(), data.calibration.begin(), data.calibration.end());
    const std::int64_t before = run.current.model->config().vocab;
    const std::vector<std::int64_t> kept = kept_vocabulary(*run.current.tokenizer, texts, options.vocabulary);
    restrict_vocabulary(*run.current.model, kept);
    restrict_positions(*run.current.model, options.vocabulary.max_positions);
    run.current.tokenizer = run.current.tokenizer->restrict_to(kept);
    (*run.context.details)["removed"]["vocabulary"] = Json::array({before, run.current.model->config().vocab});
  }
  run.current.quantized.clear();
}

// Norms and biases that a tuning moves, here or in a stage of its own, need whole floats in the file, whatever they needed before.
BudgetTarget quantize_target(const QuantizeOptions& options, const Recipe& recipe, const Transformer& shapes, const Tokenizer& tokenizer, bool halves) {
  const bool tunes_later = std::any_of(recipe.stages.begin(), recipe.stages.end(), [](const RecipeStage& stage) { return stage.row->name == "tune"; });
  if (!tunes_later && (!options.tunes_model() || options.others == "f16")) return budget_target(recipe, shapes, tokenizer, halves);
  std::set<std::string> vectors;
  for (const auto& [name, value] : shapes.parameters())
    if (value.dim() == 1) vectors.insert(name);
  return budget_target(recipe, shapes, tokenizer, halves, [vectors = std::move(vectors)](const std::string& name) { return vectors.count(name) > 0; });
}

void plan_quantize(const Node& node, const PlanInput& input, PlannedModel& model) {
  set_rounding(model.config, RuntimeRounding());
  const auto options = read_stage<QuantizeOptions>(node);
  Problems problems;
  check_grid_training(options, input.recipe.is_classification(), node.place.text(), problems);
  problems.throw_if_any("the stage's options are not valid");
  if (options.method == "qad" || options.tunes_model()) plan_teacher_tokens(input, options.objective, model, "quantize");
  model.budget_bytes = 0;
  if (options.subln && model.config.sub_norms) throw Error("the model has sub-norms already").at(node.place.text()).given("subln: true").hint("leave subln out: those of the earlier stage stay");
  if (options.subln) model.config.sub_norms = true;
  const auto add_trainings = [&] {
    struct Halves {  // what has no grid is rounded at the end
      PlannedModel& model;
      bool halves;
      ~Halves() { model.halves = halves; }
    } rounded{model, options.others == "f16"};
    if (options.method == "qad") {
      if (options.has_pretrain) add_training(input, options.pretrain, nullptr, model);
      add_training(input, options.train, &options.objective, model);
    }
    if (options.tunes_model() && input.calibration_windows > 0) add_training(input, kl_train_options(options.tune, options.tuning, input.calibration_windows, input.calibration_length), &options.objective, model);
  };
  if (options.has_budget) {
    model.config = basis_config(model.config, options.basis);
    const Transformer shapes(model.config, 0, c10::Device(c10::kMeta));
    const BudgetFrame frame = budget_frame(model.config, options, quantize_target(options, input.recipe, shapes, *input.tokenizer, true));
    model.quantized = frame.smallest, model.budget_bytes = frame.limit;
    model.notes.push_back(frame.note());
    add_calibration(input, options, model);
    add_trainings();
    model.bytes = float_bytes(model.config);
    return;
  }
  const QuantizationPlan plan = plan_quantization(model.config, options);
  model.config = basis_config(model.config, options.basis);
  model.quantized = plan.tensors;
  set_rounding(model.config, planned_rounding(model.config, options, model.quantized));
  model.notes.insert(model.notes.end(), plan.fallbacks.begin(), plan.fallbacks.end());
  if (options.has_sparse) model.notes.push_back(str(chosen_pattern(options.sparse, "quantize.sparse").text(), " of the weights of linears in blocks become zero in the same sweep"));
  add_calibration(input, options, model);
  add_trainings();
  model.bytes = float_bytes(model.config);
}

void run_quantize(const Node& node, StageRun& run) {
  set_rounding(*run.current.model, RuntimeRounding());
  const auto options = read_stage<QuantizeOptions>(node);
  const auto objectives = options.method == "qad" || options.tunes_model() ? stage_objectives(options.objective, run) : std::vector<std::shared_ptr<Objective>>{};
  const QuantizedModel result = options.has_budget ? quantize_within_budget(*run.current.model, options, objectives, run.context, quantize_target(options, run.recipe, *run.current.model, *run.current.tokenizer, options.others == "f16"))
                                                   : quantize(*run.current.model, options, objectives, run.context);
  run.current.quantized.clear();
  for (const auto& [name, values] : result.tensors) run.current.quantized[name] = {result.plan.tensors.at(name), values};
}

// The last windows of the calibration text score the tuning: neither the method nor a tuning before may have seen them.
void check_unseen(const PlanInput& input, const TuneOptions& options, const Place& place) {
  const DataSource* heldout = input.recipe.find_data("heldout");
  if (heldout || input.calibration_windows == 0) return;
  const std::int64_t held = held_out_windows(input.calibration_windows, options.tuning.holdout);
  const auto refuse_less = [&](const RecipeStage& stage, double holdout) {
    if (held_out_windows(input.calibration_windows, holdout) < held)
      throw Error(str("the last ", held, " of ", input.calibration_windows, " calibration windows choose among the checkpoints, and stage \"", stage.title, "\" tunes on some of them"))
          .at(place.text()).given(str("holdout: ", shortest(options.tuning.holdout))).allowed(str("at most ", shortest(holdout), ", as there")).hint("give both the same holdout, or a data set heldout");
  };
  for (std::size_t i = input.stage; i-- > 0;) {
    if (input.recipe.stages[i].row->name == "tune") refuse_less(input.recipe.stages[i], read_stage<TuneOptions>(input.recipe.stages[i].options).tuning.holdout);
    if (input.recipe.stages[i].row->name != "quantize") continue;
    const auto method = read_stage<QuantizeOptions>(input.recipe.stages[i].options);
    if (method.tunes_model()) return refuse_less(input.recipe.stages[i], method.tuning.holdout);
    const bool looks = find_quantization_method(method.method)->needs_calibration || method.tunes_blocks() || method.has_budget || method.basis.basis != "none";
    if (looks && method.calibration_sequences + held > input.calibration_windows)
      throw Error(str("the last ", held, " of ", input.calibration_windows, " calibration windows choose among the checkpoints, and stage \"", input.recipe.stages[i].title, "\" sees them"))
          .at(place.text()).given(str("calibration_sequences: ", method.calibration_sequences)).allowed(str("at most ", input.calibration_windows - held, ", more calibration text, or a data set heldout")).hint("set calibration_sequences of that stage, or data.heldout");
    return;
  }
}

void plan_tune(const Node& node, const PlanInput& input, PlannedModel& model) {
  const auto options = read_stage<TuneOptions>(node);
  Problems problems;
  check_tune(model.config, model.quantized, options, node.place.text(), problems);
  problems.throw_if_any("the stage's options are not valid");
  plan_teacher_tokens(input, options.objective, model, "tune");
  check_unseen(input, options, node.place);
  if (input.calibration_windows > 0) add_training(input, kl_train_options(options.mode, options.tuning, input.calibration_windows, input.calibration_length), &options.objective, model);
  model.bytes = float_bytes(model.config);
}

void run_tune(const Node& node, StageRun& run) {
  const auto options = read_stage<TuneOptions>(node);
  QuantizedModel quantized;
  for (const auto& [name, tensor] : run.current.quantized) quantized.plan.tensors[name] = tensor.spec, quantized.tensors[name] = tensor.values;
  tune(*run.current.model, quantized, options, stage_objectives(options.objective, run), run.context);
  for (const auto& [name, values] : quantized.tensors) run.current.quantized.at(name).values = values;
}

void plan_export(const Node& node, const PlanInput&, PlannedModel& model) {
  const auto options = read_stage<ExportOptions>(node);
  std::vector<std::string> all;
  for (const std::string& format : options.formats)
    for (const std::string& obstacle : find_exporter(format)->obstacles(model.config, model.quantized)) all.push_back(str("format ", format, ": ", obstacle));
  if (!all.empty()) throw Error(join(all, "; ")).at("stage \"export\"").hint("choose another format, or a grid that this format can hold");
}

void plan_evaluate(const Node& node, const PlanInput& input, PlannedModel& model) {
  const auto options = read_stage<EvaluateOptions>(node);
  if (!options.has_cache) return;
  if (input.recipe.is_classification()) throw Error("\"cache\" of the stage evaluate is for text").at(node.place.text()).hint("remove the key: of classes the teacher's predictions are kept anyway");
  const SparseLayout row{1, std::min(options.cache.top, input.teacher.vocab), options.cache.tail, input.teacher.vocab};
  model.notes.push_back(str("the teacher's outputs on the test set take at most ", row.packed_bytes(), " bytes a token"));
}
void run_evaluate(const Node&, StageRun&) {}  // measuring happens after every stage; this one carries its options

}  // namespace

void fields(FieldVisitor& v, ExportOptions& o) {
  v.texts("formats", o.formats, "rows of the table of exporters; the first is what the report calls the artifact");
  v.number("tolerance", o.tolerance, "largest logit difference between the trained model and the reopened artifact", {.min = 0});
  v.integer("check_examples", o.check_examples, "texts (or windows) that the reopened artifact is compared on", {.min = 1});
}

void fields(FieldVisitor& v, EvaluateOptions& o) {
  v.choice("against", o.against, "whom every model is compared with", {"teacher"});
  v.flag("latency", o.measure.latency, "measure the time of one request");
  v.integer("latency_tokens", o.measure.latency_tokens, "tokens of that request", {.min = 1});
  v.integer("latency_repeats", o.measure.latency_repeats, "timed requests", {.min = 1});
  v.integer("batch_size", o.measure.batch_size, "texts per forward pass", {.min = 1});
  v.section("cache", o.has_cache, "text: KL and same top-1 from the teacher's likeliest tokens and draws from the rest, kept on disk: a teacher whose outputs are there is not loaded", [&](FieldVisitor& inner) {
    inner.integer("top", o.cache.top, "likeliest tokens kept of every position", {.min = 1.0, .max = 4096.0});
    inner.integer("tail", o.cache.tail, "draws from all other tokens, an even number; 0 = none: KL is then a lower bound", {.min = 0.0, .max = 4096.0});
  });
  v.flag("cascade", o.cascade, "curve of the share kept by the small model against the accuracy of small model and teacher together");
}

EvaluateOptions evaluate_options(const Recipe& recipe) {
  for (const RecipeStage& stage : recipe.stages)
    if (stage.row->name == "evaluate") return read_stage<EvaluateOptions>(stage.options);
  return {};
}

std::span<const StageRow> stage_rows() {
  static constexpr std::array<StageRow, 8> rows = {{
      {"finetune", "trains the model on the labels; the result is the teacher of the stages after it", true, false, true, describe_stage<FinetuneOptions>, check_stage<FinetuneOptions>, plan_finetune, run_finetune},
      {"distill", "trains a smaller student under the teacher", true, true, true, describe_stage<DistillRecipe>, check_stage<DistillRecipe>, plan_distill, run_distill},
      {"prune", "removes neurons, heads, layers and vocabulary for real", false, false, true, describe_stage<PruneOptions>, check_stage<PruneOptions>, plan_prune, run_prune},
      {"quantize", "puts the weights on a grid of few values, after training or while training", false, false, true, describe_stage<QuantizeOptions>, check_stage<QuantizeOptions>, plan_quantize, run_quantize},
      {"export", "writes the artifact, reopens it and proves that it computes the same", false, false, false, describe_stage<ExportOptions>, check_stage<ExportOptions>, plan_export, run_export},
      {"evaluate", "how every model on the way is measured", false, false, false, describe_stage<EvaluateOptions>, check_stage<EvaluateOptions>, plan_evaluate, run_evaluate},
      {"search", "finds layers, widths, heads, vocabulary and formats together under a budget of bytes, memory, time or energy, and cuts the model to them", false, false, true, describe_stage<SearchOptions>, check_stage<SearchOptions>, plan_search, run_search},
      {"tune", "moves what a stage quantize has stored towards the teacher's predictions, on its grid", false, true, true, describe_stage<TuneOptions>, check_stage<TuneOptions>, plan_tune, run_tune},
  }};
  return rows;
}

const StageRow* find_stage(std::string_view name) {
  for (const StageRow& row : stage_rows())
    if (row.name == name) return &row;
  return nullptr;
}

bool works_by_blocks(const RecipeStage& stage) {
  if (stage.row->name == "prune") return prunes_by_blocks(read_stage<PruneOptions>(stage.options));
  if (stage.row->name != "quantize") return false;
  const auto options = read_stage<QuantizeOptions>(stage.options);
  return !find_quantization_method(options.method)->needs_train && !options.tunes_model();
}

bool starts_afresh(const RecipeStage& stage) {
  if (stage.row->name != "distill") return false;
  const StudentOptions student = read_stage<DistillRecipe>(stage.options).student;
  return !student.config.empty() || !student.model.empty();
}

std::vector<TrainOptions> shared_trainings(const RecipeStage& stage) {
  std::vector<TrainOptions> out;
  if (stage.row->name == "finetune") out.push_back(read_stage<FinetuneOptions>(stage.options).train);
  if (stage.row->name == "distill") out.push_back(read_stage<DistillRecipe>(stage.options).train);
  if (stage.row->name == "prune") {
    const auto options = read_stage<PruneOptions>(stage.options);
    if (options.has_recover) out.push_back(options.recover);
  }
  if (stage.row->name == "quantize") {
    const auto options = read_stage<QuantizeOptions>(stage.options);
    if (!find_quantization_method(options.method)->needs_train || options.tunes_model()) return out;
    if (options.has_pretrain) out.push_back(options.pretrain);
    out.push_back(options.train);
  }
  return out;
}

std::vector<std::string> stage_names() {
  std::vector<std::string> names;
  for (const StageRow& row : stage_rows()) names.emplace_back(row.name);
  return names;
}

}  // namespace kompakt
