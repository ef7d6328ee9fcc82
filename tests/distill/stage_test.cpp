// Students from layers, objectives from recipe lists (values, taps and mistakes), and the stage itself on a tiny task.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"
#include <cmath>
#include <filesystem>

#include "core/files.h"
#include "core/node.h"
#include "distill/losses.h"
#include "distill/stage.h"
#include "tests/distill/objectives.h"
#include "tests/distill/tokenizers.h"
#include "tests/support.h"
#include "tests/tiny_models.h"
#include "train/teacher.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

TokenBatch batch_of(const TokenizedExamples& examples, std::int64_t count) { return ClassificationBatches(examples, count, 0, 1, 0).evaluation(count).at(0); }

struct Evaluated {
  double total = 0;
  std::vector<LossPart> parts;
};

// Sum of the objectives for a student and a teacher on one batch, as the loop computes it.
Evaluated evaluate(const std::vector<std::shared_ptr<Objective>>& objectives, const Transformer& student, std::shared_ptr<const Transformer> teacher, const TokenBatch& batch) {
  const at::NoGradGuard no_grad;
  std::set<std::string> wanted, teacher_taps;
  bool logits_needed = !batch.labels.empty();
  for (const auto& objective : objectives) {
    objective->request_taps(wanted, teacher_taps);
    logits_needed = logits_needed || objective->needs_logits();
  }
  auto source = live_teacher(teacher);
  source->prepare(teacher_taps);
  const TeacherTargets targets = source->targets(batch);
  const ModelInput input = to_input(batch, c10::Device(c10::kCPU));
  TapMap taps(wanted);
  at::Tensor hidden, logits;
  if (batch.labels.empty()) {
    hidden = student.hidden(input, &taps);
    if (logits_needed) logits = student.head(hidden);
  } else {
    taps.request("final");
    logits = student.forward(input, &taps);
    hidden = taps.at("final");
  }
  Evaluated out;
  for (const auto& objective : objectives) out.total += objective->loss({student, input, batch, logits, hidden, taps, &targets}, out.parts).item<double>();
  return out;
}

std::filesystem::path scratch(const std::string& name) {
  const auto folder = std::filesystem::temp_directory_path() / ("kompakt-distill-" + name);
  std::filesystem::remove_all(folder);
  return folder;
}

}  // namespace

TEST_CASE("layer map: each student layer answers for the last dropped layer behind its copy") {
  CHECK(default_layer_map({0, 2, 4}, 6) == std::vector<std::int64_t>{1, 3, 5});
  CHECK(default_layer_map({1, 3, 5}, 6) == std::vector<std::int64_t>{2, 4, 5});
  CHECK(default_layer_map({0, 5}, 6) == std::vector<std::int64_t>{4, 5});
  CHECK(default_layer_map({}, 3) == std::vector<std::int64_t>{0, 1, 2});
  CHECK(contains_all(error_text([] { default_layer_map({0, 6}, 6); }), {"layer 6", "0 to 5"}));
  CHECK(contains_all(error_text([] { default_layer_map({2, 1}, 6); }), {"must rise", "2, 1"}));
  CHECK(contains_all(error_text([] { default_layer_map({1, 1}, 6); }), {"must rise"}));
}

TEST_CASE("a layer map of the recipe replaces the rule") {
  CHECK(student_layer_map({{1, 3}, {1, 3}}, 4) == std::vector<std::int64_t>{1, 3});
  CHECK(student_layer_map({{1, 3}, {}}, 4) == std::vector<std::int64_t>{2, 3});
  CHECK(contains_all(error_text([] { student_layer_map({{1, 3}, {1}}, 4); }), {"1 entries for 2 student layers"}));
  CHECK(contains_all(error_text([] { student_layer_map({{1, 3}, {1, 4}}, 4); }), {"layer 4", "0 to 3"}));
}

TEST_CASE("a student is a copy of the chosen layers, with names and lists of its own") {
  const auto teacher = tiny_encoder(3);
  const auto all = make_student(*teacher, {});
  CHECK(same_parameters(copy_of(*all), copy_of(*teacher)));
  const auto before = copy_of(*teacher);
  const auto student = make_student(*teacher, {{1, 3}});
  CHECK(student->config().layers == 2);
  CHECK(at::equal(student->blocks[1].mlp.up.weight, teacher->blocks[3].mlp.up.weight));
  CHECK(student->blocks[1].mlp.up.name == teacher->blocks[1].mlp.up.name);
  CHECK(at::equal(student->classifier.weight, teacher->classifier.weight));
  student->blocks[0].mlp.up.weight.zero_();
  CHECK(same_parameters(copy_of(*teacher), before));  // nothing is shared
  // The same blocks by hand give the same output.
  const auto again = make_student(*teacher, {{0, 2}});
  const ModelInput input = tiny_input({{4, 9, 17, 30}});
  at::Tensor x = teacher->embed(input);
  for (const std::int64_t layer : {0, 2}) x = teacher->block_forward(layer, x, input);
  CHECK(at::allclose(again->hidden(input), x, 1e-5, 1e-6));
}

TEST_CASE("objectives: the quickstart's sum by hand") {
  const std::shared_ptr<Transformer> teacher = tiny_encoder(3);
  const auto student = make_student(*teacher, {{0, 2}});
  stir(*student, 8);
  const std::vector<std::int64_t> map = default_layer_map({0, 2}, 4);
  const TokenBatch batch = batch_of(tiny_examples(5, 2), 5);
  const auto objectives = objectives_of(dump_yaml(default_objective(true)), map);
  const Evaluated sum = evaluate(objectives, *student, teacher, batch);

  const at::NoGradGuard no_grad;
  const ModelInput input = to_input(batch, c10::Device(c10::kCPU));
  TapMap taps({"layer.0.output", "layer.1.output"}), teacher_taps({"layer.1.output", "layer.3.output"});
  const at::Tensor logits = student->forward(input, &taps), target = teacher->forward(input, &teacher_taps);
  double ce = 0, kl = 0, mse = 0;
  for (std::int64_t b = 0; b < batch.rows; ++b) {
    ce -= at::log_softmax(logits[b], 0)[batch.labels[static_cast<std::size_t>(b)]].item<double>() / static_cast<double>(batch.rows);
    const at::Tensor p = at::softmax(target[b].to(at::kDouble) / 2, 0), q = at::softmax(logits[b].to(at::kDouble) / 2, 0);
    kl += 4 * (p * (p / q).log()).sum().item<double>() / static_cast<double>(batch.rows);
  }
  for (const auto& [s, t] : {std::pair{"layer.0.output", "layer.1.output"}, std::pair{"layer.1.output", "layer.3.output"}}) {
    double squares = 0;
    for (std::int64_t b = 0; b < batch.rows; ++b) {
      const std::int64_t n = batch.lengths[static_cast<std::size_t>(b)];
      squares += (taps.at(s)[b].narrow(0, 0, n) - teacher_taps.at(t)[b].narrow(0, 0, n)).to(at::kDouble).square().sum().item<double>();
    }
    mse += squares / static_cast<double>(batch.tokens() * 24) / 2;
  }
  CHECK(sum.total == Approx(0.5 * ce + kl + 10 * mse).epsilon(1e-5));
  REQUIRE(sum.parts.size() == 5);
  CHECK(sum.parts[0].name == "cross_entropy");
  CHECK(sum.parts[1].name == "forward_kl");
  CHECK(sum.parts[1].value.item<double>() == Approx(kl).epsilon(1e-5));
  CHECK(sum.parts[2].name == "teacher_forward_kl");  // at temperature 1, always logged
  CHECK(sum.parts[2].value.item<double>() == Approx(forward_kl(logits, target).item<double>()).epsilon(1e-5));
  CHECK(sum.parts[3].name == "teacher_reverse_kl");
  CHECK(sum.parts[3].value.item<double>() == Approx(reverse_kl(logits, target).item<double>()).epsilon(1e-5));
  CHECK(sum.parts[4].name == "hidden_mse");
  CHECK(sum.parts[4].value.item<double>() == Approx(mse).epsilon(1e-5));
}

TEST_CASE("every loss of the table works as an objective and is zero for the teacher itself") {
  const std::shared_ptr<Transformer> encoder = tiny_encoder(3), decoder = tiny_decoder(3);
  TokenBatch text;
  text.rows = 2, text.columns = 5;
  text.ids = {3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
  text.lengths = {5, 3};
  text.examples = {0, 1};
  const TokenBatch classes = batch_of(tiny_examples(4, 2), 4);
  std::vector<std::string> items{"{hidden: mse}", "{hidden: cosine, layers: [0, 2]}", "{relation: minilm}", "{relation: minilm, normalize: true, layer: 0, heads: 2}",
                                 "{embedding: mse}", "{embedding: cosine}", "{embedding: contrastive}", "{embedding: similarity, temperature: 0.2}"};
  for (const std::string& name : logit_loss_names()) items.push_back("{logits: " + name + ", temperature: 2}");
  for (const std::string& item : items) {
    INFO(item);
    const auto check = [&](std::shared_ptr<Transformer> teacher, const TokenBatch& batch, std::int64_t layers) {
      const auto map = default_layer_map({}, layers);
      const auto objectives = objectives_of("[" + item + "]", map, objective_shapes(*teacher, teacher->config(), 1));
      CHECK(std::abs(evaluate(objectives, *teacher, teacher, batch).total) < 1e-5);
      const auto other = teacher->clone();
      stir(*other, 99);
      CHECK(evaluate(objectives, *other, teacher, batch).total > 1e-4);
    };
    check(encoder, classes, 4);
    if (item.find("embedding") == std::string::npos) check(decoder, text, 3);
  }
}

TEST_CASE("several logit losses of a list are one pass, each with its own weight and temperature") {
  const std::shared_ptr<Transformer> teacher = tiny_decoder(3);
  const auto student = tiny_decoder(4);
  TokenBatch batch;
  batch.rows = 1, batch.columns = 4;
  batch.ids = {3, 4, 5, 6};
  batch.lengths = {4};
  batch.examples = {0};
  const auto objectives = objectives_of("[{logits: forward_kl, temperature: 2, weight: 0.5}, {labels: cross_entropy}, {logits: reverse_kl, weight: 2}]", {0, 1, 2}, {24, 24, true});
  REQUIRE(objectives.size() == 2);
  const Evaluated both = evaluate(objectives, *student, teacher, batch);
  double expected = evaluate(objectives_of("[{labels: cross_entropy}]", {0, 1, 2}, {24, 24, true}), *student, teacher, batch).total;
  expected += 0.5 * evaluate(objectives_of("[{logits: forward_kl, temperature: 2}]", {0, 1, 2}, {24, 24, true}), *student, teacher, batch).total;
  expected += 2 * evaluate(objectives_of("[{logits: reverse_kl}]", {0, 1, 2}, {24, 24, true}), *student, teacher, batch).total;
  CHECK(both.total == Approx(expected).epsilon(1e-5));
  REQUIRE(both.parts.size() == 5);
  CHECK(both.parts[1].name == "reverse_kl");
  CHECK(both.parts[1].value.item<double>() == Approx(both.parts[3].value.item<double>()).epsilon(1e-6));
}

TEST_CASE("logit objective of a decoder: chunks from hidden states give what full logits give") {
  const std::shared_ptr<Transformer> teacher = tiny_decoder(3, true);
  const auto student = tiny_decoder(4, true);
  TokenBatch batch;
  batch.rows = 2, batch.columns = 4;
  batch.ids = {3, 4, 5, 6, 7, 8, 9, 0};
  batch.lengths = {4, 3};
  batch.examples = {0, 1};
  const std::string item = "[{logits: forward_kl, weight: 3}]";
  const double fused = evaluate(objectives_of(item, {0, 1, 2}, {24, 24, true, 0}), *student, teacher, batch).total;
  // Only positions with a next token count: three of the first row, two of the second.
  const at::NoGradGuard no_grad;
  const ModelInput input = to_input(batch, c10::Device(c10::kCPU));
  const at::Tensor s = student->forward(input), t = teacher->forward(input);
  LogitLossOptions options;
  options.mask = at::tensor({1, 1, 1, 0, 1, 1, 0, 0}, at::kLong).to(at::kBool).reshape({2, 4});
  CHECK(fused == Approx(3 * forward_kl(s, t, options).item<double>()).epsilon(1e-5));
}

TEST_CASE("hidden objective: different widths get an orthogonal projection that trains") {
  ObjectiveShapes shapes;
  shapes.student_hidden = 12, shapes.teacher_hidden = 24;
  const auto objectives = objectives_of("[{hidden: mse, layers: [1]}]", {0, 3}, shapes);
  const auto parameters = objectives[0]->parameters();
  REQUIRE(parameters.size() == 1);
  CHECK(parameters[0].first == "projection.hidden.1");
  CHECK(parameters[0].second.sizes() == at::IntArrayRef({12, 24}));
  CHECK(parameters[0].second.requires_grad());
  CHECK(objectives_of("[{hidden: mse}]", {0, 3})[0]->parameters().empty());
}

TEST_CASE("objectives: all mistakes of a list at once, with places and nearest names") {
  const std::string text = error_text([] {
    objectives_of("- {logits: foward_kl}\n- {logit: forward_kl}\n- {logits: forward_kl, beta: 0.5}\n- {hidden: mse, layers: [0, 7]}\n- {labels: cross_entropy, weight: -1}\n"
                  "- just text\n- {logits: reverse_kl, labels: cross_entropy}\n- {logits: forward_kl, temperature: 0}\n- {hidden: mse, wieght: 2}\n", {0, 1});
  });
  CHECK(contains_all(text, {"recipe.yaml:1:", "did you mean \"forward_kl\"", "recipe.yaml:2:", "did you mean \"logits\"", "recipe.yaml:3:", "\"beta\"", "no layer 7", "0 to 1",
                            "recipe.yaml:5:", "recipe.yaml:6:", "just text", "two losses", "recipe.yaml:8:", "more than 0", "did you mean \"weight\""}));
  CHECK(contains_all(error_text([] { objectives_of("[{embedding: contrastive}]", {0, 1}, {24, 24, true}); }), {"recipe.yaml:1:", "a decoder has none"}));
  ObjectiveShapes cached;
  cached.cached = true;
  CHECK(contains_all(error_text([&] { objectives_of("- {hidden: mse}\n- {logits: logits_mse}\n- {logits: ranking}\n- {logits: forward_kl, temperature: 2}\n", {0, 1}, cached); }),
                     {"recipe.yaml:1:", "not values of its layers", "recipe.yaml:2:", "all logits", "reverse_kl", "recipe.yaml:3:", "recipe.yaml:4:", "at temperature 1, not at 2"}));
  CHECK(objectives_of("[{logits: reverse_kl}, {logits: adaptive_kl}, {labels: cross_entropy}]", {0, 1}, cached).size() == 2);
  CHECK(contains_all(error_text([] { objectives_of("[]", {0}); }), {"must be a list", "an empty list"}));
  CHECK(contains_all(error_text([] { objectives_of("{logits: forward_kl}", {0}); }), {"must be a list", "a map"}));
  CHECK(contains_all(error_text([] { objectives_of("[{labels: cross_entropy, weight: 0}]", {0}); }), {"weight 0"}));
}

TEST_CASE("objective kinds explain themselves") {
  const auto kinds = objective_kinds();
  REQUIRE(kinds.size() == 7);
  for (const ObjectiveKindInfo& kind : kinds) {
    CHECK(!kind.names.empty());
    CHECK(kind.fields.size() >= 2);
    for (const FieldInfo& field : kind.fields) CHECK(!field.help.empty());
  }
}

TEST_CASE("every row of the objectives is built from a recipe, and described in docs/objectives.md") {
  const std::string page = read_text(source_folder() / "docs/objectives.md");
  for (const ObjectiveKindInfo& kind : objective_kinds()) {
    ObjectiveShapes shapes;
    shapes.decoder = kind.key != "embedding";
    shapes.crossed = kind.key == "cross_tokenizer", shapes.sampled = kind.key == "policy";
    for (const std::string& name : kind.names) {
      INFO(kind.key << ": " << name);
      CHECK(objectives_of("[{" + kind.key + ": " + name + "}]", {0, 1}, shapes).size() == 1);
      CHECK(contains_all(page, {("`" + kind.key + ": ").c_str(), (name + "`").c_str()}));
    }
  }
}

TEST_CASE("options of the stage are read and written") {
  DistillOptions options;
  Problems problems;
  read_fields(parse_yaml("{student: {keep_layers: [0, 2]}, objective: [{logits: forward_kl}], epochs: 2, learning_rate: 2e-4}", "r.yaml"), "stage \"distill\"", problems, [&](FieldVisitor& v) { fields(v, options); });
  problems.throw_if_any("mistakes");
  CHECK(options.student.keep_layers == std::vector<std::int64_t>{0, 2});
  CHECK(options.train.epochs == 2);
  CHECK(options.objective.is_list());
  const Node written = write_fields([&](FieldVisitor& v) { fields(v, options); });
  CHECK(written.find("student") != nullptr);
  CHECK(written.find("student")->find("keep_layers")->items.size() == 2);
}

TEST_CASE("distill: the student comes nearer to its teacher, on classes and on text") {
  const auto distance = [](const Transformer& student, const Transformer& teacher, const ModelInput& input) {
    const at::NoGradGuard no_grad;
    return forward_kl(student.forward(input), teacher.forward(input)).item<double>();
  };
  const ModelInput input = tiny_input({{4, 9, 17, 30, 5, 44}, {11, 12, 13, 14, 15, 16}, {33, 3, 41, 22, 8, 19}});
  for (const bool text : {false, true}) {
    INFO((text ? "text" : "classes"));
    const std::shared_ptr<Transformer> teacher = text ? tiny_decoder(3) : tiny_encoder(3);
    const TaskData data = text ? tiny_text() : tiny_classification(96);
    DistillOptions options;
    options.student.keep_layers = {0, 2};
    options.train.steps = 60;
    options.train.batch_size = text ? 4 : 16;
    options.train.sequence_length = 16;
    options.train.learning_rate = 3e-3;
    options.train.precision = "float32";
    options.train.dropout = 0;
    const auto source = live_teacher(teacher);
    Json details = Json::object();
    StageContext context;
    context.title = "01-distill";
    context.work = scratch(text ? "text" : "classes");
    context.seed = 5;
    context.data = &data;
    context.teacher = source.get();
    context.details = &details;
    const auto student = make_student(*teacher, options.student);
    const double before = distance(*student, *teacher, input);
    const TrainResult result = distill(*student, options, context);
    CHECK(result.steps == 60);
    CHECK(distance(*student, *teacher, input) < 0.85 * before);
    CHECK(details.at("layer_map") == Json(text ? std::vector<std::int64_t>{1, 2} : std::vector<std::int64_t>{1, 3}));
    CHECK(details.contains("loss_curve"));
    std::filesystem::remove_all(context.work);
  }
}

TEST_CASE("rows of the heads behind the tokenizer's ids are padding: of equal width too, they enter no distribution") {
  CHECK(shared_logits(50304, 50304) == 0);
  CHECK(shared_logits(50304, 50304, 50257) == 50257);
  CHECK(shared_logits(50304, 50432) == 50304);
  CHECK(shared_logits(50304, 50432, 50257) == 50257);
  CHECK(shared_logits(50257, 50304, 50257) == 50257);
  CHECK(shared_logits(50257, 50257, 50257) == 0);
  CHECK(shared_logits(50257, 50257, 60000) == 0);  // what the tokenizer has more is no column
  CHECK(contains_all(error_text([&] { shared_logits(50257, 32000, 32000); }), {"do not share", "50257 and 32000"}));
  // By hand: 43 tokens, seven rows of padding that shout on both sides.
  const std::shared_ptr<Transformer> teacher = tiny_decoder(3);
  const auto student = tiny_decoder(4);
  {
    const at::NoGradGuard no_grad;
    teacher->lm_head.weight.narrow(0, 43, 7).mul_(20);
    student->lm_head.weight.narrow(0, 43, 7).mul_(-30);
  }
  TokenBatch batch;
  batch.rows = 1, batch.columns = 5, batch.ids = {3, 4, 5, 6, 8}, batch.lengths = {5}, batch.examples = {0};
  const ModelInput input = to_input(batch, c10::Device(c10::kCPU));
  const auto kl = [&](std::int64_t columns) {
    const at::NoGradGuard no_grad;
    const at::Tensor log_p = at::log_softmax(teacher->forward(input)[0].narrow(0, 0, 4).narrow(1, 0, columns).to(at::kDouble), 1), log_q = at::log_softmax(student->forward(input)[0].narrow(0, 0, 4).narrow(1, 0, columns).to(at::kDouble), 1);
    return (log_p.exp() * (log_p - log_q)).sum().item<double>() / 4;
  };
  ObjectiveShapes shapes = objective_shapes(*student, teacher->config(), 1);
  CHECK(evaluate(objectives_of("[{logits: forward_kl}]", {}, shapes), *student, teacher, batch).total == Approx(kl(50)).epsilon(1e-5));
  shapes.tokens = 43;
  REQUIRE(std::abs(kl(43) - kl(50)) > 0.5);
  const Evaluated masked = evaluate(objectives_of("[{logits: forward_kl}]", {}, shapes), *student, teacher, batch);
  CHECK(masked.total == Approx(kl(43)).epsilon(1e-5));
  REQUIRE(masked.parts.size() == 3);
  CHECK(masked.parts[1].name == "teacher_forward_kl");  // what chooses the best state looks at the same columns
  CHECK(masked.parts[1].value.item<double>() == Approx(kl(43)).epsilon(1e-5));
}

TEST_CASE("a distillation knows the tokenizer: padding rows change no loss and learn nothing, live and from the cache") {
  const auto tokenizer = word_tokenizer();
  REQUIRE(tokenizer->vocab_size() == 263);
  TaskData data;
  data.kind = TaskData::Kind::text;
  data.tokenizer = tokenizer.get();
  for (const char* text : {"the cat sat on the mat", "a cat that sat there saw the cat", "that hat"}) data.train_documents.push_back(tokenizer->encode(text, false, false));
  data.hash = "padded";
  const Json json = {{"model_type", "llama"}, {"hidden_size", 16}, {"num_hidden_layers", 3}, {"num_attention_heads", 2}, {"num_key_value_heads", 1}, {"intermediate_size", 24}, {"vocab_size", 300},
                     {"max_position_embeddings", 64}, {"rms_norm_eps", 1e-5}, {"hidden_act", "silu"}, {"tie_word_embeddings", false}};
  for (const bool cached : {false, true}) {
    INFO((cached ? "cache" : "live"));
    std::vector<std::vector<double>> curves;
    for (const double loud : {1.0, 40.0}) {
      const auto teacher = std::make_shared<Transformer>(config_from_json(json, "tiny"), 3);
      stir(*teacher, 3);
      {
        const at::NoGradGuard no_grad;
        teacher->lm_head.weight.narrow(0, 263, 37).mul_(loud);
      }
      DistillOptions options;
      options.student.keep_layers = {0, 2};
      options.objective = parse_yaml("[{logits: forward_kl}]", "test");
      options.train.steps = 4, options.train.batch_size = 2, options.train.sequence_length = 16, options.train.learning_rate = 3e-3, options.train.weight_decay = 0, options.train.precision = "float32";
      const TemporaryFolder store;
      SparseCacheOptions cache{8, 4};
      cache.columns = shared_logits(300, 300, 263);
      const auto source = cached ? sparse_teacher(teacher, data, 16, cache, store.path()) : live_teacher(teacher);
      options.has_cache = cached;
      Json details = Json::object();
      StageContext context;
      context.title = "01-distill", context.work = scratch("padded"), context.seed = 5, context.data = &data, context.teacher = source.get(), context.details = &details;
      const auto student = make_student(*teacher, options.student);
      distill(*student, options, context);
      std::filesystem::remove_all(context.work);
      curves.emplace_back();
      for (const Json& point : details.at("loss_curve")) curves.back().push_back(point.at("loss").get<double>());
      CHECK(at::equal(student->lm_head.weight.narrow(0, 263, 37), teacher->lm_head.weight.narrow(0, 263, 37)));
      CHECK_FALSE(at::equal(student->lm_head.weight.narrow(0, 0, 263), teacher->lm_head.weight.narrow(0, 0, 263)));
    }
    REQUIRE(curves[0].size() == curves[1].size());
    REQUIRE(!curves[0].empty());
    CHECK(curves[0].front() > 1e-3);
    for (std::size_t i = 0; i < curves[0].size(); ++i) CHECK(curves[1][i] == Approx(curves[0][i]).epsilon(1e-6));
  }
}

TEST_CASE("relation heads that do not divide are a mistake of the list") {
  const auto teacher = tiny_decoder(3);
  Problems problems;
  build_objectives(parse_yaml("[{relation: minilm, heads: 5}]", "test"), {0, 1, 2}, problems, objective_shapes(*teacher, teacher->config(), 0));
  CHECK(contains_all(error_text([&] { problems.throw_if_any("mistakes"); }), {"relation heads", "5", "nearest"}));
}

TEST_CASE("distill refuses what it would have to ignore") {
  const std::shared_ptr<Transformer> teacher = tiny_encoder(3);
  const TaskData data = tiny_classification(8);
  const auto source = live_teacher(teacher);
  StageContext context;
  context.title = "01-distill";
  context.data = &data;
  const auto student = make_student(*teacher, {});
  CHECK(contains_all(error_text([&] { distill(*student, {}, context); }), {"needs a teacher"}));
  context.teacher = source.get();
  DistillOptions smoothed;
  smoothed.train.label_smoothing = 0.1;
  CHECK(contains_all(error_text([&] { distill(*student, smoothed, context); }), {"label_smoothing", "objective"}));
  DistillOptions wrong;
  wrong.student.keep_layers = {0};
  CHECK_THROWS_AS(distill(*student, wrong, context), std::logic_error);
}
