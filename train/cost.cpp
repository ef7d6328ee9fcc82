// Predicted arithmetic and memory of a training, from the shape alone.
#include <algorithm>
#include <cmath>

#include "model/families.h"
#include "train/loop.h"
#include "train/optimizer.h"
#include "train/rate_finder.h"

namespace kompakt {
namespace {

constexpr double process_bytes = 250e6;  // LibTorch, the program and the data, resident before the first step

// Floats that the graph keeps per token and layer: inputs of the six or seven products, of softmax, activation and norms.
double cost_kept_floats(const ModelConfig& config) {
  const double d = static_cast<double>(config.hidden), f = static_cast<double>(config.ffn);
  const double q = static_cast<double>(config.heads * config.head_dim), kv = static_cast<double>(config.kv_heads * config.head_dim);
  const double inner = config.family && config.family->gated_mlp ? 4 * f : 2 * f;  // gate, up, activated, product
  return 4 * d + 2 * q + 2 * kv + 2 * d + inner + (config.sub_norms ? q + f : 0);
}

// Forward operations a token: 2 a weight; scores and mixing of attention: 4 T (H hd) a layer.
struct CostForward {
  double block = 0, attention = 0, rest = 0;  // weights of one block, attention of one block, what follows the blocks
  double layers = 0;
  double total() const { return layers * (block + attention) + rest; }
};
CostForward cost_forward(const ModelConfig& config, double sequence) {
  const ParameterCount count = count_parameters(config);
  const double head = config.is_classifier() || config.family->encoder || !config.tied ? 0 : static_cast<double>(config.vocab * config.hidden);  // an untied head is counted already
  const double untied = config.is_classifier() || config.tied || config.family->encoder ? 0 : static_cast<double>(config.vocab * config.hidden);
  CostForward out;
  out.layers = static_cast<double>(std::max<std::int64_t>(config.layers, 1));
  out.block = 2 * (static_cast<double>(count.total - count.embedding) - untied) / out.layers;
  out.attention = 4 * sequence * static_cast<double>(config.heads * config.head_dim);
  out.rest = 2 * (head + untied);
  return out;
}

// Every tensor whose role passes the test is named by a pattern of `freeze`.
template <class Test>
bool cost_frozen(const ModelConfig& config, const TrainOptions& options, std::int64_t layer, Test test) {
  for (const NameMap& row : config.family->names) {
    if (!test(row.role)) continue;
    const std::string name = tensor_name(row.hf, layer) + ".weight";
    if (std::none_of(options.freeze.begin(), options.freeze.end(), [&](const std::string& pattern) { return matches_pattern(name, pattern); })) return false;
  }
  return !options.freeze.empty();
}

}  // namespace

TrainCost predict_cost(const ModelConfig& config, const TrainOptions& options, std::int64_t examples, double tokens_per_example, std::int64_t touched_vocabulary, const ModelConfig* teacher) {
  const bool classifier = config.is_classifier() || config.family->encoder;  // texts of their own, no logits over the vocabulary
  const double sequence = classifier ? tokens_per_example : static_cast<double>(options.sequence_length);
  const double rows = classifier ? static_cast<double>(examples) : std::max(1.0, static_cast<double>(examples) * tokens_per_example / sequence);
  const double rows_per_step = static_cast<double>(options.batch_size * options.accumulate);
  const double steps_per_epoch = std::max(1.0, std::ceil(rows / rows_per_step));
  const double steps = options.steps > 0 ? static_cast<double>(options.steps) : std::max(1.0, std::ceil(options.epochs * steps_per_epoch));
  const double sweep = options.find_learning_rate ? static_cast<double>(RateFinder::steps) : 0;  // at most: it ends where the loss explodes
  const double tokens = (steps + sweep) * std::min(rows_per_step, rows) * sequence;

  const CostForward forward = cost_forward(config, sequence);
  const ParameterCount count = count_parameters(config);
  const double blocks = static_cast<double>(count.total - count.embedding);
  const double head = classifier || !config.tied ? 0 : static_cast<double>(config.vocab * config.hidden);  // an untied head is among the blocks
  const auto is_block = [](std::string_view role) { return role.starts_with("block."); };
  const auto is_input = [](std::string_view role) { return role == "tokens" || role == "positions" || role == "token_types" || role == "embedding_norm"; };
  const bool inputs_frozen = cost_frozen(config, options, 0, is_input);
  std::int64_t frozen = 0, below = 0;  // blocks that do not train; those among them with nothing that trains before them
  for (std::int64_t layer = 0; layer < config.layers; ++layer) {
    if (!cost_frozen(config, options, layer, is_block)) continue;
    if (inputs_frozen && below == layer) ++below;
    ++frozen;
  }
  TrainCost cost;
  // The backward pass costs two forwards: gradients of the inputs and of the weights. A frozen block saves the second, and the
  // first too where nothing before it trains.
  // Recomputation adds a forward.
  cost.flops = tokens * ((options.recompute ? 4 : 3) * forward.total() - static_cast<double>(frozen) * forward.block - static_cast<double>(below) * (forward.block + 2 * forward.attention));
  // The teacher of a classifier runs once over the examples (cache), that of text and of an encoder without classes at every step.
  if (teacher) cost.flops += cost_forward(*teacher, sequence).total() * (config.is_classifier() ? rows * sequence : tokens);

  const double embedding = static_cast<double>(count.embedding);
  const double trained_embedding = classifier && touched_vocabulary > 0
                                       ? std::min(embedding, embedding - static_cast<double>((config.vocab - touched_vocabulary) * config.hidden))
                                       : embedding;
  const double trained = blocks - static_cast<double>(frozen) * forward.block / 2 + (inputs_frozen ? 0 : std::max(0.0, trained_embedding));
  // Batches are cut from texts of different length: the longest decide, about three times the mean for short texts.
  const double widest = classifier ? std::min(3 * sequence, config.max_positions > 0 ? static_cast<double>(config.max_positions) : 3 * sequence) : sequence;
  const double batch_tokens = static_cast<double>(options.batch_size) * widest;
  double bytes = process_bytes + 4 * (blocks + embedding);                         // weights
  bytes += trained * (optimizer_is_8bit(options.optimizer) ? 4 + 2 : 4 * 3);          // gradients, two moments
  bytes += 4 * trained;                                                            // copies while compacted, state being written
  // Graph and its gradients in flight: all layers, or one and the inputs of all.
  const double kept = options.recompute ? cost_kept_floats(config) + static_cast<double>(config.hidden * (config.layers - below)) : cost_kept_floats(config) * static_cast<double>(config.layers - below);
  bytes += 4 * batch_tokens * kept * 1.25;
  if (!classifier) bytes += 2.0 * 64 * 1024 * 1024 + 4 * head;                     // two chunks of logits, gradient of the head
  cost.memory_bytes = static_cast<std::int64_t>(bytes);
  return cost;
}

}  // namespace kompakt
