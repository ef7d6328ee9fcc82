// Recipes: places of keys and values, duplicates, writing back, --set.
#include "core/node.h"

#include <catch2/catch.hpp>

#include "core/error.h"
#include "tests/support.h"

namespace kompakt {

using testing::contains_all;
using testing::error_text;

TEST_CASE("YAML nodes remember where they stood") {
  const Node root = parse_yaml("name: x\nstages:\n  - quantize: {weights: ternary, group: 64}\n  - evaluate\nempty:\n", "r.yaml");
  REQUIRE(root.is_map());
  const Node& stages = *root.find("stages");
  REQUIRE(stages.is_list());
  const Node& quantize = stages.items[0].entries[0].value;
  CHECK(quantize.find("group")->scalar == "64");
  CHECK(quantize.find("group")->place.text() == "r.yaml:3:41");
  CHECK(quantize.entries[1].place.text() == "r.yaml:3:34");
  CHECK(stages.items[1].scalar == "evaluate");
  CHECK(root.find("empty")->is_null());
  CHECK(root.find("absent") == nullptr);
  CHECK(parse_yaml("", "r.yaml").is_null());
}

TEST_CASE("a quoted number stays a text") {
  const Node root = parse_yaml("a: \"17\"\nb: 17\nc: '17'\nd: true\ne: 1.5\nf: word\n", "r.yaml");
  CHECK(root.find("a")->quoted);
  CHECK_FALSE(root.find("b")->quoted);
  CHECK(root.find("c")->quoted);
  CHECK(to_json(root).dump() == R"({"a":"17","b":17,"c":"17","d":true,"e":1.5,"f":"word"})");
}

TEST_CASE("mistakes in YAML are placed") {
  CHECK(contains_all(error_text([] { parse_yaml("a: 1\nb: 2\na: 3\n", "r.yaml"); }), {"r.yaml:3:1", "\"a\"", "twice"}));
  CHECK(contains_all(error_text([] { parse_yaml("a: [1, 2\nb: 3\n", "r.yaml"); }), {"r.yaml:2", "not valid YAML"}));
  CHECK(contains_all(error_text([] { parse_yaml("a: 1\n---\nb: 2\n", "r.yaml"); }), {"r.yaml", "2 YAML documents"}));
  CHECK(contains_all(error_text([] { parse_yaml("a: \xff\n", "r.yaml"); }), {"r.yaml", "UTF-8"}));
  CHECK(contains_all(error_text([] { parse_yaml("? [a, b]\n: 1\n", "r.yaml"); }), {"plain text"}));
  CHECK(contains_all(error_text([] { parse_yaml("&a [*a]\n", "r.yaml"); }), {"r.yaml"}));
  CHECK_THROWS_AS(parse_yaml(std::string(5000, '['), "r.yaml"), Error);
}

TEST_CASE("a written recipe reads back as the same values") {
  const char* text = "name: x\nquoted: \"17\"\nflag: true\nnumber: 1.5\nodd: \"a: b # c\"\nlines: \"a\\nb\"\nnothing: ~\nstages:\n  - distill: {layers: [0, 2], deep: {a: []}}\n  - evaluate\n";
  const Node root = parse_yaml(text, "r.yaml");
  const Node again = parse_yaml(dump_yaml(root), "again.yaml");
  CHECK(to_json(again).dump() == to_json(root).dump());
  CHECK(again.find("quoted")->quoted);
  CHECK(dump_yaml(again) == dump_yaml(root));
}

TEST_CASE("--set walks maps, lists and stages by name") {
  Node root = parse_yaml("seed: 1\nstages:\n  - quantize: {weights: ternary}\n  - evaluate: {}\n  - quantize: {weights: int4}\ndata: {train: {files: [a, b]}}\n", "r.yaml");
  set_path(root, "seed=2");
  CHECK(root.find("seed")->scalar == "2");
  set_path(root, "stages.evaluate.cascade=true");
  CHECK(root.find("stages")->items[1].entries[0].value.find("cascade")->scalar == "true");
  set_path(root, "stages.2.quantize.weights=int8");
  CHECK(root.find("stages")->items[2].entries[0].value.find("weights")->scalar == "int8");
  set_path(root, "data.train.files.1=c");
  CHECK(root.find("data")->find("train")->find("files")->items[1].scalar == "c");
  set_path(root, "data.train.files=[x, y, z]");
  CHECK(root.find("data")->find("train")->find("files")->items.size() == 3);
  set_path(root, "fresh.deep.key=1");
  CHECK(root.find("fresh")->find("deep")->find("key")->scalar == "1");
  CHECK(contains_all(error_text([&] { set_path(root, "stages.quantize.weights=x"); }), {"--set", "2 times", "index"}));
  CHECK(contains_all(error_text([&] { set_path(root, "stages.evalute.x=1"); }), {"--set", "did you mean \"evaluate\""}));
  CHECK(contains_all(error_text([&] { set_path(root, "stages.7.x=1"); }), {"0 to 2"}));
  CHECK(contains_all(error_text([&] { set_path(root, "stages.-1.x=1"); }), {"0 to 2"}));
  CHECK(contains_all(error_text([&] { set_path(root, "dta.train.text=x"); }), {"did you mean \"data\""}));
  CHECK(contains_all(error_text([&] { set_path(root, "seed.x=1"); }), {"\"x\"", "single value"}));
  CHECK(contains_all(error_text([&] { set_path(root, "seed"); }), {"key.path=value"}));
  CHECK(contains_all(error_text([&] { set_path(root, "=1"); }), {"key.path=value"}));
}

TEST_CASE("--set gives options to a stage that is named bare, and reaches into one by index") {
  Node root = parse_yaml("stages: [finetune, {distill: {epochs: 1}}]", "r");
  set_path(root, "stages.finetune.epochs=2");
  set_path(root, "stages.1.epochs=3");
  CHECK(root.find("stages")->items[0].find("finetune")->find("epochs")->scalar == "2");
  CHECK(root.find("stages")->items[1].find("distill")->find("epochs")->scalar == "3");
}

}  // namespace kompakt
