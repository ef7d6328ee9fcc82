// The centroid head by hand, fine-tuning as a stage, and the chunked loss against the plain one.
#include <ATen/ATen.h>

#include "tests/catch_torch.h"
#include <cmath>

#include "tests/support.h"
#include "tests/train/fixtures.h"
#include "train/chunked_loss.h"
#include "train/targets.h"
#include "train/teacher.h"

using namespace kompakt;
using namespace kompakt::testing;

TEST_CASE("centroid head by hand") {
  auto model = tiny_bert(2);
  const TokenizedExamples examples{{{1, 5, 6}, {1, 7}, {1, 8, 9, 10}}, {0, 1, 0}, 0};
  set_centroid_head(*model, examples, 0);
  // The same formula, example by example, in plain loops.
  std::vector<std::vector<double>> unit;
  double length = 0;
  for (const auto& ids : examples.ids) {
    ModelInput input;
    input.ids = at::tensor(at::ArrayRef<std::int64_t>(ids), at::kLong).unsqueeze(0);
    const at::Tensor x = model->pooled(model->hidden(input), input)[0].to(at::kDouble);
    const double norm = x.norm().item<double>();
    length += norm / 3;
    unit.emplace_back();
    for (int j = 0; j < 16; ++j) unit.back().push_back(x[j].item<double>() / norm);
  }
  std::vector<double> center(16), row0(16), row1(16);
  for (int j = 0; j < 16; ++j) center[j] = (unit[0][j] + unit[1][j] + unit[2][j]) / 3;
  double norm0 = 0, norm1 = 0;
  for (int j = 0; j < 16; ++j) {
    row0[j] = (unit[0][j] + unit[2][j]) / 2 - center[j];
    row1[j] = unit[1][j] - center[j];
    norm0 += row0[j] * row0[j];
    norm1 += row1[j] * row1[j];
  }
  double bias0 = 0, bias1 = 0;
  for (int j = 0; j < 16; ++j) {
    row0[j] *= 8 / std::sqrt(norm0);
    row1[j] *= 8 / std::sqrt(norm1);
    bias0 -= row0[j] * center[j] * length;
    bias1 -= row1[j] * center[j] * length;
    CHECK(model->classifier.weight[0][j].item<double>() == Approx(row0[j]).margin(1e-5));
    CHECK(model->classifier.weight[1][j].item<double>() == Approx(row1[j]).margin(1e-5));
  }
  CHECK(model->classifier.bias[0].item<double>() == Approx(bias0).margin(1e-5));
  CHECK(model->classifier.bias[1].item<double>() == Approx(bias1).margin(1e-5));
}

TEST_CASE("centroids of the first examples of each class") {
  auto some = tiny_bert(2), same = tiny_bert(2);
  set_centroid_head(*some, {{{1, 5, 6}, {1, 7}, {1, 8, 9, 10}, {1, 11}}, {0, 1, 0, 1}, 0}, 0, 1);
  set_centroid_head(*same, {{{1, 5, 6}, {1, 7}}, {0, 1}, 0}, 0);
  CHECK(at::equal(some->classifier.weight, same->classifier.weight));
  CHECK(at::equal(some->classifier.bias, same->classifier.bias));
}

TEST_CASE("a class without examples gets a zero row") {
  auto model = tiny_bert(3);
  set_centroid_head(*model, {{{1, 5, 6}, {1, 7}}, {0, 1}, 0}, 0);
  CHECK(model->classifier.weight[2].abs().max().item<double>() == 0);
  CHECK(model->classifier.weight.isfinite().all().item<bool>());
}

TEST_CASE("fine-tuning adds a head once and keeps a fitting one") {
  const TaskData data = tiny_data();
  const TemporaryFolder work;
  Json details = Json::object();
  StageContext context = tiny_context(data, work.path(), &details);
  FinetuneOptions options;
  options.train = tiny_options();
  options.train.epochs = 6;
  auto model = tiny_bert(0);
  CHECK(finetune(*model, options, context).dev_score > 0.9);
  CHECK(model->config().labels == data.labels);
  CHECK(details["head"] == "centroids");
  const std::string tuned = weight_bytes(*model);
  // Resumed from the work folder: same bytes, although the centroids are not computed again.
  context.resume = true;
  auto again = tiny_bert(0);
  finetune(*again, options, context);
  CHECK(weight_bytes(*again) == tuned);
  // A second stage goes on with the head that is there.
  const TemporaryFolder second;
  StageContext next = tiny_context(data, second.path());
  options.train.steps = 1;
  options.train.learning_rate = 1e-9;
  const at::Tensor head = model->classifier.weight.detach().clone();
  finetune(*model, options, next);
  CHECK((model->classifier.weight - head).abs().max().item<double>() < 1e-6);
}

TEST_CASE("chunked cross entropy equals the plain one") {
  at::manual_seed(1);
  const double smoothing = GENERATE(0.0, 0.1);
  const at::Tensor targets = at::randint(0, 11, {7}, at::kLong);
  const auto fresh = [](at::IntArrayRef shape, std::uint64_t seed) {
    at::manual_seed(seed);
    return at::randn(shape, at::kDouble).requires_grad_(true);
  };
  const at::Tensor hidden = fresh({7, 5}, 1), weight = fresh({11, 5}, 2), bias = fresh({11}, 3);
  const at::Tensor plain = at::cross_entropy_loss(at::linear(hidden, weight, bias), targets, {}, at::Reduction::Mean, -100, smoothing);
  (plain * 3).backward();
  const std::vector<at::Tensor> wanted = {hidden.grad().clone(), weight.grad().clone(), bias.grad().clone()};
  for (const std::int64_t chunk : {1, 3, 7, 100}) {
    const at::Tensor h = fresh({7, 5}, 1), w = fresh({11, 5}, 2), b = fresh({11}, 3);
    const at::Tensor loss = chunked_cross_entropy(h, w, b, targets, smoothing, chunk);
    (loss * 3).backward();
    CHECK(loss.item<double>() == Approx(plain.item<double>()).epsilon(1e-12));
    CHECK(at::allclose(h.grad(), wanted[0], 1e-10, 1e-12));
    CHECK(at::allclose(w.grad(), wanted[1], 1e-10, 1e-12));
    CHECK(at::allclose(b.grad(), wanted[2], 1e-10, 1e-12));
  }
  // And by finite differences, without autograd.
  const at::Tensor h = fresh({7, 5}, 1);
  chunked_cross_entropy(h, weight, bias, targets, smoothing, 2).backward();
  for (const int i : {0, 13, 34}) {
    const auto shifted = [&](double by) {
      at::Tensor moved = h.detach().clone();
      moved.view(-1)[i] += by;
      return chunked_cross_entropy(moved, weight.detach(), bias.detach(), targets, smoothing, 2).item<double>();
    };
    CHECK((shifted(1e-6) - shifted(-1e-6)) / 2e-6 == Approx(h.grad().view(-1)[i].item<double>()).epsilon(1e-6).margin(1e-9));
  }
}

TEST_CASE("next tokens respect rows, documents and padding") {
  TokenBatch batch;
  batch.rows = 2;
  batch.columns = 4;
  batch.ids = {1, 2, 3, 4, 5, 6, 7, 8};
  CHECK(next_tokens(batch) == std::vector<std::int64_t>{2, 3, 4, no_target, 6, 7, 8, no_target});
  batch.documents = {0, 0, 1, 1, 0, 1, 2, 2};
  CHECK(next_tokens(batch) == std::vector<std::int64_t>{2, no_target, 4, no_target, no_target, no_target, 8, no_target});
  batch.documents.clear();
  batch.lengths = {2, 4};
  CHECK(next_tokens(batch) == std::vector<std::int64_t>{2, no_target, no_target, no_target, 6, 7, 8, no_target});
  CHECK(count_targets(batch) == 4);
}

TEST_CASE("label cross entropy of text from hidden states equals that from logits") {
  auto model = tiny_llama(false);
  TokenBatch batch;
  batch.rows = 2;
  batch.columns = 5;
  batch.ids = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  batch.lengths = {5, 5};
  batch.documents = {0, 0, 0, 1, 1, 0, 0, 0, 0, 0};
  const ModelInput input = to_input(batch, c10::Device(c10::kCPU));
  const at::Tensor hidden = model->hidden(input), logits = model->head(hidden), none;
  const TapMap taps;
  std::vector<LossPart> parts;
  const auto objective = label_cross_entropy(0.1);
  const double from_hidden = objective->loss({*model, input, batch, none, hidden, taps, nullptr}, parts).item<double>();
  const double from_logits = objective->loss({*model, input, batch, logits, hidden, taps, nullptr}, parts).item<double>();
  CHECK(from_hidden == Approx(from_logits).epsilon(1e-6));
  CHECK(parts.size() == 2);
}
