// Which layers go, and the refit to the residual stream: brute force, cuts that can be made up for exactly, the same bytes.
#include "prune/depth.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"
#include <algorithm>
#include <cmath>
#include <set>

#include "core/node.h"
#include "model/depth.h"
#include "prune/criteria.h"
#include "prune/sparsegpt.h"
#include "prune/stage.h"
#include "prune/stream_refit.h"
#include "tests/support.h"
#include "tests/tiny_models.h"
#include "train/teacher.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

struct DepthStage {
  TaskData data;
  Json details = Json::object();
  StageContext context;
  explicit DepthStage(bool decoder) : data(decoder ? tiny_text() : tiny_classification()) {
    if (decoder) {  // more windows: a refit has as many unknowns as a matrix has rows
      const CounterRandom random(3, "windows");
      for (std::uint64_t w = 0; w < 60; ++w) {
        std::vector<std::int64_t> ids;
        for (std::uint64_t t = 0; t < 16; ++t) ids.push_back(3 + static_cast<std::int64_t>(random.below(w * 16 + t, 47)));
        data.calibration.push_back(std::move(ids));
      }
    }
    context.title = "prune", context.seed = 9, context.data = &data, context.details = &details;
  }
};

std::unique_ptr<Transformer> depth_model(bool decoder, std::int64_t layers) { return decoder ? tiny_decoder(3, false, layers) : tiny_encoder(3, layers); }

// KL(a || b) over the calibration windows or the texts.
double depth_divergence(const Transformer& a, const Transformer& b, const std::vector<TokenBatch>& batches) {
  const at::NoGradGuard no_grad;
  double sum = 0, count = 0;
  for (const TokenBatch& batch : batches) {
    const ModelInput input = to_input(batch, c10::Device(c10::kCPU));
    const at::Tensor p = at::log_softmax(a.forward(input).to(at::kDouble), -1), q = at::log_softmax(b.forward(input).to(at::kDouble), -1), kl = (p.exp() * (p - q)).sum(-1);
    sum += kl.sum().item<double>(), count += static_cast<double>(kl.numel());
  }
  return sum / count;
}

double stream_gain(bool decoder, const PruneOptions& options, double& plain) {
  PruneOptions without = options;
  without.compensate = "none";
  DepthStage stage(decoder);
  const auto original = depth_model(decoder, 4), cut = depth_model(decoder, 4), compensated = depth_model(decoder, 4);
  prune(*cut, without, {}, stage.context);
  prune(*compensated, options, {}, stage.context);
  CHECK(stage.details.at("calibration").at("tokens").get<std::int64_t>() > 0);
  const auto batches = measuring_batches(stage.data, 100, 1);
  plain = depth_divergence(*original, *cut, batches);
  return depth_divergence(*original, *compensated, batches);
}

PruneOptions shape_options(double ffn, double heads, std::int64_t layers, const std::string& depth = "block_influence") {
  PruneOptions options;
  options.has_structured = true;
  options.structured.ffn = ffn, options.structured.heads = heads, options.structured.layers = layers, options.structured.depth = depth;
  options.criterion = "magnitude", options.compensate = "stream", options.multiple_of = 8, options.samples = 100;
  return options;
}

}  // namespace

TEST_CASE("the divergence of every removal is what removing gives") {
  for (const bool decoder : {true, false}) {
    const auto model = depth_model(decoder, 3);
    const auto batches = measuring_batches(decoder ? tiny_text() : tiny_classification(), 6, 1);
    const std::vector<double> found = removal_divergence(*model, batches);
    REQUIRE(found.size() == 3);
    for (std::int64_t gone = 0; gone < 3; ++gone) {
      const auto cut = model->clone();
      std::vector<std::int64_t> keep;
      for (std::int64_t i = 0; i < 3; ++i)
        if (i != gone) keep.push_back(i);
      keep_blocks(*cut, keep);
      CHECK(found[static_cast<std::size_t>(gone)] == Approx(depth_divergence(*model, *cut, batches)).epsilon(1e-4));
    }
  }
  const auto bare = tiny_encoder(3, 2);
  bare->classifier = {};
  bare->config().labels.clear();
  CHECK(contains_all(error_text([&] { removal_divergence(*bare, measuring_batches(tiny_classification(), 4, 1)); }), {"no classifier", "block_influence"}));
}

TEST_CASE("every depth criterion removes what was asked for, a layer that does nothing first") {
  for (const DepthCriterion& row : depth_criteria()) {
    CAPTURE(std::string(row.name));
    const auto model = tiny_decoder(3, false, 5);
    const at::NoGradGuard no_grad;
    model->blocks[3].attention.output.weight.zero_();
    model->blocks[3].mlp.down.weight.zero_();
    const auto batches = measuring_batches(tiny_text(), 4, 1);
    const auto one = model->clone();
    CHECK(remove_layers(*one, 1, batches, row.name) == std::vector<std::int64_t>{3});
    const auto two = model->clone();
    const std::vector<std::int64_t> gone = remove_layers(*two, 2, batches, row.name);
    CHECK(std::set<std::int64_t>(gone.begin(), gone.end()).size() == 2);
    CHECK(two->config().layers == 3);
    CHECK(find_depth_criterion(row.name) == &row);
    CHECK(remove_layers(*two, 0, {}, row.name).empty());
    CHECK(contains_all(error_text([&] { remove_layers(*two, 1, {}, row.name); }), {"needs data"}));
  }
}

TEST_CASE("a refit of an uncut model changes nothing") {
  for (const bool decoder : {true, false}) {
    DepthStage stage(decoder);
    const auto original = depth_model(decoder, 3), cut = depth_model(decoder, 3);
    const auto before = copy_of(*original);
    refit_to_stream(*cut, *original, {0, 1, 2}, calibration_set(stage.context, 100));
    const auto after = copy_of(*cut);
    for (std::size_t i = 0; i < after.size(); ++i) CHECK(at::allclose(after[i].second, before[i].second, 1e-4, 1e-5));
    CHECK(same_parameters(copy_of(*original), before));
  }
}

TEST_CASE("a neuron that repeats another, and a head, are made up for exactly") {
  DepthStage stage(true);
  const auto original = tiny_decoder(3);
  const at::NoGradGuard no_grad;
  for (Block& block : original->blocks) {
    block.mlp.gate.weight[5].copy_(block.mlp.gate.weight[4]);
    block.mlp.up.weight[5].copy_(2 * block.mlp.up.weight[4]);
  }
  const auto cut = original->clone();
  for (Block& block : cut->blocks) block.mlp.down.weight.select(1, 5).zero_();
  const CalibrationSet set = calibration_set(stage.context, 100);
  const auto batches = measuring_batches(stage.data, 100, 1);
  const double before = depth_divergence(*original, *cut, batches);
  refit_to_stream(*cut, *original, {0, 1, 2}, set, 1e-7);
  CHECK(depth_divergence(*original, *cut, batches) < 1e-4 * before);
}

TEST_CASE("the refit to the stream pays for neurons, heads and layers") {
  for (const bool decoder : {true, false})
    for (const PruneOptions& options : {shape_options(0.75, 1, 0), shape_options(0.5, 0.667, 0), shape_options(1, 1, 1), shape_options(0.75, 1, 1, "removal_kl"), shape_options(1, 1, 2, "span")}) {
      double plain = 0;
      const double refitted = stream_gain(decoder, options, plain);
      CAPTURE(decoder, options.structured.ffn, options.structured.heads, options.structured.layers, plain, refitted);
      CHECK(refitted < 0.9 * plain);  // 0.2 to 0.77: layers of random weights are far from linear in what is left
    }
}

TEST_CASE("the refit gives the same bytes for one and two threads, and refuses layers of another model") {
  DepthStage stage(true);
  const auto original = tiny_decoder(3, false, 4);
  const CalibrationSet set = calibration_set(stage.context, 100);
  const int before = at::get_num_threads();
  std::vector<std::vector<std::pair<std::string, at::Tensor>>> runs;
  for (const int threads : {1, 2}) {
    at::set_num_threads(threads);
    const auto cut = original->clone();
    keep_blocks(*cut, {0, 2, 3});
    refit_to_stream(*cut, *original, {0, 2, 3}, set);
    runs.push_back(copy_of(*cut));
  }
  at::set_num_threads(before);
  CHECK(same_parameters(runs[0], runs[1]));
  const auto cut = original->clone();
  CHECK_THROWS_AS(refit_to_stream(*cut, *original, {0, 2, 3}, set), std::logic_error);
  CHECK_THROWS_AS(refit_to_stream(*cut, *original, {0, 1, 2, 4}, set), std::logic_error);
  CHECK(contains_all(error_text([&] { refit_to_stream(*cut, *original, {0, 1, 2, 3}, CalibrationSet{}); }), {"needs data"}));
}

TEST_CASE("obs: the error that is left when the other neurons make up for one") {
  const auto model = tiny_decoder(3, false, 2);
  const auto batches = measuring_batches(tiny_text(), 6, 1);
  const at::NoGradGuard no_grad;
  const UnitScores scores = measure_units(*find_criterion("obs"), *model, batches, 1);
  TapMap taps({"layer.1.ffn"});
  at::Tensor c = at::zeros({40, 40});
  double count = 0;
  for (const TokenBatch& batch : batches) {
    model->hidden(to_input(batch, c10::Device(c10::kCPU)), &taps);
    const at::Tensor x = taps.at("layer.1.ffn").flatten(0, 1);
    c += at::mm(x.t(), x), count += static_cast<double>(x.size(0));
  }
  c /= count;
  const at::Tensor damped = c + 1e-2 * c.diagonal().mean() * at::eye(40), weight = model->blocks[1].mlp.down.weight;
  for (const std::int64_t unit : {0, 7, 39}) {
    at::Tensor mask = at::ones(weight.sizes(), at::kBool);
    mask.select(1, unit).fill_(false);
    const at::Tensor e = weight - refit_support(weight, mask, c, 1e-2);
    CHECK(scores.ffn[1][unit].item<double>() == Approx((at::mm(e, damped) * e).sum().item<double>()).epsilon(1e-3));
  }
}
