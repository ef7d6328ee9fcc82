// Steps without a token to predict: passed over, counted, resumed; a training of nothing else is an error.
#include <ATen/ATen.h>

#include "tests/catch_torch.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <stdexcept>

#include "core/files.h"
#include "core/log.h"
#include "tests/support.h"
#include "tests/train/fixtures.h"
#include "train/batch_sampler.h"
#include "train/monitor.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

// Ends the process's training at a loss that is asked for, as a kill would.
class KilledStep final : public Objective {
 public:
  explicit KilledStep(int at) : at_(at) {}
  bool needs_logits() const override { return false; }
  at::Tensor loss(const ObjectiveInput& input, std::vector<LossPart>&) override {
    if (++calls_ == at_) throw std::runtime_error("killed");
    return input.hidden.sum() * 0;
  }

 private:
  int at_, calls_ = 0;
};

}  // namespace

TEST_CASE("a step with nothing to predict is passed over and counted; a training of such steps alone is an error") {
  // Texts that end with their prompts: no token of them is a target.
  struct Emptier final : BatchSampler {
    std::set<std::int64_t> steps;
    void sample(const Transformer&, std::int64_t step, std::vector<TokenBatch>& batches) override {
      const auto empty = [](TokenBatch& batch) { batch.prompts.assign(static_cast<std::size_t>(batch.rows), batch.columns); };
      if (step == 0) empty(batches.front());  // one micro batch of two
      if (steps.count(step)) std::for_each(batches.begin(), batches.end(), empty);
    }
    Json identity() const override { return "emptier"; }
  };
  struct Weights final : TrainMonitor {
    std::vector<std::string> bytes;
    void after_step(Transformer& model, std::int64_t, std::int64_t) override { bytes.push_back(weight_bytes(model)); }
    Json save() const override { return nullptr; }
    void restore(const Json&) override {}
  };
  const TaskData data = tiny_text();
  TrainOptions options = tiny_options();
  options.steps = 4, options.batch_size = 2, options.accumulate = 2, options.sequence_length = 16, options.save_every_steps = 2;
  const auto run = [&](Emptier& sampler, const std::filesystem::path& work, Json& details, Weights* weights, int kill) {
    StageContext context = tiny_context(data, work, &details);
    context.sampler = &sampler;
    context.resume = kill == 0;
    std::vector<std::shared_ptr<Objective>> objectives = {std::shared_ptr<Objective>(label_cross_entropy())};
    if (kill > 0) objectives.push_back(std::make_shared<KilledStep>(kill));
    const auto model = tiny_llama();
    return train(*model, options, objectives, {}, context, weights);
  };
  const TemporaryFolder work, other;
  Emptier sampler;
  sampler.steps = {1, 3};
  Json details = Json::object();
  Weights weights;
  open_metrics(work.path() / "metrics.jsonl");
  const TrainResult result = run(sampler, work.path() / "a", details, &weights, 0);
  close_metrics();
  CHECK(result.steps == 4);
  CHECK(std::isfinite(result.final_loss));
  REQUIRE(weights.bytes.size() == 4);
  CHECK(weights.bytes[0] == weights.bytes[1]);
  CHECK(weights.bytes[1] != weights.bytes[2]);
  CHECK(weights.bytes[2] == weights.bytes[3]);
  CHECK(details.at("empty") == Json({{"steps", 2}, {"micro_batches", 5}}));
  CHECK(details.at("loss_curve").size() == 2);
  CHECK(contains_all(read_text(work.path() / "metrics.jsonl"), {"\"empty_steps\":1", "\"empty_micro_batches\":3"}));
  // Killed behind the empty step and resumed: the same count.
  Json again = Json::object();
  CHECK_THROWS_AS(run(sampler, other.path(), again, nullptr, 2), std::runtime_error);
  run(sampler, other.path(), again, nullptr, 0);
  CHECK(again.at("empty") == details.at("empty"));

  sampler.steps = {0, 1, 2, 3};
  CHECK(contains_all(error_text([&] { run(sampler, work.path() / "b", again, nullptr, 0); }), {"none of 4 steps", "to predict"}));
}
