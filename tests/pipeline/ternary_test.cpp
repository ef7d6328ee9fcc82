// Ternary training from a recipe: sub-norms on the way to the artifact, relations under a teacher of another shape, formats that
// cannot hold the model refused before anything is computed.
#include <ATen/ATen.h>

#include "tests/catch_torch.h"

#include "core/error.h"
#include "core/json.h"
#include "core/text.h"
#include "export/exporters.h"
#include "model/checkpoint.h"
#include "pipeline/plan.h"
#include "pipeline/recipe.h"
#include "pipeline/run.h"
#include "tests/pipeline/tiny.h"
#include "tests/support.h"

using namespace kompakt;
using namespace kompakt::testing;
namespace fs = std::filesystem;

namespace {

std::string ternary_chain(const std::string& before, const std::string& objective, const std::string& format) {
  return str("\n  - finetune: {epochs: 1, batch_size: 8}", before, "\n  - quantize: {weights: ternary, group: 0, embedding: int4, embedding_group: 0, method: qad, subln: true, gradual: 0.3, epochs: 1, batch_size: 8, learning_rate: 1.0e-3, objective: ", objective,
             "}\n  - export: {formats: [", format, "]}\n  - evaluate: {latency: false}\n");
}

constexpr const char* ternary_losses = "[{logits: forward_kl, temperature: 5}, {relation: minilm, layer: 1, heads: 2, weight: 10}]";

}  // namespace

TEST_CASE("sub-norms reach the packed artifact, which computes what was trained", "[run][subln]") {
  TinySetting tiny;
  tiny.write_recipe(ternary_chain("", ternary_losses, "kompakt"));
  const RunOutcome outcome = run_recipe(read_recipe(tiny.recipe()), {.out = tiny.out("a")});
  CHECK(outcome.code == ExitCode::ok);
  const fs::path stage = tiny.out("a") / "02-quantize";
  const auto trained = load_model(stage), artifact = open_any_model(tiny.out("a") / "artifact");
  CHECK(trained->config().sub_norms);
  CHECK(artifact->config().sub_norms);
  CHECK(fingerprint(*trained) == fingerprint(*artifact));
  CHECK(packed_grids(tiny.out("a") / "artifact").at("embeddings.word_embeddings").grid->name == "int4");
  const Json details = read_json(tiny.out("a") / "manifest.json").at("stages").at(1).at("details");
  CHECK(details.at("sub_norms").at("changes").size() == 3);
}

TEST_CASE("relations of a chosen layer train a ternary model of fewer heads and layers", "[run][subln]") {
  for (const char* shape : {"heads: 0.5", "heads: 0.5, layers: 1"}) {
    INFO(shape);
    TinySetting tiny;
    tiny.write_recipe(ternary_chain(str("\n  - prune: {structured: {", shape, "}, criterion: taylor, samples: 24}"), ternary_losses, "kompakt"));
    const RunOutcome outcome = run_recipe(read_recipe(tiny.recipe()), {.out = tiny.out("a")});
    CHECK(outcome.code == ExitCode::ok);
    const auto model = load_model(tiny.out("a") / "03-quantize");
    CHECK(model->config().heads == 2);
    CHECK(load_config(tiny.out("a") / "01-finetune").heads == 4);
    const Json manifest = read_json(tiny.out("a") / "manifest.json");
    // Layers that stay know whom they follow, so that losses between layers can be used behind the cut.
    if (std::string(shape).find("layers") != std::string::npos) CHECK(manifest.at("stages").at(1).at("layer_map").size() == 2);
  }
}

TEST_CASE("formats that cannot hold sub-norms are refused by the plan", "[plan][subln]") {
  TinySetting tiny;
  for (const char* format : {"safetensors", "gguf"}) {
    INFO(format);
    tiny.write_recipe(ternary_chain("", ternary_losses, format));
    CHECK(contains_all(error_text([&] { run_recipe(read_recipe(tiny.recipe()), {.out = tiny.out("b")}); }), {format, std::string(format) == "gguf" ? "encoder" : "sub-norms"}));
    CHECK_FALSE(fs::exists(tiny.out("b") / "01-finetune"));
  }
  tiny.write_recipe("\n  - finetune: {epochs: 1}\n  - quantize: {method: rtn, subln: true}\n");
  CHECK(contains_all(error_text([&] { read_recipe(tiny.recipe()); }), {"subln", "rtn", "qad"}));
  tiny.write_recipe("\n  - finetune: {epochs: 1}\n  - quantize: {method: qad, pretrain: {steps: 3}}\n");
  CHECK(contains_all(error_text([&] { run_recipe(read_recipe(tiny.recipe()), {.out = tiny.out("c")}); }), {"pretrain", "class labels"}));
}
