// The training loop on tiny models: it learns, accumulates exactly, freezes, calls hooks in order, resumes to the same bytes.
#include <ATen/ATen.h>

#include "tests/catch_torch.h"
#include <cmath>
#include <set>

#include "core/error.h"
#include "core/log.h"
#include "core/system.h"
#include "tests/support.h"
#include "tests/train/fixtures.h"
#include "train/dev_score.h"
#include "train/optimizer.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

// Stops the process's training at a step, as a kill would: nothing is saved on this way out.
class Killer final : public Objective {
 public:
  explicit Killer(int at) : at_(at) {}
  bool needs_logits() const override { return false; }
  at::Tensor loss(const ObjectiveInput& input, std::vector<LossPart>&) override {
    if (++calls_ == at_) throw std::runtime_error("killed");
    return input.hidden.sum() * 0;
  }

 private:
  int at_, calls_ = 0;
};

// Asks for an interruption in the middle of a step, as Ctrl-C would.
class Interrupter final : public Objective {
 public:
  explicit Interrupter(int at) : at_(at) {}
  bool needs_logits() const override { return false; }
  at::Tensor loss(const ObjectiveInput& input, std::vector<LossPart>&) override {
    if (++calls_ == at_) request_interrupt(2);
    return input.hidden.sum() * 0;
  }

 private:
  int at_, calls_ = 0;
};

// A learned scale on the loss: an objective's own parameter.
class LearnedScale final : public Objective {
 public:
  LearnedScale() : scale_(at::ones({2})) {}
  std::vector<std::pair<std::string, at::Tensor>> parameters() override { return {{"scale", scale_}}; }
  at::Tensor loss(const ObjectiveInput& input, std::vector<LossPart>& parts) override {
    const at::Tensor value = (input.logits.mean() * scale_[0] - 1).square() + (scale_[1] - 3).square();
    parts.push_back({"scale", value});
    return value;
  }
  at::Tensor scale_;
};

class Recorder final : public Constraint {
 public:
  explicit Recorder(std::vector<std::string>& log, std::string name) : log_(log), name_(std::move(name)) {}
  std::string name() const override { return name_; }
  void attach(Transformer& model) override {
    log_.push_back(name_ + " attach" + (model.tokens.compacted() ? " compacted" : ""));
    model.blocks[0].mlp.up.transform = [this](const at::Tensor& weight) {
      log_.push_back(name_ + " forward");
      return weight * mask_;
    };
    mask_ = at::ones_like(model.blocks[0].mlp.up.weight);
    mask_.select(0, 0).zero_();
  }
  void detach(Transformer& model) override {
    model.blocks[0].mlp.up.transform = {};
    log_.push_back(name_ + " detach");
  }
  void before_forward(Transformer&, std::int64_t step, std::int64_t steps) override { log_.push_back(str(name_, " before ", step, "/", steps)); }
  void after_step(Transformer& model) override {
    at::Tensor weight = model.blocks[0].mlp.up.weight.detach();
    weight.mul_(mask_);
    log_.push_back(name_ + " after");
  }

 private:
  std::vector<std::string>& log_;
  std::string name_;
  at::Tensor mask_;
};

}  // namespace

TEST_CASE("training lowers the loss and finds the labels") {
  const TaskData data = tiny_data();
  const TemporaryFolder work;
  Json details = Json::object();
  StageContext context = tiny_context(data, work.path(), &details);
  auto model = tiny_bert();
  TrainOptions options = tiny_options();
  options.epochs = 12;
  const TrainResult result = train_labels(*model, options, context);
  CHECK(result.steps == 72);
  CHECK(result.dev_score == 1.0);
  CHECK(details["loss_curve"].front()["loss"].get<double>() > 0.9);
  CHECK(details["loss_curve"].back()["loss"].get<double>() < 0.3);
  CHECK(details["loss_curve"].back()["parts"].contains("cross_entropy"));
  CHECK(details["dev_curve"].size() == 12);
  CHECK_FALSE(model->tokens.compacted());
  CHECK(model->tokens.weight.size(0) == 50);
  for (const auto& [name, value] : std::as_const(*model).parameters()) {
    CHECK_FALSE(value.requires_grad());
    CHECK_FALSE(value.grad().defined());
  }
}

TEST_CASE("two micro batches of 16 equal one of 32") {
  const TaskData data = tiny_data(32, 0);
  TrainOptions options = tiny_options();
  options.dropout = 0;
  options.steps = 3;
  const auto run = [&](std::int64_t batch, std::int64_t accumulate) {
    const TemporaryFolder work;
    StageContext context = tiny_context(data, work.path());
    options.batch_size = batch;
    options.accumulate = accumulate;
    auto model = tiny_bert();
    const double loss = train_labels(*model, options, context).final_loss;
    return std::pair(std::move(model), loss);
  };
  const auto [one, one_loss] = run(32, 1);
  const auto [two, two_loss] = run(16, 2);
  const auto [uneven, uneven_loss] = run(24, 2);  // 24 + 8: a mean of means would differ
  CHECK(two_loss == Approx(one_loss).epsilon(1e-5));
  CHECK(uneven_loss == Approx(one_loss).epsilon(1e-5));
  const auto a = std::as_const(*one).parameters(), b = std::as_const(*two).parameters(), c = std::as_const(*uneven).parameters();
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i].first.find("key.bias") != std::string::npos) continue;  // its gradient is zero but for rounding, which Adam blows up
    INFO(a[i].first);
    CHECK((a[i].second - b[i].second).abs().max().item<double>() < 2e-4);
    CHECK((a[i].second - c[i].second).abs().max().item<double>() < 2e-4);
  }
}

TEST_CASE("a run killed at any step and resumed gives the same bytes") {
  const TaskData data = tiny_data();
  TrainOptions options = tiny_options();
  options.keep = GENERATE("last", "best");
  options.save_every_steps = 4;
  std::string unbroken;
  {
    const TemporaryFolder work;
    StageContext context = tiny_context(data, work.path());
    auto model = tiny_bert();
    train_labels(*model, options, context);
    unbroken = weight_bytes(*model);
  }
  for (const int kill : {1, 3, 6, 9, 12}) {
    INFO("killed in step " << kill);
    const TemporaryFolder work;
    Json details = Json::object();
    StageContext context = tiny_context(data, work.path(), &details);
    auto broken = tiny_bert();
    CHECK_THROWS_AS(train(*broken, options, {std::shared_ptr<Objective>(label_cross_entropy()), std::make_shared<Killer>(kill)}, {}, context), std::runtime_error);
    CHECK_FALSE(broken->tokens.compacted());
    CHECK(broken->tokens.weight.size(0) == 50);
    context.resume = true;
    auto resumed = tiny_bert();
    const TrainResult result = train_labels(*resumed, options, context);
    CHECK(result.steps == 12);
    CHECK(weight_bytes(*resumed) == unbroken);
    CHECK(details["loss_curve"].size() == 12);
    CHECK(details["dev_curve"].size() == 2);
    // Finished: resuming again trains nothing and gives the same.
    auto again = tiny_bert();
    train(*again, options, {std::shared_ptr<Objective>(label_cross_entropy()), std::make_shared<Killer>(1)}, {}, context);
    CHECK(weight_bytes(*again) == unbroken);
  }
}

TEST_CASE("an interruption finishes the step, saves, and resumes to the same bytes") {
  const TaskData data = tiny_data();
  const TrainOptions options = tiny_options();
  const TemporaryFolder plain, work;
  StageContext context = tiny_context(data, plain.path());
  auto model = tiny_bert();
  train_labels(*model, options, context);
  context = tiny_context(data, work.path());
  auto broken = tiny_bert();
  try {
    train(*broken, options, {std::shared_ptr<Objective>(label_cross_entropy()), std::make_shared<Interrupter>(5)}, {}, context);
    FAIL("not interrupted");
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::interrupted);
  }
  request_interrupt(0);
  REQUIRE_FALSE(interrupted());
  context.resume = true;
  auto resumed = tiny_bert();
  train(*resumed, options, {std::shared_ptr<Objective>(label_cross_entropy()), std::make_shared<Killer>(8)}, {}, context);  // 7 steps were left
  CHECK(weight_bytes(*resumed) == weight_bytes(*model));
}

TEST_CASE("a state of other options, data or model is refused") {
  const TaskData data = tiny_data();
  const TrainOptions options = tiny_options();
  const TemporaryFolder work;
  StageContext context = tiny_context(data, work.path());
  auto model = tiny_bert();
  train_labels(*model, options, context);
  context.resume = true;
  TrainOptions other = options;
  other.learning_rate = 0.5;
  CHECK(contains_all(error_text([&] { train_labels(*tiny_bert(), other, context); }), {"options.learning_rate", "0.01", "0.5", "resume"}));
  CHECK(contains_all(error_text([&] { train_labels(*tiny_bert(3, 6), options, context); }), {"model"}));
  TaskData more = tiny_data(56);
  StageContext changed = context;
  changed.data = &more;
  CHECK(contains_all(error_text([&] { train_labels(*tiny_bert(), options, changed); }), {"data"}));
  other = options;
  other.save_every_steps = 3;  // does not change the weights
  auto again = tiny_bert();
  train_labels(*again, other, context);
  CHECK(weight_bytes(*again) == weight_bytes(*model));
  // Without resume the old state is not looked at.
  context.resume = false;
  other.learning_rate = 0.02;
  CHECK(train_labels(*tiny_bert(), other, context).steps == 12);
}

TEST_CASE("frozen parameters stay, others move; untouched embedding rows stay") {
  const TaskData data = tiny_data();
  const TemporaryFolder work;
  StageContext context = tiny_context(data, work.path());
  TrainOptions options = tiny_options();
  options.freeze = {"*position_embeddings*", "encoder.layer.0.*"};
  auto model = tiny_bert();
  const auto before = model->clone();
  train_labels(*model, options, context);
  const auto a = std::as_const(*before).parameters(), b = std::as_const(*model).parameters();
  for (std::size_t i = 0; i < a.size(); ++i) {
    const bool frozen = a[i].first.find("position_embeddings") != std::string::npos || a[i].first.find("encoder.layer.0.") != std::string::npos;
    INFO(a[i].first);
    CHECK(at::equal(a[i].second, b[i].second) == frozen);
  }
  CHECK(at::equal(before->tokens.weight.narrow(0, 41, 9), model->tokens.weight.narrow(0, 41, 9)));
  CHECK_FALSE(at::equal(before->tokens.weight[1], model->tokens.weight[1]));
}

TEST_CASE("hooks of constraints come in order, and leave nothing behind") {
  const TaskData data = tiny_data(16, 0);
  const TemporaryFolder work;
  StageContext context = tiny_context(data, work.path());
  TrainOptions options = tiny_options();
  options.steps = 2;
  options.accumulate = 2;
  std::vector<std::string> log;
  auto model = tiny_bert();
  train(*model, options, {std::shared_ptr<Objective>(label_cross_entropy())}, {std::make_shared<Recorder>(log, "a")}, context);
  CHECK(log == std::vector<std::string>{"a attach compacted", "a before 0/2", "a forward", "a forward", "a after", "a before 1/2", "a forward", "a forward", "a after", "a detach"});
  CHECK_FALSE(model->blocks[0].mlp.up.transform);
  CHECK(model->blocks[0].mlp.up.weight[0].abs().max().item<double>() == 0);

  log.clear();
  CHECK_THROWS(train(*model, options, {std::make_shared<Killer>(1)}, {std::make_shared<Recorder>(log, "a"), std::make_shared<Recorder>(log, "b")}, context));
  CHECK(log.back() == "a detach");
  CHECK(log[log.size() - 2] == "b detach");
  CHECK_FALSE(model->tokens.compacted());
}

TEST_CASE("a monitor sees every step, ends the training early, and is saved with the state") {
  struct Watcher final : TrainMonitor {
    std::vector<std::int64_t> seen;
    std::int64_t last = 1000;
    void after_step(Transformer& model, std::int64_t step, std::int64_t steps) override {
      CHECK(steps == 12);
      CHECK(model.blocks[0].mlp.up.weight.requires_grad());
      seen.push_back(step);
    }
    bool enough() const override { return !seen.empty() && seen.back() >= last; }
    Json save() const override { return seen; }
    void restore(const Json& saved) override { seen = saved.get<std::vector<std::int64_t>>(); }
  };
  const TaskData data = tiny_data();
  TrainOptions options = tiny_options();
  options.save_every_steps = 4;
  const auto run = [&](StageContext& context, Watcher& watcher, int kill) {
    auto model = tiny_bert();
    std::vector<std::shared_ptr<Objective>> objectives = {std::shared_ptr<Objective>(label_cross_entropy())};
    if (kill > 0) objectives.push_back(std::make_shared<Killer>(kill));
    return train(*model, options, objectives, {}, context, &watcher);
  };
  const TemporaryFolder work;
  StageContext context = tiny_context(data, work.path());
  Watcher killed, resumed, again;
  CHECK_THROWS_AS(run(context, killed, 7), std::runtime_error);
  CHECK(killed.seen == std::vector<std::int64_t>{1, 2, 3, 4, 5, 6});
  context.resume = true;
  resumed.last = again.last = 9;
  CHECK(run(context, resumed, 0).steps == 9);
  CHECK(resumed.seen == std::vector<std::int64_t>{1, 2, 3, 4, 5, 6, 7, 8, 9});
  CHECK(run(context, again, 1).steps == 9);  // nothing is left to do
  CHECK(again.seen == resumed.seen);
}

TEST_CASE("norms and biases can have a rate of their own") {
  TrainOptions options = tiny_options();
  options.learning_rate = 1e-3, options.norm_learning_rate = 5e-4;
  auto model = tiny_bert();
  for (const TrainableParameter& parameter : trainable_parameters(*model, options)) {
    CAPTURE(parameter.name);
    const bool head = parameter.name.find("classifier") != std::string::npos;
    CHECK(parameter.learning_rate == (parameter.value.dim() == 1 && !head ? 5e-4 : 1e-3));
  }
}

TEST_CASE("parameters of an objective train and survive a kill") {
  const TaskData data = tiny_data();
  TrainOptions options = tiny_options();
  options.save_every_steps = 2;
  const TemporaryFolder plain, work;
  StageContext context = tiny_context(data, plain.path());
  auto unbroken = std::make_shared<LearnedScale>();
  auto model = tiny_bert();
  train(*model, options, {std::shared_ptr<Objective>(label_cross_entropy()), unbroken}, {}, context);
  CHECK(unbroken->scale_[1].item<double>() > 1.05);
  context = tiny_context(data, work.path());
  auto broken_model = tiny_bert();
  CHECK_THROWS(train(*broken_model, options, {std::shared_ptr<Objective>(label_cross_entropy()), std::make_shared<LearnedScale>(), std::make_shared<Killer>(8)}, {}, context));
  context.resume = true;
  auto resumed = std::make_shared<LearnedScale>();
  auto resumed_model = tiny_bert();
  train(*resumed_model, options, {std::shared_ptr<Objective>(label_cross_entropy()), resumed}, {}, context);
  CHECK(at::equal(resumed->scale_.detach(), unbroken->scale_.detach()));
  CHECK(weight_bytes(*resumed_model) == weight_bytes(*model));
}

TEST_CASE("keep best takes the epoch with the best score") {
  TaskData data = tiny_data();
  const TemporaryFolder work;
  Json details = Json::object();
  StageContext context = tiny_context(data, work.path(), &details);
  TrainOptions options = tiny_options();
  options.epochs = 8;
  options.learning_rate = 0.5;  // wild on purpose
  options.clip = 0;
  options.keep = "best";
  auto model = tiny_bert();
  const TrainResult result = train_labels(*model, options, context);
  double best = 0;
  for (const Json& point : details["dev_curve"]) best = std::max(best, point["score"].get<double>());
  CHECK(result.dev_score == best);
  CHECK(accuracy(*model, data.dev, 0) == best);
}

TEST_CASE("without dev data there is no score") {
  const TaskData data = tiny_data(16, 0);
  const TemporaryFolder work;
  StageContext context = tiny_context(data, work.path());
  TrainOptions options = tiny_options();
  options.keep = "best";
  CHECK(std::isnan(train_labels(*tiny_bert(), options, context).dev_score));
}

TEST_CASE("a loss that is not finite stops with the batch kept") {
  class Broken final : public Objective {
   public:
    at::Tensor loss(const ObjectiveInput& input, std::vector<LossPart>& parts) override {
      const at::Tensor value = input.logits.sum() * std::nan("");
      parts.push_back({"broken", value});
      return value;
    }
  };
  const TaskData data = tiny_data();
  const TemporaryFolder work;
  StageContext context = tiny_context(data, work.path());
  auto model = tiny_bert();
  const std::string before = weight_bytes(*model);
  CHECK(contains_all(error_text([&] { train(*model, tiny_options(), {std::make_shared<Broken>()}, {}, context); }), {"step 1", "not finite", "broken", "bad_batch.json"}));
  CHECK(weight_bytes(*model) == before);
  const Json batch = read_json(work.path() / "bad_batch.json");
  CHECK(batch["micro_batches"][0].size() == 8);
  CHECK(batch["micro_batches"][0][0]["ids"].size() >= 3);
}

TEST_CASE("events name the stage, the parts and the rates") {
  const TaskData data = tiny_data();
  const TemporaryFolder work;
  StageContext context = tiny_context(data, work.path());
  open_metrics(work.path() / "metrics.jsonl");
  train_labels(*tiny_bert(), tiny_options(), context);
  close_metrics();
  int steps = 0, devs = 0;
  for (const std::string& line : split(read_text(work.path() / "metrics.jsonl"), '\n')) {
    if (line.empty()) continue;
    const Json event = parse_json(line, "metrics");
    if (event["event"] == "dev") ++devs;
    if (event["event"] != "step") continue;
    ++steps;
    CHECK(event["stage"] == "01-finetune");
    CHECK(event["parts"]["cross_entropy"].get<double>() == Approx(event["loss"].get<double>()));
    for (const char* key : {"step", "gradient_norm", "learning_rate", "tokens_per_second", "memory_bytes"}) CHECK(event[key].get<double>() > 0);
  }
  CHECK(steps == 12);
  CHECK(devs == 2);
}

TEST_CASE("text trains on next tokens, packed with boundaries") {
  const TaskData data = tiny_text();
  for (const bool tied : {true, false}) {
    const TemporaryFolder work;
    StageContext context = tiny_context(data, work.path());
    TrainOptions options = tiny_options();
    options.epochs = 10;
    options.batch_size = 2;
    options.accumulate = 2;
    options.sequence_length = 16;
    auto model = tiny_llama(tied);
    const double before = mean_loss(*model, data.heldout);
    const TrainResult result = train_labels(*model, options, context);
    CHECK(before == Approx(std::log(50.0)).epsilon(0.1));
    CHECK(-result.dev_score < 0.5 * before);
  }
}

TEST_CASE("bf16 autocast trains and keeps float32 weights") {
  const TaskData data = tiny_data();
  const TemporaryFolder work;
  StageContext context = tiny_context(data, work.path());
  TrainOptions options = tiny_options();
  options.precision = "bf16";
  options.epochs = 12;
  auto model = tiny_bert();
  CHECK(train_labels(*model, options, context).dev_score > 0.9);
  CHECK(model->classifier.weight.scalar_type() == at::kFloat);
}

TEST_CASE("mistakes are told before anything is computed") {
  const TemporaryFolder work;
  TaskData data = tiny_data(0, 0);
  StageContext context = tiny_context(data, work.path());
  CHECK(contains_all(error_text([&] { train_labels(*tiny_bert(), tiny_options(), context); }), {"empty"}));
  data = tiny_data();
  CHECK(contains_all(error_text([&] { train_labels(*tiny_bert(0), tiny_options(), context); }), {"classifier"}));
  data.train.labels[5] = 7;
  CHECK(contains_all(error_text([&] { train_labels(*tiny_bert(), tiny_options(), context); }), {"label 7", "3 classes"}));
  TaskData text = tiny_text(1, 10);
  context.data = &text;
  CHECK(contains_all(error_text([&] { train_labels(*tiny_llama(), tiny_options(), context); }), {"tokens", "512"}));
  CHECK(contains_all(error_text([&] { train_labels(*tiny_bert(0), tiny_options(), context); }), {"vocabulary"}));
}
