// Six steps against PyTorch's AdamW on the same model and data (scripts/make_goldens_train.py).
#include <ATen/ATen.h>

#include "tests/catch_torch.h"

#include "core/log.h"
#include "model/checkpoint.h"
#include "tests/support.h"
#include "tests/train/fixtures.h"

using namespace kompakt;
using namespace kompakt::testing;

TEST_CASE("losses, norms and weights of six steps equal PyTorch's") {
  const auto folder = source_folder() / "tests" / "goldens" / "train_bert";
  const Json golden = read_json(folder / "golden.json");
  TaskData data;
  data.labels = {"a", "b", "c"};
  data.train.ids = golden["texts"].get<std::vector<std::vector<std::int64_t>>>();
  data.train.labels = golden["labels"].get<std::vector<std::int64_t>>();
  auto model = load_model(folder);
  const TemporaryFolder work;
  StageContext context = tiny_context(data, work.path());
  FinetuneOptions options;
  options.centroid_head = false;
  TrainOptions& train = options.train;
  train.steps = 6;
  train.batch_size = 8;
  train.warmup = 1.0 / 3;
  train.learning_rate = 3e-3;
  train.head_learning_rate = 1e-2;
  train.weight_decay = 0.05;
  train.clip = 0.5;
  train.label_smoothing = 0.1;
  train.dropout = 0;
  train.precision = "float32";
  train.freeze = {"*position_embeddings*"};
  open_metrics(work.path() / "metrics.jsonl");
  finetune(*model, options, context);
  close_metrics();
  std::size_t step = 0;
  for (const std::string& line : split(read_text(work.path() / "metrics.jsonl"), '\n')) {
    if (line.empty()) continue;
    const Json event = parse_json(line, "metrics");
    if (event["event"] != "step") continue;
    CHECK(event["loss"].get<double>() == Approx(golden["losses"].at(step).get<double>()).epsilon(2e-5));
    CHECK(event["gradient_norm"].get<double>() == Approx(golden["gradient_norms"].at(step).get<double>()).epsilon(2e-4));
    ++step;
  }
  CHECK(step == 6);
  for (int i = 0; i < 3; ++i) CHECK(model->classifier.bias[i].item<double>() == Approx(golden["classifier_bias"][i].get<double>()).epsilon(1e-3).margin(1e-6));
  for (int i = 0; i < 16; ++i) {
    CHECK(model->blocks[1].attention.query.weight[3][i].item<double>() == Approx(golden["query_row"][i].get<double>()).epsilon(1e-3).margin(1e-5));
    CHECK(model->tokens.weight[5][i].item<double>() == Approx(golden["word_row"][i].get<double>()).epsilon(1e-3).margin(1e-5));
  }
}
