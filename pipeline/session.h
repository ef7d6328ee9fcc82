// State of one `kompakt run`: keys, the store, lazily loaded models, the manifest. Used by run.cpp alone.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "pipeline/measure.h"
#include "pipeline/plan.h"
#include "pipeline/recipe.h"
#include "pipeline/run.h"
#include "pipeline/stage_options.h"
#include "pipeline/stages.h"
#include "pipeline/store.h"
#include "pipeline/task_data.h"

namespace kompakt {

class RunSession {
 public:
  RunSession(const Recipe& recipe, const RunOptions& options);
  ~RunSession();
  RunOutcome run();

 private:
  struct Position {  // where the chain stands
    std::string key;
    std::filesystem::path folder;  // model on disk; the teacher's own folder at the start
    std::string title;
    std::vector<std::int64_t> layer_map;
  };

  RunOutcome work();
  bool leader() const;  // true in a run of one process
  std::string stage_key(const RecipeStage& stage, std::size_t index) const;
  void run_stage(const RecipeStage& stage, std::size_t index, const std::string& key);
  // The part of the ranks that write nothing: they train along, or wait until rank 0 has stored the stage.
  void follow_stage(const RecipeStage& stage, std::size_t index, const std::string& key, bool stored);
  // What a stage's function gets, but for the teacher; loads the model and makes the scratch folder.
  StageContext stage_context(const RecipeStage& stage, std::size_t index, const std::string& key, Json& details);
  void add_teacher(const RecipeStage& stage, StageContext& context);
  void measure_teacher(std::size_t index);  // behind stage `index`, unless it is known or a later stage makes another one
  void move_on(const RecipeStage& stage, const std::string& key, const std::filesystem::path& entry, const Json& record);
  // current_ from position_.folder when it is not there; `paging`: folder for its weights, empty = in memory; `shape_only`: without weights.
  void load_current(const std::filesystem::path& paging = {}, bool shape_only = false);
  // The model at teacher_position_, not loaded yet; `precision`: row of held_precisions().
  FrozenTeacher frozen_teacher(const std::string& precision) const;
  // teacher_, answering_ and the tokenizer, of teacher_position_.
  void name_teacher();
  bool learns_from_teacher(const RecipeStage& stage) const;
  bool holds_teacher_apart() const { return recipe_.teacher.precision != "float32"; }
  TokenizedData& data_for(const std::shared_ptr<const Tokenizer>& tokenizer, const ModelConfig& config);
  TeacherSource* teacher_source();
  // The teacher's outputs on the test windows, for evaluate: {cache: ...}; computed where they are missing.
  TeacherSource* test_outputs(const TokenizedData& tokenized);
  // MODEL of the report for a model on disk; from the store when it was measured before.
  Json measure_model(const std::string& label, const std::string& key, const std::filesystem::path& folder, bool artifact);
  // With data.previous: the model that the run begins with, before any stage, on old and new data.
  void measure_start();
  void publish_artifact(const std::filesystem::path& entry);
  void write_manifest() const;
  Json environment() const;

  std::unique_ptr<Collective> ranks_;  // null: one process
  const Recipe& recipe_;
  RunOptions options_;
  std::filesystem::path folder_;
  Store store_;
  c10::Device device_;
  LoadedData data_;
  EvaluateOptions evaluate_;
  Position position_, teacher_position_;
  std::string data_hash_;
  WorkingModel current_;
  FrozenTeacher teacher_;    // what models are compared with
  FrozenTeacher answering_;  // what stages learn from: the same, or held in fewer bits
  std::shared_ptr<const Tokenizer> teacher_tokenizer_;
  std::unique_ptr<TeacherSource> teacher_source_, test_outputs_;
  TaskData test_text_;  // names the test windows in the cache's key
  std::string teacher_source_key_;
  std::map<std::string, std::unique_ptr<TokenizedData>> tokenized_;  // by tokenizer fingerprint and length limit
  std::optional<TeacherScores> teacher_scores_;
  std::string teacher_evaluation_key_;
  std::optional<TeacherScores> start_scores_;  // with data.previous
  std::string start_key_;                      // likewise
  Json manifest_ = Json::object();
  std::map<std::string, StagePrediction> predictions_;
  int worked_ = 0;  // stages and measurements that were really done
};

}  // namespace kompakt
