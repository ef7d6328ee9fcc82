// Run folders to reports: the samples, missing parts, hostile texts.
#include "report/report.h"

#include <catch2/catch.hpp>
#include <pugixml.hpp>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"
#include "report/html.h"
#include "report/metrics.h"
#include "tests/support.h"

using namespace kompakt;
using kompakt::testing::contains_all;
using kompakt::testing::error_text;
namespace fs = std::filesystem;

namespace {

Json sample(const std::string& name) { return read_json(kompakt::testing::source_folder() / "tests/report/samples" / (name + ".json")); }
Json sample_report(const std::string& name) { return report_from_manifest(sample(name), name); }

// Tags balance, attributes are quoted, and nothing is loaded from elsewhere.
void check_page(const std::string& html) {
  std::vector<std::string> open;
  for (std::size_t i = html.find("<html"); i < html.size();) {
    if (html.compare(i, 6, "<style") == 0) {
      i = html.find("</style>", i) + 8;
      continue;
    }
    const std::size_t start = html.find('<', i);
    if (start == std::string::npos) break;
    std::size_t end = start;
    for (bool quoted = false; end < html.size() && (quoted || html[end] != '>'); ++end) quoted = quoted != (html[end] == '"');
    REQUIRE(end < html.size());
    const std::string tag = html.substr(start + 1, end - start - 1);
    const std::string name = tag.substr(tag[0] == '/' ? 1 : 0, tag.find_first_of(" /", 1) - (tag[0] == '/' ? 1 : 0));
    i = end + 1;
    if (name == "style") {
      i = html.find("</style>", end) + 8;
      continue;
    }
    if (name == "meta" || tag.back() == '/') continue;
    if (tag[0] != '/') {
      open.push_back(name);
      continue;
    }
    INFO("closing " << name << " near " << html.substr(start, 80));
    REQUIRE_FALSE(open.empty());
    REQUIRE(open.back() == tag.substr(1));
    open.pop_back();
  }
  CHECK(open.empty());
  for (const char* outside : {"http://", "https://", "src=", "@import", "url(", "<script", "<link"}) {
    INFO(outside);
    CHECK(html.find(outside) == std::string::npos);
  }
}

}  // namespace

TEST_CASE("the report of a classification run", "[report]") {
  const Json report = sample_report("banking");
  CHECK(report["verdict"] == "4.19 MB, 22× smaller than the teacher, 0.3 points below it (95%: −0.9 … +0.3).");
  const Json& artifact = report["artifact"];
  CHECK(artifact["bytes"] == 4187000);
  CHECK(artifact["bits_per_weight"].get<double>() == Approx(8.0 * 4187000 / 5068493));
  CHECK(artifact["accuracy"]["value"].get<double>() == Approx(0.9351));
  CHECK(artifact["task"] == "test");
  CHECK(artifact["tasks"]["dev"]["n"] == 1000);
  CHECK(artifact["versus_teacher"]["accuracy_difference"]["low"].get<double>() == Approx(-0.0089));
  CHECK(artifact["ratio_to_teacher"]["bytes"].get<double>() == Approx(4187000.0 / 90970000));
  CHECK(artifact["seconds"].get<double>() == Approx(148.3 + 81.2 + 39.7 + 126.0 + 2.1));
  CHECK(artifact["joules_per_token"].is_null());
  CHECK(artifact["nulls"]["joules_per_token"] == "no energy counter (RAPL) on this machine");
  CHECK(artifact["perplexity"].is_null());
  CHECK(contains_all(artifact["nulls"]["perplexity"].get<std::string>(), {"no text"}));
  const Json& prune = report["stages"][2];
  CHECK(prune["peak_memory_bytes"] == 1050000000);  // of training it
  CHECK(prune["inference_peak_memory_bytes"] == 2 * 20330000);
  CHECK_FALSE(prune["ratio_to_teacher"].contains("peak_memory_bytes"));
  CHECK(prune["predicted"]["seconds"]["ratio"].get<double>() == Approx(39.7 / 22));
  CHECK(report["totals"]["peak_memory_bytes"].get<double>() == 1210e6);
  // Every metric is there for every model, as a figure or as null with a reason.
  for (const Json* row : {&report["teacher"], &report["stages"][0], &report["stages"][4], &artifact}) {
    for (const Metric& metric : metrics()) {
      INFO(metric.name);
      REQUIRE(row->contains(metric.name));
      CHECK((*row)[metric.name].is_null() == (*row)["nulls"].contains(metric.name));
    }
  }
  // Gates given as texts were judged, the one that came judged was kept.
  REQUIRE(report["gates"].size() == 3);
  CHECK(report["gates"][0]["met"] == true);
  CHECK(contains_all(report["gates"][0]["note"].get<std::string>(), {"lower 95% bound"}));
  CHECK(report["gates"][2]["met"] == false);
  REQUIRE(report["regressions"].size() == 2);
  CHECK(contains_all(report["regressions"][1].get<std::string>(), {"03-prune", "−1.0 points", "−1.6 … −0.4"}));
}

TEST_CASE("the closing table puts what got worse first and says what is missing", "[report]") {
  const std::string text = closing_table(sample_report("banking"), "runs/banking");
  CHECK(contains_all(text, {"worse: gate not met: artifact.bytes <= 2.9 MB", "93.5% ±0.9", "91.0 MB", "22×", "(reused)", "not measured: J/token: no energy counter (RAPL) on this machine (all models)", "warning: 15 texts", "NOT MET  artifact.bytes <= 2.9 MB", "4.19 MB <= 2.90 MB", "report: runs/banking/report.html"}));
  CHECK(text.find("worse:") == 0);
  CHECK(text.find("perplexity") == std::string::npos);  // a column that nothing fills is left out
  // Aligned: the lines of the table have one width.
  std::size_t width = 0;
  int rows = 0;
  bool inside = false;
  for (const std::string& line : split(text, '\n')) {
    inside = (inside || starts_with(line, "model ")) && !line.empty();
    if (!inside) continue;
    if (!width) width = text_width(line);
    CHECK(text_width(line) == width);
    ++rows;
  }
  CHECK(rows == 2 + 7);
}

TEST_CASE("the report of a language model run", "[report]") {
  const Json report = sample_report("smollm2");
  CHECK(report["verdict"] == "60.0 MB, 4.5× smaller than the teacher, perplexity 31.90 against 17.62 (+81.0%), KL 0.610 nats.");
  CHECK(report["artifact"]["kl"]["p99"].get<double>() > 1);
  CHECK(report["artifact"]["bits_per_weight"].get<double>() == Approx(8 * 60e6 / 134515008));  // computed where absent
  CHECK(report["gates"][2]["met"] == false);
  const std::string text = closing_table(report);
  CHECK(contains_all(text, {"31.90 ±0.64", "0.610 ±0.024", "67.2% ±0.4", "52.4", "perplexity 31.90 against 17.62, intervals apart"}));
  CHECK(text.find("macro-F1") == std::string::npos);
  CHECK(text.find("report:") == std::string::npos);
  const std::string html = report_html(report);
  check_page(html);
  CHECK(contains_all(html, {"windows of 512 tokens", "60 layers", "layers.29.down_proj"}));
  CHECK(html.find("GPU memory") == std::string::npos);
}

TEST_CASE("a run on a GPU shows what it took there", "[report]") {
  Json report = sample_report("smollm2");
  Json& stage = report["stages"][0];
  stage["peak_device_memory_bytes"] = 3250000000, stage["energy_joules"] = 5400.0;
  const std::string html = report_html(report);
  check_page(html);
  CHECK(contains_all(html, {"GPU memory", "GPU energy", "3.25 GB", "other programs on it included"}));
}

TEST_CASE("the page holds every part", "[report]") {
  const std::string html = report_html(sample_report("banking"));
  check_page(html);
  CHECK(contains_all(html, {"<h1>4.19 MB, 22× smaller", "id=\"gates\"", "2 of 3 met", "id=\"models\"", "id=\"size\"", "<svg class=\"chart\"", "id=\"classes\"", "topping_up_by_card", "id=\"cost\"", "id=\"training\"", "id=\"removed\"", "<b>30522</b> → <b>8721</b>", "768 of 1536", "id=\"layers\"", "encoder.layer.2.output", "id=\"not-measured\"", "id=\"warnings\"", "id=\"environment\"", "id=\"lineage\"", "prefers-color-scheme:dark", "McNemar p = 0.310"}));
  // Stages are told apart from the artifact, and one that is the teacher is drawn once.
  CHECK(html.find("<g class=\"teacher\"><title>teacher") != std::string::npos);
  CHECK(html.find("<title>01-finetune") == std::string::npos);
  CHECK(html == report_html(sample_report("banking")));
  const std::string markdown = report_markdown(sample_report("banking"));
  CHECK(contains_all(markdown, {"# banking-assistant", "| artifact | 93.5% ±0.9 |", "## Gates", "## Predicted and measured", "## Worse", "## Not measured"}));
}

TEST_CASE("texts from outside cannot break out", "[report]") {
  const std::string evil = "<img src=x onerror=alert(1)>\"'&</script>|`*\x01";
  Json manifest = sample("banking");
  manifest["name"] = evil;
  manifest["warnings"] = {evil};
  manifest["environment"] = {{evil, evil}};
  manifest["gates"] = {{{"text", evil}, {"met", false}}};
  manifest["artifact"]["label"] = evil;
  manifest["artifact"]["nulls"]["tokens_per_second"] = evil;
  manifest["artifact"]["latency_ms"]["protocol"] = evil;
  manifest["artifact"]["tasks"][evil] = manifest["artifact"]["tasks"]["test"];
  manifest["artifact"]["tasks"][evil]["worst_classes"][0]["label"] = evil;
  Json& stage = manifest["stages"][2];
  stage["name"] = evil;
  stage["outputs"][evil] = evil;
  stage["details"]["removed"][evil] = {{evil, 4, 2}};
  stage["details"]["layers"] = {{{"layer", evil}, {"format", evil}, {"error", 0.1}}};
  stage["details"]["loss_curve"] = {{0, 1, {{evil, 2}}}, {1, 2, {{evil, 3}}}};
  manifest["data"][evil] = {{"hash", evil}};
  const Json report = report_from_manifest(manifest, "evil");
  const std::string html = report_html(report);
  CHECK(html.find("<img") == std::string::npos);
  CHECK(html.find("</script") == std::string::npos);
  CHECK(html.find('\x01') == std::string::npos);
  std::string harmless = replace_all(html, "src=x onerror", "");
  check_page(harmless);
  const std::string markdown = report_markdown(report);
  CHECK(markdown.find("<img") == std::string::npos);
  CHECK(contains_all(markdown, {"&lt;img", "\\|\\`\\*"}));
  CHECK(html_escape("a<b>&\"'\x7F\n") == "a&lt;b&gt;&amp;&quot;&#39;\xEF\xBF\xBD\n");
}

TEST_CASE("missing parts are shown as missing", "[report]") {
  SECTION("an empty manifest") {
    const Json report = report_from_manifest(Json::object(), "m");
    CHECK(report["verdict"] == "No model was made in this run.");
    check_page(report_html(report));
    CHECK(contains_all(closing_table(report), {"No model was made"}));
    CHECK(contains_all(report_markdown(report), {"unnamed run"}));
  }
  SECTION("no teacher") {
    Json manifest = sample("banking");
    manifest.erase("teacher");
    for (Json& stage : manifest["stages"]) {
      if (stage.contains("model")) stage["model"]["tasks"]["test"].erase("versus_teacher");
    }
    manifest["artifact"]["tasks"]["test"].erase("versus_teacher");
    const Json report = report_from_manifest(manifest, "m");
    CHECK(report["teacher"].is_null());
    CHECK(report["verdict"] == "4.19 MB, accuracy 93.5%.");
    CHECK(report["gates"][0]["met"] == false);
    CHECK(contains_all(report["gates"][0]["note"].get<std::string>(), {"no teacher"}));
    check_page(report_html(report));
    CHECK(closing_table(report).find("smaller") == std::string::npos);
  }
  SECTION("a run that stopped before the export") {
    Json manifest = sample("banking");
    manifest["artifact"] = nullptr;
    manifest["stages"].erase(4);
    manifest["gates"] = {"accuracy >= 0.5"};
    const Json report = report_from_manifest(manifest, "m");
    CHECK(contains_all(report["verdict"].get<std::string>(), {"20.3 MB", "No artifact", "04-quantize"}));
    CHECK(contains_all(report["gates"][0]["note"].get<std::string>(), {"no artifact"}));
    check_page(report_html(report));
  }
  SECTION("stages without figures, nulls instead of numbers") {
    const Json manifest = parse_json(R"({"stages": [{"name": "01-x"}, {"name": "02-y", "seconds": null, "model": {"bytes": null, "tasks": {"test": {"accuracy": null}}}, "details": {"layers": [{}], "removed": {"ffn": []}, "loss_curve": []}, "predicted": {"seconds": 3, "bytes": null}}]})", "m");
    const Json report = report_from_manifest(manifest, "m");
    check_page(report_html(report));
    CHECK(report["stages"][1]["nulls"]["bytes"] == "not measured in this run");
    CHECK(report["stages"][0]["nulls"]["bytes"] == "this stage makes no model");
    CHECK(report["stages"][1]["predicted"]["seconds"]["measured"].is_null());
    CHECK_FALSE(closing_table(report).empty());
  }
  SECTION("an unpaired difference says so") {
    Json manifest = sample("banking");
    manifest["artifact"]["tasks"]["test"].erase("versus_teacher");
    CHECK(contains_all(report_from_manifest(manifest, "m")["verdict"].get<std::string>(), {"0.3 points below it, unpaired"}));
  }
  SECTION("a larger artifact is a regression") {
    Json manifest = sample("banking");
    manifest["artifact"]["bytes"] = 100000000;
    const Json report = report_from_manifest(manifest, "m");
    CHECK(contains_all(report["verdict"].get<std::string>(), {"1.1× larger than the teacher"}));
    CHECK(contains_all(report["regressions"].dump(), {"artifact: size 100.0 MB, 1.1× the teacher's"}));
  }
}

TEST_CASE("mistakes in a run folder", "[report]") {
  const auto of = [](const char* text) { return error_text([&] { report_from_manifest(parse_json(text, "m.json"), "m.json"); }); };
  CHECK(contains_all(of("[]"), {"not an object", "m.json"}));
  CHECK(contains_all(of(R"({"stages": {}})"), {"stages", "a list"}));
  CHECK(contains_all(of(R"({"stages": [{}]})"), {"name"}));
  CHECK(contains_all(of(R"({"name": 3})"), {"name"}));
  CHECK(contains_all(of(R"({"artifact": {"bytes": "many"}})"), {"bytes", "many", "a number"}));
  CHECK(contains_all(of(R"({"artifact": {"tasks": []}})"), {"tasks", "an object"}));
  CHECK(contains_all(of(R"({"gates": ["acuracy > 1"]})"), {"acuracy"}));
  TemporaryFolder folder;
  CHECK(contains_all(error_text([&] { build_report(folder.path()); }), {"manifest.json", "kompakt run"}));
  CHECK(contains_all(error_text([&] { build_report(folder.path() / "none"); }), {"no run folder"}));
}

TEST_CASE("files of a run folder", "[report]") {
  TemporaryFolder folder;
  Json manifest = sample("banking");
  manifest["stages"][1]["details"].erase("loss_curve");
  write_json(folder.path() / "manifest.json", manifest);
  std::string events;
  for (int step = 0; step < 1000; ++step) events += str("{\"event\":\"step\",\"stage\":\"02-distill\",\"step\":", step, ",\"loss\":", 1000 - step, "}\n");
  write_text(folder.path() / "metrics.jsonl", events + "{\"event\":\"step\",\"stage\":\"02-dis");  // killed while writing
  write_report(folder.path());
  const Json report = read_json(folder.path() / "report.json");
  const Json& curve = report["stages"][1]["details"]["loss_curve"];
  CHECK(curve.size() <= 401);
  CHECK(curve[0] == Json::parse("[0.0,1000.0,{}]"));
  CHECK(curve.back()[0] == 999.0);
  pugi::xml_document junit;
  REQUIRE(junit.load_file((folder.path() / "junit.xml").c_str()));
  CHECK(junit.child("testsuites").child("testsuite").attribute("failures").as_int() == 1);
  check_page(read_text(folder.path() / "report.html"));
  const std::string once = read_text(folder.path() / "report.json") + read_text(folder.path() / "report.html") + read_text(folder.path() / "report.md");
  write_report(folder.path());
  CHECK(once == read_text(folder.path() / "report.json") + read_text(folder.path() / "report.html") + read_text(folder.path() / "report.md"));
  // A mistake leaves the reports that are there.
  write_text(folder.path() / "manifest.json", "{\"stages\": 3}");
  CHECK_THROWS_AS(write_report(folder.path()), Error);
  CHECK(once.find(read_text(folder.path() / "report.html")) != std::string::npos);
}

TEST_CASE("figures read well", "[report]") {
  CHECK(show_number(Unit::share, 0.93512) == "93.5%");
  CHECK(show_number(Unit::bytes, 2867297) == "2.87 MB");
  CHECK(show_number(Unit::milliseconds, 9.8) == "9.80 ms");
  CHECK(show_number(Unit::number, 31.9) == "31.90");
  CHECK(show_number(Unit::small_number, 0.0000123) == "1.23e-05");
  CHECK(show_number(Unit::number, std::nan("")) == "–");
  CHECK(show_points(-0.0049) == "−0.5");
  CHECK(show_points(0.0001) == "±0.0");
  CHECK(show_times(43.2) == "43×");
  CHECK(text_width("±×a") == 3);
  CHECK(svg_scatter({}, "x", "y", true).empty());
  CHECK(svg_lines({{"a", {}}}, "x", "y").empty());
  // One point, equal points, not a number: still a chart without "nan".
  for (const std::string& svg : {svg_scatter({{"a", 5, 0.5}}, "x", "y", true), svg_scatter({{"a", 5, 0}, {"b", 5, 0}}, "x", "y", false), svg_lines({{"a", {{1, 2}}}}, "x", "y"), svg_lines({{"a", {{1, 0}, {2, std::nan("")}, {3, 0}}}}, "x", "y"), svg_lines({{"a", {{1, -2}, {2, -2}}}}, "x", "y")}) {
    INFO(svg);
    CHECK(svg.find("<svg") == 0);
    CHECK(svg.find("nan") == std::string::npos);
    CHECK(svg.find("inf") == std::string::npos);
  }
}
