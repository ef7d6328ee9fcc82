// Sparsity that grows during the recovery: the schedule by hand, monotone masks, exact zeros, resume, refusals.
#include "prune/gradual.h"

#include <ATen/ATen.h>

#include <cmath>
#include <filesystem>

#include "core/node.h"
#include "core/system.h"
#include "prune/stage.h"
#include "tests/catch_torch.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;

PruneOptions gradual_read(const std::string& yaml) {
  PruneOptions options;
  Problems problems;
  read_fields(parse_yaml(yaml, "test"), "the stage", problems, [&](FieldVisitor& v) { fields(v, options); });
  problems.throw_if_any("test");
  return options;
}

struct GradualRun {
  TaskData data = testing::tiny_text(4);
  Json details = Json::object();
  StageContext context;
  explicit GradualRun(const std::string& name) {
    context.title = "prune", context.data = &data, context.details = &details, context.seed = 3;
    context.work = std::filesystem::temp_directory_path() / ("kompakt-gradual-" + name);
    std::filesystem::remove_all(context.work);
  }
  ~GradualRun() { std::filesystem::remove_all(context.work); }
};

// Asks for an end in the `at`-th call; adds nothing to the loss.
class GradualInterrupter final : public Objective {
 public:
  explicit GradualInterrupter(int at) : at_(at) {}
  bool needs_logits() const override { return false; }
  at::Tensor loss(const ObjectiveInput& input, std::vector<LossPart>&) override {
    if (++calls_ == at_) request_interrupt(2);
    return input.hidden.sum() * 0;
  }

 private:
  int at_, calls_ = 0;
};

constexpr const char* gradual_yaml = "{unstructured: {sparsity: 0.5, criterion: magnitude}, schedule: {type: cubic, begin: 0.0, end: 0.6, every: 3}, recover: {steps: 20, batch_size: 4, sequence_length: 16, precision: float32, learning_rate: 0.001}}";

}  // namespace

TEST_CASE("the cubic schedule by hand", "[prune][gradual]") {
  GradualOptions options;
  options.initial = 0.1, options.begin = 0.2, options.end = 0.6;
  CHECK(gradual_sparsity(options, 0.5, 0, 10) == Approx(0.1));
  CHECK(gradual_sparsity(options, 0.5, 2, 10) == Approx(0.1));
  CHECK(gradual_sparsity(options, 0.5, 4, 10) == Approx(0.1 + 0.4 * (1 - 0.125)));  // half of the way
  CHECK(gradual_sparsity(options, 0.5, 6, 10) == Approx(0.5));
  CHECK(gradual_sparsity(options, 0.5, 10, 10) == Approx(0.5));
  options.type = "linear";
  CHECK(gradual_sparsity(options, 0.5, 3, 10) == Approx(0.2));
  for (const SparsitySchedule& row : sparsity_schedules()) {
    CHECK(row.grown(0) == 0);
    CHECK(row.grown(1) == 1);
    for (double t = 0; t < 1; t += 0.1) CHECK(row.grown(t) <= row.grown(t + 0.1));
  }
}

TEST_CASE("masks only grow, and reach the sparsity of every row when the growth ends", "[prune][gradual]") {
  const auto model = testing::tiny_decoder(5);
  WeightMasks masks;
  GradualOptions options;
  options.end = 0.5, options.every = 2;
  const std::string name = model->linears()[5]->name;
  const auto constraint = gradual_masks(options, 0.5, {name}, masks);
  constraint->attach(*model);
  at::Tensor before = at::zeros_like(model->find_linear(name)->weight, at::kBool);
  std::int64_t last = -1;
  for (std::int64_t step = 0; step < 20; ++step) {
    constraint->before_forward(*model, step, 20);
    const at::Tensor zeros = model->find_linear(name)->weight.eq(0);
    CHECK(before.logical_and(zeros.logical_not()).sum().item<std::int64_t>() == 0);
    const auto count = zeros.sum().item<std::int64_t>();
    CHECK(count >= last);
    last = count, before = zeros;
    model->find_linear(name)->weight.add_(0.01);  // what an optimizer would do
    constraint->after_step(*model);
    CHECK(model->find_linear(name)->weight.eq(0).eq(zeros).all().item<bool>());
  }
  constraint->detach(*model);
  const at::Tensor kept = masks.at(name).sum(1);
  CHECK(kept.eq(model->find_linear(name)->in_features() / 2).all().item<bool>());
}

TEST_CASE("the recovery ends with the whole sparsity, and a resumed one with the same bytes", "[prune][gradual]") {
  const auto run = [](GradualRun& r, Transformer& model, int interrupt) {
    prune(model, gradual_read(gradual_yaml), {std::shared_ptr<Objective>(label_cross_entropy()), std::make_shared<GradualInterrupter>(interrupt)}, r.context);
  };
  GradualRun whole("whole");
  const auto model = testing::tiny_decoder(5);
  run(whole, *model, 0);
  CHECK(whole.context.masks.size() == model->linears().size());
  for (const Linear* linear : model->linears()) {
    const at::Tensor& mask = whole.context.masks.at(linear->name);
    CHECK(mask.sum(1).eq(linear->in_features() - linear->in_features() / 2).all().item<bool>());
    CHECK(linear->weight.masked_select(mask.logical_not()).eq(0).all().item<bool>());
  }
  for (const int step : {2, 8, 19}) {
    CAPTURE(step);
    GradualRun broken("broken");
    const auto lost = testing::tiny_decoder(5), resumed = testing::tiny_decoder(5);
    CHECK_THROWS_AS(run(broken, *lost, step), Error);
    request_interrupt(0);
    broken.context.resume = true, broken.context.masks.clear();
    run(broken, *resumed, 0);
    CHECK(testing::same_parameters(testing::copy_of(*model), testing::copy_of(*resumed)));
    CHECK(broken.context.masks.size() == whole.context.masks.size());
  }
  CHECK(whole.details.at("sparsity").at("schedule") == "cubic");
  CHECK(whole.details.at("sparsity").at("zeros").get<double>() / whole.details.at("sparsity").at("weights").get<double>() == Approx(0.5));
  // Killed behind the last step: the masks come back, and the weights are the same.
  const auto again = testing::tiny_decoder(5);
  whole.context.resume = true, whole.context.masks.clear();
  run(whole, *again, 0);
  CHECK(whole.context.masks.size() == model->linears().size());
  CHECK(testing::same_parameters(testing::copy_of(*model), testing::copy_of(*again)));
}

TEST_CASE("a schedule without what it needs is refused before anything is computed", "[prune][gradual]") {
  const ModelConfig config = testing::tiny_decoder(1)->config();
  const auto refused = [&](const std::string& yaml) { return error_text([&] { pruned_config(config, gradual_read(yaml)); }); };
  CHECK(contains_all(refused("{schedule: {type: cubic}, recover: {steps: 5}}"), {"prune.schedule", "unstructured: {sparsity"}));
  CHECK(contains_all(refused("{unstructured: {pattern: \"2:4\", criterion: magnitude}, schedule: {type: cubic}, recover: {steps: 5}}"), {"pattern 2:4"}));
  CHECK(contains_all(refused("{unstructured: {sparsity: 0.5, criterion: magnitude}, schedule: {type: cubic}}"), {"no recover"}));
  CHECK(contains_all(refused("{unstructured: {sparsity: 0.5}, schedule: {type: cubic}, recover: {steps: 5}}"), {"criterion wanda"}));
  CHECK(contains_all(refused("{unstructured: {sparsity: 0.5, criterion: magnitude}, schedule: {begin: 0.7, end: 0.7}, recover: {steps: 5}}"), {"no time to grow"}));
  CHECK(contains_all(refused("{unstructured: {sparsity: 0.5, criterion: magnitude}, schedule: {initial: 0.5}, recover: {steps: 5}}"), {"would not grow"}));
  CHECK(contains_all(refused("{unstructured: {sparsity: 0.5, criterion: magnitude}, schedule: {type: cubic}, recover: {steps: 5, keep: best}}"), {"keep: best"}));
  CHECK(contains_all(refused("{unstructured: {sparsity: 0.5, criterion: magnitude}, schedule: {type: qubic}, recover: {steps: 5}}"), {"cubic"}));
}

}  // namespace kompakt
