// Formats under a byte budget: the file fits, the choice is the best of all, mistakes are named, a resumed run computes nothing
// twice.
#include "quantize/budget.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <set>

#include "core/files.h"
#include "core/json.h"
#include "core/text.h"
#include "quantize/stage.h"
#include "quantize/tensors.h"
#include "tests/catch_torch.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;

// A file of a thousand bytes and the packed tensors, three more for every tensor of int8: a header that depends on the plan.
BudgetTarget budget_test_target(const Transformer& model) {
  BudgetTarget target;
  target.format = "test";
  target.formats = {"ternary:8", "int3:8", "int4:8", "int8"};
  target.holds = [](const GridSpec& spec, std::int64_t, std::string& why) {
    why = "it is odd";
    return spec.grid->name != "int2";
  };
  target.tensor_bytes = [](const GridSpec& spec, std::int64_t rows, std::int64_t columns) { return spec.packed_bytes(rows, columns); };
  target.file_bytes = [&model](const std::map<std::string, GridSpec>& plan) {
    std::int64_t bytes = 1000;
    for (const auto& [name, value] : model.parameters()) {
      const auto found = plan.find(ends_with(name, ".weight") ? name.substr(0, name.size() - 7) : name);
      if (found == plan.end()) bytes += value.numel() * 2;
      else bytes += found->second.packed_bytes(value.size(0), value.size(1)) + (found->second.grid->name == "int8" ? 3 : 0);
    }
    return bytes;
  };
  return target;
}

struct BudgetRun {
  std::unique_ptr<Transformer> model = testing::tiny_decoder(3, true);
  TaskData data = testing::tiny_text(2);
  Json details = Json::object();
  QuantizeOptions options;
  StageContext context;
  BudgetRun() {
    options.has_budget = true, options.method = "gptq", options.budget.tokens = 96;
    context.title = "quantize", context.data = &data, context.details = &details, context.seed = 5;
  }
  QuantizedModel run() { return quantize_within_budget(*model, options, {}, context, budget_test_target(*model)); }
};

}  // namespace

TEST_CASE("entropy-coded grids keep to the budget with the size that their codes really have", "[quantize][budget][entropy]") {
  for (const double part : {0.2, 0.5, 0.9}) {
    BudgetRun r;
    r.options.budget.formats = {"ecq2", "ecq3", "ecq4", "ecq6"};
    r.options.budget.bytes = 1 << 30;
    const BudgetFrame frame = budget_frame(r.model->config(), r.options, budget_test_target(*r.model));
    r.options.budget.bytes = frame.smallest_bytes + static_cast<std::int64_t>(part * static_cast<double>(frame.largest_bytes - frame.smallest_bytes));
    CAPTURE(part);
    const QuantizedModel result = r.run();
    const Json& budget = r.details.at("budget");
    std::int64_t bytes = budget.at("predicted_bytes").get<std::int64_t>();
    for (const auto& [name, values] : result.tensors) {
      const GridSpec& spec = result.plan.tensors.at(name);
      bytes += stored_bytes(spec, values) - spec.packed_bytes(values.codes.size(0), values.codes.size(1));
    }
    CHECK(budget.at("bytes_after_quantization").get<std::int64_t>() == bytes);
    CHECK(bytes <= r.options.budget.bytes);
    CHECK(result.plan.row_importance.size() == 21);  // not of the embedding
  }
}

TEST_CASE("the file fits the budget, and more bytes give less divergence", "[quantize][budget]") {
  const BudgetFrame frame = [] {
    BudgetRun any;
    any.options.budget.bytes = 1 << 30;
    return budget_frame(any.model->config(), any.options, budget_test_target(*any.model));
  }();
  CHECK(frame.tensors.size() == 22);  // 3 x 7 linears and the tied embedding, once
  CHECK(frame.smallest_bytes < frame.largest_bytes);
  double last = 1e9;
  for (const double part : {0.0, 0.3, 0.6, 1.0}) {
    BudgetRun r;
    r.options.budget.bytes = frame.smallest_bytes + static_cast<std::int64_t>(part * static_cast<double>(frame.largest_bytes - frame.smallest_bytes));
    const QuantizedModel result = r.run();
    const Json& budget = r.details.at("budget");
    CAPTURE(part);
    CHECK(result.plan.tensors.size() == 22);
    CHECK(budget.at("predicted_bytes").get<std::int64_t>() == budget_test_target(*r.model).file_bytes(result.plan.tensors));
    CHECK(budget.at("predicted_bytes").get<std::int64_t>() <= r.options.budget.bytes);
    CHECK(budget.at("predicted_kl").get<double>() < last);
    last = budget.at("predicted_kl").get<double>();
    double sum = 0;
    for (const Json& row : budget.at("formats")) {
      sum += row.at("predicted_kl").get<double>();
      CHECK(row.at("candidates").size() == 4);
    }
    CHECK(sum == Approx(last));
    CHECK(budget.at("measured_kl_calibration").get<double>() > 0);
    if (part == 0.0)
      for (const auto& [name, spec] : result.plan.tensors) CHECK(spec.grid->name == "ternary");
    if (part == 1.0)
      for (const auto& [name, spec] : result.plan.tensors) CHECK(spec.grid->name == "int8");
    // The curve falls, stays below its limits, and reaches both ends.
    const Json& curve = budget.at("curve");
    CHECK(curve.size() > 5);
    CHECK(curve.front().at("bytes").get<std::int64_t>() == frame.smallest_bytes);
    CHECK(curve.back().at("bytes").get<std::int64_t>() == frame.largest_bytes);
    for (std::size_t i = 1; i < curve.size(); ++i) CHECK(curve[i].at("predicted_kl").get<double>() <= curve[i - 1].at("predicted_kl").get<double>());
    for (const Json& point : curve) CHECK(point.at("bytes").get<std::int64_t>() <= point.at("limit").get<std::int64_t>());
    // What was planned is what the model holds.
    for (const auto& [name, q] : result.tensors) CHECK(at::equal(decode(result.plan.tensors.at(name), q), *find_quantizable(*r.model, name).weight));
  }
}

TEST_CASE("a budget as bits per weight, as another file, as points of a curve", "[quantize][budget]") {
  BudgetRun r;
  const BudgetTarget target = budget_test_target(*r.model);
  r.options.budget.bits_per_weight = 5;
  CHECK(budget_frame(r.model->config(), r.options, target).limit == 5 * count_parameters(r.model->config()).total / 8);
  const TemporaryFolder folder;
  write_text(folder.path() / "other.gguf", std::string(20000, 'x'));
  r.options.budget.bits_per_weight = 0, r.options.budget.not_larger_than = (folder.path() / "other.gguf").string();
  CHECK(budget_frame(r.model->config(), r.options, target).limit == 20000);
  r.options.budget.not_larger_than = "", r.options.budget.pareto = {"18kB", "15kB"};
  r.options.method = "rtn";
  const QuantizedModel result = r.run();
  CHECK(r.details.at("budget").at("limit") == 18000);
  int asked = 0;
  for (const Json& point : r.details.at("budget").at("curve"))
    if (point.contains("asked")) {
      ++asked;
      CHECK(point.at("bytes").get<std::int64_t>() > point.at("limit").get<std::int64_t>() - 1500);
    }
  CHECK(asked == 2);
}

TEST_CASE("query, key and value share a format when asked", "[quantize][budget]") {
  BudgetRun r;
  r.options.method = "rtn", r.options.budget.fuse_qkv = true, r.options.budget.bits_per_weight = 6;
  const QuantizedModel result = r.run();
  std::set<std::string_view> used;
  for (int layer = 0; layer < 3; ++layer) {
    const auto name = [&](const char* part) { return result.plan.tensors.at(str("model.layers.", layer, ".self_attn.", part, "_proj")).grid->name; };
    CHECK(name("q") == name("k"));
    CHECK(name("q") == name("v"));
  }
  for (const auto& [name, spec] : result.plan.tensors) used.insert(spec.grid->name);
  CHECK(used.size() > 1);
}

TEST_CASE("one and two threads, and a resumed run, choose and write the same", "[quantize][budget]") {
  const int threads = at::get_num_threads();
  const TemporaryFolder work;
  std::string first;
  for (int turn = 0; turn < 3; ++turn) {
    at::set_num_threads(turn == 1 ? 2 : 1);
    BudgetRun r;
    r.options.budget.bits_per_weight = 6;
    if (turn != 1) r.context.work = work.path();
    r.context.resume = turn == 2;
    const TemporaryFolder out;
    save_quantized(r.run(), out.path());
    const std::string bytes = read_text(out.path() / "quantization.safetensors");
    if (turn == 0) first = bytes;
    CHECK(bytes == first);
  }
  at::set_num_threads(threads);
}

TEST_CASE("another budget of the same candidates takes the sensitivities over, other candidates do not", "[quantize][budget]") {
  const TemporaryFolder shared;
  const auto files = [&] {
    std::set<std::string> out;
    for (const auto& entry : std::filesystem::directory_iterator(shared.path())) out.insert(entry.path().filename().string());
    return out;
  };
  const auto run = [&](double bits, std::vector<std::string> formats, bool keeps) {
    BudgetRun r;
    r.options.budget.bits_per_weight = bits, r.options.budget.formats = std::move(formats);
    if (keeps) r.context.measurements = shared.path();
    const TemporaryFolder out;
    save_quantized(r.run(), out.path());
    return read_text(out.path() / "quantization.safetensors");
  };
  const std::string first = run(6, {}, true);
  CHECK(files().size() == 1);
  CHECK((run(7, {}, true) == run(7, {}, false)));
  CHECK((run(7, {"ecq3", "ecq4", "int8"}, true) == run(7, {"ecq3", "ecq4", "int8"}, false)));  // with importances of rows
  CHECK((run(8, {"ecq3", "ecq4", "int8"}, true) == run(8, {"ecq3", "ecq4", "int8"}, false)));
  CHECK(files().size() == 2);
  for (const std::string& file : files()) {
    const std::string whole = read_text(shared.path() / file);
    for (const std::string& damaged : {whole.substr(0, whole.size() / 3), std::string("[]"), std::string("{}")}) {
      write_text(shared.path() / file, damaged);
      run(6, {}, true), run(8, {"ecq3", "ecq4", "int8"}, true);
      CHECK((read_text(shared.path() / file) == whole));
    }
  }
  CHECK((run(6, {}, true) == first));
}

TEST_CASE("what a budget cannot do is said with the remedy", "[quantize][budget]") {
  BudgetRun r;
  const BudgetTarget target = budget_test_target(*r.model);
  const auto refused = [&] { return error_text([&] { budget_frame(r.model->config(), r.options, target); }); };
  r.options.budget.bytes = 2000;
  r.options.budget.bytes = budget_frame(r.model->config(), [&] { QuantizeOptions big = r.options; big.budget.bytes = 1 << 30; return big; }(), target).smallest_bytes - 1;
  CHECK(contains_all(refused(), {"smallest test file", str(r.options.budget.bytes + 1, " bytes").c_str(), "quantize.budget", "to do"}));
  r.options.budget.bytes = 1 << 20;
  r.options.budget.pareto = {"2kB"};
  CHECK(contains_all(refused(), {"smallest", "pareto"}));
  r.options.budget.pareto = {"large"};
  CHECK(contains_all(refused(), {"large", "62MB"}));
  r.options.budget.pareto.clear();
  r.options.budget.formats = {"int4:8", "itn3:8", "q4_0:64", "int4:x"};
  CHECK(contains_all(refused(), {"itn3", "did you mean", "q4_0", "int4:x"}));
  r.options.budget.formats = {"int4:8", "q4_0"};
  CHECK(contains_all(refused(), {"no tensor can take format q4_0", "24", "32"}));
  r.options.budget.formats = {"int4:8", "int2:8"};
  CHECK(contains_all(refused(), {"no tensor can take format int2:8", "odd"}));
  r.options.budget.formats = {"q4_0"};
  CHECK(contains_all(refused(), {"no format of the budget fits", "keep_float"}));
  r.options.budget.formats.clear();
  r.options.budget.bits_per_weight = 4;
  CHECK(contains_all(refused(), {"one size", "several"}));
  r.options.budget.bits_per_weight = 0, r.options.weights = "ternary";
  CHECK(contains_all(refused(), {"budget chooses the grid", "keep_float"}));
  r.options.weights = "int4", r.options.keep_float = {"*"};
  CHECK(contains_all(refused(), {"no tensor is left"}));
  r.options.keep_float = {"*.mlp.*"};
  CHECK(budget_frame(r.model->config(), r.options, target).tensors.size() == 13);
}

}  // namespace kompakt
