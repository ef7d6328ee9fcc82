// Tokens per second of forward + backward + AdamW on a BERT of MiniLM-L6's shape, and the share of the machine's matrix rate
// that this is. benchmarks/train_speed.py measures PyTorch eager on the same shape: run both, compare the ratio.
#include <ATen/ATen.h>

#include <chrono>
#include <cstdio>

#include "core/files.h"
#include "core/log.h"
#include "core/random.h"
#include "core/system.h"
#include "pipeline/device.h"
#include "pipeline/plan.h"
#include "train/loop.h"

int main(int argc, char** argv) {
  using namespace kompakt;
  set_threads();
  const int examples = argc > 1 ? std::atoi(argv[1]) : 640;
  const Json json = {{"architectures", {"BertModel"}}, {"model_type", "bert"}, {"vocab_size", 30522}, {"hidden_size", 384}, {"num_hidden_layers", 6}, {"num_attention_heads", 12}, {"intermediate_size", 1536},
                     {"hidden_act", "gelu"}, {"max_position_embeddings", 512}, {"type_vocab_size", 2}, {"layer_norm_eps", 1e-12}, {"pad_token_id", 0}};
  Transformer model(config_from_json(json, "benchmark"), 1);
  TaskData data;
  const CounterRandom random(3, "train-speed");
  std::int64_t tokens = 0;
  for (int c = 0; c < 77; ++c) data.labels.push_back(std::to_string(c));
  for (int i = 0; i < examples; ++i) {
    const auto length = static_cast<std::int64_t>(8 + random.below(static_cast<std::uint64_t>(2 * i), 17));  // 16 on average, as banking77
    std::vector<std::int64_t> ids;
    for (std::int64_t t = 0; t < length; ++t) ids.push_back(static_cast<std::int64_t>(1000 + random.below(static_cast<std::uint64_t>(100000 + 50 * i + t), 2600)));
    tokens += length;
    data.train.ids.push_back(std::move(ids));
    data.train.labels.push_back(i % 77);
  }
  model.add_classifier(data.labels, "mean");
  set_verbosity(Verbosity::quiet);
  const TemporaryFolder work;
  Json details = Json::object();
  StageContext context;
  context.title = "benchmark";
  context.work = work.path();
  context.data = &data;
  context.details = &details;
  TrainOptions options;
  options.epochs = 1;
  options.save_every_steps = 1 << 30;
  const double before = cpu_seconds();
  const auto start = std::chrono::steady_clock::now();
  train(model, options, {label_cross_entropy()}, {}, context);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const double rate = static_cast<double>(tokens) / seconds;
  const double gigaflops = 6.0 * 10.6e6 * rate / 1e9, machine = measure_gigaflops();
  std::printf("tokens %lld  seconds %.2f  cpu seconds %.2f  tokens/s %.0f  %.1f GFLOP/s of %.1f that a matrix product reaches (%.0f%%)\n", static_cast<long long>(tokens), seconds, cpu_seconds() - before, rate, gigaflops,
              machine, 100 * gigaflops / machine);
  return 0;
}
