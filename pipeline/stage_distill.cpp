// The stage `distill`: the student and the teacher's outputs that a recipe asks for, in front of distill/.
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/files.h"
#include "core/log.h"
#include "core/text.h"
#include "distill/cross_tokenizer.h"
#include "distill/stage.h"
#include "distill/vocabularies.h"
#include "export/exporters.h"
#include "model/checkpoint.h"
#include "model/families.h"
#include "model/rounding.h"
#include "pipeline/recipe.h"
#include "pipeline/stage_common.h"
#include "pipeline/store.h"
#include "pipeline/student_width.h"
#include "pipeline/task_data.h"
#include "prune/stage.h"
#include "train/mask.h"
#include "train/sparse_codec.h"
#include "train/teacher.h"

namespace kompakt {
namespace {

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

}  // namespace

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
    run.context.layer_map = other_layer_map(options.student, run.current.model->config(), run.teacher.config());
  }
  if (!options.student.config.empty()) {
    const ModelConfig config = random_student(options.student, run.recipe);
    check_tokenizer_fits(*run.current.tokenizer, config, run.recipe.path_of(options.student.config).string());
    run.current.model = std::make_unique<Transformer>(config, run.context.seed, run.context.device);
    run.current.quantized.clear();
    run.context.masks.clear();
    run.context.layer_map = other_layer_map(options.student, config, run.teacher.config());
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
    const VocabularyComparison common = compare_students(options, *run.current.tokenizer, run.current.model->config(), *run.teacher_tokenizer, run.teacher.config());
    if (run.context.details) (*run.context.details)["vocabularies"] = common.json();
    if (crosses_tokenizers(options.objective)) {
      log_info(str(run.context.title, ": ", common.text()));
      source = cross_tokenizer_teacher(run.teacher, *run.current.tokenizer, *run.teacher_tokenizer);
    }
  }
  if (options.has_cache) {
    SparseCacheOptions cache = options.cache;
    cache.columns = shared_logits(run.current.model->config().vocab, run.teacher.config().vocab, run.current.tokenizer->vocab_size());
    source = sparse_teacher(run.teacher, *run.context.data, options.train.sequence_length, cache, outputs);
  }
  if (source) run.context.teacher = source.get();
  if (options.has_cache) run.teacher.release();  // rows that are missing bring it back
  std::unique_ptr<BatchSampler> writer;
  if (options.has_teacher_text) {
    writer = teacher_text_sampler(run.teacher, options.teacher_text, options.train.batch_size, outputs, {*run.context.data, options.train.sequence_length, run.context.seed, run.context.title, run.context.ranks});
    run.context.sampler = writer.get();
  }
  distill(*run.current.model, options, run.context);
  if (options.has_cache && run.context.details) (*run.context.details)["teacher_loaded"] = run.teacher.loaded();  // false: the cache had every row
  run.current.quantized.clear();
}

}  // namespace kompakt
