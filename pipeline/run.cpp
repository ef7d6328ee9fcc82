#include "pipeline/run.h"

#include <algorithm>
#include <memory>

#include "core/files.h"
#include "core/log.h"
#include "core/text.h"
#include "pipeline/session.h"
#include "report/gates.h"
#include "report/report.h"

namespace kompakt {
namespace fs = std::filesystem;

RunOutcome run_recipe(const Recipe& recipe, const RunOptions& options) { return RunSession(recipe, options).run(); }

RunOutcome RunSession::run() {
  const FolderLock lock(folder_);
  open_metrics(folder_ / "metrics.jsonl");
  log_metric("start", Json{{"recipe", recipe_.name}, {"seed", recipe_.seed}});
  write_text(folder_ / "recipe.yaml", dump_yaml(recipe_.resolved));
  log_info(str(bold(recipe_.name), "  ", folder_.string()));

  data_ = load_data(recipe_);
  data_hash_ = data_.hash();
  for (StagePrediction& prediction : predict_stages(recipe_, data_)) predictions_[prediction.title] = prediction;

  bool stopped = false;
  for (std::size_t index = 0; index < recipe_.stages.size() && !stopped; ++index) {
    check_interrupted();
    const RecipeStage& stage = recipe_.stages[index];
    if (stage.row->name != "evaluate") run_stage(stage, index, stage_key(stage, index));
    stopped = !options_.until.empty() && (options_.until == stage.title || options_.until == stage.row->name);
  }
  if (manifest_["teacher"].is_null() && !stopped) manifest_["teacher"] = measure_model("teacher", teacher_position_.key, teacher_position_.folder, false);

  Json gates = Json::array();
  for (const std::string& gate : recipe_.gates) gates.push_back(gate);
  manifest_["gates"] = gates;
  manifest_["warnings"] = warnings();
  write_manifest();
  write_report(folder_);
  RunOutcome outcome;
  outcome.folder = folder_;
  outcome.report = read_json(folder_ / "report.json");
  outcome.did_nothing = worked_ == 0;
  if (!stopped && !recipe_.gates.empty() && !all_met(evaluate_gates(outcome.report, recipe_.gates))) outcome.code = ExitCode::gate;
  std::error_code ignored;
  fs::remove_all(folder_ / "work", ignored);
  log_metric("end", Json{{"worked", worked_}});
  close_metrics();
  return outcome;
}

}  // namespace kompakt
