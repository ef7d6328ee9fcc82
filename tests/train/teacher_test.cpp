// The teacher cache against a live teacher, its file, and what it refuses.
#include <ATen/ATen.h>

#include "tests/catch_torch.h"

#include "tests/support.h"
#include "tests/train/fixtures.h"
#include "train/teacher.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

std::shared_ptr<const Transformer> teacher_model() {
  auto model = tiny_bert(3, 9);
  model->classifier.weight.copy_(at::linspace(-1, 1, 48).view({3, 16}));
  return model;
}

const std::set<std::string> teacher_taps = {"layer.0.output", "layer.1.output", "layer.1.query", "layer.1.ffn", "pooled", "final"};

}  // namespace

TEST_CASE("a cached teacher gives what a live one gives, to bfloat16") {
  const TokenizedExamples examples = tiny_examples(30);
  const TemporaryFolder folder;
  const auto model = teacher_model();
  const auto cached = cached_teacher(model, examples, 0, folder.path() / "cache");
  const auto live = live_teacher(model);
  cached->prepare(teacher_taps);
  live->prepare(teacher_taps);
  const ClassificationBatches batches(examples, 7, 0, 3, 0);
  for (std::int64_t i = 0; i < batches.batches_per_epoch(); ++i) {
    const TokenBatch batch = batches.get(0, i);
    const TeacherTargets a = cached->targets(batch), b = live->targets(batch);
    CHECK(at::allclose(a.logits, b.logits, 1e-5, 1e-5));
    for (const std::string& tap : teacher_taps) {
      INFO(tap);
      const at::Tensor& x = a.taps.at(tap);
      const at::Tensor& y = b.taps.at(tap);
      REQUIRE(x.sizes() == y.sizes());
      CHECK(x.scalar_type() == at::kFloat);
      for (std::int64_t r = 0; r < batch.rows; ++r) {
        const std::int64_t length = batch.lengths[static_cast<std::size_t>(r)];
        const auto real = [&](const at::Tensor& t) { return t.dim() == 2 ? t[r] : t.dim() == 3 ? t[r].narrow(0, 0, length) : t[r].narrow(1, 0, length); };
        CHECK(at::allclose(real(x), real(y), 1.0 / 128, 1e-5));
        if (x.dim() == 3 && length < batch.columns) CHECK(x[r].narrow(0, length, batch.columns - length).abs().max().item<double>() == 0);
      }
    }
  }
}

TEST_CASE("the cache is computed once per teacher, data and taps") {
  const TokenizedExamples examples = tiny_examples(10), others = tiny_examples(10, 3, 4);
  const TemporaryFolder folder;
  const auto count = [&] { return std::distance(std::filesystem::directory_iterator(folder.path()), {}); };
  cached_teacher(teacher_model(), examples, 0, folder.path())->prepare({"final"});
  REQUIRE(count() == 1);
  const auto file = std::filesystem::directory_iterator(folder.path())->path();
  const auto written = std::filesystem::last_write_time(file);
  const std::string bytes = read_text(file);
  cached_teacher(teacher_model(), examples, 0, folder.path())->prepare({"final"});
  CHECK(count() == 1);
  CHECK(std::filesystem::last_write_time(file) == written);
  std::filesystem::remove(file);
  cached_teacher(teacher_model(), examples, 0, folder.path())->prepare({"final"});
  CHECK(read_text(file) == bytes);  // same input, same bytes
  cached_teacher(teacher_model(), examples, 0, folder.path())->prepare({});
  CHECK(count() == 2);
  cached_teacher(teacher_model(), others, 0, folder.path())->prepare({"final"});
  CHECK(count() == 3);
  CHECK(cached_teacher(teacher_model(), others, 0, folder.path())->fingerprint() != cached_teacher(teacher_model(), examples, 0, folder.path())->fingerprint());
}

TEST_CASE("the cache refuses what does not fit") {
  const TokenizedExamples examples = tiny_examples(10);
  const TemporaryFolder folder;
  const auto teacher = cached_teacher(teacher_model(), examples, 0, folder.path());
  CHECK(contains_all(error_text([&] { teacher->prepare({"layer.7.output"}); }), {"layer.7.output"}));
  CHECK(std::filesystem::is_empty(folder.path()));  // nothing half written
  teacher->prepare({"final"});
  TokenizedExamples split = examples;
  split.ids[0].push_back(11);
  TokenBatch batch = ClassificationBatches(split, 10, 0, 0, 0).get(0, 0);
  CHECK(contains_all(error_text([&] { teacher->targets(batch); }), {"example 0", "tokens for the student"}));
  const auto logits_only = cached_teacher(teacher_model(), examples, 0, folder.path());
  logits_only->prepare({});
  CHECK(logits_only->targets(batch).logits.size(0) == 10);  // logits need no alignment
  batch.examples[0] = 10;
  CHECK(contains_all(error_text([&] { logits_only->targets(batch); }), {"example 10"}));
  for (const auto& entry : std::filesystem::directory_iterator(folder.path())) std::filesystem::resize_file(entry.path(), std::filesystem::file_size(entry.path()) - 8);
  CHECK(contains_all(error_text([&] { cached_teacher(teacher_model(), examples, 0, folder.path())->prepare({"final"}); }), {"teacher-"}));
}

TEST_CASE("an objective that needs a teacher is refused without one, and gets it with one") {
  class Match final : public Objective {
   public:
    bool needs_teacher() const override { return true; }
    void request_taps(std::set<std::string>& student, std::set<std::string>& teacher) const override {
      student.insert("layer.1.output");
      teacher.insert("layer.1.output");
    }
    at::Tensor loss(const ObjectiveInput& input, std::vector<LossPart>& parts) override {
      const at::Tensor value = (input.logits - input.teacher->logits).square().mean() + (input.taps.at("layer.1.output") - input.teacher->taps.at("layer.1.output")).square().mean() * 0.01;
      parts.push_back({"match", value});
      return value;
    }
  };
  const TaskData data = tiny_data();
  const TemporaryFolder work;
  StageContext context = tiny_context(data, work.path());
  CHECK(contains_all(error_text([&] { train(*tiny_bert(), tiny_options(), {std::make_shared<Match>()}, {}, context); }), {"needs a teacher"}));
  const auto teacher = cached_teacher(teacher_model(), data.train, 0, work.path() / "teacher");
  context.teacher = teacher.get();
  Json details = Json::object();
  context.details = &details;
  TrainOptions options = tiny_options();
  options.epochs = 10;
  train(*tiny_bert(), options, {std::make_shared<Match>()}, {}, context);
  CHECK(details["loss_curve"].back()["loss"].get<double>() < 0.3 * details["loss_curve"].front()["loss"].get<double>());
}
