// Reading recipes: every mistake with its place, all at once; --set; what single stages become.
#include "tests/catch_torch.h"

#include "core/error.h"
#include "pipeline/recipe.h"
#include "pipeline/stages.h"
#include "tests/pipeline/tiny.h"
#include "tests/support.h"

using namespace kompakt;
using namespace kompakt::testing;

TEST_CASE("a good recipe is read and resolved with every default", "[recipe]") {
  TinySetting tiny;
  const Recipe recipe = read_recipe(tiny.recipe());
  CHECK(recipe.name == "tiny");
  CHECK(recipe.seed == 5);
  REQUIRE(recipe.stages.size() == 6);
  CHECK(recipe.stages[1].title == "02-distill");
  CHECK(recipe.is_classification());
  const std::string text = dump_yaml(recipe.resolved);
  CHECK(contains_all(text, {"keep_layers", "weight_decay", "embedding: int8"}));
  // The resolved text is a recipe again, and resolves to itself.
  CHECK(dump_yaml(recipe_from_node(parse_yaml(text, "again"), "again", recipe.base).resolved) == text);
}

TEST_CASE("mistakes of a recipe are reported together with places and nearest matches", "[recipe]") {
  TinySetting tiny;
  tiny.write_recipe("\n  - finetune: {epochz: 2, batch_size: many}\n  - destill: {}\n  - quantize: {weights: terniary, damping: -1}\n  - export: {formats: [onyx]}\n", "gates: [\"accuracy >> 1\"]\nsede: 1\n");
  const std::string text = error_text([&] { read_recipe(tiny.recipe()); });
  CHECK(contains_all(text, {"recipe.yaml:9:16", "epochz", "epochs", "batch_size", "many", "destill", "did you mean \"distill\"", "terniary", "did you mean \"ternary\"", "damping", "onyx", "sede", "did you mean \"seed\""}));
}

TEST_CASE("missing files, data and teachers are named", "[recipe]") {
  TinySetting tiny;
  CHECK(contains_all(error_text([&] { read_recipe(tiny.recipe(), {"teacher.path=nowhere"}); }), {"there is no teacher", "nowhere"}));
  CHECK(contains_all(error_text([&] { read_recipe(tiny.recipe(), {"data.train.files=[gone.csv]"}); }), {"gone.csv", "train"}));
  CHECK(contains_all(error_text([&] { read_recipe(tiny.folder() / "none.yaml"); }), {"none.yaml"}));
  CHECK(contains_all(error_text([&] { recipe_from_node(parse_yaml("name: x\nteacher: {path: teacher}\nstages: [finetune]", "r"), "r", tiny.folder()); }), {"needs training data", "data: {train"}));
  CHECK(contains_all(error_text([&] { recipe_from_node(parse_yaml("name: x\nteacher: {path: teacher}\nstages: []", "r"), "r", tiny.folder()); }), {"at least one stage"}));
}

TEST_CASE("--set changes stages by name and index, and refuses typos", "[recipe]") {
  TinySetting tiny;
  const Recipe recipe = read_recipe(tiny.recipe(), {"stages.quantize.weights=int4", "stages.0.epochs=7", "seed=9"});
  CHECK(recipe.seed == 9);
  CHECK(recipe.stages[3].options.find("weights")->scalar == "int4");
  CHECK(recipe.stages[0].options.find("epochs")->scalar == "7");
  CHECK(contains_all(error_text([&] { read_recipe(tiny.recipe(), {"stages.quantise.weights=int4"}); }), {"quantise", "did you mean \"quantize\""}));
  CHECK(contains_all(error_text([&] { read_recipe(tiny.recipe(), {"stages"}); }), {"key.path=value"}));
}

TEST_CASE("a stage that changes weights may not follow the export", "[recipe]") {
  TinySetting tiny;
  tiny.write_recipe("\n  - export: {}\n  - finetune: {}\n");
  CHECK(contains_all(error_text([&] { read_recipe(tiny.recipe()); }), {"finetune", "after \"export\""}));
}

TEST_CASE("every stage explains its options and resolves an empty map", "[recipe]") {
  for (const StageRow& row : stage_rows()) {
    INFO(std::string(row.name));
    CHECK_FALSE(row.summary.empty());
    for (const FieldInfo& field : explain_fields([&](FieldVisitor& v) { row.describe(v); })) {
      INFO(field.key);
      CHECK_FALSE(field.help.empty());
    }
    Problems problems;
    row.check(Node::map(), "stage", problems);
    CHECK(problems.empty() == (row.name != "search"));  // a search needs a budget, and there is none that suits everyone
  }
}
