// The fine-tuning recipe on real data and real weights. Hidden: minutes of work. Run it by name:
//   test_train "[banking]"   with KOMPAKT_STEPS=60 to stop early.
#include "tests/catch_torch.h"
#include <cstdio>
#include <cstdlib>

#include "core/log.h"
#include "core/system.h"
#include "data/dataset.h"
#include "data/tokenizer.h"
#include "model/checkpoint.h"
#include "tests/support.h"
#include "tests/train/fixtures.h"
#include "train/dev_score.h"
#include "train/step_batches.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

TokenizedExamples banking_tokens(const Tokenizer& tokenizer, const ClassificationSet& set, std::size_t limit) {
  TokenizedExamples out;
  for (const Example& example : set.examples) {
    std::vector<std::int64_t> ids = tokenizer.encode(example.text);
    if (ids.size() > limit) {
      ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(limit) - 1, ids.end() - 1);  // the last one is [SEP]
      ++out.truncated;
    }
    out.ids.push_back(std::move(ids));
    out.labels.push_back(example.label);
  }
  return out;
}

std::int64_t banking_number(const char* name, std::int64_t fallback) {
  const char* given = std::getenv(name);
  return given ? std::atoll(given) : fallback;
}

}  // namespace

TEST_CASE("fine-tuning MiniLM on banking77", "[.slow][banking]") {
  const auto folder = shared_data("classification/banking77");
  const auto teacher = source_folder() / "teachers" / "all-MiniLM-L6-v2";
  if (!folder || !std::filesystem::exists(teacher)) return skip("banking77 or the teacher is not here");
  DataSource source;
  source.label = "category";
  source.files = {"train.csv"};
  const ClassificationSet train_set = read_classification(source, *folder);
  source.files = {"test.csv"};
  const ClassificationSet test_set = read_classification(source, *folder, train_set.label_names);
  const auto tokenizer = load_tokenizer(teacher);
  TaskData data;
  data.tokenizer = tokenizer.get();
  data.labels = train_set.label_names;
  data.train = banking_tokens(*tokenizer, train_set, 48);
  data.hash = train_set.hash;
  const TokenizedExamples test = banking_tokens(*tokenizer, test_set, 48);

  auto model = load_model(teacher);
  const TemporaryFolder work;
  Json details = Json::object();
  StageContext context = tiny_context(data, work.path(), &details);
  context.seed = static_cast<std::uint64_t>(banking_number("KOMPAKT_SEED", 17));
  FinetuneOptions options;
  options.train.epochs = 4;
  options.train.head_learning_rate = 1e-3;
  options.train.freeze = {"*position_embeddings*"};
  options.train.steps = banking_number("KOMPAKT_STEPS", 0);
  const bool whole = options.train.steps == 0;
  options.centroid_head = false;
  model->add_classifier(data.labels, "mean");
  if (whole) {
    set_centroid_head(*model, data.train, padding_id(data));
    const double before = accuracy(*model, test, padding_id(data));
    std::printf("centroid head: %.4f\n", before);
    CHECK(before >= 0.847);
    CHECK(before <= 0.853);
  }
  const double cpu = cpu_seconds();
  const TrainResult result = finetune(*model, options, context);
  std::printf("steps %lld, %.1f s, cpu %.1f s, cpu per step %.4f s, loss %.4f, peak %s\n", static_cast<long long>(result.steps), result.seconds, cpu_seconds() - cpu,
              (cpu_seconds() - cpu) / static_cast<double>(result.steps), result.final_loss, human_bytes(static_cast<double>(peak_memory_bytes())).c_str());
  if (whole) {
    const double after = accuracy(*model, test, padding_id(data));
    std::printf("test accuracy: %.4f\n", after);
    CHECK(after >= 0.925);
  }
}
