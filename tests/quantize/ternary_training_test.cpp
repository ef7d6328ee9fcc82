// Ternary as a training recipe: sub-norms started by hand-checked gains, quantization that fades in, next-token training first,
// resuming at any step.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"
#include <cmath>

#include "core/error.h"
#include "core/files.h"
#include "core/system.h"
#include "core/text.h"
#include "model/checkpoint.h"
#include "quantize/basis.h"
#include "quantize/fake_quant.h"
#include "quantize/stage.h"
#include "quantize/sub_norms.h"
#include "quantize/tensors.h"
#include "tests/support.h"
#include "tests/tiny_models.h"
#include "train/calibration.h"
#include "train/loop.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;
using testing::tiny_classification;
using testing::tiny_decoder;
using testing::tiny_encoder;
using testing::tiny_text;

struct GridTraining {
  explicit GridTraining(bool decoder) : data(decoder ? tiny_text() : tiny_classification(24)) {
    context.title = "03-quantize", context.work = work.path(), context.data = &data, context.seed = 7, context.details = &details;
    options.weights = "ternary", options.group = 0, options.embedding = "int4", options.embedding_group = 0, options.method = "qad", options.calibration_sequences = 8;
    for (TrainOptions* train : {&options.train, &options.pretrain}) {
      train->steps = 6, train->batch_size = 4, train->sequence_length = 16, train->learning_rate = 3e-3, train->precision = "float32", train->save_every_steps = 1000;
    }
  }
  QuantizedModel run(Transformer& model) { return quantize(model, options, {label_cross_entropy()}, context); }

  TaskData data;
  TemporaryFolder work;
  Json details = Json::object();
  StageContext context;
  QuantizeOptions options;
};

}  // namespace

TEST_CASE("gradual quantization: the weight at strength 0, 1/2 and 1, by hand", "[quantize][ternary]") {
  const at::Tensor w = at::tensor({0.9, -0.2, 0.4, -1.1}).reshape({1, 4}), q = at::tensor({0.8, 0.0, 0.8, -0.8}).reshape({1, 4});
  CHECK(at::equal(gradual_weight(w, q, 0), w));
  CHECK(at::allclose(gradual_weight(w, q, 0.5), at::tensor({0.85, -0.1, 0.6, -0.95}).reshape({1, 4})));
  CHECK(at::equal(gradual_weight(w, q, 1), q));

  const GradualSchedule &linear = *find_gradual_schedule("linear"), &cosine = *find_gradual_schedule("cosine");
  CHECK(find_gradual_schedule("squared") == nullptr);
  // 3 of 10 steps: a third, two thirds, then the grid.
  CHECK(gradual_strength(linear, 0.3, 0, 10) == Approx(1.0 / 3));
  CHECK(gradual_strength(linear, 0.3, 1, 10) == Approx(2.0 / 3));
  CHECK(gradual_strength(linear, 0.3, 2, 10) == 1.0);
  CHECK(gradual_strength(linear, 0.3, 9, 10) == 1.0);
  CHECK(gradual_strength(cosine, 0.3, 0, 10) == Approx(0.25));
  CHECK(gradual_strength(cosine, 0.3, 1, 10) == Approx(0.75));
  CHECK(gradual_strength(cosine, 0.3, 2, 10) == 1.0);
  for (const GradualSchedule& row : gradual_schedules()) {
    CHECK(gradual_strength(row, 0, 0, 10) == 1.0);
    CHECK(gradual_strength(row, 1, 9, 10) == 1.0);
    double before = 0;
    for (std::int64_t step = 0; step < 10; ++step) {
      const double now = gradual_strength(row, 1, step, 10);
      CHECK(now > before);
      before = now;
    }
  }
}

TEST_CASE("gradual quantization passes gradients whole and ends exactly on the grid", "[quantize][ternary]") {
  for (const char* schedule : {"linear", "cosine"}) {
    auto model = tiny_decoder(3);
    GridTraining setting(true);
    const QuantizationPlan plan = plan_quantization(model->config(), setting.options);
    const auto constraint = fake_quantization(plan, {0.5, schedule});
    CHECK(contains_all(constraint->name(), {"gradual=0.5", schedule}));
    constraint->attach(*model);
    Linear& linear = model->blocks[1].mlp.down;
    linear.weight.requires_grad_(true);
    const at::Tensor rounded = round_to_grid(plan.tensors.at(linear.name), linear.weight), g = at::randn_like(linear.weight);
    constraint->before_forward(*model, 4, 20);
    CHECK(at::allclose(linear.effective_weight(), 0.5 * linear.weight + 0.5 * rounded, 1e-6, 1e-7));  // half way on both schedules
    (linear.effective_weight() * g).sum().backward();
    CHECK(at::equal(linear.weight.grad(), g));
    constraint->before_forward(*model, 9, 20);
    CHECK(at::equal(linear.effective_weight(), rounded));
    constraint->before_forward(*model, 2, 20);
    CHECK_FALSE(at::equal(linear.effective_weight(), rounded));
    constraint->after_step(*model);  // evaluation between steps: what will be deployed
    CHECK(at::equal(linear.effective_weight(), rounded));
    constraint->detach(*model);
  }
  CHECK_THROWS_AS(fake_quantization({}, {0.5, "squared"}), std::logic_error);
}

TEST_CASE("the gains of inserted sub-norms are the best ones, by hand and against shifted ones", "[quantize][ternary]") {
  const at::NoGradGuard no_grad;
  for (const bool decoder : {false, true}) {
    INFO((decoder ? "decoder" : "encoder"));
    const auto plain = decoder ? tiny_decoder(3) : tiny_encoder(3);
    GridTraining setting(decoder);
    auto model = plain->clone();
    const Json report = insert_sub_norms(*model, 8, 16, setting.context);
    CHECK(report.at("changes").size() == model->blocks.size());
    const CalibrationSet set = calibration_set(setting.context, 8);
    const double eps = plain->config().norm_eps;
    for (const bool attention : {true, false}) {
      const std::string tap = attention ? "layer.1.context" : "layer.1.ffn";
      const at::Tensor gain = (attention ? model->blocks[1].attention.sub_norm : model->blocks[1].mlp.sub_norm).weight.to(at::kDouble);
      std::vector<at::Tensor> rows;
      for (std::size_t b = 0; b < set.inputs.size(); ++b) {
        TapMap taps({tap});
        plain->hidden(set.inputs[b], &taps);
        at::Tensor x = taps.at(tap).flatten(0, 1).to(at::kDouble);
        rows.push_back(set.valid[b].defined() ? x.index_select(0, set.valid[b]) : x);
      }
      const at::Tensor x = at::cat(rows), r = (x.square().mean(1, true) + eps).sqrt();
      CHECK(report.at("tokens") == x.size(0));
      double up = 0, down = 0;  // channel 5 by its definition
      for (std::int64_t t = 0; t < x.size(0); ++t) {
        const double v = x[t][5].item<double>(), n = r[t][0].item<double>();
        up += v * v / n, down += v * v / (n * n);
      }
      CHECK(gain[5].item<double>() == Approx(up / down).epsilon(1e-6));
      const auto error = [&](const at::Tensor& g) { return (x - x / r * g).square().sum().item<double>(); };
      CHECK(report.at("changes")[1].at(attention ? "attention" : "mlp").get<double>() == Approx(error(gain) / x.square().sum().item<double>()).epsilon(1e-4));
      CHECK(error(gain) < error(gain * 1.01));
      CHECK(error(gain) < error(gain * 0.99));
      CHECK(error(gain) <= error(at::full_like(gain, r.mean().item<double>())));
      CHECK(error(gain) < error(at::ones_like(gain)));
    }
    CHECK(contains_all(error_text([&] { insert_sub_norms(*model, 8, 16, setting.context); }), {"03-quantize", "already", "leave subln out"}));
  }
}

TEST_CASE("tokens of equal root mean square are left as they are, dead channels stay finite", "[quantize][ternary]") {
  const at::NoGradGuard no_grad;
  auto model = tiny_decoder(3);
  GridTraining setting(true);
  setting.data.calibration = {std::vector<std::int64_t>(16, 9)};  // one token: every position sees the same
  for (Block& block : model->blocks) block.mlp.up.weight.select(0, 4).zero_();
  const ModelInput input = testing::tiny_input(setting.data.calibration);
  const at::Tensor before = model->forward(input);
  insert_sub_norms(*model, 8, 16, setting.context);
  CHECK(at::allclose(model->forward(input), before, 1e-4, 1e-4));
  CHECK(model->blocks[0].mlp.sub_norm.weight.isfinite().all().item<bool>());
  CHECK(model->blocks[0].mlp.sub_norm.weight[4].item<double>() > 0);  // the gain of all channels together

  auto other = tiny_decoder(3);
  setting.data.calibration.clear();  // the training text takes its place
  CHECK(insert_sub_norms(*other, 3, 16, setting.context).at("tokens") == 48);
  auto none = tiny_decoder(3);
  setting.data.train_documents.clear();
  CHECK(contains_all(error_text([&] { insert_sub_norms(*none, 3, 16, setting.context); }), {"calibration", "03-quantize"}));
}

TEST_CASE("sub-norms, fading, next-token training: the stage ends on the grid and keeps the norms", "[quantize][ternary]") {
  for (const bool decoder : {false, true}) {
    INFO((decoder ? "decoder" : "encoder"));
    auto model = decoder ? tiny_decoder(3) : tiny_encoder(3);
    GridTraining setting(decoder);
    setting.options.subln = true, setting.options.gradual = 0.5, setting.options.gradual_schedule = "cosine", setting.options.has_pretrain = decoder;
    const QuantizedModel result = setting.run(*model);
    CHECK(model->config().sub_norms);
    CHECK(result.plan.tensors.at(model->tokens.name).grid->name == "int4");
    for (const auto& [name, q] : result.tensors) {
      CHECK(at::equal(*find_quantizable(*model, name).weight, decode(result.plan.tensors.at(name), q)));
      CHECK(name.find("sub_norm") == std::string::npos);  // norms stay float
    }
    CHECK(setting.details.contains("sub_norms"));
    CHECK(setting.details.contains("pretrain") == decoder);
    CHECK(setting.details.at("training").at("steps") == 6);
    if (decoder) CHECK(setting.details.at("pretrain").at("training").at("steps") == 6);
  }
}

TEST_CASE("a training on the grid killed at any step and resumed gives the same bytes", "[quantize][ternary]") {
  // The head is asked for in every step, of the next-token training first: the interruption comes in the middle of one.
  std::int64_t calls = 0;
  const auto train = [&](GridTraining& setting, std::int64_t kill, bool resume) {
    auto model = tiny_decoder(3);
    calls = 0;
    model->lm_head.transform = [&calls, kill](const at::Tensor& weight) {
      if (++calls == kill) request_interrupt(2);
      return weight;
    };
    setting.options.subln = true, setting.options.gradual = 0.5, setting.options.has_pretrain = true;
    setting.context.resume = resume;
    setting.run(*model);
    return fingerprint(*model);
  };
  GridTraining whole(true);
  const std::string expected = train(whole, 0, false);
  const std::int64_t all = calls;
  REQUIRE(all >= 12);
  std::int64_t killed = 0;
  for (const std::int64_t call : {std::int64_t(1), all / 4, all / 2 - 1, all / 2, all / 2 + 1, all * 3 / 4, all}) {
    INFO(call << " of " << all);
    GridTraining broken(true);
    try {
      train(broken, call, false);
    } catch (const Error& error) {
      CHECK(error.code() == ExitCode::interrupted);
      ++killed;
    }
    request_interrupt(0);
    CHECK(train(broken, 0, true) == expected);
  }
  CHECK(killed >= 5);  // in its last step a training is done
  // Another fade is another training.
  GridTraining other(true);
  CHECK_THROWS_AS(train(other, 2, false), Error);
  request_interrupt(0);
  auto model = tiny_decoder(3);
  other.options.gradual_schedule = "cosine", other.context.resume = true;
  CHECK(contains_all(error_text([&] { other.run(*model); }), {"another run", "gradual"}));
}

TEST_CASE("a fade inside the first training is over before the second", "[quantize][ternary]") {
  // With a fade over all of it the second training differs from one that fades itself; without pretrain it is the second that fades.
  const auto loss_of = [](double gradual, bool pretrain) {
    auto model = tiny_decoder(3);
    GridTraining setting(true);
    setting.options.gradual = gradual, setting.options.has_pretrain = pretrain;
    setting.run(*model);
    return setting.details.at("loss_curve").dump();
  };
  CHECK(loss_of(1.0, false) != loss_of(0, false));
  CHECK(loss_of(1.0, true) != loss_of(0, true));
}

TEST_CASE("changes of basis leave a model with sub-norms what it is", "[quantize][ternary][basis]") {
  const at::NoGradGuard no_grad;
  for (const char* basis : {"fold", "awq", "smoothquant", "hadamard"}) {
    INFO(basis);
    auto model = tiny_decoder(3);
    model->add_sub_norms();
    testing::stir(*model, 4);
    GridTraining setting(true);
    setting.options.method = "rtn", setting.options.basis.basis = basis;
    const ModelInput input = testing::tiny_input({setting.data.calibration.front()});
    const at::Tensor before = model->forward(input);
    change_basis(*model, setting.options, {}, setting.context);
    CHECK((model->forward(input) - before).abs().max().item<double>() < 1e-3 * before.abs().max().item<double>());
    if (std::string(basis) == "hadamard") CHECK(contains_all(setting.details.at("basis").at("notes").dump(), {"values not rotated", "sub-norm"}));
  }
}

TEST_CASE("keys of a training on the grid are refused where nothing would come of them", "[quantize][ternary]") {
  const auto text = [](const std::function<void(QuantizeOptions&)>& set, std::optional<bool> classification = std::nullopt) {
    QuantizeOptions options;
    options.method = "qad";
    set(options);
    Problems problems;
    check_grid_training(options, classification, "recipe.yaml:9", problems);
    return problems.empty() ? std::string() : error_text([&] { problems.throw_if_any("the stage"); });
  };
  CHECK(text([](QuantizeOptions& o) { o.subln = true, o.gradual = 0.3, o.gradual_schedule = "cosine", o.has_pretrain = true; }).empty());
  CHECK(contains_all(text([](QuantizeOptions& o) { o.method = "gptq", o.subln = true; }), {"recipe.yaml:9", "subln", "gptq", "qad"}));
  CHECK(contains_all(text([](QuantizeOptions& o) { o.method = "rtn", o.gradual = 0.3; }), {"gradual", "rtn"}));
  CHECK(contains_all(text([](QuantizeOptions& o) { o.method = "rtn", o.has_pretrain = true; }), {"pretrain", "rtn"}));
  CHECK(contains_all(text([](QuantizeOptions& o) { o.gradual_schedule = "cosine"; }), {"gradual_schedule", "gradual: 0"}));
  CHECK(contains_all(text([](QuantizeOptions& o) { o.has_pretrain = true; }, true), {"pretrain", "class labels"}));
  CHECK(contains_all(text([](QuantizeOptions& o) { o.has_pretrain = o.pretrain.has_lora = true; }), {"lora", "pretrain"}));
  CHECK(text([](QuantizeOptions& o) { o.has_pretrain = true; }, false).empty());

  auto model = tiny_encoder(3);
  GridTraining setting(false);
  setting.options.has_pretrain = true;
  CHECK(contains_all(error_text([&] { setting.run(*model); }), {"03-quantize", "pretrain", "class labels"}));
  setting.options.has_pretrain = false, setting.options.subln = true, setting.options.method = "rtn";
  CHECK(contains_all(error_text([&] { setting.run(*model); }), {"subln", "qad"}));
  CHECK_FALSE(model->config().sub_norms);  // refused before anything was changed
}

}  // namespace kompakt
