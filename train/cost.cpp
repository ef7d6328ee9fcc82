// Predicted arithmetic and memory of a training, from the shape alone.
#include <algorithm>
#include <cmath>

#include "train/loop.h"
#include "model/families.h"

namespace kompakt {
namespace {

constexpr double process_bytes = 150e6;  // LibTorch and the program themselves, resident after start

// Floats that the graph keeps per token and layer: inputs of the six or seven products, of softmax, activation and norms.
double cost_kept_floats(const ModelConfig& config) {
  const double d = static_cast<double>(config.hidden), f = static_cast<double>(config.ffn);
  const double q = static_cast<double>(config.heads * config.head_dim), kv = static_cast<double>(config.kv_heads * config.head_dim);
  const double inner = config.family && config.family->gated_mlp ? 4 * f : 2 * f;  // gate, up, activated, product
  return 4 * d + 2 * q + 2 * kv + 2 * d + inner;
}

}  // namespace

TrainCost predict_cost(const ModelConfig& config, const TrainOptions& options, std::int64_t examples, double tokens_per_example, std::int64_t touched_vocabulary, bool teacher) {
  const bool classifier = config.is_classifier();
  const double sequence = classifier ? tokens_per_example : static_cast<double>(options.sequence_length);
  const double rows = classifier ? static_cast<double>(examples) : std::max(1.0, static_cast<double>(examples) * tokens_per_example / sequence);
  const double rows_per_step = static_cast<double>(options.batch_size * options.accumulate);
  const double steps_per_epoch = std::max(1.0, std::ceil(rows / rows_per_step));
  const double steps = options.steps > 0 ? static_cast<double>(options.steps) : std::max(1.0, std::ceil(options.epochs * steps_per_epoch));
  const double tokens = steps * std::min(rows_per_step, rows) * sequence;

  const ParameterCount count = count_parameters(config);
  const double blocks = static_cast<double>(count.total - count.embedding);
  const double head = classifier ? 0 : static_cast<double>(config.vocab * config.hidden) * (config.tied ? 1.0 : 0.0);  // an untied head is among the blocks
  // 2 operations a weight and token forward, 4 backward; scores and mixing of attention: 4 T (H hd) a token and layer forward.
  const double attention = 4 * sequence * static_cast<double>(config.heads * config.head_dim * config.layers);
  const double forward = 2 * (blocks + head) + attention;
  TrainCost cost;
  cost.flops = 3 * forward * tokens;
  // The teacher of a classifier runs once over the examples (cache), that of text at every step. Its shape is not known here:
  // the same as the student's is assumed.
  if (teacher) cost.flops += forward * (classifier ? rows * sequence : tokens);

  const double embedding = static_cast<double>(count.embedding);
  const double trained_embedding = classifier && touched_vocabulary > 0
                                       ? std::min(embedding, embedding - static_cast<double>((config.vocab - touched_vocabulary) * config.hidden))
                                       : embedding;
  const double trained = blocks + std::max(0.0, trained_embedding);
  // Batches are cut from texts of different length: the longest decide, about three times the mean for short texts.
  const double widest = classifier ? std::min(3 * sequence, config.max_positions > 0 ? static_cast<double>(config.max_positions) : 3 * sequence) : sequence;
  const double batch_tokens = static_cast<double>(options.batch_size) * widest;
  double bytes = process_bytes + 4 * (blocks + embedding);                         // weights
  bytes += 4 * trained * 3;                                                        // gradients, two moments
  bytes += 4 * trained;                                                            // copies while compacted, state being written
  bytes += 4 * batch_tokens * cost_kept_floats(config) * static_cast<double>(config.layers) * 1.25;  // graph and its gradients in flight
  if (!classifier) bytes += 2.0 * 64 * 1024 * 1024 + 4 * head;                     // two chunks of logits, gradient of the head
  if (teacher) bytes += classifier ? 4 * (blocks + embedding) + 2 * 3 * batch_tokens * static_cast<double>(config.hidden) : 4 * (blocks + embedding);
  cost.memory_bytes = static_cast<std::int64_t>(bytes);
  return cost;
}

}  // namespace kompakt
