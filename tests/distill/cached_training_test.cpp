// Training from a cache of likeliest tokens and draws: its gradient beside the full one, and kill and resume.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"

#include <cstring>

#include "core/files.h"
#include "distill/stage.h"
#include "tests/quantize/stories.h"
#include "tests/support.h"
#include "tests/tiny_models.h"
#include "train/step_batches.h"
#include "train/teacher.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

std::shared_ptr<Objective> cached_objective(const std::string& item, const Transformer& student) {
  Problems problems;
  const auto list = build_objectives(parse_yaml("[" + item + "]", "test"), {}, problems, objective_shapes(student, student.config(), 0));
  problems.throw_if_any("mistakes");
  return list.at(0);
}

// Gradient of all weights, one after the other, and the parts of the loss.
at::Tensor gradient_under(Transformer& student, TeacherSource& teacher, const TokenBatch& batch, const std::string& item, std::vector<double>* values = nullptr) {
  const auto objective = cached_objective(item, student);
  student.requires_grad(true);
  const ModelInput input = to_input(batch, c10::Device(c10::kCPU));
  const TapMap taps;
  const at::Tensor hidden = student.hidden(input), none;
  const TeacherTargets targets = teacher.targets(batch);
  std::vector<LossPart> parts;
  objective->loss({student, input, batch, none, hidden, taps, &targets}, parts).backward();
  std::vector<at::Tensor> all;
  for (const NamedParameter& parameter : student.parameters()) {
    all.push_back(parameter.value->grad().flatten().to(at::kDouble));
    parameter.value->mutable_grad() = at::Tensor();
  }
  student.requires_grad(false);
  if (values)
    for (const LossPart& part : parts) values->push_back(part.value.item<double>());
  return at::cat(all);
}

double cosine(const at::Tensor& a, const at::Tensor& b) { return (a.dot(b) / (a.norm() * b.norm())).item<double>(); }

}  // namespace

TEST_CASE("gradient of forward KL from the cache against the live teacher, on the 260-thousand-weight story model") {
  const std::shared_ptr<Transformer> teacher = stories_model();
  if (!teacher) return;
  const auto student = make_student(*teacher, {{0, 1, 3, 4}, {}});
  const CalibrationSet text = written_text(*teacher, 8, 128, 3);
  TaskData data;
  data.kind = TaskData::Kind::text;
  data.hash = "stories";
  const at::Tensor ids = text.inputs[0].ids.contiguous();
  for (std::int64_t r = 0; r < 8; ++r) data.train_documents.emplace_back(ids[r].const_data_ptr<std::int64_t>(), ids[r].const_data_ptr<std::int64_t>() + 128);
  TrainOptions options;
  options.batch_size = 8;
  options.sequence_length = 128;
  const TokenBatch batch = StepBatches(data, options, 1).micro_batches(0).at(0);
  const auto live = live_teacher(teacher);
  live->prepare({});
  std::vector<double> full_values;
  const at::Tensor full = gradient_under(*student, *live, batch, "{logits: forward_kl}", &full_values);
  struct Case {
    SparseCacheOptions options;
    double least;
  };
  // Measured: cosine 0.999999, 0.99967 and 0.99835.
  for (const Case& c : {Case{{64, 32}, 0.9995}, Case{{16, 16}, 0.998}, Case{{8, 8}, 0.99}}) {
    const TemporaryFolder folder;
    const auto cached = sparse_teacher(teacher, data, 128, c.options, folder.path());
    cached->prepare({});
    std::vector<double> values;
    const at::Tensor gradient = gradient_under(*student, *cached, batch, "{logits: forward_kl}", &values);
    INFO("top " << c.options.top << " tail " << c.options.tail << ": cosine " << cosine(gradient, full) << ", norm ratio " << (gradient.norm() / full.norm()).item<double>() << ", loss " << values[0] << " of " << full_values[0]);
    CHECK(cosine(gradient, full) > c.least);
    CHECK((gradient.norm() / full.norm()).item<double>() == Approx(1).epsilon(0.03));
    CHECK(values[0] == Approx(full_values[0]).epsilon(0.02));
    CHECK(values[2] <= full_values[2] * 1.001);  // reverse KL of the partition: a lower bound
  }
}

TEST_CASE("training from the cache: killed and resumed to the same bytes, whatever the cache held") {
  class Stopping final : public Objective {
   public:
    Stopping(std::shared_ptr<Objective> inner, int calls) : inner_(std::move(inner)), calls_(calls) {}
    bool needs_teacher() const override { return true; }
    bool needs_logits() const override { return false; }
    at::Tensor loss(const ObjectiveInput& input, std::vector<LossPart>& parts) override {
      if (calls_-- == 0) throw std::runtime_error("killed");
      return inner_->loss(input, parts);
    }

   private:
    std::shared_ptr<Objective> inner_;
    int calls_;
  };
  const std::shared_ptr<Transformer> teacher = tiny_decoder(3);
  const TaskData data = tiny_text();
  TrainOptions options;
  options.steps = 14;
  options.batch_size = 4;
  options.sequence_length = 16;
  options.learning_rate = 3e-3;
  options.precision = "float32";
  options.save_every_steps = 4;
  const auto train_with = [&](const std::filesystem::path& store, const std::filesystem::path& work, bool resume, int calls) {
    const auto source = sparse_teacher(teacher, data, 16, {6, 4}, store);
    const auto student = make_student(*teacher, {{0, 2}, {}});
    Json details = Json::object();
    StageContext context;
    context.title = "01-distill";
    context.work = work;
    context.resume = resume;
    context.seed = 5;
    context.data = &data;
    context.teacher = source.get();
    context.details = &details;
    train(*student, options, {std::make_shared<Stopping>(cached_objective("{logits: forward_kl}", *student), calls)}, {}, context);
    CHECK(details.at("loss_curve").back().at("parts").contains("teacher_reverse_kl"));
    return copy_of(*student);
  };
  const TemporaryFolder store, broken_store, work, broken_work, third;
  const auto whole = train_with(store.path(), work.path() / "a", false, 1000);
  CHECK_THROWS_WITH(train_with(broken_store.path(), broken_work.path() / "b", false, 9), "killed");
  for (const auto& entry : std::filesystem::recursive_directory_iterator(broken_store.path()))
    if (entry.path().extension() == ".h5") std::filesystem::remove(entry.path());  // a real kill leaves no part that was not full
  CHECK(same_parameters(train_with(broken_store.path(), broken_work.path() / "b", true, 1000), whole));
  CHECK(same_parameters(train_with(store.path(), third.path() / "c", false, 1000), whole));  // from a cache that is complete
}

TEST_CASE("options of the cache: read, checked with the objectives") {
  const auto read = [](const std::string& yaml, bool classification) {
    DistillOptions options;
    Problems problems;
    read_fields(parse_yaml(yaml, "r.yaml"), "stage \"distill\"", problems, [&](FieldVisitor& v) { fields(v, options); });
    check_distill(options, classification, {}, problems);
    problems.throw_if_any("mistakes");
    return options;
  };
  CHECK(!read("{epochs: 1}", false).has_cache);
  const DistillOptions defaults = read("{cache: {}}", false);
  CHECK(defaults.has_cache);
  CHECK(defaults.cache.top == 64);
  CHECK(read("{cache: {top: 8, tail: 0}, objective: [{logits: reverse_kl}, {labels: cross_entropy}]}", false).cache.tail == 0);
  CHECK(contains_all(error_text([&] { read("{cache: {tail: 3}, objective: [{hidden: mse}]}", true); }), {"even", "4", "is for text", "not values of its layers"}));
  CHECK(contains_all(error_text([&] { read("{cache: {tops: 3}}", false); }), {"did you mean \"top\""}));
}
