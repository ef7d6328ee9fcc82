#include "pipeline/stages.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <functional>
#include <set>

#include "core/error.h"
#include "core/log.h"
#include "core/text.h"
#include "distill/cross_tokenizer.h"
#include "distill/stage.h"
#include "distill/vocabularies.h"
#include "export/exporters.h"
#include "model/checkpoint.h"
#include "model/families.h"
#include "model/rounding.h"
#include "pipeline/budget_target.h"
#include "pipeline/recipe.h"
#include "pipeline/search.h"
#include "pipeline/shape_target.h"
#include "pipeline/stage_options.h"
#include "pipeline/store.h"
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
namespace {

// The four adapters below are the same for every stage; what differs is the option struct and the function that runs it.
template <class Options>
void describe_stage(FieldVisitor& visitor) {
  Options options;
  fields(visitor, options);
}

template <class Options>
Options read_stage(const Node& node) {
  Options options;
  Problems problems;
  read_fields(node, "the stage", problems, [&](FieldVisitor& v) { fields(v, options); });
  problems.throw_if_any("the stage's options are not valid");
  return options;
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
  if constexpr (std::is_same_v<Options, SearchOptions>) check_search(options, node.place.text(), problems);
  if constexpr (std::is_same_v<Options, ExportOptions>) {
    for (const std::string& format : options.formats)
      if (!find_exporter(format)) problems.add(Error(str("unknown format \"", format, "\" in ", context, did_you_mean(format, exporter_names()))).at(node.place.text()).allowed(join(exporter_names(), ", ")));
    if (options.formats.empty()) problems.add(Error(str(context, " names no format")).at(node.place.text()).allowed(join(exporter_names(), ", ")));
  }
  return write_fields([&](FieldVisitor& v) { fields(v, options); });
}

std::int64_t float_bytes(const ModelConfig& config) { return count_parameters(config).total * 4; }

// `objective`: null for a training without teacher. A classifier's outputs on the training set are cached: logits, and in
// bfloat16 what the objectives ask for.
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

// The passes over calibration data that the method itself makes.
void add_calibration(const PlanInput& input, const QuantizeOptions& options, PlannedModel& model) {
  const bool text = !input.recipe.is_classification();
  const QuantizeCost cost = predict_quantize_cost(model.config, options, text ? input.calibration_windows : input.train_examples, text ? static_cast<double>(input.calibration_length) : input.tokens_per_example);
  model.seconds += input.gigaflops > 0 ? cost.flops / (input.gigaflops * 1e9) : 0;
  model.memory_bytes = std::max(model.memory_bytes, cost.memory_bytes);
}

// Losses against the teacher go token by token: an Error where a cut of the vocabulary, or another student, has given the model other ids.
void refuse_other_tokens(const std::string& stage) {
  throw Error("the stage compares model and teacher token by token, and the ids of the model are not the teacher's any more").at(str("stage \"", stage, "\""))
      .hint("cut the vocabulary behind the last stage that learns from the teacher, or take its objective from the text alone: [{labels: cross_entropy}]");
}

bool asks_teacher(const Node& objective) {
  Problems problems;
  const auto rows = build_objectives(objective.is_null() ? default_objective(false) : objective, {}, problems);
  return std::any_of(rows.begin(), rows.end(), [](const auto& row) { return row->needs_teacher(); });
}

void plan_teacher_tokens(const PlanInput& input, const Node& objective, const PlannedModel& model, const std::string& stage) {
  if (model.other_tokens && !input.recipe.has_labels() && asks_teacher(objective)) refuse_other_tokens(stage);
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

// What both tokenizers have in common; an Error where the objectives, or the teacher's texts, need more.
VocabularyComparison compare_students(const DistillOptions& options, const Tokenizer& student, const ModelConfig& config, const Tokenizer& teacher, const ModelConfig& teacher_config) {
  const VocabularyComparison out = compare_vocabularies(student, config.vocab, teacher, teacher_config.vocab);
  if (!crosses_tokenizers(options.objective)) check_comparable(out, "stage \"distill\"");
  if (options.has_teacher_text && !out.comparable()) throw Error("the teacher's texts are in its own tokens, which are not the student's").at("stage \"distill\"").given(out.text()).hint("remove teacher_text, or use a student with the teacher's tokenizer");
  return out;
}

// Of a student that is another model.
std::vector<std::int64_t> other_layer_map(const StudentOptions& options, const ModelConfig& student, const ModelConfig& teacher) {
  if (options.layer_map.empty()) return even_layer_map(student.layers, teacher.layers);
  check_layer_map(options.layer_map, student.layers, teacher.layers);
  return options.layer_map;
}

// The shape of a student that starts from random weights.
ModelConfig random_student(const StudentOptions& options, const Recipe& recipe) {
  const std::filesystem::path path = recipe.path_of(options.config);
  if (!std::filesystem::is_regular_file(path)) throw Error("there is no such shape").at("distill.student.config").given(path.string()).allowed("a file config.json of a decoder, as transformers writes it").hint("check the path; relative paths start at the recipe's folder");
  ModelConfig config = config_from_json(read_json(path), path.string());
  if (config.family->encoder || config.is_classifier()) throw Error("the shape is not that of a decoder").at(path.string()).given(std::string(config.family->name)).hint("student.config is for text");
  return config;
}

// With what only the task decides, which the check of the recipe does not know.
DistillRecipe read_distill(const Node& node, bool classification) {
  const auto options = read_stage<DistillRecipe>(node);
  Problems problems;
  check_distill(options, classification, node.place, problems);
  problems.throw_if_any("the stage's options are not valid");
  return options;
}

void plan_distill(const Node& node, const PlanInput& input, PlannedModel& model) {
  set_rounding(model.config, RuntimeRounding());
  const DistillRecipe options = read_distill(node, input.recipe.is_classification());
  if (!options.student.keep_layers.empty()) model.config.layers = static_cast<std::int64_t>(options.student.keep_layers.size());
  if (options.has_width) plan_width_cut(options.width, input, model);
  if (!options.student.config.empty()) {
    model.config = random_student(options.student, input.recipe);
    if (input.tokenizer && !model.other_tokens) check_tokenizer_fits(*input.tokenizer, model.config, input.recipe.path_of(options.student.config).string());
    model.layer_map = other_layer_map(options.student, model.config, model.teacher);
  } else if (options.student.model.empty()) {
    model.layer_map = student_layer_map(options.student, model.teacher.layers);
  } else {
    const std::filesystem::path path = input.recipe.path_of(options.student.model);
    model.config = load_config(path);
    model.layer_map = other_layer_map(options.student, model.config, model.teacher);
    if (input.tokenizer) {
      const std::unique_ptr<Tokenizer> own = load_tokenizer(path);
      model.notes.push_back(compare_students(options, *own, model.config, *input.tokenizer, model.teacher).text());
      model.other_tokens = own->fingerprint() != input.tokenizer->fingerprint();
    }
  }
  if (options.student.model.empty() && !crosses_tokenizers(options.objective)) plan_teacher_tokens(input, options.objective, model, "distill");
  if (options.has_on_policy) check_completion_length(options.on_policy, options.on_policy.prompt_tokens, options.train.sequence_length, model.config.max_positions, "stage \"distill\"");
  if (options.has_teacher_text) check_completion_length(options.teacher_text, options.teacher_text.prompt_tokens, options.train.sequence_length, model.teacher.max_positions, "stage \"distill\"");
  if (options.has_on_policy || options.has_teacher_text) model.notes.push_back("the time to write texts is not in the prediction");
  if (options.has_cache) {
    const SparseLayout row{1, std::min(options.cache.top, input.teacher.vocab), options.cache.tail, input.teacher.vocab};
    model.notes.push_back(str("the teacher's cache takes at most ", row.packed_bytes(), " bytes a token"));
  }
  Problems problems;
  check_distill_models(options, model.config, model.teacher, model.layer_map, input.recipe.is_classification(), problems);
  problems.throw_if_any("the objectives of the stage distill have mistakes");
  add_training(input, options.train, &options.objective, model);
  model.bytes = float_bytes(model.config);
}

void run_distill(const Node& node, StageRun& run) {
  set_rounding(*run.current.model, RuntimeRounding());
  const DistillRecipe options = read_distill(node, run.context.data->kind == TaskData::Kind::classification);
  const std::int64_t before = run.current.model->config().layers;
  std::unique_ptr<TokenizedData> own;  // the data in the tokens of a student that is another model
  if (!options.student.model.empty()) {
    const std::filesystem::path path = run.recipe.path_of(options.student.model);
    run.current = {open_any_model(path), load_tokenizer(path), {}, {}};
    check_tokenizer_fits(*run.current.tokenizer, run.current.model->config(), path.string());
    run.current.model->to(run.context.device);
    own = tokenize_data(run.recipe, load_data(run.recipe), *run.current.tokenizer, run.current.model->config());
    run.context.data = &own->task;
    run.context.masks.clear();
    run.context.layer_map = other_layer_map(options.student, run.current.model->config(), run.teacher->config());
  }
  if (!options.student.config.empty()) {
    const ModelConfig config = random_student(options.student, run.recipe);
    check_tokenizer_fits(*run.current.tokenizer, config, run.recipe.path_of(options.student.config).string());
    run.current.model = std::make_unique<Transformer>(config, run.context.seed, run.context.device);
    run.current.quantized.clear();
    run.context.masks.clear();
    run.context.layer_map = other_layer_map(options.student, config, run.teacher->config());
  }
  if (options.has_width) prune(*run.current.model, width_cut(options.width, run.current.model->config()), {}, run.context);
  if (!options.student.keep_layers.empty()) {
    refuse_masks(run.context, "keep_layers makes a model of other layers");
    // Layers are counted in the teacher; the teacher's weights are where the student starts.
    run.current.model = make_student(*run.current.model, options.student);
    run.context.layer_map = student_layer_map(options.student, before);
  }
  std::unique_ptr<TeacherSource> source;
  const std::filesystem::path outputs = store_folder(run.recipe.store, run.recipe.base) / "teacher-outputs";
  if (run.context.data->kind == TaskData::Kind::text && run.teacher && run.teacher_tokenizer) {
    const VocabularyComparison common = compare_students(options, *run.current.tokenizer, run.current.model->config(), *run.teacher_tokenizer, run.teacher->config());
    if (run.context.details) (*run.context.details)["vocabularies"] = common.json();
    if (crosses_tokenizers(options.objective)) {
      log_info(str(run.context.title, ": ", common.text()));
      source = cross_tokenizer_teacher(run.teacher, *run.current.tokenizer, *run.teacher_tokenizer);
    }
  }
  if (options.has_cache) {
    SparseCacheOptions cache = options.cache;
    cache.columns = shared_logits(run.current.model->config().vocab, run.teacher->config().vocab, run.current.tokenizer->vocab_size());
    source = sparse_teacher(run.teacher, *run.context.data, options.train.sequence_length, cache, outputs);
  }
  if (source) run.context.teacher = source.get();
  std::unique_ptr<BatchSampler> writer;
  if (options.has_teacher_text) {
    writer = teacher_text_sampler(run.teacher, options.teacher_text, options.train.batch_size, outputs, {*run.context.data, options.train.sequence_length, run.context.seed, run.context.title, run.context.ranks});
    run.context.sampler = writer.get();
  }
  distill(*run.current.model, options, run.context);
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

void plan_evaluate(const Node&, const PlanInput&, PlannedModel&) {}
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
