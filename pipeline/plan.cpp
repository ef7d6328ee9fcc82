#include "pipeline/plan.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <set>

#include "core/error.h"
#include "core/system.h"
#include "core/text.h"
#include "export/exporters.h"
#include "model/checkpoint.h"
#include "model/families.h"
#include "pipeline/budget_target.h"
#include "pipeline/describe.h"
#include "pipeline/stages.h"
#include "prune/shape_planner.h"
#include "prune/stage.h"
#include "quantize/held_weights.h"

namespace kompakt {
namespace {

// A few megabytes of libtorch, allocator slack and memory-mapped pages that every process of ours shows.
constexpr std::int64_t base_memory_bytes = 320LL << 20;

std::unique_ptr<Tokenizer> plan_tokenizer(const Recipe& recipe) {
  return load_tokenizer(recipe.path_of(recipe.teacher.tokenizer.empty() ? recipe.teacher.path : recipe.teacher.tokenizer));
}

const VocabularyOptions* plan_vocabulary(const Recipe& recipe, PruneOptions& options) {
  for (const RecipeStage& stage : recipe.stages) {
    if (stage.row->name == "search") {
      const Node* tried = stage.options.find("vocabulary");
      if (tried && std::any_of(tried->items.begin(), tried->items.end(), [](const Node& item) { return item.scalar == "used"; })) return &(options = {}).vocabulary;
    }
    if (stage.row->name != "prune") continue;
    Problems problems;
    options = {};
    read_fields(stage.options, "stage", problems, [&](FieldVisitor& v) { fields(v, options); });
    if (options.has_vocabulary) return &options.vocabulary;
  }
  return nullptr;
}

}  // namespace

double measure_gigaflops() {
  const at::NoGradGuard no_grad;
  // Sizes of a small encoder's feed-forward product: the rate that training will see, not the best of the machine.
  const at::Tensor a = at::ones({512, 384}), b = at::ones({384, 1536});
  at::matmul(a, b);
  const auto start = std::chrono::steady_clock::now();
  double seconds = 0;
  int runs = 0;
  while (seconds < 0.2) {
    for (int i = 0; i < 5; ++i, ++runs) at::matmul(a, b);
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  return 2.0 * 512 * 384 * 1536 * runs / seconds / 1e9;
}

std::int64_t predict_packed_bytes(const ModelConfig& config, const std::map<std::string, GridSpec>& quantized) {
  const Transformer shapes(config, 0, c10::Device(c10::kMeta));
  std::int64_t bytes = 0, tensors = 0;
  for (const auto& [name, value] : shapes.parameters()) {
    const std::string owner = ends_with(name, ".weight") ? name.substr(0, name.size() - 7) : name;
    const auto found = quantized.find(owner);
    if (found == quantized.end()) bytes += value.numel() * 2, tensors += 1;
    // Formats that get here store codes of equal length.
    else if (const GridSpec& spec = found->second; spec.grid->entropy_coded()) bytes += value.size(0) * (spec.grid->layout.row_bytes(value.size(1)) + 2 * spec.scale_count(value.size(1))), tensors += 2;
    else bytes += found->second.packed_bytes(value.size(0), value.size(1)), tensors += 2;
  }
  constexpr std::int64_t header_bytes_per_tensor = 120, config_bytes = 6000;
  const std::int64_t tokenizer_bytes = config.vocab * 8;
  return bytes + tensors * header_bytes_per_tensor + config_bytes + tokenizer_bytes;
}

namespace {

// Of the first format that the artifact can be measured in before it is there: header, metadata and tokenizer counted as the writer does.
std::int64_t plan_artifact_bytes(const Recipe& recipe, const RecipeStage& stage, const PlannedModel& model, const Tokenizer& tokenizer, const Tokenizer* pruned) {
  const Node* formats = stage.options.find("formats");
  const bool exact = formats && std::any_of(formats->items.begin(), formats->items.end(), [](const Node& format) { return find_exporter(format.scalar) && find_exporter(format.scalar)->file_bytes; });
  if (!exact) return predict_packed_bytes(model.config, model.quantized);
  const Transformer shapes(model.config, 0, c10::Device(c10::kMeta));
  std::function<bool(const std::string&)> whole;
  if (model.trained && !model.halves) whole = [](const std::string&) { return true; };
  return budget_target(recipe, shapes, pruned && pruned->vocab_size() == model.config.vocab ? *pruned : tokenizer, model.halves, std::move(whole)).file_bytes(model.quantized);
}

}  // namespace

std::vector<StagePrediction> predict_stages(const Recipe& recipe, const LoadedData& data) {
  const std::unique_ptr<Tokenizer> tokenizer = plan_tokenizer(recipe);
  PlanInput input{recipe};
  input.teacher = load_config(recipe.path_of(recipe.teacher.path));
  check_tokenizer_fits(*tokenizer, input.teacher, recipe.teacher.path);
  input.tokenizer = tokenizer.get();
  const std::unique_ptr<TokenizedData> tokenized = tokenize_data(recipe, data, *tokenizer, input.teacher);
  std::vector<std::vector<std::int64_t>> texts = tokenized->task.train.ids;
  texts.insert(texts.end(), tokenized->task.train_documents.begin(), tokenized->task.train_documents.end());
  std::set<std::int64_t> touched;
  std::int64_t tokens = 0;
  for (const auto& ids : texts) {
    touched.insert(ids.begin(), ids.end());
    tokens += static_cast<std::int64_t>(ids.size());
  }
  input.train_examples = static_cast<std::int64_t>(texts.size());
  input.tokens_per_example = texts.empty() ? 0 : static_cast<double>(tokens) / static_cast<double>(texts.size());
  input.calibration_windows = static_cast<std::int64_t>(tokenized->task.calibration.size());
  input.calibration_length = tokenized->task.calibration.empty() ? 0 : static_cast<std::int64_t>(tokenized->task.calibration.front().size());
  input.touched_vocabulary = static_cast<std::int64_t>(touched.size());
  input.evaluation_examples = static_cast<std::int64_t>(tokenized->test.ids.size());
  input.gigaflops = measure_gigaflops();
  PruneOptions prune_options;
  std::unique_ptr<Tokenizer> pruned_tokenizer;
  if (const VocabularyOptions* vocabulary = plan_vocabulary(recipe, prune_options)) {
    texts.insert(texts.end(), tokenized->task.calibration.begin(), tokenized->task.calibration.end());
    const std::vector<std::int64_t> kept = kept_vocabulary(*tokenizer, texts, *vocabulary);
    input.vocabulary_kept = static_cast<std::int64_t>(kept.size());
    pruned_tokenizer = tokenizer->restrict_to(kept);
    input.pruned_tokenizer = pruned_tokenizer.get();
  }

  const HeldPrecision& held = find_held_precision(recipe.teacher.precision);
  // The teacher stays in memory beside the model of every stage after the one that made it; one that is no classifier
  // yet is not loaded for classification.
  std::int64_t teacher_bytes = recipe.has_labels() && !input.teacher.is_classifier() ? 0 : held_bytes(input.teacher, held);
  if (recipe.is_classification() && !recipe.has_labels() && (input.teacher.is_classifier() || !input.teacher.family->encoder))
    throw Error("texts without labels train encoders that give a vector for each").at("data").given(input.teacher.is_classifier() ? "a classifier" : std::string(input.teacher.family->name)).hint("give the data labels (format: classification) or running text (format: text)");
  input.labels = &tokenized->task.labels;
  PlannedModel model;
  model.config = input.teacher;
  if (recipe.is_classification() && !model.config.is_classifier()) model.config.labels = tokenized->task.labels;
  model.teacher = model.config;
  std::vector<StagePrediction> out;
  for (const RecipeStage& stage : recipe.stages) {
    model.seconds = 0;
    model.bytes = 0;
    model.memory_bytes = 0;
    model.notes.clear();
    model.shapes = Json();
    input.stage = static_cast<std::size_t>(&stage - recipe.stages.data());
    stage.row->plan(stage.options, input, model);
    StagePrediction prediction;
    prediction.title = stage.title;
    prediction.parameters = count_parameters(model.config).total;
    const std::int64_t weights = prediction.parameters * 4;
    prediction.memory_bytes = std::max(model.memory_bytes, base_memory_bytes + 2 * weights) + teacher_bytes + model.cache_bytes;
    if (stage.row->name == "finetune") teacher_bytes = held_bytes(model.config, held);
    prediction.seconds = model.seconds;
    if (stage.row->name == "export") prediction.bytes = model.budget_bytes > 0 ? model.budget_bytes : plan_artifact_bytes(recipe, stage, model, *tokenizer, pruned_tokenizer.get());
    else prediction.bytes = stage.row->changes_weights ? model.bytes : 0;
    for (const auto& [name, spec] : model.quantized)
      if (stage.row->name == "quantize") prediction.formats[name] = model.budget_bytes > 0 ? "decided in the run" : str(spec.grid->name, spec.group > 0 ? str(" g", spec.group) : std::string());
    prediction.notes = model.notes;
    prediction.shapes = model.shapes;
    out.push_back(std::move(prediction));
  }
  return out;
}

Json explain_shapes(const std::filesystem::path& file) {
  const Recipe recipe = read_recipe(file);
  const LoadedData data = load_data(recipe);
  Json out = Json::array();
  for (const StagePrediction& prediction : predict_stages(recipe, data))
    if (!prediction.shapes.is_null()) out.push_back(Json{{"stage", prediction.title}, {"shapes", prediction.shapes}});
  return out;
}

std::string explain_shapes_text(const Json& stages) {
  if (stages.empty()) return "\nno stage of the recipe changes a shape: prune: {structured: ...} or {vocabulary: ...} does\n";
  std::string out;
  for (const Json& stage : stages) out += str("\n", stage.at("stage").get<std::string>(), "\n", shapes_text(stage.at("shapes"), "  "));
  return out;
}

std::string plan_table(const Recipe& recipe, const std::vector<StagePrediction>& predictions) {
  std::string out = str("plan of ", recipe.name, " (nothing was computed)\n\n");
  const auto cell = [](std::string text, std::size_t width) { return text + std::string(text.size() < width ? width - text.size() : 1, ' '); };
  out += cell("stage", 16) + cell("parameters", 14) + cell("writes", 14) + cell("peak memory", 14) + "time\n";
  double seconds = 0;
  for (const StagePrediction& p : predictions) {
    seconds += p.seconds;
    out += cell(p.title, 16) + cell(human_count(static_cast<double>(p.parameters)), 14) + cell(p.bytes > 0 ? human_bytes(static_cast<double>(p.bytes)) : "-", 14) +
           cell(human_bytes(static_cast<double>(p.memory_bytes)), 14) + (p.seconds > 0 ? human_seconds(p.seconds) : "-") + "\n";
    for (const std::string& note : p.notes) out += "  note: " + note + "\n";
    if (!p.shapes.is_null()) out += shapes_text(p.shapes, "  ");
    std::map<std::string, int> counts;
    for (const auto& [name, format] : p.formats) ++counts[format];
    for (const auto& [format, count] : counts) out += str("  ", count, " tensors as ", format, "\n");
  }
  out += str("\nabout ", human_seconds(seconds), " of training with ", core_count(), " cores; memory of this machine: ", human_bytes(static_cast<double>(physical_memory_bytes())), "\n");
  return out;
}

Json plan_json(const Recipe& recipe, const std::vector<StagePrediction>& predictions) {
  Json stages = Json::array();
  for (const StagePrediction& p : predictions)
    stages.push_back(Json{{"name", p.title}, {"parameters", p.parameters}, {"bytes", p.bytes}, {"peak_memory_bytes", p.memory_bytes}, {"seconds", p.seconds}, {"formats", p.formats}, {"notes", p.notes}, {"shapes", p.shapes}});
  return Json{{"name", recipe.name}, {"stages", stages}};
}

}  // namespace kompakt
