// The search under a budget: the optimum of an exhaustive enumeration, better than uniform ratios at equal bytes, the latency
// table, the stage in a recipe.
#include "pipeline/search.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cstdio>
#include <limits>

#include "core/files.h"
#include "model/checkpoint.h"
#include "pipeline/latency_table.h"
#include "pipeline/plan.h"
#include "pipeline/recipe.h"
#include "pipeline/run.h"
#include "quantize/budget_probe.h"
#include "tests/catch_torch.h"
#include "tests/pipeline/tiny.h"
#include "tests/quantize/stories.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;

// Five hundred bytes and the packed tensors; what has no grid as halves.
BudgetTarget search_test_target(const Transformer& shapes) {
  BudgetTarget target;
  target.format = "test", target.formats = {"int4_signed:8", "int8"};
  target.holds = [](const GridSpec&, std::int64_t, std::string&) { return true; };
  target.tensor_bytes = [](const GridSpec& spec, std::int64_t rows, std::int64_t columns) { return spec.packed_bytes(rows, columns); };
  target.file_bytes = [&shapes](const std::map<std::string, GridSpec>& plan) {
    std::int64_t bytes = 500;
    for (const auto& [name, value] : shapes.parameters()) {
      const auto found = plan.find(ends_with(name, ".weight") ? name.substr(0, name.size() - 7) : name);
      bytes += found == plan.end() ? value.numel() * 2 : found->second.packed_bytes(value.size(0), value.size(1));
    }
    return bytes;
  };
  return target;
}

SearchOptions search_test_options(std::int64_t bytes) {
  SearchOptions options;
  options.has_budget = true, options.budget.bytes = bytes;
  options.layers = {1}, options.ffn = {"0.6"}, options.heads = {"0.667"}, options.multiple_of = 8, options.tokens = 96, options.samples = 6;
  return options;
}

struct SearchRun {
  std::unique_ptr<Transformer> model;
  TaskData data = testing::tiny_text(2);
  StageContext context;
  explicit SearchRun(std::unique_ptr<Transformer> m) : model(std::move(m)) { context.title = "search", context.data = &data, context.seed = 5; }
};

// Bytes of a plan in the test's own count.
std::int64_t search_plan_bytes(const ModelConfig& config, const std::map<std::string, GridSpec>& plan) {
  const Transformer shapes(config, 0, c10::Device(c10::kMeta));
  return search_test_target(shapes).file_bytes(plan);
}

}  // namespace

TEST_CASE("the search finds the optimum of all shapes and formats", "[search]") {
  SearchRun r(testing::tiny_decoder(3, true, 2));
  const std::vector<std::int64_t> budgets = {9500, 7500, 5500, 4200};
  for (const std::int64_t budget : budgets) {
    CAPTURE(budget);
    const SearchOptions options = search_test_options(budget);
    BudgetSearch search(*r.model, options, {}, [](const Transformer& shapes, bool) { return search_test_target(shapes); }, r.context);
    search.measure({});
    const std::vector<SearchPoint> found = search.solve(nullptr);
    // Every shape, every choice of a format for each of up to 15 tensors.
    double best = std::numeric_limits<double>::infinity();
    std::int64_t fitting = 0;
    const GridSpec choices[] = {{find_grid("int4_signed"), 8}, {find_grid("int8"), find_grid("int8")->default_group}};
    const std::vector<SearchShape> shapes = search_shapes(r.model->config(), options);
    CHECK(shapes.size() == 8);
    for (const SearchShape& shape : shapes) {
      const ModelConfig config = search_config(r.model->config(), shape, 0);
      const std::vector<std::string> names = [&] {
        Transformer meta(config, 0, c10::Device(c10::kMeta));
        std::vector<std::string> out = {meta.tokens.name};
        for (const Linear* linear : meta.linears()) out.push_back(linear->name);
        return out;
      }();
      // Costs and bytes of every tensor in every format, from plans that differ in one tensor.
      std::map<std::string, GridSpec> plan;
      for (const std::string& name : names) plan[name] = choices[0];
      const double base = search.predict(shape, plan);
      const std::int64_t base_bytes = search_plan_bytes(config, plan);
      std::vector<double> gain;
      std::vector<std::int64_t> more;
      for (const std::string& name : names) {
        plan[name] = choices[1];
        gain.push_back(search.predict(shape, plan) - base), more.push_back(search_plan_bytes(config, plan) - base_bytes);
        plan[name] = choices[0];
      }
      for (std::uint32_t set = 0; set < (1u << names.size()); ++set) {
        double cost = base;
        std::int64_t bytes = base_bytes;
        for (std::size_t i = 0; i < names.size(); ++i)
          if (set >> i & 1) cost += gain[i], bytes += more[i];
        if (bytes <= budget) best = std::min(best, cost), ++fitting;
      }
    }
    REQUIRE(fitting > 0);
    CHECK(found.front().bytes <= budget);
    CHECK(found.front().predicted() == Approx(best).epsilon(1e-9));
    CHECK(search.predict(found.front().shape, found.front().plan) == Approx(best).epsilon(1e-9));
    CHECK(search_plan_bytes(search_config(r.model->config(), found.front().shape, 0), found.front().plan) == found.front().bytes);
    for (std::size_t i = 1; i < search.frontier().size(); ++i) {
      CHECK(search.frontier()[i].bytes > search.frontier()[i - 1].bytes);
      CHECK(search.frontier()[i].predicted() < search.frontier()[i - 1].predicted());
    }
  }
  const SearchOptions tight = search_test_options(600);
  BudgetSearch search(*r.model, tight, {}, [](const Transformer& shapes, bool) { return search_test_target(shapes); }, r.context);
  search.measure({});
  CHECK(contains_all(error_text([&] { search.solve(nullptr); }), {"no shape of the search fits", "600", "files from"}));
}

TEST_CASE("measurements are kept, and a second search gives the same choice from them", "[search]") {
  SearchRun r(testing::tiny_decoder(3, true, 2));
  const TemporaryFolder folder;
  const auto file = folder.path() / "importance" / "a.json";
  std::vector<double> predicted;
  for (int run = 0; run < 2; ++run) {
    const SearchOptions options = search_test_options(7500);
    BudgetSearch search(*r.model, options, {}, [](const Transformer& shapes, bool) { return search_test_target(shapes); }, r.context);
    search.measure(file);
    CHECK(std::filesystem::exists(file));
    predicted.push_back(search.solve(nullptr).front().predicted());
  }
  CHECK(predicted[0] == predicted[1]);
  // A file that is damaged in any way is measured anew, to the same choice and the same bytes.
  const std::string whole = read_text(file);
  Json narrow = parse_json(whole, "kept"), foreign = narrow, untyped = narrow, empty = narrow;
  narrow["scores_ffn"][0].erase(0), foreign["ffn"] = Json::array(), untyped["order"] = "all", empty.erase("sensitivities");
  for (const std::string& damaged : {whole.substr(0, whole.size() / 2), std::string(), std::string("[]"), dump_json(narrow), dump_json(foreign), dump_json(untyped), dump_json(empty)}) {
    CAPTURE(damaged.substr(0, 200));
    write_text(file, damaged);
    const SearchOptions options = search_test_options(7500);
    BudgetSearch search(*r.model, options, {}, [](const Transformer& shapes, bool) { return search_test_target(shapes); }, r.context);
    search.measure(file);
    CHECK(read_text(file) == whole);
    CHECK(search.solve(nullptr).front().predicted() == predicted[0]);
  }
}

TEST_CASE("sensitivities of a search foresee the error feedback of its method", "[search]") {
  SearchRun r(testing::tiny_decoder(3, true, 2));
  const TemporaryFolder folder;
  std::map<std::string, std::map<std::string, double>> found[2];
  for (const int feedback : {0, 1}) {
    SearchOptions options = search_test_options(7500);
    options.method = feedback ? "gptq" : "rtn";
    CHECK(search_feeds_back(options) == (feedback == 1));
    BudgetSearch search(*r.model, options, {}, [](const Transformer& shapes, bool) { return search_test_target(shapes); }, r.context);
    const auto file = folder.path() / (options.method + ".json");
    search.measure(file);
    const Json json = read_json(file);
    found[feedback] = json.at("sensitivities").get<std::map<std::string, std::map<std::string, double>>>();
  }
  REQUIRE(found[0].size() == found[1].size());
  std::size_t lower = 0;
  for (const auto& [name, formats] : found[0])
    for (const auto& [format, value] : formats) {
      CAPTURE(name, format);
      CHECK(found[1].at(name).at(format) <= value * (1 + 1e-9));
      lower += found[1].at(name).at(format) < 0.99 * value;
    }
  CHECK(lower > 0);
}

TEST_CASE("a cut vocabulary costs what the removed pieces had, and nothing more", "[search]") {
  const at::NoGradGuard no_grad;
  SearchRun r(testing::tiny_decoder(3, true, 2));
  CalibrationSet set = calibration_set(r.context, 4);
  const BudgetProbe probe(*r.model, set);
  std::vector<std::int64_t> kept;
  for (std::int64_t i = 0; i < 40; ++i) kept.push_back(i);
  double expected = 0, count = 0;
  for (const ModelInput& input : set.inputs) {
    const at::Tensor p = at::softmax(r.model->forward(input), -1).flatten(0, 1);
    expected -= p.slice(1, 0, 40).sum(1).log().sum().item<double>();
    count += static_cast<double>(p.size(0));
  }
  CHECK(probe.divergence(*r.model, at::tensor(at::ArrayRef<std::int64_t>(kept), at::kLong)) == Approx(expected / count).epsilon(1e-4));
  CHECK(probe.divergence(*r.model) == Approx(0).margin(1e-6));
}

TEST_CASE("limits: memory counts the cache of keys and values, time and energy come from the table", "[search]") {
  const ModelConfig config = testing::tiny_decoder(1)->config();
  SearchBudget budget;
  budget.memory = 100000, budget.context = 10;
  CHECK(search_limit(config, budget, nullptr) == 100000 - 3 * 2 * 3 * 4 * 10 * 2);
  budget.bytes = 5000;
  CHECK(search_limit(config, budget, nullptr) == 5000);
  LatencyTable table;
  table.us[{24, 24}] = 2, table.us[{12, 24}] = 1, table.us[{40, 24}] = 4, table.us[{24, 40}] = 5, table.us[{50, 24}] = 6, table.layer_us = 10;
  // Per layer: query and output 24x24, key and value 12x24, gate and up 40x24, down 24x40; once the head.
  CHECK(table.milliseconds(config) == Approx((3 * (2 + 2 + 1 + 1 + 4 + 4 + 5 + 10) + 6) / 1e3));
  budget.latency_ms = 0.09;
  CHECK(search_limit(config, budget, &table) == -1);
  budget.latency_ms = 0.1;
  CHECK(search_limit(config, budget, &table) == 5000);
  table.watts = 10, budget.joules = 0.0009;
  CHECK(search_limit(config, budget, &table) == -1);
  const TemporaryFolder folder;
  write_json(folder.path() / "t.json", to_json(table));
  const LatencyTable back = read_latency_table(folder.path() / "t.json");
  CHECK(back.us == table.us);
  CHECK(back.watts == table.watts);
  write_json(folder.path() / "x.json", Json{{"kind", "other"}});
  CHECK(contains_all(error_text([&] { read_latency_table(folder.path() / "x.json"); }), {"no latency table", "doctor"}));
  const LatencyTable measured = measure_latency_table(config, 2);
  CHECK(measured.us.size() >= 5);
  CHECK(measured.us.at({24, 40}) > 0);
  CHECK(measured.milliseconds(config) > 0);
}

TEST_CASE("options of a search that cannot be are named", "[search]") {
  const auto problems = [](const SearchOptions& options) {
    return error_text([&] {
      Problems all;
      check_search(options, "here", all);
      all.throw_if_any("test");
    });
  };
  SearchOptions options;
  CHECK(contains_all(problems(options), {"needs a budget", "latency_ms"}));
  options = search_test_options(5000);
  options.budget.latency_ms = 3;
  CHECK(contains_all(problems(options), {"latency table", "doctor"}));
  options = search_test_options(5000);
  options.ffn = {"1.5"}, options.vocabulary = {"some"};
  CHECK(contains_all(problems(options), {"1.5", "search.ffn", "some", "all, used"}));
  const ModelConfig config = testing::tiny_decoder(1)->config();
  options = search_test_options(5000);
  options.layers = {3};
  CHECK(contains_all(error_text([&] { search_shapes(config, options); }), {"search.layers", "0 to 2"}));
  options.layers = {0}, options.heads = {"0.9"};
  CHECK(contains_all(error_text([&] { search_shapes(config, options); }), {"nearest"}));
}

TEST_CASE("the search beats uniform ratios at equal bytes in measured divergence", "[search][stories]") {
  auto model = testing::stories_model();
  if (!model) return;
  const at::NoGradGuard no_grad;
  SearchRun r(std::move(model));
  r.data.train_documents.clear(), r.data.calibration.clear();
  const CalibrationSet text = testing::written_text(*r.model, 24, 96, 11);
  for (std::int64_t row = 0; row < 24; ++row) {
    const at::Tensor ids = text.inputs[0].ids[row].contiguous();
    r.data.calibration.emplace_back(ids.const_data_ptr<std::int64_t>(), ids.const_data_ptr<std::int64_t>() + ids.numel());
  }
  r.data.hash = "stories";
  SearchOptions options;
  options.has_budget = true;
  options.layers = {1, 2}, options.ffn = {"0.75", "0.5"}, options.heads = {"0.5"}, options.multiple_of = 4, options.tokens = 1152, options.samples = 24;
  options.formats = {"int3_signed:0", "int4_signed:0", "int8:0"}, options.measure = 4;
  // Uniform: three quarters of neurons, all heads and layers, everything in int4 with one scale a row.
  options.budget.bytes = 1 << 30;
  const auto target = [](const Transformer& shapes, bool) { return search_test_target(shapes); };
  const TemporaryFolder folder;
  SearchPoint uniform;
  {
    BudgetSearch search(*r.model, options, {}, target, r.context);
    search.measure(folder.path() / "kept.json");
    uniform.shape = {0, 128, {8, 4}, false};
    const ModelConfig config = search_config(r.model->config(), uniform.shape, 0);
    Transformer shapes(config, 0, c10::Device(c10::kMeta));
    uniform.plan[shapes.tokens.name] = {find_grid("int4_signed"), 0};
    for (const Linear* linear : shapes.linears()) uniform.plan[linear->name] = {find_grid("int4_signed"), 0};
    uniform.bytes = search_plan_bytes(config, uniform.plan);
    uniform.measured = search.divergence(uniform);
  }
  options.budget.bytes = uniform.bytes;
  BudgetSearch search(*r.model, options, {}, target, r.context);
  search.measure(folder.path() / "kept.json");
  std::vector<SearchPoint> points = search.solve(nullptr);
  double best = std::numeric_limits<double>::infinity();
  for (std::size_t i = 0; i < std::min<std::size_t>(4, points.size()); ++i) {
    CHECK(points[i].bytes <= uniform.bytes);
    points[i].measured = search.divergence(points[i]);
    best = std::min(best, points[i].measured);
    std::printf("  %s: %lld bytes, predicted %.4f, measured %.4f\n", points[i].shape.text().c_str(), static_cast<long long>(points[i].bytes), points[i].predicted(), points[i].measured);
  }
  std::printf("  uniform: %lld bytes, measured %.4f\n", static_cast<long long>(uniform.bytes), uniform.measured);
  CHECK(best < uniform.measured);
}

TEST_CASE("a recipe with a search runs, stays in the budget, and its plan knows", "[search][run]") {
  testing::TinySetting tiny;
  const std::string head = R"(
  - finetune: {epochs: 1, batch_size: 8, learning_rate: 1.0e-3}
  - search: {budget: {bytes: BUDGET}, layers: [1], ffn: [0.5], heads: [0.5], vocabulary: [all, used], formats: ["int4_signed:16", int8], samples: 24, tokens: 512, measure: 2, multiple_of: 16, apply: APPLY}
)";
  const auto stages = [&](const std::string& budget, const std::string& apply, const std::string& rest) { return replace_all(replace_all(head, "BUDGET", budget), "APPLY", apply) + rest + "  - export: {formats: [kompakt]}\n"; };
  // The smallest file of all shapes, as the refusal names it, and half as much again.
  tiny.write_recipe(stages("1kB", "all", ""));
  const std::string refusal = error_text([&] { run_recipe(read_recipe(tiny.recipe()), {.out = tiny.out("none")}); });
  REQUIRE(contains_all(refusal, {"no shape of the search fits", "files from"}));
  const std::int64_t smallest = std::stoll(refusal.substr(refusal.find("files from ") + 11)), limit = smallest * 3 / 2;
  tiny.write_recipe(stages(std::to_string(limit), "all", ""));
  const Recipe recipe = read_recipe(tiny.recipe());
  const RunOutcome outcome = run_recipe(recipe, {.out = tiny.out("all")});
  const Json manifest = read_json(tiny.out("all") / "manifest.json");
  const Json& search = manifest.at("stages").at(1).at("details").at("search");
  CHECK(search.at("chosen").at("bytes").get<std::int64_t>() <= limit);
  CHECK(search.at("chosen").contains("measured_kl"));
  const auto written = [&](const char* name) { return static_cast<std::int64_t>(bytes_on_disk(tiny.out(name) / "artifact") - bytes_on_disk(tiny.out(name) / "artifact" / "lineage.json")); };
  CHECK(written("all") <= limit);
  CHECK(written("all") == search.at("chosen").at("bytes").get<std::int64_t>());
  CHECK(contains_all(read_text(tiny.out("all") / "report.html"), {"id=\"search\"", "<svg class=\"chart\""}));
  // Shape alone, formats by the quantize stage behind.
  tiny.write_recipe(stages(std::to_string(limit), "shape", str("  - quantize: {method: rtn, budget: {bytes: ", limit, ", formats: [\"int4_signed:16\", int8]}}\n")));
  run_recipe(read_recipe(tiny.recipe()), {.out = tiny.out("shape")});
  CHECK(written("shape") <= limit);
}

TEST_CASE("the plan of a prune stage shows shapes that fit, and refuses one that its grid cannot hold", "[search][shape]") {
  testing::TinySetting tiny;  // feed-forward 64
  const auto recipe = [&](const std::string& ffn) {
    tiny.write_recipe(str("\n  - finetune: {epochs: 1, batch_size: 8}\n  - prune: {structured: {ffn: ", ffn, "}, multiple_of: 8, vocabulary: {multiple_of: 8}}\n  - quantize: {weights: int4, group: 32, embedding: int8}\n  - export: {formats: [kompakt]}\n"));
    return read_recipe(tiny.recipe());
  };
  const Recipe good = recipe("0.5");
  const auto predictions = predict_stages(good, load_data(good));
  REQUIRE(predictions.at(1).shapes.size() == 4);
  const Json& widths = predictions.at(1).shapes.at(0);
  CHECK(widths.at("choices").size() == 2);  // 64 and 32
  CHECK(widths.at("choices").at(1).at("asked") == true);
  CHECK(widths.at("choices").at(1).at("bytes").get<std::int64_t>() < widths.at("choices").at(0).at("bytes").get<std::int64_t>());
  CHECK(predictions.at(1).shapes.at(3).at("axis") == "vocabulary");
  // What is predicted is what is written, tokenizer included, but for the header's text.
  run_recipe(good, {.out = tiny.out("good")});
  const auto written = static_cast<double>(bytes_on_disk(tiny.out("good") / "artifact") - bytes_on_disk(tiny.out("good") / "artifact" / "lineage.json"));
  // Once saved and read again, config.json holds keys that the teacher's did not.
  CHECK(widths.at("choices").at(1).at("bytes").get<double>() == Approx(written).margin(250));
  const Recipe bad = recipe("0.6");
  CHECK(contains_all(error_text([&] { predict_stages(bad, load_data(bad)); }), {"structured.ffn", "40", "do not divide into groups of 32", "0.5 (32 neurons)"}));
}

}  // namespace kompakt
