// AdamW against a plain double reference, groups and freezing, clipping, schedules.
#include <ATen/ATen.h>

#include "tests/catch_torch.h"
#include <cmath>

#include "tests/support.h"
#include "tests/train/fixtures.h"
#include "train/clip.h"
#include "train/optimizer.h"
#include "train/precision.h"
#include "train/schedule.h"

using namespace kompakt;
using namespace kompakt::testing;

TEST_CASE("fused AdamW equals the written-out algorithm for three steps") {
  const double rate = 0.01, decay = 0.1, beta1 = 0.9, beta2 = 0.98, epsilon = 1e-6, divisor = 2.5;
  const CounterRandom random(3, "adamw");
  const std::int64_t n = 37;  // odd: a tail behind the vector lanes
  at::Tensor value = at::empty({n}), skipped = at::ones({3});
  for (std::int64_t i = 0; i < n; ++i) value[i] = random.normal(static_cast<std::uint64_t>(i));
  std::vector<double> w(n), m(n, 0.0), v(n, 0.0);
  for (std::int64_t i = 0; i < n; ++i) w[i] = value[i].item<double>();
  value.requires_grad_(true);
  skipped.requires_grad_(true);
  AdamW optimizer({{"a", value, rate, decay}, {"b", skipped, rate, decay}}, {beta1, beta2, epsilon});
  for (int step = 1; step <= 3; ++step) {
    const double factor = 1.0 / step;
    at::Tensor gradient = at::empty({n});
    for (std::int64_t i = 0; i < n; ++i) gradient[i] = random.normal(static_cast<std::uint64_t>(1000 * step + i));
    std::vector<double> g(n);
    for (std::int64_t i = 0; i < n; ++i) g[i] = gradient[i].item<double>() / divisor;
    optimizer.zero_grad();
    value.mutable_grad() = gradient;
    optimizer.step(factor, at::full({}, divisor));
    for (std::int64_t i = 0; i < n; ++i) {
      w[i] -= rate * factor * decay * w[i];
      m[i] = beta1 * m[i] + (1 - beta1) * g[i];
      v[i] = beta2 * v[i] + (1 - beta2) * g[i] * g[i];
      w[i] -= rate * factor * (m[i] / (1 - std::pow(beta1, step))) / (std::sqrt(v[i] / (1 - std::pow(beta2, step))) + epsilon);
      CHECK(value[i].item<double>() == Approx(w[i]).epsilon(1e-5).margin(1e-6));
    }
  }
  // Without a gradient nothing moves, no decay either.
  CHECK(at::equal(skipped.detach(), at::ones({3})));
  for (const auto& [name, tensor] : optimizer.state()) {
    if (name == "steps.a") CHECK(tensor.item<float>() == 3);
    if (name == "steps.b") CHECK(tensor.item<float>() == 0);
  }
}

TEST_CASE("rates and decay go to the right parameters") {
  auto model = tiny_bert();
  TrainOptions options = tiny_options();
  options.learning_rate = 1e-4;
  options.head_learning_rate = 1e-3;
  options.embedding_learning_rate = 1e-5;
  options.weight_decay = 0.01;
  options.freeze = {"embeddings.position*"};
  std::map<std::string, TrainableParameter> rows;
  for (const TrainableParameter& row : trainable_parameters(*model, options)) rows[row.name] = row;
  CHECK(rows.size() + 1 == model->parameters().size());
  CHECK_FALSE(model->positions.requires_grad());
  const auto check = [&](const std::string& part, double rate, double decay) {
    INFO(part);
    bool found = false;
    for (const auto& [name, row] : rows) {
      if (name.find(part) == std::string::npos) continue;
      found = true;
      CHECK(row.learning_rate == rate);
      CHECK(row.weight_decay == decay);
    }
    CHECK(found);
  };
  check("word_embeddings.weight", 1e-5, 0);
  check("token_type_embeddings.weight", 1e-5, 0);
  check("embeddings.LayerNorm", 1e-4, 0);
  check("attention.self.query.weight", 1e-4, 0.01);
  check("attention.self.query.bias", 1e-4, 0);
  check("output.LayerNorm.weight", 1e-4, 0);
  check("classifier.weight", 1e-3, 0.01);
  check("classifier.bias", 1e-3, 0);

  options.freeze = {"no.such.name"};
  CHECK(contains_all(error_text([&] { trainable_parameters(*model, options); }), {"no.such.name", "freeze"}));
  options.freeze = {"*"};
  CHECK(contains_all(error_text([&] { trainable_parameters(*model, options); }), {"nothing is left to train"}));
}

TEST_CASE("patterns") {
  CHECK(matches_pattern("embeddings.position_embeddings.weight", "embeddings.position*"));
  CHECK(matches_pattern("a.b.c", "*b*"));
  CHECK(matches_pattern("a.b.c", "a*c"));
  CHECK(matches_pattern("abab", "*ab"));
  CHECK(matches_pattern("", "*"));
  CHECK(matches_pattern("abc", "abc"));
  CHECK_FALSE(matches_pattern("abc", "ab"));
  CHECK_FALSE(matches_pattern("abc", "a*d"));
  CHECK_FALSE(matches_pattern("", "a"));
}

TEST_CASE("global norm and clipping") {
  const std::vector<at::Tensor> gradients = {at::full({4}, 1.0), at::full({3, 3}, 2.0)};
  CHECK(global_norm(gradients).item<double>() == Approx(std::sqrt(4.0 + 36.0)));
  CHECK(global_norm({}).item<double>() == 0);
  CHECK(std::isnan(global_norm({at::full({2}, std::nan(""))}).item<double>()));
  CHECK_FALSE(std::isfinite(global_norm({at::full({2}, INFINITY)}).item<double>()));
  CHECK(clip_divisor(0.5, 1.0) == 1);
  CHECK(clip_divisor(4.0, 1.0) == 4);
  CHECK(clip_divisor(4.0, 2.0) == 2);
  CHECK(clip_divisor(4.0, 0) == 1);
}

TEST_CASE("schedules") {
  const auto at_step = [](const char* name, std::int64_t step, std::int64_t steps, double warmup, double final_ratio) { return schedule_factor(find_schedule(name), step, steps, warmup, final_ratio); };
  CHECK(at_step("linear", 0, 100, 0.1, 0) == Approx(0.1));
  CHECK(at_step("linear", 9, 100, 0.1, 0) == Approx(1.0));
  CHECK(at_step("linear", 10, 100, 0.1, 0) == Approx(1.0));
  CHECK(at_step("linear", 55, 100, 0.1, 0) == Approx(0.5));
  CHECK(at_step("linear", 99, 100, 0.1, 0) == Approx(1.0 / 90));
  CHECK(at_step("linear", 55, 100, 0.1, 0.2) == Approx(0.6));
  CHECK(at_step("constant", 99, 100, 0, 0) == 1);
  CHECK(at_step("cosine", 50, 100, 0, 0) == Approx(0.5));
  CHECK(at_step("cosine", 25, 100, 0, 0) == Approx(0.5 * (1 + std::sqrt(0.5))));
  CHECK(at_step("wsd", 80, 100, 0.1, 0) == 1);
  CHECK(at_step("wsd", 85, 100, 0.1, 0) == Approx(0.5));
  CHECK(at_step("wsd", 95, 100, 0.1, 0.5) == Approx(0.5 + 0.5 * (1 - std::sqrt(0.75))));
  CHECK(at_step("linear", 0, 1, 1, 0) == 1);
  for (const Schedule& row : schedules()) {
    for (std::int64_t step = 0; step < 40; ++step) {
      const double factor = schedule_factor(row, step, 40, 0.1, 0);
      CHECK((factor > 0 && factor <= 1));
    }
  }
  CHECK(contains_all(error_text([] { find_schedule("cosin"); }), {"cosin", "cosine", "wsd"}));
}

TEST_CASE("precision by name") {
  CHECK_FALSE(use_bf16("float32", c10::Device(c10::kCPU)));
  CHECK(use_bf16("bf16", c10::Device(c10::kCPU)));
  CHECK(contains_all(error_text([] { use_bf16("fp16", c10::Device(c10::kCPU)); }), {"fp16", "float32"}));
}
