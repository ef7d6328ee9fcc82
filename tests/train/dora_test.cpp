// DoRA: the start is the model itself, the merged weight is the formula, gradients against finite differences.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"

#include "tests/support.h"
#include "tests/train/fixtures.h"
#include "train/lora.h"

using namespace kompakt;
using namespace kompakt::testing;

TEST_CASE("adapters with lengths: start, formula, merge") {
  const auto start = tiny_llama(), model = tiny_llama();
  LoraAdapters adapters({2, 6, {"*q_proj"}, true}, 3);
  const ModelInput input{at::tensor({1, 4, 7, 10, 13}, at::kLong).reshape({1, 5}), {}, {}, {}};
  const at::NoGradGuard no_grad;
  model->blocks[0].attention.query.weight[3].zero_();  // a row without a direction
  start->blocks[0].attention.query.weight[3].zero_();
  adapters.attach(*model);
  CHECK(at::allclose(model->forward(input), start->forward(input), 1e-5, 1e-6));
  const auto parameters = adapters.parameters();
  REQUIRE(parameters.size() == 6);
  CHECK(parameters[2].first == "model.layers.0.self_attn.q_proj.lora_magnitude");
  const at::Tensor weight = start->blocks[0].attention.query.weight;
  CHECK(at::allclose(parameters[2].second, weight.norm(2, 1)));
  parameters[1].second.copy_(at::linspace(-1, 1, 32).reshape({16, 2}));
  parameters[2].second.mul_(1.5);
  const at::Tensor adapted = model->forward(input);
  const at::Tensor direction = weight + at::mm(parameters[1].second, parameters[0].second) * 3;
  const at::Tensor expected = direction / direction.norm(2, 1, true) * parameters[2].second.unsqueeze(1);
  adapters.detach(*model);
  CHECK(!model->blocks[0].attention.query.transform);
  CHECK(at::allclose(model->blocks[0].attention.query.weight, expected, 1e-5, 1e-6));
  CHECK(at::allclose(model->forward(input), adapted, 1e-4, 1e-5));
  CHECK(at::equal(model->blocks[0].attention.key.weight, start->blocks[0].attention.key.weight));
}

TEST_CASE("training with lengths learns, resumes, and leaves the rest alone") {
  const TaskData data = tiny_text();
  const TemporaryFolder work;
  TrainOptions options = tiny_options();
  options.sequence_length = 16, options.batch_size = 4, options.steps = 20;
  options.has_lora = true;
  options.lora.rank = 4;
  const auto run = [&](bool dora, const char* name) {
    options.lora.dora = dora;
    Json details = Json::object();
    StageContext context = tiny_context(data, work.path() / name, &details);
    const auto model = tiny_llama();
    train_labels(*model, options, context);
    CHECK(at::equal(model->tokens.weight, tiny_llama()->tokens.weight));
    CHECK(details["loss_curve"].back()["loss"].get<double>() < details["loss_curve"].front()["loss"].get<double>());
    return model->blocks[1].mlp.up.weight.detach().clone();
  };
  const at::Tensor with = run(true, "a"), again = run(true, "b"), without = run(false, "c");
  CHECK(at::equal(with, again));
  CHECK(!at::allclose(with, without));
}
