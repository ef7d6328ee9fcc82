// W8A8 through a whole run: the stage, the export and the report of the reopened artifact.
#include "tests/catch_torch.h"

#include "core/error.h"
#include "core/json.h"
#include "export/exporters.h"
#include "model/rounding.h"
#include "pipeline/plan.h"
#include "pipeline/recipe.h"
#include "pipeline/run.h"
#include "pipeline/task_data.h"
#include "tests/pipeline/tiny.h"
#include "tests/support.h"

using namespace kompakt;
using namespace kompakt::testing;
namespace fs = std::filesystem;

namespace {

constexpr const char* rounding_stages = R"(
  - finetune: {epochs: 1, batch_size: 8, learning_rate: 1.0e-3}
  - quantize: {weights: int8, embedding: none, activations: {mode: static}}
  - export: {formats: [FORMATS], tolerance: 0}
  - evaluate: {latency: false}
)";

std::string rounding_recipe(const std::string& formats) {
  std::string text = rounding_stages;
  return text.replace(text.find("FORMATS"), 7, formats);
}

}  // namespace

TEST_CASE("W8A8 goes through a run, and the artifact is what was measured", "[rounding][run]") {
  TinySetting tiny;
  tiny.write_recipe(rounding_recipe("compressed-tensors, kompakt"));
  const fs::path out = tiny.out("a");
  CHECK(run_recipe(read_recipe(tiny.recipe()), {.out = out}).code == ExitCode::ok);
  const Json manifest = read_json(out / "manifest.json");
  CHECK(manifest.at("artifact").at("format") == "compressed-tensors");
  const Json& quantize = manifest.at("stages")[1];
  CHECK(quantize.at("details").at("activations").at("inputs").size() == 12);
  CHECK(quantize.at("model").at("tasks") == manifest.at("artifact").at("tasks"));
  for (const char* format : {"compressed-tensors", "kompakt"}) {
    const auto model = open_any_model(out / "artifact" / format);
    CHECK(rounding_of(model->config()).activations->scales.size() == 18);
  }
  CHECK(contains_all(read_text(out / "report.md"), {"Activations, keys and values of", "Inputs of 18 linears: int8", "input of output.dense"}));
}

TEST_CASE("a plan refuses rounded activations in formats without a place for them", "[rounding][run]") {
  TinySetting tiny;
  tiny.write_recipe(rounding_recipe("safetensors"));
  CHECK(contains_all(error_text([&] { const Recipe recipe = read_recipe(tiny.recipe());
          predict_stages(recipe, load_data(recipe)); }), {"format safetensors", "quantize.activations", "compressed-tensors"}));
}
