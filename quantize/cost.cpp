#include "quantize/cost.h"

#include <algorithm>
#include <cmath>

#include "quantize/methods.h"
#include "quantize/token_weights.h"
#include "train/precision.h"

namespace kompakt {
namespace {

constexpr double process_bytes = 250e6;  // LibTorch, the program and the data

struct CostLinears {
  double inputs, outputs;
  int matrices;  // that read the same inputs
};

}  // namespace

QuantizeCost predict_quantize_cost(const ModelConfig& config, const QuantizeOptions& options, std::int64_t windows, double sequence) {
  QuantizeCost cost;
  const QuantizationMethod* method = find_quantization_method(options.method);
  if (!method || !method->needs_calibration || method->needs_train || windows <= 0) return cost;
  const double tokens = static_cast<double>(std::min(windows, options.calibration_sequences)) * sequence, layers = static_cast<double>(config.layers);
  const double d = static_cast<double>(config.hidden), f = static_cast<double>(config.ffn), vocabulary = static_cast<double>(config.vocab);
  const double q = static_cast<double>(config.heads * config.head_dim), kv = static_cast<double>(config.kv_heads * config.head_dim);
  const int gates = config.family && config.family->gated_mlp ? 2 : 1;
  const CostLinears parts[] = {{d, q + 2 * kv, 3}, {q, d, 1}, {d, gates * f, gates}, {f, d, 1}};
  double block = 0;  // weights
  for (const CostLinears& part : parts) block += part.inputs * part.outputs;
  const double attention = 2 * sequence * q;                                              // half of all pairs
  const double head = config.family && !config.family->encoder ? d * vocabulary : 0;

  const TokenWeightRow* weighing = find_token_weights(options.token_weights);
  const bool weighs = weighing && weighing->exponent > 0, cross = options.teacher_target > 0 || options.method == "trifit", follows = cross || options.tunes_blocks();
  const double rounds = options.polish_rounds > 0 ? static_cast<double>(options.polish_rounds) : options.method == "trifit" ? 4 : 0;
  const bool squares = options.method == "imatrix";
  double layer = tokens * (2 * block + attention) * (follows ? 2 : 1);
  for (const CostLinears& part : parts) {
    // The second moment is symmetric; with weights every matrix has its own.
    if (!squares) layer += tokens * part.inputs * part.inputs * (cross ? 3 : 1) * (weighs ? part.matrices : 1);
    layer += part.outputs * part.inputs * part.inputs * (squares ? 0 : 1 + 2 * rounds);
  }
  if (options.tunes_blocks()) {
    const BlockTuneOptions& tune = options.block_tune;
    const double scores = 1 + std::ceil(static_cast<double>(tune.iterations) / static_cast<double>(tune.evaluate_every));
    layer += static_cast<double>(tune.iterations) * std::min(tokens, static_cast<double>(tune.batch) * sequence) * 3 * (2 * block + attention) + scores * tokens * (2 * block + attention);
  }
  cost.flops = layers * layer;
  // Two forward passes through every block and one back to its inputs; the head's logits, their gradient, and what it makes of the hidden
  // state.
  const double gradients = layers * 3 * (2 * block + attention) + 3 * 2 * head;
  if (weighs) cost.flops += tokens * (gradients + (options.tunes_blocks() && options.block_tune.fisher > 0 ? layers * 2 * d * d : 0));
  if (options.has_budget) cost.flops += std::min(static_cast<double>(options.budget.tokens), static_cast<double>(windows) * sequence) * gradients;
  if (head > 0 && options.calibrate_head && options.embedding != "none") cost.flops += tokens * d * d + vocabulary * d * d * (1 + 2 * rounds);

  const double weights = static_cast<double>(count_parameters(config).total);
  const double streams = options.spill ? 0 : follows ? 2 : 1;
  double bytes = process_bytes + 4 * weights + weights;                                    // model, codes
  if (options.basis.basis != "none") bytes += 4 * weights;                                 // the model before the change beside it
  const bool bf16 = use_bf16(options.calibration_precision, c10::Device(c10::kCPU));
  bytes += tokens * streams * (4 * 2 * d + (bf16 ? 2 : 4) * std::max(f, q));               // residual stream before and inside the block, the widest inner state
  if (bf16) bytes += 2 * block * (weighs ? layers : 1);                                    // weights as they are multiplied
  if (weighs) bytes += 4 * tokens * layers * (3 + gates + 2);                              // a number a token and matrix
  if (options.tunes_blocks()) bytes += 6 * 4 * block + (options.block_tune.fisher > 0 ? layers * d * d * 4 : 0);
  cost.memory_bytes = static_cast<std::int64_t>(bytes);
  return cost;
}

}  // namespace kompakt
