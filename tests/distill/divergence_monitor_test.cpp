// KL to the teacher as a figure: beside objectives that do not minimise it, and now and then where only labels teach.
#include <ATen/ATen.h>

#include "core/files.h"
#include "distill/stage.h"
#include "tests/catch_torch.h"
#include "tests/distill/objectives.h"
#include "tests/support.h"
#include "tests/tiny_models.h"
#include "train/teacher.h"

using namespace kompakt;
using namespace kompakt::testing;

TEST_CASE("the divergence is logged beside objectives that look at other values of the teacher, and changes nothing") {
  for (const bool text : {false, true}) {
    INFO((text ? "text" : "classes"));
    const std::shared_ptr<Transformer> teacher = text ? tiny_decoder(3) : tiny_encoder(3);
    const TaskData data = text ? tiny_text() : tiny_classification(32);
    const auto source = live_teacher(teacher);
    const auto run = [&](const char* objective, Json& details, bool monitored = true) {
      DistillOptions options;
      options.student.keep_layers = {0, 2};
      options.objective = parse_yaml(objective, "test");
      options.train.steps = 5, options.train.batch_size = 4, options.train.sequence_length = 16, options.train.precision = "float32", options.train.dropout = 0;
      StageContext context;
      const TemporaryFolder work;
      context.title = "01-distill", context.work = work.path(), context.seed = 5, context.data = &data, context.teacher = source.get(), context.details = &details;
      auto student = make_student(*teacher, options.student);
      if (monitored) distill(*student, options, context);
      else train(*student, options.train, objectives_of(objective, student_layer_map(options.student, teacher->config().layers), objective_shapes(*student, teacher->config(), 5)), {}, context);
      return student;
    };
    Json alone = Json::object(), beside = Json::object(), without = Json::object();
    const auto a = run("[{relation: minilm}]", alone), b = run("[{relation: minilm}]", without, false);
    run("[{relation: minilm}, {logits: forward_kl}]", beside);
    const Json& parts = alone.at("loss_curve").front().at("parts");
    CHECK(parts.at("teacher_forward_kl").get<double>() > 0);
    CHECK(parts.at("teacher_reverse_kl").get<double>() > 0);
    CHECK_FALSE(parts.contains("forward_kl"));
    CHECK_FALSE(without.at("loss_curve").front().at("parts").contains("teacher_forward_kl"));
    // The first step's is what a logit loss measures there; the weights are those of a training without it.
    CHECK(parts.at("teacher_forward_kl").get<double>() == Approx(beside.at("loss_curve").front().at("parts").at("forward_kl").get<double>()).epsilon(1e-6));
    for (std::size_t i = 0; i < a->parameters().size(); ++i) CHECK(at::equal(*a->parameters()[i].value, *b->parameters()[i].value));
  }
}

TEST_CASE("with labels alone the divergence is measured now and then, and changes neither weights nor score") {
  const std::shared_ptr<Transformer> teacher = tiny_decoder(3);
  TaskData data = tiny_text();
  data.heldout = tiny_text(2).calibration;
  const auto source = live_teacher(teacher);
  DistillOptions options;
  options.student.keep_layers = {0, 2};
  options.objective = parse_yaml("[{labels: cross_entropy}]", "test");
  options.train.steps = 23, options.train.batch_size = 4, options.train.sequence_length = 16, options.train.precision = "float32";
  TrainResult results[2];
  Json details[2] = {Json::object(), Json::object()};
  std::vector<std::pair<std::string, at::Tensor>> weights[2];
  for (const int watched : {0, 1}) {
    const TemporaryFolder work;
    StageContext context;
    context.title = "01-distill", context.work = work.path(), context.seed = 5, context.data = &data, context.teacher = source.get(), context.details = &details[watched];
    const auto student = make_student(*teacher, options.student);
    if (watched) results[1] = distill(*student, options, context);
    else results[0] = train(*student, options.train, objectives_of("[{labels: cross_entropy}]", student_layer_map(options.student, 3), objective_shapes(*student, teacher->config(), 5)), {}, context);
    CHECK(context.watched == nullptr);
    weights[watched] = copy_of(*student);
  }
  CHECK(same_parameters(weights[0], weights[1]));
  CHECK(results[0].dev_score == results[1].dev_score);
  CHECK_FALSE(details[0].contains("watched_curve"));
  const Json& curve = details[1].at("watched_curve");
  REQUIRE(curve.size() == 4);
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(curve[i].at("step") == std::vector<int>{1, 10, 20, 23}[i]);
    CHECK(curve[i].at("parts").at("teacher_forward_kl").get<double>() > 0);
    CHECK(curve[i].at("parts").at("teacher_reverse_kl").get<double>() > 0);
  }
  CHECK_FALSE(details[1].at("loss_curve").front().at("parts").contains("teacher_forward_kl"));
  // The first is what a logit loss measures on the first step's rows.
  options.objective = parse_yaml("[{logits: reverse_kl}]", "test");
  options.train.steps = 1;
  Json other = Json::object();
  const TemporaryFolder work;
  StageContext context;
  context.title = "01-distill", context.work = work.path(), context.seed = 5, context.data = &data, context.teacher = source.get(), context.details = &other;
  distill(*make_student(*teacher, options.student), options, context);
  for (const char* part : {"teacher_forward_kl", "teacher_reverse_kl"})
    CHECK(curve[0].at("parts").at(part).get<double>() == Approx(other.at("loss_curve").front().at("parts").at(part).get<double>()).epsilon(1e-6));
}
