// Predicted cost of calibrated methods against arithmetic by hand and a measured run.
#include "quantize/cost.h"

#include "tests/catch_torch.h"
#include "tests/support.h"

namespace kompakt {
namespace {

ModelConfig cost_config() {  // SmolLM2-135M
  return config_from_json({{"model_type", "llama"}, {"hidden_size", 576}, {"num_hidden_layers", 30}, {"num_attention_heads", 9}, {"num_key_value_heads", 3}, {"intermediate_size", 1536}, {"vocab_size", 49152},
                           {"max_position_embeddings", 8192}, {"tie_word_embeddings", true}, {"hidden_act", "silu"}},
                          "smollm2");
}

}  // namespace

TEST_CASE("the cost of a calibrated method is what arithmetic says", "[quantize][cost]") {
  const ModelConfig config = cost_config();
  QuantizeOptions options;
  options.weights = "q2_0", options.embedding = "none", options.method = "gptq";
  const double tokens = 65536, block = 576 * (576 + 2 * 192) + 576 * 576 + 576 * 2 * 1536 + 1536 * 576, attention = 2 * 512 * 576.0;
  const double sweep = 960.0 * 576 * 576 + 576.0 * 576 * 576 + 3072.0 * 576 * 576 + 576.0 * 1536 * 1536, squares = 3.0 * 576 * 576 + 1536.0 * 1536;
  const QuantizeCost gptq = predict_quantize_cost(config, options, 500, 512);
  CHECK(gptq.flops == Approx(30 * (tokens * (2 * block + attention + squares) + sweep)).epsilon(1e-9));
  // Fewer windows than the options ask for.
  CHECK(predict_quantize_cost(config, options, 64, 512).flops == Approx(30 * (tokens / 2 * (2 * block + attention + squares) + sweep)).epsilon(1e-9));
  // The teacher's activations and their moments too, four rounds of polish.
  options.method = "trifit", options.damping = 0.1;
  const QuantizeCost trifit = predict_quantize_cost(config, options, 500, 512);
  CHECK(trifit.flops == Approx(30 * (tokens * (2 * (2 * block + attention) + 3 * squares) + 9 * sweep)).epsilon(1e-9));
  // Two forward passes and one back; every matrix has moments of its own.
  options.token_weights = "gradient_norm";
  const QuantizeCost weighed = predict_quantize_cost(config, options, 500, 512);
  CHECK(weighed.flops - trifit.flops == Approx(tokens * (30 * 3 * (2 * block + attention) + 6.0 * 576 * 49152) + 30 * tokens * 9 * 576.0 * 576).epsilon(1e-9));
  // Measured on the CPU: 3.03 GB with the teacher's 0.54 GB, 1,420 CPU seconds, and 3,030 for 100 iterations of block tuning without the pass that
  // weighs tokens, where products run at 80 to 100 GFLOP/s.
  CHECK(weighed.memory_bytes > 2'200'000'000);
  CHECK(weighed.memory_bytes < 2'600'000'000);
  CHECK(weighed.flops / 1420 > 60e9);
  CHECK(weighed.flops / 1420 < 120e9);
  options.has_block_tune = true, options.block_tune.iterations = 100, options.block_tune.batch = 4, options.block_tune.evaluate_every = 50;
  const QuantizeCost tuned = predict_quantize_cost(config, options, 500, 512);
  CHECK(tuned.flops - weighed.flops == Approx(30 * (100 * 2048.0 * 3 + 3 * tokens) * (2 * block + attention)).epsilon(1e-9));
  CHECK((tuned.flops - weighed.flops + trifit.flops) / 3030 > 60e9);
  CHECK((tuned.flops - weighed.flops + trifit.flops) / 3030 < 120e9);

  options.spill = true;
  CHECK(predict_quantize_cost(config, options, 500, 512).memory_bytes < tuned.memory_bytes - 1'300'000'000);
  options.method = "rtn";
  CHECK(predict_quantize_cost(config, options, 500, 512).flops == 0);
  options.method = "gptq";
  CHECK(predict_quantize_cost(config, options, 0, 0).flops == 0);
}

}  // namespace kompakt
