// Strict JSON: duplicates, UTF-8, places, depth, linear time; typed access.
#include "core/json.h"

#include <catch2/catch.hpp>
#include <chrono>
#include <cmath>

#include "core/error.h"
#include "core/files.h"
#include "tests/support.h"

namespace kompakt {

using testing::contains_all;
using testing::error_text;

TEST_CASE("JSON keeps order and values") {
  const Json json = parse_json(R"( {"b": 1, "a": [true, null, -2, 18446744073709551615, 1.5, "ü\n"], "c": {"x": {}, "y": []}} )", "f.json");
  CHECK(json.dump() == R"({"b":1,"a":[true,null,-2,18446744073709551615,1.5,"ü\n"],"c":{"x":{},"y":[]}})");
  CHECK(json == Json::parse(json.dump()));
  CHECK(parse_json("17", "f").get<int>() == 17);
  CHECK(dump_json(parse_json(R"({"k":[1]})", "f")) == "{\n  \"k\": [\n    1\n  ]\n}\n");
  CHECK(dump_json(Json{{"nan", std::nan("")}}) == "{\n  \"nan\": null\n}\n");
}

TEST_CASE("what is not strict JSON is refused with its place") {
  CHECK(contains_all(error_text([] { parse_json("{\"a\": 1,\n \"a\": 2}", "f.json"); }), {"f.json", "\"a\"", "twice"}));
  CHECK(contains_all(error_text([] { parse_json(R"([{"x": {"k": 1, "k": 1}}])", "f.json"); }), {"\"k\"", "twice"}));
  CHECK_NOTHROW(parse_json(R"([{"k": 1}, {"k": 1}, {"x": {"k": 1}, "k": 2}])", "f.json"));
  CHECK(contains_all(error_text([] { parse_json("{\n  \"a\": 1,\n}", "f.json"); }), {"f.json:3:1", "not valid JSON"}));
  CHECK(contains_all(error_text([] { parse_json("{} x", "f.json"); }), {"f.json:1:4"}));
  CHECK(contains_all(error_text([] { parse_json("", "f.json"); }), {"f.json", "not valid JSON"}));
  CHECK(contains_all(error_text([] { parse_json("[\"a\n\xff\"]", "f.json"); }), {"f.json:2:1", "UTF-8"}));
  CHECK(contains_all(error_text([] { parse_json("[1e999]", "f.json"); }), {"not valid JSON"}));
  for (const char* bad : {"[NaN]", "[01]", "['a']", "[1,]", "{a:1}", "[\"\t\"]", "// c\n1", "[\"\\ud800\"]"}) {
    CAPTURE(bad);
    CHECK_THROWS_AS(parse_json(bad, "f.json"), Error);
  }
  CHECK(contains_all(error_text([] { parse_json(std::string(100'000, '['), "f.json"); }), {"nested too deeply", "200"}));
  CHECK_NOTHROW(parse_json(std::string(200, '[') + std::string(200, ']'), "f.json"));
}

TEST_CASE("a vocabulary of 200,000 words is read in linear time") {
  std::string text = "{";
  for (int i = 0; i < 200'000; ++i) text += (i ? ",\"word" : "\"word") + std::to_string(i) + "\":" + std::to_string(i);
  const auto start = std::chrono::steady_clock::now();
  const Json json = parse_json(text + "}", "vocab.json");
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  CHECK(json.size() == 200'000);
  CHECK(json.begin().key() == "word0");
  CHECK(seconds.count() < 20);  // a quadratic parser needs minutes
}

TEST_CASE("typed access names key, value and type") {
  const Json json = parse_json(R"({"n": 3, "f": 2.5, "whole": 4.0, "t": "x", "b": true, "list": [1, 2], "texts": ["a"], "null": null, "huge": 18446744073709551615})", "f.json");
  CHECK(json_get<std::int64_t>(json, "n", "f.json") == 3);
  CHECK(json_get<std::int64_t>(json, "whole", "f.json") == 4);
  CHECK(json_get<double>(json, "n", "f.json") == 3.0);
  CHECK(json_get<bool>(json, "b", "f.json"));
  CHECK(json_get<std::string>(json, "t", "f.json") == "x");
  CHECK(json_get<std::vector<std::int64_t>>(json, "list", "f.json") == std::vector<std::int64_t>{1, 2});
  CHECK(json_get<std::vector<std::string>>(json, "texts", "f.json") == std::vector<std::string>{"a"});
  CHECK(json_get_or<std::int64_t>(json, "null", "f.json", 9) == 9);
  CHECK(json_get_or<std::int64_t>(json, "absent", "f.json", 9) == 9);
  CHECK(contains_all(error_text([&] { json_get<std::int64_t>(json, "f", "f.json"); }), {"f.json", "\"f\"", "2.5", "whole number"}));
  CHECK(contains_all(error_text([&] { json_get<std::int64_t>(json, "huge", "f.json"); }), {"\"huge\""}));
  CHECK(contains_all(error_text([&] { json_get<std::string>(json, "n", "f.json"); }), {"\"n\"", "3", "a text"}));
  CHECK(contains_all(error_text([&] { json_get<std::string>(json, "textes", "f.json"); }), {"\"textes\"", "missing", "did you mean \"texts\""}));
}

TEST_CASE("JSON files are written atomically and read back") {
  const TemporaryFolder folder;
  write_json(folder.path() / "x.json", Json{{"b", 1}, {"a", "ü"}});
  CHECK(read_text(folder.path() / "x.json") == "{\n  \"b\": 1,\n  \"a\": \"ü\"\n}\n");
  CHECK(read_json(folder.path() / "x.json")["a"] == "ü");
}

}  // namespace kompakt
