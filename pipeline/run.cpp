#include "pipeline/run.h"

#include <algorithm>
#include <memory>
#include <optional>

#include "core/files.h"
#include "core/launch.h"
#include "core/log.h"
#include "core/system.h"
#include "core/text.h"
#include "distributed/collective.h"
#include "pipeline/session.h"
#include "report/event_file.h"
#include "report/gates.h"
#include "report/report.h"
#include "train/data_parallel.h"

namespace kompakt {
namespace fs = std::filesystem;

RunOutcome run_recipe(const Recipe& recipe, const RunOptions& options) { return RunSession(recipe, options).run(); }

RunOutcome RunSession::run() {
  const Launch& launch = this_launch();
  if (launch.alone()) return work();
  for (const RecipeStage& stage : recipe_.stages)
    for (const TrainOptions& train : shared_trainings(stage)) check_world_fits(train.batch_size, train.accumulate, launch.world, stage.place.text());
  if (launch.rank > 0) set_verbosity(Verbosity::silent);
  ranks_ = Collective::join(launch, device_);
  try {
    const RunOutcome outcome = work();
    ranks_->leave();
    return outcome;
  } catch (const std::exception& error) {
    ranks_->fail(error.what());
    throw;
  }
}

RunOutcome RunSession::work() {
  std::optional<FolderLock> lock;
  if (leader()) {
    lock.emplace(folder_);
    open_metrics(folder_ / "metrics.jsonl");
    log_metric("start", Json{{"recipe", recipe_.name}, {"seed", recipe_.seed}});
    write_text(folder_ / "recipe.yaml", dump_yaml(recipe_.resolved));
    set_metric_listener({});
    if (recipe_.tensorboard) set_metric_listener([events = std::make_shared<EventFolder>(folder_ / "tensorboard")](const std::string& event, const Json& fields) { events->metric(event, fields); });
  }
  log_info(str(bold(recipe_.name), "  ", folder_.string(), ranks_ ? str("  ", ranks_->world(), " ranks") : std::string()));

  data_ = load_data(recipe_);
  data_hash_ = data_.hash();
  if (ranks_) ranks_->check_equal(str(stage_key(recipe_.stages.front(), 0), manifest_.at("recipe_sha256").get<std::string>(), data_hash_, options_.resume ? "\nresume\n" : "\n", options_.device, "\n", options_.until), "recipe, teacher, data, --resume, --device, --until or version of kompakt", "give all ranks the same files and options");
  if (leader())
    for (StagePrediction& prediction : predict_stages(recipe_, data_)) predictions_[prediction.title] = prediction;
  if (leader()) measure_start();

  bool stopped = false;
  for (std::size_t index = 0; index < recipe_.stages.size() && !stopped; ++index) {
    check_interrupted();
    const RecipeStage& stage = recipe_.stages[index];
    if (stage.row->name != "evaluate") run_stage(stage, index, stage_key(stage, index));
    stopped = index + 1 < recipe_.stages.size() && !options_.until.empty() && (options_.until == stage.title || options_.until == stage.row->name);
  }
  RunOutcome outcome;
  outcome.folder = folder_;
  if (!leader()) return outcome;
  if (!stopped) measure_teacher(recipe_.stages.size() - 1);  // nothing but evaluate
  if (!start_key_.empty() && teacher_position_.key == start_key_) manifest_["start"]["path"] = "teacher";  // one row in tables

  Json gates = Json::array();
  if (stopped && !recipe_.gates.empty()) log_info(str("gates are not checked: the run stopped after ", options_.until));
  else for (const std::string& gate : recipe_.gates) gates.push_back(gate);
  manifest_["gates"] = gates;
  manifest_["warnings"] = warnings();
  write_manifest();
  write_report(folder_);
  outcome.report = read_json(folder_ / "report.json");
  outcome.did_nothing = worked_ == 0;
  if (!gates.empty() && !all_met(evaluate_gates(outcome.report, recipe_.gates))) outcome.code = ExitCode::gate;
  std::error_code ignored;
  fs::remove_all(folder_ / "work", ignored);
  log_metric("end", Json{{"worked", worked_}});
  close_metrics();
  set_metric_listener({});
  return outcome;
}

}  // namespace kompakt
