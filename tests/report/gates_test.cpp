// Grammar, evaluation and printing of gates.
#include "report/gates.h"

#include <catch2/catch.hpp>
#include <pugixml.hpp>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"
#include "report/report.h"
#include "tests/support.h"

using namespace kompakt;
using kompakt::testing::contains_all;
using kompakt::testing::error_text;

namespace {

Json gates_report() {
  return parse_json(R"({
    "name": "r",
    "teacher": {"name": "teacher", "bytes": 1000, "accuracy": {"value": 0.9, "low": 0.88, "high": 0.92}, "macro_f1": 0.9, "kl": null, "perplexity": 10, "nulls": {"kl": "its own reference"}},
    "stages": [{"name": "01-distill", "stage": "distill", "bytes": 600, "accuracy": 0.85, "versus_teacher": {"accuracy_difference": {"value": -0.05, "low": -0.07, "high": -0.03}}},
               {"name": "02-prune", "stage": "prune", "bytes": 400},
               {"name": "03-distill", "stage": "distill", "bytes": 300, "accuracy": 0.89}],
    "artifact": {"name": "artifact", "bytes": 200, "accuracy": {"value": 0.895, "low": 0.875, "high": 0.915}, "macro_f1": 0.89, "kl": {"mean": 0.2, "p99": 1.5}, "perplexity": {"value": 12, "low": 11.5, "high": 12.6},
                 "latency_ms": 3.5, "seconds": 90, "joules_per_token": null, "nulls": {"joules_per_token": "no energy counter"},
                 "versus_teacher": {"accuracy_difference": {"value": -0.005, "low": -0.012, "high": 0.002}},
                 "tasks": {"dev": {"accuracy": {"value": 0.91}}}, "language": {"wiki-2": {"perplexity": 13}}},
    "totals": {"seconds": 120}, "gates": []})",
                    "test");
}

GateResult judged(const std::string& text) { return evaluate_gates(gates_report(), {text}).at(0); }
bool met(const std::string& text) {
  const GateResult result = judged(text);
  INFO(text << ": " << result.note);
  CHECK(result.left.has_value());
  return result.met;
}
std::string refused(const std::string& text) {
  return error_text([&] { parse_gate(text, {"01-distill", "distill", "02-prune", "prune"}); });
}

}  // namespace

TEST_CASE("gates compare figures of artifact, teacher and stages", "[gates]") {
  CHECK(met("accuracy >= 0.89"));
  CHECK_FALSE(met("accuracy > 0.895"));
  CHECK(met("accuracy == 0.895"));
  CHECK_FALSE(met("accuracy != 89.5%"));
  CHECK(met("artifact.accuracy >= teacher.accuracy - 0.01"));
  CHECK_FALSE(met("accuracy >= teacher.accuracy"));
  CHECK(met("artifact.bytes <= 0.25 * teacher.bytes"));
  CHECK(met("bytes <= 0.2 kB"));
  CHECK_FALSE(met("bytes < 0.19KiB"));
  CHECK(met("seconds <= 1.5 min"));
  CHECK(met("distill.bytes == 300"));      // the last stage of the kind
  CHECK(met("01-distill.bytes == 600"));   // by name
  CHECK(met("01-distill.bytes-3-1 == 596"));
  CHECK(met("kl <= 0.2"));                 // the mean
  CHECK(met("kl.p99 < 2"));
  CHECK(met("accuracy.low >= 0.875"));
  CHECK(met("artifact.tasks.dev.accuracy > 0.9"));
  CHECK(met("tasks.dev.accuracy > 90%"));
  CHECK(met("artifact.language.'wiki-2'.perplexity == 13"));
  CHECK(met("totals.seconds == 2min"));
}

TEST_CASE("gates on the task before take the paired interval against the model at the start", "[gates]") {
  Json report = gates_report();
  report["start"] = Json{{"name", "start"}, {"previous_accuracy", {{"value", 0.9}, {"low", 0.85}, {"high", 0.95}}}, {"previous_perplexity", 10.0}};
  report["teacher"]["previous_accuracy"] = 0.89;
  report["teacher"]["versus_start"] = Json{{"previous_accuracy_difference", {{"value", -0.01}, {"low", -0.03}, {"high", 0.01}}}};
  report["artifact"]["previous_accuracy"] = Json{{"value", 0.88}, {"low", 0.8}, {"high", 0.9}};
  report["artifact"]["previous_perplexity"] = Json{{"value", 10.1}, {"low", 9}, {"high", 11}};
  report["artifact"]["versus_start"] = Json{{"previous_accuracy_difference", {{"value", -0.02}, {"low", -0.05}, {"high", 0.01}}}, {"previous_perplexity_ratio", {{"value", 1.01}, {"low", 1.0}, {"high", 1.02}}}};
  const auto judge = [&](const std::string& text) { return evaluate_gates(report, {text}).at(0); };
  CHECK(judge("previous_accuracy >= start.previous_accuracy - 0.02").met);
  const GateResult bound = judge("previous_accuracy >= start.previous_accuracy - 0.04 @ 95%");
  CHECK_FALSE(bound.met);
  CHECK(*bound.left == -0.05);
  CHECK(contains_all(bound.note, {"lower 95% bound", "at the start"}));
  CHECK(judge("previous_accuracy >= start.previous_accuracy - 0.06 @ 95%").met);
  CHECK(judge("teacher.previous_accuracy >= start.previous_accuracy - 0.04 @ 95%").met);
  CHECK_FALSE(judge("start.previous_accuracy - 0.02 <= teacher.previous_accuracy @ 95%").met);
  // Of perplexities the paired ratio: 10.1 against 1.03 * 10, upper bound 1.02 against 1.03.
  const GateResult ratio = judge("previous_perplexity <= 1.03 * start.previous_perplexity @ 95%");
  CHECK(ratio.met);
  CHECK(*ratio.left == 1.02);
  CHECK(*ratio.right == Approx(1.03));
  CHECK_FALSE(judge("previous_perplexity <= 1.015 * start.previous_perplexity @ 95%").met);
  CHECK_FALSE(judge("1.015 * start.previous_perplexity >= previous_perplexity @ 95%").met);
  CHECK(contains_all(judge("previous_perplexity <= start.previous_perplexity + 1 @ 95%").note, {"compared plainly"}));
}

TEST_CASE("gates follow the usual precedence", "[gates]") {
  CHECK(met("1 + 2 * 3 == 7"));
  CHECK(met("(1 + 2) * 3 == 9"));
  CHECK(met("8 - 3 - 2 == 3"));
  CHECK(met("8 / 4 / 2 == 1"));
  CHECK(met("-2 * -3 == 6"));
  CHECK(met("- (1 - 3) == 2"));
  CHECK(met("1e3 == 1 kB"));
  CHECK(met("0.1 + 0.2 == 0.3"));  // as people mean it
  CHECK(met(".5 == 50%"));
  CHECK(met("  accuracy>=0.5"));
}

TEST_CASE("@ 95% takes the unfavourable bound of the paired interval", "[gates]") {
  CHECK_FALSE(met("accuracy >= teacher.accuracy - 0.01 @ 95%"));  // lower bound -0.012
  CHECK(met("accuracy >= teacher.accuracy - 0.013 @ 95%"));
  // The same condition, written otherwise.
  CHECK_FALSE(met("accuracy - teacher.accuracy >= -1% @95%"));
  CHECK_FALSE(met("teacher.accuracy - accuracy <= 0.01 @ 95%"));
  CHECK(met("teacher.accuracy - accuracy <= 0.013 @ 95%"));
  CHECK_FALSE(met("2 * accuracy >= 2 * (teacher.accuracy - 0.01) @ 95%"));
  CHECK(met("accuracy < teacher.accuracy + 0.003 @ 95%"));  // upper bound 0.002
  CHECK_FALSE(met("accuracy < teacher.accuracy + 0.001 @ 95%"));
  CHECK(met("01-distill.accuracy >= teacher.accuracy - 0.08 @ 95%"));
  CHECK_FALSE(met("01-distill.accuracy >= teacher.accuracy - 0.06 @ 95%"));
  const GateResult paired = judged("accuracy >= teacher.accuracy - 0.01 @ 95%");
  CHECK(*paired.left == Approx(-0.012));
  CHECK(*paired.right == Approx(-0.01));
  CHECK(contains_all(paired.note, {"lower 95% bound", "artifact.accuracy", "teacher"}));
  SECTION("a single figure has its own interval") {
    CHECK(met("accuracy >= 0.87 @ 95%"));
    CHECK_FALSE(met("accuracy >= 0.88 @ 95%"));
    CHECK_FALSE(met("perplexity <= 12.5 @ 95%"));
    CHECK(met("perplexity <= 12.6 @ 95%"));
  }
  SECTION("without a fitting interval the comparison is plain and says so") {
    for (const char* text : {"macro_f1 >= teacher.macro_f1 - 0.02 @ 95%", "accuracy >= 0.9 * teacher.accuracy @ 95%", "accuracy * accuracy >= 0.1 @ 95%", "03-distill.accuracy >= teacher.accuracy - 0.02 @ 95%", "accuracy == 0.895 @ 95%"}) {
      const GateResult plain = judged(text);
      INFO(text);
      CHECK(plain.met);
      CHECK(contains_all(plain.note, {"compared plainly"}));
    }
  }
}

TEST_CASE("a figure that was not measured leaves its gate unmet, with the reason", "[gates]") {
  const auto unmet = [](const std::string& text, std::initializer_list<const char*> parts) {
    const GateResult result = judged(text);
    INFO(text);
    CHECK_FALSE(result.met);
    CHECK_FALSE(result.left.has_value());
    CHECK(contains_all(result.note, parts));
  };
  unmet("joules_per_token <= 1", {"joules_per_token", "no energy counter"});
  unmet("teacher.kl <= 1", {"its own reference"});
  unmet("02-prune.accuracy >= 0.5", {"02-prune.accuracy"});
  unmet("tasks.dve.accuracy >= 0.5", {"did you mean", "dev"});
  unmet("accuracy >= 0.5 / 0", {"division by zero"});
  unmet("artifact.tasks >= 0", {"not a figure"});
  Json report = gates_report();
  report["artifact"] = nullptr;
  CHECK(contains_all(evaluate_gates(report, {"accuracy >= 0"})[0].note, {"no artifact", "distill.accuracy"}));
  report["teacher"] = nullptr;
  CHECK(contains_all(evaluate_gates(report, {"distill.bytes <= teacher.bytes"})[0].note, {"no teacher"}));
}

TEST_CASE("mistakes in gates name the column and the nearest match", "[gates]") {
  CHECK(contains_all(refused("acuracy >= 0.9"), {"acuracy", "did you mean", "accuracy", "column 1"}));
  CHECK(contains_all(refused("teacher.acuracy >= 0.9"), {"acuracy", "did you mean", "column 9"}));
  CHECK(contains_all(refused("accuracy >= techer.accuracy"), {"techer", "did you mean", "teacher", "column 13"}));
  CHECK(contains_all(refused("04-prune.bytes < 1"), {"04-prune", "02-prune"}));
  CHECK(contains_all(refused("quantize.bytes < 1"), {"quantize", "is not known"}));
  CHECK(contains_all(refused(""), {"empty"}));
  CHECK(contains_all(refused("   "), {"empty"}));
  CHECK(contains_all(refused("accuracy"), {"comparison is missing", "<="}));
  CHECK(contains_all(refused("accuracy >="), {"ends too early"}));
  CHECK(contains_all(refused("accuracy = 0.9"), {"write =="}));
  CHECK(contains_all(refused("accuracy >> 0.9"), {"column 11"}));
  CHECK(contains_all(refused("0.1 < accuracy < 0.9"), {"one comparison"}));
  CHECK(contains_all(refused("(accuracy >= 0.9"), {"column 1", "not closed"}));
  CHECK(contains_all(refused("accuracy) >= 0.9"), {"column 9"}));
  CHECK(contains_all(refused("bytes <= 2.9 MBB"), {"MBB", "did you mean", "MB"}));
  CHECK(contains_all(refused("bytes <= 1.2.3"), {"1.2.3", "not a number"}));
  CHECK(contains_all(refused("accuracy >= 0.9 @ 90%"), {"95%", "column 17"}));
  CHECK(contains_all(refused("accuracy >= 0.9 @"), {"level"}));
  CHECK(contains_all(refused("accuracy >= 93"), {"share", "93%"}));
  CHECK(contains_all(refused("latency_ms <= 5 MB"), {"latency_ms", "MB", "milliseconds"}));
  CHECK(contains_all(refused("artifact >= 1"), {"model, not a figure", "artifact.accuracy"}));
  CHECK(contains_all(refused("kl. < 1"), {"name must follow"}));
  CHECK(contains_all(refused("artifact.'x < 1"), {"quote"}));
  CHECK(contains_all(refused("accuracy >= 0.9 ☃☃☃☃☃☃☃☃☃☃☃"), {"unexpected", "☃"}));
  CHECK(contains_all(refused(std::string(5000, '(') + "1 < 2"), {"nested too deeply"}));
  CHECK(contains_all(refused(std::string(5000, '-') + "1 < 2"), {"nested too deeply"}));
  CHECK_FALSE(invalid_utf8(refused("accuracy >= 0.9 aaaaaaaaaaaaaaaaaaa☃")).has_value());
  // Without the recipe's stages any stage name may be meant.
  CHECK_NOTHROW(parse_gate("07-anything.bytes < 1"));
  CHECK_NOTHROW(parse_gate("quantize.bytes < 1"));
  CHECK(contains_all(error_text([] { parse_gate("nonsense.bytes < 1"); }), {"nonsense"}));
}

TEST_CASE("no text crashes the reader of gates", "[gates]") {
  const std::string seed = "accuracy >= (teacher.accuracy - 0.01) * 2 @ 95%";
  for (std::size_t i = 0; i < seed.size(); ++i) {
    for (const char c : std::string("\0(@.'-%\xFF", 8)) {
      for (std::string text : {seed.substr(0, i), seed.substr(i), seed.substr(0, i) + c + seed.substr(i + 1), seed.substr(0, i) + c + seed.substr(i)}) {
        try {
          parse_gate(text);
        } catch (const Error& error) {
          CHECK(error.code() == ExitCode::user);
        }
      }
    }
  }
}

TEST_CASE("gates as a table and as JUnit", "[gates]") {
  const auto results = evaluate_gates(gates_report(), {"accuracy >= 0.8", "bytes <= 100", "joules_per_token < 1"});
  CHECK_FALSE(all_met(results));
  CHECK(all_met({results[0]}));
  const std::string table = gate_table(results);
  CHECK(table.find("NOT MET  bytes <= 100") < table.find("met      accuracy >= 0.8"));
  CHECK(contains_all(table, {"200 B <= 100 B", "89.50% >= 80.00%", "no energy counter"}));
  const auto again = gates_from_json(gates_to_json(results));
  CHECK(gate_table(again) == table);
  // Two figures that read alike are shown in full.
  GateResult close{"bytes <= 2.9 MB", false, 2900001.0, 2900000.0, "<=", ""};
  CHECK(gate_figures(close) == "2900001 <= 2900000");

  pugi::xml_document document;
  const std::string xml = gate_junit("a <b> & \"c\"", results);
  REQUIRE(document.load_string(xml.c_str()));
  const pugi::xml_node suite = document.child("testsuites").child("testsuite");
  CHECK(suite.attribute("name").as_string() == std::string("a <b> & \"c\""));
  CHECK(suite.attribute("tests").as_int() == 3);
  CHECK(suite.attribute("failures").as_int() == 2);
  CHECK(std::string(suite.find_child_by_attribute("testcase", "name", "joules_per_token < 1").child("failure").attribute("message").as_string()).find("no energy counter") != std::string::npos);
  CHECK_FALSE(suite.find_child_by_attribute("testcase", "name", "accuracy >= 0.8").child("failure"));
}
