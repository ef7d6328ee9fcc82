// Option fields: reading with all mistakes at once, writing back, explaining.
#include "core/fields.h"

#include <catch2/catch.hpp>

#include "tests/support.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;

struct Item {
  std::string name;
  std::int64_t count = 1;
};

struct Options {
  bool flag = false;
  std::int64_t group = 64;
  double rate = 0.5;
  std::string method = "qad", label;
  std::vector<std::int64_t> layers;
  std::vector<std::string> files;
  std::int64_t size = 1024;
  bool has_inner = false;
  double inner_weight = 1;
  std::vector<Item> items;
  Node rest;
};

void fields(FieldVisitor& v, Options& o) {
  v.flag("flag", o.flag, "a flag");
  v.integer("group", o.group, "group size", {.min = 1, .max = 256});
  v.number("rate", o.rate, "a rate", {.min = 0, .max = 1, .open_min = true});
  v.choice("method", o.method, "how", {"qad", "gptq", "awq"});
  v.text("label", o.label, "a label");
  v.integers("layers", o.layers, "layers kept", {.min = 0});
  v.texts("files", o.files, "files");
  v.bytes("size", o.size, "a size");
  v.section("inner", o.has_inner, "a map", [&](FieldVisitor& w) { w.number("weight", o.inner_weight, "weight"); });
  v.list("items", "a list", o.items.size(), [&](std::size_t n) { o.items.resize(n); }, [&](std::size_t i, FieldVisitor& w) {
    w.text("name", o.items[i].name, "name");
    w.integer("count", o.items[i].count, "count");
  });
  v.subtree("rest", o.rest, "anything");
}

Problems read(const char* text, Options& options) {
  Problems problems;
  read_fields(parse_yaml(text, "r.yaml"), "stage \"quantize\"", problems, [&](FieldVisitor& v) { fields(v, options); });
  return problems;
}

}  // namespace

TEST_CASE("fields are read, and absent ones keep their defaults") {
  Options options;
  const Problems problems = read("flag: true\ngroup: 32\nrate: 1e-2\nmethod: awq\nlabel: 17\nlayers: [0, 2]\nfiles: one.txt\nsize: 60MB\ninner: {weight: 2}\nitems: [{name: a}, {name: b, count: 3}]\nrest: {x: [1]}\n", options);
  CHECK(problems.empty());
  CHECK((options.flag && options.group == 32 && options.rate == 0.01 && options.method == "awq" && options.label == "17"));
  CHECK(options.layers == std::vector<std::int64_t>{0, 2});
  CHECK(options.files == std::vector<std::string>{"one.txt"});
  CHECK(options.size == 60'000'000);
  CHECK((options.has_inner && options.inner_weight == 2));
  REQUIRE(options.items.size() == 2);
  CHECK((options.items[0].count == 1 && options.items[1].name == "b" && options.items[1].count == 3));
  CHECK(options.rest.find("x")->items.size() == 1);
  Options untouched;
  CHECK(read("group: ~\n", untouched).empty());
  CHECK(untouched.group == 64);
  CHECK(read("", untouched).empty());
}

TEST_CASE("all mistakes are found in one pass, each with its place") {
  Options options;
  const Problems problems = read("flag: maybe\ngroup: 512\nrate: 0\nmethod: gpqt\nlayers: [0, -1]\nfiles: {a: 1}\nsize: big\ninner: {wieght: 2}\nitems: [{name: a, count: x}, 5]\ngruop: 3\nlabel: [1]\n", options);
  const std::string text = error_text([&] { problems.throw_if_any("the recipe has mistakes"); });
  CHECK(problems.size() == 12);
  CHECK(contains_all(text, {"12 mistakes", "r.yaml:1:7", "true or false", "r.yaml:2:8", "1 to 256", "r.yaml:3:7", "more than 0 to 1", "r.yaml:4:9", "did you mean \"gptq\"", "r.yaml:5:13",
                            "at least 0", "r.yaml:6:8", "a list of texts", "r.yaml:7:7", "60MB", "r.yaml:8:9", "did you mean \"weight\"", "\"inner\" of stage \"quantize\"", "r.yaml:9:26", "item 0",
                            "r.yaml:9:30", "r.yaml:10:1", "did you mean \"group\"", "r.yaml:11:8"}));
  CHECK(options.group == 64);  // a value out of range is not taken
}

TEST_CASE("a quoted number is not a number, a scalar is not a map") {
  Options options;
  CHECK(contains_all(error_text([&] { read("group: \"32\"\n", options).throw_if_any(""); }), {"wrong type", "\"32\"", "whole number"}));
  CHECK(contains_all(error_text([&] { read("inner: 3\n", options).throw_if_any(""); }), {"\"inner\"", "a map"}));
  CHECK(contains_all(error_text([&] { read("[1]\n", options).throw_if_any(""); }), {"must be a map", "a list"}));
}

TEST_CASE("written fields read back equal, defaults included") {
  Options options;
  read("flag: true\nlabel: \"17\"\nlayers: [3]\nfiles: [\"1\", b]\ninner: {weight: 2}\nitems: [{name: a}]\n", options);
  const Node written = write_fields([&](FieldVisitor& v) { fields(v, options); });
  CHECK(written.find("rate")->scalar == "0.5");
  CHECK(written.find("method")->scalar == "qad");
  Options again;
  const std::string text = dump_yaml(written);
  CHECK(read(text.c_str(), again).empty());
  CHECK(dump_yaml(write_fields([&](FieldVisitor& v) { fields(v, again); })) == text);
  CHECK((again.label == "17" && again.files[0] == "1" && again.inner_weight == 2));
}

TEST_CASE("explaining lists nested keys with type, default and range") {
  Options options;
  const auto infos = explain_fields([&](FieldVisitor& v) { fields(v, options); });
  const auto find = [&](const std::string& key) {
    for (const auto& info : infos)
      if (info.key == key) return info;
    FAIL("no field " << key);
    return FieldInfo{};
  };
  CHECK(find("group").range == "1 to 256");
  CHECK(find("group").default_text == "64");
  CHECK(find("method").range == "qad, gptq, awq");
  CHECK(find("inner.weight").type == "number");
  CHECK(find("items[].count").help == "count");
  CHECK(options.items.empty());
}

}  // namespace kompakt
