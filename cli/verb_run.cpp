// Verbs that run or plan a recipe: run, plan, and each stage alone.
#include <cstdio>

#include "cli/verbs.h"
#include "core/json.h"
#include "core/log.h"
#include "core/text.h"
#include "pipeline/device.h"
#include "pipeline/plan.h"
#include "pipeline/run.h"
#include "pipeline/stages.h"
#include "report/gates.h"
#include "report/report.h"

namespace kompakt {
namespace {

RunOptions run_settings(const Arguments& arguments) {
  RunOptions options;
  options.out = arguments.get("out");
  options.device = arguments.get("device", default_device());
  options.resume = arguments.has("resume");
  options.until = arguments.get("until");
  return options;
}

ExitCode run_and_print(const Recipe& recipe, const Arguments& arguments) {
  set_threads();
  const RunOutcome outcome = run_recipe(recipe, run_settings(arguments));
  if (outcome.report.is_null()) return outcome.code;  // not the first of several processes
  if (arguments.has("json")) {
    std::fputs(dump_json(outcome.report).c_str(), stdout);
    return outcome.code;
  }
  if (outcome.did_nothing) log_info("\nnothing to do: every stage and every measurement of this recipe is unchanged");
  std::printf("\n%s\nreport: %s\n", closing_table(outcome.report).c_str(), (outcome.folder / "report.html").string().c_str());
  if (outcome.code == ExitCode::gate) std::fprintf(stderr, "%s a gate was not met\n", red("error:").c_str());
  return outcome.code;
}

}  // namespace

ExitCode verb_run(const Arguments& arguments) { return run_and_print(read_recipe(arguments.positional[0], arguments.all("set")), arguments); }

ExitCode verb_plan(const Arguments& arguments) {
  set_threads();
  const Recipe recipe = read_recipe(arguments.positional[0], arguments.all("set"));
  const std::vector<StagePrediction> predictions = predict_stages(recipe, load_data(recipe));
  std::fputs(arguments.has("json") ? dump_json(plan_json(recipe, predictions)).c_str() : plan_table(recipe, predictions).c_str(), stdout);
  return ExitCode::ok;
}

template <int stage>
ExitCode verb_stage(const Arguments& arguments) {
  const std::string name(stage_rows()[stage].name);
  if (!arguments.has("model")) throw Error("--model is missing").at("kompakt " + name).hint(str("kompakt ", name, " --model DIR ..."));
  return run_and_print(single_stage_recipe(name, arguments.get("model"), arguments.all("set")), arguments);
}

template ExitCode verb_stage<0>(const Arguments&);
template ExitCode verb_stage<1>(const Arguments&);
template ExitCode verb_stage<2>(const Arguments&);
template ExitCode verb_stage<3>(const Arguments&);
template ExitCode verb_stage<4>(const Arguments&);
template ExitCode verb_stage<5>(const Arguments&);

}  // namespace kompakt
