// Token-wise Fisher estimates: equal to one whole-graph backward pass, and close to the divergence that they stand for.
#include "quantize/sensitivity.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <set>

#include "core/random.h"
#include "quantize/budget_probe.h"
#include "quantize/tensors.h"
#include "tests/catch_torch.h"
#include "tests/quantize/stories.h"
#include "tests/tiny_models.h"

namespace kompakt {
namespace {

using testing::tiny_decoder;
using testing::tiny_encoder;

CalibrationSet sensitivity_set(std::int64_t rows, std::int64_t length, std::int64_t vocabulary, std::uint64_t seed) {
  const CounterRandom random(seed, "sensitivity");
  at::Tensor ids = at::empty({rows, length}, at::kLong);
  for (std::int64_t i = 0; i < ids.numel(); ++i) ids.data_ptr<std::int64_t>()[i] = static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(i), static_cast<std::uint64_t>(vocabulary)));
  CalibrationSet set;
  set.inputs.push_back({ids, {}, {}, {}});
  set.valid.emplace_back();
  set.sequences = rows, set.tokens = rows * length;
  return set;
}

at::Tensor plain_error(const at::Tensor& weight, const GridSpec& spec, const at::Tensor&) { return weight - round_to_grid(spec, weight); }

SensitivityRequest all_tensors(Transformer& model, const std::vector<GridSpec>& formats) {
  SensitivityRequest request;
  for (const QuantizableTensor& tensor : quantizable_tensors(model)) request.formats[tensor.name] = formats;
  request.error = plain_error;
  request.seed = 3;
  return request;
}

// Divergence when one matrix alone is rounded.
double direct_divergence(Transformer& model, const BudgetProbe& probe, const std::string& name, const GridSpec& spec) {
  at::Tensor& slot = *find_quantizable(model, name).weight;
  const at::Tensor before = slot;
  slot = round_to_grid(spec, before);
  const double out = probe.divergence(model);
  slot = before;
  return out;
}

std::vector<double> ranks(const std::vector<double>& values) {
  std::vector<std::size_t> order(values.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return values[a] < values[b]; });
  std::vector<double> out(values.size());
  for (std::size_t i = 0; i < order.size(); ++i) out[order[i]] = static_cast<double>(i);
  return out;
}

double correlation(const std::vector<double>& a, const std::vector<double>& b) {
  const double n = static_cast<double>(a.size()), ma = std::accumulate(a.begin(), a.end(), 0.0) / n, mb = std::accumulate(b.begin(), b.end(), 0.0) / n;
  double ab = 0, aa = 0, bb = 0;
  for (std::size_t i = 0; i < a.size(); ++i) ab += (a[i] - ma) * (b[i] - mb), aa += (a[i] - ma) * (a[i] - ma), bb += (b[i] - mb) * (b[i] - mb);
  return ab / std::sqrt(aa * bb);
}

// Keeps every value and its gradient.
class WholeGraphTaps final : public TapSink {
 public:
  bool wants(const std::string& name) const override { return name.find("put:") != std::string::npos || name == "final" || name == "embedding"; }
  void put(const std::string& name, const at::Tensor& value) override {
    if (value.requires_grad() && !value.is_leaf()) value.retain_grad();
    values[name] = value;
  }
  std::map<std::string, at::Tensor> values;
};

}  // namespace

TEST_CASE("block by block and in parts of the vocabulary gives what one backward pass through everything gives", "[quantize][sensitivity]") {
  for (const bool tied : {true, false}) {
    auto model = tiny_decoder(7, tied);
    const CalibrationSet set = sensitivity_set(3, 11, 50, 1);
    const std::vector<GridSpec> formats = {{find_grid("int4"), 8}, {find_grid("ternary"), 8}};
    const SensitivityRequest request = all_tensors(*model, formats);
    const auto found = measure_sensitivities(*model, smaller_batches(set, 11), request);
    REQUIRE(found.size() == request.formats.size());

    // The same labels, one graph.
    model->requires_grad(true);
    WholeGraphTaps taps;
    const at::Tensor logits = model->forward(set.inputs[0], &taps).view({-1, 50});
    const CounterRandom random(3, "fisher-labels");
    const at::Tensor running = at::softmax(logits.detach(), -1).cumsum(1, at::kDouble);
    at::Tensor labels = at::empty({33}, at::kLong);
    for (std::int64_t t = 0; t < 33; ++t) labels[t] = running[t].le(random.uniform(static_cast<std::uint64_t>(t)) * (1 - 1e-5)).sum();
    at::nll_loss(at::log_softmax(logits, -1), labels, {}, at::Reduction::Sum).backward();
    const at::Tensor head_gradient = at::softmax(logits.detach(), -1) - at::one_hot(labels, 50).to(at::kFloat);
    for (const QuantizableTensor& tensor : quantizable_tensors(*model))
      for (std::size_t f = 0; f < formats.size(); ++f) {
        const at::Tensor error = plain_error(tensor.weight->detach(), formats[f], {});
        double sum = 0;
        const auto add = [&](const at::Tensor& x, const at::Tensor& g) { sum += (at::matmul(x, error.t()) * g).sum(1).to(at::kDouble).square().sum().item<double>(); };
        if (tensor.role == QuantizableRole::linear) {
          add(taps.values.at("input:" + tensor.name).detach().reshape({33, -1}), taps.values.at("output:" + tensor.name).grad().reshape({33, -1}));
        } else {
          if (tensor.role == QuantizableRole::head || tied) add(taps.values.at("final").detach().reshape({33, -1}), head_gradient);
          if (tensor.role == QuantizableRole::embedding)
            sum += (taps.values.at("embedding").grad().reshape({33, -1}) * error.index_select(0, set.inputs[0].ids.reshape(-1))).sum(1).to(at::kDouble).square().sum().item<double>();
        }
        INFO(tensor.name << (tied ? " tied" : ""));
        CHECK(found.at(tensor.name).divergence[f] == Approx(0.5 * sum / 33).epsilon(1e-3));
        if (tensor.role == QuantizableRole::linear) CHECK(found.at(tensor.name).relative_error[f] == Approx((error.square().sum() / tensor.weight->square().sum()).item<double>()).epsilon(1e-5));
      }
  }
}

TEST_CASE("padding and the split into batches do not count", "[quantize][sensitivity]") {
  auto model = tiny_decoder(4, true);
  CalibrationSet set = sensitivity_set(4, 9, 50, 2);
  const SensitivityRequest request = all_tensors(*model, {{find_grid("int3"), 8}});
  const auto whole = measure_sensitivities(*model, set, request), parts = measure_sensitivities(*model, smaller_batches(set, 18), request);
  // The same texts with three columns of padding behind them.
  CalibrationSet padded = set;
  padded.inputs[0].ids = at::constant_pad_nd(set.inputs[0].ids, {0, 3}, 0);
  padded.inputs[0].lengths = at::full({4}, 9, at::kLong);
  padded.valid[0] = at::arange(48).view({4, 12}).slice(1, 0, 9).reshape(-1);
  const auto behind = measure_sensitivities(*model, smaller_batches(padded, 24), request);
  for (const auto& [name, s] : whole) {
    INFO(name);
    CHECK(parts.at(name).divergence[0] == Approx(s.divergence[0]).epsilon(1e-3));
    CHECK(behind.at(name).divergence[0] == Approx(s.divergence[0]).epsilon(1e-3));
    CHECK(s.divergence[0] > 0);
  }
}

TEST_CASE("the estimate ranks the matrices of a classifier as the divergence does", "[quantize][sensitivity]") {
  auto model = tiny_encoder(5);
  CalibrationSet set = sensitivity_set(400, 9, 50, 6);
  set.inputs[0].lengths = at::full({400}, 9, at::kLong);
  const GridSpec spec{find_grid("int4"), 8};
  const auto found = measure_sensitivities(*model, smaller_batches(set, 900), all_tensors(*model, {spec}));
  const BudgetProbe probe(*model, set);
  CHECK(probe.divergence(*model) == Approx(0).margin(1e-9));
  std::vector<double> estimate, direct;
  for (const auto& [name, s] : found) {
    estimate.push_back(std::log(s.divergence[0]));
    direct.push_back(std::log(direct_divergence(*model, probe, name, spec)));
  }
  CHECK(correlation(ranks(estimate), ranks(direct)) > 0.85);  // 26 matrices, 400 labels drawn
}

TEST_CASE("on a trained model the estimate ranks matrices and formats as the divergence does, and adds up", "[quantize][sensitivity]") {
  auto model = testing::stories_model();
  if (!model) return;
  const CalibrationSet set = testing::written_text(*model, 24, 128, 1), held = testing::written_text(*model, 12, 128, 2);
  const std::vector<GridSpec> formats = {{find_grid("four_level"), 0}, {find_grid("int3_signed"), 0}, {find_grid("int4_signed"), 0}};
  const auto found = measure_sensitivities(*model, smaller_batches(set, 512), all_tensors(*model, formats));
  const BudgetProbe probe(*model, held);
  for (std::size_t f = 0; f < formats.size(); ++f) {
    std::vector<double> estimate, direct, relative, ratio;
    double sum = 0;
    for (const auto& [name, s] : found) {
      estimate.push_back(s.divergence[f]), relative.push_back(s.relative_error[f]);
      direct.push_back(direct_divergence(*model, probe, name, formats[f]));
      ratio.push_back(s.divergence[f] / direct.back());
      sum += direct.back();
    }
    std::sort(ratio.begin(), ratio.end());
    std::vector<std::pair<at::Tensor*, at::Tensor>> floats;
    for (const QuantizableTensor& tensor : quantizable_tensors(*model)) {
      floats.emplace_back(tensor.weight, *tensor.weight);
      *tensor.weight = round_to_grid(formats[f], *tensor.weight);
    }
    const double joint = probe.divergence(*model);
    for (auto& [slot, value] : floats) *slot = value;
    const double rank = correlation(ranks(estimate), ranks(direct));
    std::printf("%-12s rank correlation %.3f (relative error alone %.3f), median estimate/direct %.2f, joint/sum of direct %.2f, sum %.4f\n", std::string(formats[f].grid->name).c_str(), rank,
                correlation(ranks(relative), ranks(direct)), ratio[ratio.size() / 2], joint / sum, sum);
    CHECK(rank >= 0.9);
    if (f == 2) {
      CHECK(ratio[ratio.size() / 2] > 0.5);  // within a factor of two for small perturbations
      CHECK(ratio[ratio.size() / 2] < 2.0);
      CHECK(joint / sum > 0.5);
      CHECK(joint / sum < 2.0);
    }
  }
}

TEST_CASE("what a method's compensation leaves scales the costs of linears, and of a tied embedding the output's part", "[quantize][sensitivity]") {
  const auto model = tiny_decoder(6, true);
  const CalibrationSet set = sensitivity_set(4, 24, 50, 8);
  SensitivityRequest request = all_tensors(*model, {{find_grid("int4"), 0}, {find_grid("int8"), 0}});
  const auto plain = measure_sensitivities(*model, set, request);
  std::set<std::string> asked;
  request.reduction = [&](const std::string& name, const at::Tensor& inputs) {
    asked.insert(name);
    CHECK(inputs.size(0) == 96);
    return 0.25;
  };
  const auto reduced = measure_sensitivities(*model, set, request);
  CHECK(asked.size() == plain.size());
  for (const auto& [name, s] : plain) {
    CAPTURE(name);
    const TensorSensitivity& r = reduced.at(name);
    if (name != model->tokens.name) {
      for (std::size_t f = 0; f < 2; ++f) CHECK(r.divergence[f] == Approx(0.25 * s.divergence[f]));
      continue;
    }
    CHECK(r.divergence[0] < 0.999 * s.divergence[0]);
    CHECK(r.divergence[0] > 0.2501 * s.divergence[0]);
    CHECK(r.divergence[1] == Approx(s.divergence[1]));  // eight bits are rounded
    CHECK_FALSE(s.row_importance.defined());
  }
}

}  // namespace kompakt
