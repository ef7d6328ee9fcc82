// Table of stages: what each needs, its options, what it does to the shape of the model, and how it runs.
#pragma once

#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/fields.h"
#include "data/tokenizer.h"
#include "model/transformer.h"
#include "quantize/grids.h"
#include "train/context.h"
#include "train/frozen_teacher.h"
#include "train/loop.h"

namespace kompakt {

struct Recipe;
struct RecipeStage;

// The model on its way through the stages.
struct WorkingModel {
  std::shared_ptr<Transformer> model;
  std::shared_ptr<const Tokenizer> tokenizer;
  WeightMasks masks;           // weights that are zero for good
  QuantizedTensors quantized;  // filled by the stage quantize; empty again when the weights change afterwards
};

// What a stage's run function may use beside its options.
struct StageRun {
  const Recipe& recipe;
  WorkingModel& current;                     // in and out
  FrozenTeacher teacher;                     // none before there is one
  StageContext& context;
  std::filesystem::path output;              // folder for files of its own (export); the pipeline saves the model
  std::shared_ptr<const Tokenizer> teacher_tokenizer;  // null where there is no teacher
};

// What `plan` knows after a stage without running it.
struct PlannedModel {
  ModelConfig config;
  ModelConfig teacher;           // of the stages that have one
  std::vector<std::int64_t> layer_map;  // of the distillation before; empty = layer i follows layer i
  std::int64_t cache_bytes = 0;  // teacher's outputs on the training set: a mapped file whose pages count as memory
  std::map<std::string, GridSpec> quantized;
  bool trained = false;          // floats have values that half precision does not hold
  bool halves = false;           // what has no grid was rounded to half precision
  bool other_tokens = false;     // of text: the ids are not the teacher's any more
  std::int64_t budget_bytes = 0; // > 0: grids are chosen in the run, so that the artifact has at most these; `quantized` is the smallest plan
  std::int64_t bytes = 0;        // of the files that the stage writes
  std::int64_t memory_bytes = 0; // predicted peak
  double seconds = 0;            // predicted
  std::vector<std::string> notes;
  Json shapes = Json();          // of stages that change the shape: valid values and their bytes (prune/shape_planner.h)
};
struct PlanInput {
  const Recipe& recipe;
  std::int64_t train_examples = 0;      // or windows
  double tokens_per_example = 0;
  std::int64_t calibration_windows = 0, calibration_length = 0;
  std::int64_t touched_vocabulary = 0;  // pieces that the training texts use
  std::int64_t vocabulary_kept = 0;     // after vocabulary pruning
  const Tokenizer* pruned_tokenizer = nullptr;  // likewise; null without
  std::size_t stage = 0;                // index of the stage that is being planned
  std::int64_t evaluation_examples = 0;
  double gigaflops = 0;                 // measured in a moment's matrix product
  ModelConfig teacher;
  const std::vector<std::string>* labels = nullptr;  // of the data
  const Tokenizer* tokenizer = nullptr;  // of the teacher
};

struct StageRow {
  std::string_view name;
  std::string_view summary;
  bool needs_train;         // labelled or text training data
  bool needs_teacher;       // a teacher that is fit for the task
  bool changes_weights;
  // Visits the options with defaults, for `explain`.
  void (*describe)(FieldVisitor& visitor);
  // Reads and checks; returns the resolved options.
  Node (*check)(const Node& options, const std::string& context, Problems& problems);
  void (*plan)(const Node& options, const PlanInput& input, PlannedModel& model);
  void (*run)(const Node& options, StageRun& run);
};

std::span<const StageRow> stage_rows();
const StageRow* find_stage(std::string_view name);
std::vector<std::string> stage_names();
// A stage prune or quantize that works on one block after the other and neither trains nor tunes the whole model: it needs one block of
// float weights at a time and no outputs of the teacher.
bool works_by_blocks(const RecipeStage& stage);
// A stage distill whose student is another model, or starts from random weights: of the model before it the shape is enough.
bool starts_afresh(const RecipeStage& stage);
// The trainings of a stage that several processes share; none for stages that rank 0 works on alone. (Tuning towards the teacher
// in the stage quantize watches one model and stays there.)
std::vector<TrainOptions> shared_trainings(const RecipeStage& stage);

}  // namespace kompakt
