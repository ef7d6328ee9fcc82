// Activation checkpointing, running means of weights, low-rank adapters, early stopping.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"

#include <cmath>

#include "model/recompute.h"
#include "tests/support.h"
#include "tests/train/fixtures.h"
#include "train/ema.h"
#include "train/lora.h"
#include "train/precision.h"
#include "train/teacher.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

TrainOptions text_options() {
  TrainOptions options = tiny_options();
  options.steps = 9;
  options.batch_size = 4;
  options.sequence_length = 10;
  options.save_every_steps = 4;
  return options;
}

// Value and gradients of all parameters of a sum over hidden states.
std::vector<at::Tensor> gradients_of(Transformer& model, const ModelInput& input, bool recompute, const std::set<std::string>& wanted = {}, bool bf16 = false) {
  model.recompute_blocks = recompute;
  TapMap taps(wanted);
  at::Tensor total;
  {
    const AutocastGuard autocast(c10::Device(c10::kCPU), bf16);
    total = model.hidden(input, &taps).to(at::kFloat).square().sum();
    for (const auto& [name, value] : taps.values()) total = total + value.to(at::kFloat).sin().sum() * 0.1;
  }
  total.backward();
  std::vector<at::Tensor> out{total.detach()};
  for (const NamedParameter& parameter : model.parameters()) {
    out.push_back(parameter.value->grad().defined() ? parameter.value->grad().clone() : at::Tensor());
    parameter.value->mutable_grad() = at::Tensor();
  }
  model.recompute_blocks = false;
  return out;
}

bool same(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i)
    if (a[i].defined() != b[i].defined() || (a[i].defined() && !at::equal(a[i], b[i]))) return false;
  return true;
}

// The gradients of a block's input add up in another order where a tap uses it as well.
bool nearly(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i)
    if (a[i].defined() != b[i].defined() || (a[i].defined() && !at::allclose(a[i], b[i], 1e-5, 1e-6))) return false;
  return true;
}

class Killed final : public Objective {
 public:
  explicit Killed(int calls) : calls_(calls) {}
  bool needs_logits() const override { return false; }
  at::Tensor loss(const ObjectiveInput& input, std::vector<LossPart>&) override {
    if (calls_-- == 0) throw std::runtime_error("killed");
    return input.hidden.sum() * 0;
  }

 private:
  int calls_;
};

// Trains, then trains again with a kill after `calls` batches and a resume: both must give the same weights, which are returned.
std::string same_after_kill(const TrainOptions& options, const TaskData& data, int calls, std::unique_ptr<Transformer> (*make)()) {
  const TemporaryFolder work;
  StageContext context = tiny_context(data, work.path() / "whole");
  const auto whole = make();
  train_labels(*whole, options, context);
  StageContext broken = tiny_context(data, work.path() / "broken");
  const auto run = [&](Transformer& model, int left) { train(model, options, {std::shared_ptr<Objective>(label_cross_entropy()), std::make_shared<Killed>(left)}, {}, broken); };
  CHECK_THROWS_WITH(run(*make(), calls), "killed");
  broken.resume = true;
  const auto resumed = make();
  run(*resumed, 1000);
  CHECK(weight_bytes(*resumed) == weight_bytes(*whole));
  return weight_bytes(*whole);
}

std::unique_ptr<Transformer> small_llama() { return tiny_llama(); }
std::unique_ptr<Transformer> small_bert() { return tiny_bert(); }

}  // namespace

TEST_CASE("recompute: value and gradients are those of the plain function, and it runs twice") {
  const at::Tensor w = at::linspace(-1, 1, 6, at::kDouble).reshape({2, 3}).requires_grad_();
  const at::Tensor x = at::linspace(0.5, 2, 6, at::kDouble).reshape({3, 2}).requires_grad_();
  int calls = 0;
  const auto function = [&](const at::Tensor& in) {
    ++calls;
    return at::matmul(in, w).tanh();
  };
  recompute(function, x).square().sum().backward();
  CHECK(calls == 2);
  const at::Tensor gx = x.grad().clone(), gw = w.grad().clone();
  x.mutable_grad() = at::Tensor(), w.mutable_grad() = at::Tensor();
  function(x).square().sum().backward();
  CHECK(at::equal(gx, x.grad()));
  CHECK(at::equal(gw, w.grad()));
  // An input without a gradient: the weights still get theirs.
  w.mutable_grad() = at::Tensor();
  recompute(function, x.detach()).square().sum().backward();
  CHECK(at::equal(gw, w.grad()));
  calls = 0;
  const at::NoGradGuard no_grad;
  recompute(function, x);
  CHECK(calls == 1);
}

TEST_CASE("activation checkpointing leaves the gradients as they are: decoder and encoder, taps, frozen embeddings, bfloat16, packed text") {
  for (const bool encoder : {false, true}) {
    const auto model = encoder ? tiny_bert(0) : tiny_llama();
    model->requires_grad(true);
    ModelInput input;
    input.ids = at::tensor({1, 4, 7, 10, 13, 16, 19, 22, 2, 5}, at::kLong).reshape({2, 5});
    ModelInput packed = input;
    packed.documents = at::tensor({0, 0, 1, 1, 1, 0, 0, 0, 0, 1}, at::kLong).reshape({2, 5});
    packed.positions = at::tensor({0, 1, 0, 1, 2, 0, 1, 2, 3, 0}, at::kLong).reshape({2, 5});
    INFO((encoder ? "encoder" : "decoder"));
    for (const auto& taps : std::vector<std::set<std::string>>{{}, {"layer.0.output", "layer.1.input"}, {"layer.1.query"}, {"layer.0.ffn", "final"}})
      CHECK(nearly(gradients_of(*model, input, true, taps), gradients_of(*model, input, false, taps)));
    CHECK(same(gradients_of(*model, input, true), gradients_of(*model, input, false)));  // without taps bit for bit
    CHECK(same(gradients_of(*model, packed, true), gradients_of(*model, packed, false)));
    CHECK(same(gradients_of(*model, input, true, {}, true), gradients_of(*model, input, false, {}, true)));
    model->tokens.weight.requires_grad_(false);
    CHECK(same(gradients_of(*model, input, true), gradients_of(*model, input, false)));
  }
}

TEST_CASE("training with recompute gives the same weights") {
  const TaskData data = tiny_text();
  const TemporaryFolder work;
  std::string plain;
  for (const bool recompute : {false, true}) {
    TrainOptions options = text_options();
    options.recompute = recompute;
    StageContext context = tiny_context(data, work.path() / (recompute ? "again" : "plain"));
    const auto model = tiny_llama();
    train_labels(*model, options, context);
    CHECK(!model->recompute_blocks);
    if (recompute) CHECK(weight_bytes(*model) == plain);
    plain = weight_bytes(*model);
  }
}

TEST_CASE("running mean of the weights: by hand, exchanged and back") {
  at::Tensor w = at::full({2}, 4.0f);
  EmaWeights ema({{"w", w}}, 0.5);
  w.fill_(8);
  ema.update(1);  // decay 2/11: 4 + 9/11 * 4
  const auto mean = [&] { return ema.state().at(0).second[0].item<double>(); };
  CHECK(ema.state().at(0).first == "ema.w");
  CHECK(mean() == Approx(4 + 36.0 / 11));
  const double before = mean();
  w.fill_(0);
  ema.update(100);  // decay 0.5
  CHECK(mean() == Approx(before / 2));
  ema.swap();
  CHECK(w[0].item<double>() == Approx(before / 2));
  CHECK(mean() == 0);
  ema.swap();
  CHECK(w[1].item<double>() == 0);
  EmaWeights off({{"w", w}}, 0);
  CHECK(!off.active());
  CHECK(off.state().empty());
  off.update(1);
  off.swap();
}

TEST_CASE("training ends with the mean of the weights, also after a kill, and with the best of them") {
  TrainOptions options = text_options();
  const TaskData data = tiny_text();
  const std::string last = same_after_kill(options, data, 6, small_llama);
  options.ema = 0.9;
  const std::string mean = same_after_kill(options, data, 6, small_llama);
  CHECK(mean != last);
  options.keep = "best";
  options.evaluate_every_steps = 2;
  same_after_kill(options, data, 7, small_llama);
}

TEST_CASE("adapters: the start is the model itself, the end is merged, nothing else has moved") {
  const TaskData data = tiny_text();
  const auto start = tiny_llama(), model = tiny_llama();
  LoraAdapters adapters({2, 6, {"*q_proj", "*down_proj"}}, 3);
  const ModelInput input{at::tensor({1, 4, 7, 10, 13}, at::kLong).reshape({1, 5}), {}, {}, {}};
  const at::NoGradGuard no_grad;
  adapters.attach(*model);
  CHECK(at::equal(model->forward(input), start->forward(input)));
  const auto parameters = adapters.parameters();
  REQUIRE(parameters.size() == 8);  // two layers, two linears, A and B
  CHECK(parameters[0].first == "model.layers.0.self_attn.q_proj.lora_A");
  CHECK(parameters[0].second.sizes() == at::IntArrayRef({2, 16}));
  CHECK(parameters[1].second.sizes() == at::IntArrayRef({16, 2}));
  CHECK(parameters[0].second.abs().max().item<double>() <= 0.25);
  for (const auto& [name, value] : parameters)
    if (ends_with(name, "_B")) value.copy_(at::linspace(-1, 1, value.numel()).reshape(value.sizes()));
  const at::Tensor adapted = model->forward(input), a = parameters[0].second.clone(), b = parameters[1].second.clone();
  CHECK(!at::allclose(adapted, start->forward(input)));
  adapters.detach(*model);
  CHECK(at::allclose(model->forward(input), adapted, 1e-4, 1e-5));
  CHECK(at::allclose(model->blocks[0].attention.query.weight, start->blocks[0].attention.query.weight + at::mm(b, a) * 3, 1e-5, 1e-6));
  CHECK(at::equal(model->blocks[0].attention.key.weight, start->blocks[0].attention.key.weight));
  CHECK(contains_all(error_text([&] { LoraAdapters({2, 6, {"*q_prij"}}, 3).attach(*model); }), {"*q_prij", "lora.targets"}));
}

TEST_CASE("training adapters: learns, leaves the rest alone, resumes to the same bytes, refuses constraints") {
  TrainOptions options = text_options();
  options.has_lora = true;
  options.lora.rank = 4;
  const TaskData data = tiny_text();
  same_after_kill(options, data, 6, small_llama);
  const TemporaryFolder work;
  Json details = Json::object();
  StageContext context = tiny_context(data, work.path() / "a", &details);
  options.steps = 120;
  const auto model = tiny_llama();
  train_labels(*model, options, context);
  const auto start = tiny_llama();
  CHECK(details["loss_curve"].back()["loss"].get<double>() < 0.95 * details["loss_curve"].front()["loss"].get<double>());
  CHECK(at::equal(model->tokens.weight, start->tokens.weight));
  CHECK(at::equal(model->final_norm.weight, start->final_norm.weight));
  CHECK(!at::equal(model->blocks[1].mlp.up.weight, start->blocks[1].mlp.up.weight));
  CHECK(!model->blocks[1].mlp.up.side);
  // A classifier's head trains beside the adapters.
  const TaskData classes = tiny_data();
  StageContext other = tiny_context(classes, work.path() / "b");
  options.steps = 6;
  const auto bert = tiny_bert();
  train_labels(*bert, options, other);
  CHECK(!at::equal(bert->classifier.weight, tiny_bert()->classifier.weight));
  CHECK(at::equal(bert->embedding_norm.weight, tiny_bert()->embedding_norm.weight));
  same_after_kill(options, classes, 3, small_bert);
  class Nothing final : public Constraint {
   public:
    std::string name() const override { return "mask"; }
    void attach(Transformer&) override {}
    void detach(Transformer&) override {}
  };
  CHECK(contains_all(error_text([&] { train(*tiny_llama(), options, {std::shared_ptr<Objective>(label_cross_entropy())}, {std::make_shared<Nothing>()}, context); }), {"lora", "mask"}));
}

TEST_CASE("early stopping: after so many scores without a better one, and the same after a kill") {
  TaskData data = tiny_text();
  data.heldout = {{40, 3, 31, 8, 22, 17, 45, 2}, {9, 44, 12, 33, 1, 28, 6, 19}};  // nothing that the training text teaches
  TrainOptions options = text_options();
  options.steps = 60;
  options.learning_rate = 3e-2;
  options.evaluate_every_steps = 2;
  options.stop_after = 3;
  options.keep = "best";
  const TemporaryFolder work;
  Json details = Json::object();
  StageContext context = tiny_context(data, work.path(), &details);
  const auto model = tiny_llama();
  const TrainResult result = train_labels(*model, options, context);
  REQUIRE(result.steps < 60);
  CHECK(details["steps"].get<std::int64_t>() == result.steps);
  const Json& curve = details["dev_curve"];
  REQUIRE(curve.size() >= 4);
  double best = -1e9;
  std::size_t at = 0;
  for (std::size_t i = 0; i < curve.size(); ++i)
    if (curve[i]["score"].get<double>() > best) best = curve[i]["score"].get<double>(), at = i;
  CHECK(at + 4 == curve.size());
  CHECK(result.dev_score == Approx(best));
  same_after_kill(options, data, static_cast<int>(result.steps) - 3, small_llama);
  data.heldout.clear();
  CHECK(contains_all(error_text([&] { train_labels(*tiny_llama(), options, context); }), {"stop_after", "held-out"}));
}

TEST_CASE("a part that is marked as score decides on held-out text") {
  class Distance final : public Objective {
   public:
    bool needs_teacher() const override { return true; }
    bool needs_logits() const override { return false; }
    at::Tensor loss(const ObjectiveInput& input, std::vector<LossPart>& parts) override {
      const at::Tensor value = (input.hidden - input.teacher->hidden).square().mean();
      parts.push_back({"distance", value, true});
      return value;
    }
  };
  const TaskData data = tiny_text();
  const auto teacher = live_teacher(tiny_llama(true, 9));
  const TemporaryFolder work;
  Json details = Json::object();
  StageContext context = tiny_context(data, work.path(), &details);
  context.teacher = teacher.get();
  TrainOptions options = text_options();
  const auto model = tiny_llama();
  const TrainResult result = train(*model, options, {std::make_shared<Distance>()}, {}, context);
  const at::NoGradGuard no_grad;
  double expected = 0;
  for (const auto& window : data.heldout) {
    const ModelInput input{at::tensor(at::ArrayRef<std::int64_t>(window), at::kLong).reshape({1, -1}), {}, {}, {}};
    expected -= (model->hidden(input) - tiny_llama(true, 9)->hidden(input)).square().mean().item<double>() / 2;
  }
  CHECK(result.dev_score == Approx(expected).epsilon(1e-5));
}
