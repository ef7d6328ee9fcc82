// Predicted cost against arithmetic by hand.
#include "tests/catch_torch.h"

#include "tests/support.h"
#include "tests/train/fixtures.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

ModelConfig minilm_config(std::int64_t layers) {
  ModelConfig config = config_from_json({{"model_type", "bert"}, {"hidden_size", 384}, {"num_hidden_layers", layers}, {"num_attention_heads", 12}, {"intermediate_size", 1536}, {"vocab_size", 30522},
                                         {"max_position_embeddings", 512}, {"type_vocab_size", 2}, {"hidden_act", "gelu"}}, "minilm");
  config.labels = std::vector<std::string>(77, "label");
  return config;
}

}  // namespace

TEST_CASE("the cost of fine-tuning MiniLM on banking77 is what arithmetic says") {
  TrainOptions options;
  options.epochs = 1;
  const TrainCost cost = predict_cost(minilm_config(6), options, 10003, 16.1, 2616, nullptr);
  // 10.6M weights in six blocks, 6 operations a weight and token, 161k tokens; attention and the head add a few percent.
  CHECK(cost.flops == Approx(6.0 * 10.65e6 * 161048).epsilon(0.06));
  // Measured peak of the process: 0.67 GB.
  CHECK(cost.memory_bytes > 500'000'000);
  CHECK(cost.memory_bytes < 1'000'000'000);

  options.epochs = 4;
  CHECK(predict_cost(minilm_config(6), options, 10003, 16.1, 2616, nullptr).flops == Approx(4 * cost.flops).epsilon(1e-9));
  CHECK(predict_cost(minilm_config(3), options, 10003, 16.1, 2616, nullptr).flops == Approx(2 * cost.flops).epsilon(0.05));
  const ModelConfig teacher = minilm_config(6);
  CHECK(predict_cost(minilm_config(6), options, 10003, 16.1, 2616, &teacher).flops == Approx((4 + 1.0 / 3) * cost.flops).epsilon(0.01));
  CHECK(predict_cost(minilm_config(6), options, 10003, 16.1, 0, nullptr).memory_bytes > cost.memory_bytes);  // the whole vocabulary trains

  // A student of three layers: its teacher runs once over the texts and costs what the teacher's six layers cost.
  options.epochs = 1;
  const double alone = predict_cost(minilm_config(3), options, 10003, 16.1, 2616, nullptr).flops;
  CHECK(predict_cost(minilm_config(3), options, 10003, 16.1, 2616, &teacher).flops == Approx(alone + cost.flops / 3).epsilon(1e-3));  // training counts its last, smaller batch as a full one

  // Two of six blocks frozen: forward and gradient of the inputs are left, and the forward alone when the embeddings are frozen too.
  options.freeze = {"encoder.layer.0.*", "encoder.layer.1.*"};
  CHECK(predict_cost(minilm_config(6), options, 10003, 16.1, 2616, nullptr).flops == Approx(cost.flops * 16 / 18).epsilon(0.01));
  options.freeze.push_back("embeddings.*");
  CHECK(predict_cost(minilm_config(6), options, 10003, 16.1, 2616, nullptr).flops == Approx(cost.flops * 14 / 18).epsilon(0.01));
  CHECK(predict_cost(minilm_config(6), options, 10003, 16.1, 2616, nullptr).memory_bytes < cost.memory_bytes);
}
