// Losses between models of different tokenizers: alignment by bytes, goldens, gradients, edges, and the teacher that reads in its own tokens.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"

#include <cmath>

#include "core/files.h"
#include "core/json.h"
#include "data/token_bytes.h"
#include "distill/cross_tokenizer.h"
#include "distill/stage.h"
#include "distill/token_log_probs.h"
#include "distill/vocabularies.h"
#include "distributed/collective.h"
#include "tests/distill/tensors.h"
#include "tests/distill/tokenizers.h"
#include "tests/support.h"
#include "tests/tiny_models.h"
#include "tests/train/ranks.h"
#include "train/step_batches.h"
#include "train/targets.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

using Ids = std::vector<std::int64_t>;

at::Tensor long_tensor(const Ids& values) { return at::tensor(at::ArrayRef<std::int64_t>(values), at::kLong); }

std::unique_ptr<Transformer> text_model(std::int64_t vocabulary, std::uint64_t seed) {
  const Json json = {{"model_type", "llama"}, {"hidden_size", 16}, {"num_hidden_layers", 2}, {"num_attention_heads", 2}, {"num_key_value_heads", 1}, {"intermediate_size", 24}, {"vocab_size", vocabulary},
                     {"max_position_embeddings", 64}, {"rms_norm_eps", 1e-5}, {"hidden_act", "silu"}, {"tie_word_embeddings", false}};
  auto model = std::make_unique<Transformer>(config_from_json(json, "tiny"), seed);
  stir(*model, seed);
  return model;
}

TaskData text_data(const Tokenizer& tokenizer, const std::vector<std::string>& texts) {
  TaskData data;
  data.kind = TaskData::Kind::text;
  data.tokenizer = &tokenizer;
  for (const std::string& text : texts) data.train_documents.push_back(tokenizer.encode(text, false, false));
  data.hash = "texts";
  return data;
}

TokenBatch batch_of_rows(const std::vector<Ids>& rows) {
  TokenBatch batch;
  batch.rows = static_cast<std::int64_t>(rows.size());
  for (const Ids& row : rows) batch.columns = std::max(batch.columns, static_cast<std::int64_t>(row.size()));
  batch.ids.assign(static_cast<std::size_t>(batch.rows * batch.columns), 0);
  for (std::int64_t r = 0; r < batch.rows; ++r) {
    const Ids& row = rows[static_cast<std::size_t>(r)];
    std::copy(row.begin(), row.end(), batch.ids.begin() + r * batch.columns);
    batch.lengths.push_back(static_cast<std::int64_t>(row.size()));
    batch.examples.push_back(r);
  }
  return batch;
}

HiddenAndHead as_logits(const at::Tensor& logits) { return {logits, at::eye(logits.size(1), at::kDouble), {}}; }

std::shared_ptr<Objective> cross_objective(const CrossLoss& row, const Transformer& student, const Transformer& teacher) {
  ObjectiveShapes shapes = objective_shapes(student, teacher.config(), 0);
  shapes.crossed = true;
  Problems problems;
  return build_objectives(parse_yaml(str("[{cross_tokenizer: ", row.name, "}]"), "test"), {}, problems, shapes).at(0);
}

}  // namespace

TEST_CASE("bytes of tokens: byte-level stand-ins, byte fallback, dummy prefix") {
  const auto tokenizer = word_tokenizer();
  CHECK(token_bytes(*tokenizer, tokenizer->id_of("\xC4\xA0" "cat").value()) == " cat");
  CHECK(token_bytes(*tokenizer, 0) == "<end>");
  CHECK(token_bytes(*tokenizer, 9999).empty());
  CHECK_FALSE(has_dummy_prefix(*tokenizer));
  const auto table = token_byte_table(*tokenizer);
  const std::string text = "the cat s\xC3\xA4t";
  const SpelledText spelled = spell_tokens(tokenizer->encode(text, false, false), table, false);
  CHECK(spelled.bytes == text);
  CHECK(spelled.ends.front() == 3);
  CHECK(spelled.ends.back() == static_cast<std::int64_t>(text.size()));
  const std::vector<std::string> pieces = {" a", "b", "\xC3", ""};
  const SpelledText shifted = spell_tokens(Ids{0, 1, 3, 2}, pieces, true);
  CHECK(shifted.bytes == "ab\xC3");
  CHECK(shifted.ends == Ids{1, 2, 2, 3});
}

TEST_CASE("alignment of two tokenizations: by hand, edges and goldens") {
  using Spans = std::vector<TokenSpan>;
  CHECK((align_spans(Ids{3, 5, 8}, Ids{1, 3, 8}, 8) == Spans{{0, 1, 0, 2}, {1, 3, 2, 3}}));
  CHECK((align_spans(Ids{1, 2, 3}, Ids{1, 2, 3}, 3) == Spans{{0, 1, 0, 1}, {1, 2, 1, 2}, {2, 3, 2, 3}}));
  CHECK(align_spans(Ids{}, Ids{3}, 3).empty());
  CHECK(align_spans(Ids{2, 4}, Ids{3, 5}, 9).empty());
  CHECK((align_spans(Ids{1, 2, 3}, Ids{1, 3}, 2) == Spans{{0, 1, 0, 1}}));    // bytes behind 2 differ
  CHECK((align_spans(Ids{1, 1, 2}, Ids{1, 2}, 2) == Spans{{0, 1, 0, 1}, {1, 3, 1, 2}}));  // a token without bytes belongs to the next span
  for (const Json& item : read_json(source_folder() / "tests/goldens/cross_tokenizer.json").at("alignment")) {
    const Ids a = item.at("student"), b = item.at("teacher");
    Spans expected;
    for (const Json& group : item.at("spans")) expected.push_back({group[0], group[1], group[2], group[3]});
    CHECK((align_spans(a, b, a.back()) == expected));
  }
}

TEST_CASE("losses between tokenizers equal the goldens in value and gradient") {
  const Json goldens = read_json(source_folder() / "tests/goldens/cross_tokenizer.json");
  const auto check = [](const Json& item, const at::Tensor& student, const ScalarFunction& loss) {
    const auto [value, gradient] = gradient_of(loss, student);
    CHECK(value == Approx(item.at("value").get<double>()).epsilon(1e-10));
    CHECK(largest_difference(gradient, tensor_of(item.at("gradient"), student.sizes().vec())) < 1e-10);
    CHECK(gradient_error(loss, student) < 1e-5);
  };
  for (const Json& item : goldens.at("uld")) {
    const std::int64_t n = item.at("n");
    const at::Tensor student = tensor_of(item.at("student"), {n, -1}), teacher = tensor_of(item.at("teacher"), {n, -1});
    TextAlignment alignment;
    alignment.spans = n, alignment.student_starts = alignment.teacher_starts = at::arange(n, at::kLong);
    const double temperature = item.at("temperature");
    check(item, student, [&](const at::Tensor& s) { return find_cross_loss("uld")->evaluate(alignment, as_logits(s), as_logits(teacher), temperature); });
  }
  for (const Json& item : goldens.at("shared")) {
    const std::int64_t n = item.at("n");
    const at::Tensor student = tensor_of(item.at("student"), {n, -1}), teacher = tensor_of(item.at("teacher"), {n, -1});
    TextAlignment alignment;
    alignment.spans = n, alignment.student_starts = alignment.teacher_starts = at::arange(n, at::kLong);
    alignment.student_shared = long_tensor(item.at("mine")), alignment.teacher_shared = long_tensor(item.at("other"));
    const double temperature = item.at("temperature");
    check(item, student, [&](const at::Tensor& s) { return find_cross_loss("shared")->evaluate(alignment, as_logits(s), as_logits(teacher), temperature); });
  }
  for (const Json& item : goldens.at("spans")) {
    const Ids mine = item.at("student_tokens"), other = item.at("teacher_tokens");
    const at::Tensor student = tensor_of(item.at("student"), {static_cast<std::int64_t>(mine.size()), -1}), teacher = tensor_of(item.at("teacher"), {static_cast<std::int64_t>(other.size()), -1});
    TextAlignment alignment;
    alignment.spans = 3;
    alignment.student_positions = at::arange(student.size(0), at::kLong), alignment.teacher_positions = at::arange(teacher.size(0), at::kLong);
    alignment.student_tokens = long_tensor(mine), alignment.teacher_tokens = long_tensor(other);
    alignment.student_spans = long_tensor(item.at("student_spans")), alignment.teacher_spans = long_tensor(item.at("teacher_spans"));
    const double temperature = item.at("temperature");
    check(item, student, [&](const at::Tensor& s) { return find_cross_loss("spans")->evaluate(alignment, as_logits(s), as_logits(teacher), temperature); });
  }
}

TEST_CASE("universal logit distance and span divergence by hand") {
  const at::Tensor half = at::zeros({1, 2}, at::kDouble), quarter = at::zeros({1, 4}, at::kDouble);
  CHECK(universal_logit_distance(half, quarter, 1, false).value.item<double>() == Approx(1.0));  // |1/2-1/4| twice, 1/4 twice
  CHECK(universal_logit_distance(quarter, half, 1, false).value.item<double>() == Approx(1.0));
  const at::Tensor logits = random_tensor({2, 5}, 1), turned = logits.flip(1);
  const Divergence same = universal_logit_distance(logits, turned, 1, true);  // the order of the vocabulary does not matter
  CHECK(same.value.abs().max().item<double>() < 1e-15);
  CHECK(same.gradient.abs().max().item<double>() < 1e-12);
  const at::Tensor s = at::full({1}, std::log(0.5), at::kDouble), t = at::full({1}, std::log(0.8), at::kDouble);
  CHECK(span_divergence(s, t, 1).item<double>() == Approx(0.8 * std::log(1.6) + 0.2 * std::log(0.4)));
  CHECK(span_divergence(s, s, 1).item<double>() == Approx(0).margin(1e-15));
  // Probabilities of next to one and next to nothing stay finite.
  for (const double a : {0.0, -1e-9, -200.0})
    for (const double b : {0.0, -1e-9, -200.0}) CHECK(std::isfinite(span_divergence(at::full({1}, a, at::kDouble), at::full({1}, b, at::kDouble), 1).item<double>()));
}

TEST_CASE("log-probabilities of tokens: value and gradients in hidden states, weight and bias, in ragged chunks") {
  const at::Tensor hidden = random_tensor({5, 3}, 1), weight = random_tensor({7, 3}, 2), bias = random_tensor({7}, 3), factor = random_tensor({5}, 4);
  const at::Tensor tokens = long_tensor({6, 0, 3, 3, 1});
  const at::Tensor expected = at::log_softmax(at::linear(hidden, weight, bias), -1).gather(1, tokens.unsqueeze(1)).squeeze(1);
  for (const std::int64_t chunk : {1, 2, 5, 0}) {
    CHECK(largest_difference(token_log_probs(hidden, weight, bias, tokens, chunk), expected) < 1e-12);
    const auto sum = [&](const at::Tensor& h, const at::Tensor& w, const at::Tensor& b) { return (token_log_probs(h, w, b, tokens, chunk) * factor).sum(); };
    CHECK(gradient_error([&](const at::Tensor& x) { return sum(x, weight, bias); }, hidden) < 1e-6);
    CHECK(gradient_error([&](const at::Tensor& x) { return sum(hidden, x, bias); }, weight) < 1e-6);
    CHECK(gradient_error([&](const at::Tensor& x) { return sum(hidden, weight, x); }, bias) < 1e-6);
    CHECK(gradient_error([&](const at::Tensor& x) { return sum(hidden, x, {}); }, weight) < 1e-6);
  }
  CHECK(token_log_probs(hidden.narrow(0, 0, 0), weight, bias, tokens.narrow(0, 0, 0)).numel() == 0);
}

TEST_CASE("a teacher of another tokenizer: its own tokens, packed, aligned with the student's") {
  const auto mine = word_tokenizer(), other = other_tokenizer();
  const std::shared_ptr<Transformer> teacher = text_model(other->vocab_size(), 4);
  const auto source = cross_tokenizer_teacher(teacher, *mine, *other);
  source->prepare({});
  CHECK(contains_all(error_text([&] { source->prepare({"layer.0.output"}); }), {"another tokenizer", "layer.0.output"}));

  // "the cat": the| cat for the student, t|he| ca|t for the teacher. The first span begins the document and is left out.
  const Ids text = mine->encode("the cat", false, false);
  REQUIRE(text.size() == 2);
  const TeacherTargets one = source->targets(batch_of_rows({text}));
  CHECK(one.alignment->spans == 1);
  CHECK(one.alignment->student_starts.item<std::int64_t>() == 0);
  CHECK(one.alignment->teacher_starts.item<std::int64_t>() == 1);
  CHECK(one.hidden.size(1) == 4);
  CHECK(one.alignment->teacher_tokens.size(0) == 2);
  CHECK(one.alignment->student_tokens.item<std::int64_t>() == text[1]);

  // The end token is aligned with the teacher's; a row without text gives nothing; a prompt is not learned.
  Ids ended = text;
  ended.push_back(0);
  CHECK(source->targets(batch_of_rows({ended})).alignment->spans == 2);
  CHECK(source->targets(batch_of_rows({{0}})).alignment->spans == 0);
  TokenBatch prompted = batch_of_rows({ended});
  prompted.prompts = {2};
  CHECK(source->targets(prompted).alignment->spans == 1);
  // A character that the row cuts: nothing behind it is aligned, and nothing breaks.
  Ids cut = mine->encode("the cat s\xC3\xA4", false, false);
  cut.pop_back();
  const auto broken = source->targets(batch_of_rows({cut})).alignment;
  CHECK(broken->spans >= 2);
  cut.erase(cut.begin(), cut.begin() + 1);
  Ids headless = mine->encode("\xC3\xA4t the cat", false, false);
  headless.erase(headless.begin());
  CHECK(source->targets(batch_of_rows({headless})).alignment->spans >= 1);

  // Packed documents: as each alone.
  const TaskData data = text_data(*mine, {"the cat sat", "a cat that sat there", "the thecat"});
  TrainOptions options;
  options.batch_size = 1;
  options.sequence_length = 20;
  const TokenBatch packed = StepBatches(data, options, 3).micro_batches(0).at(0);
  REQUIRE_FALSE(packed.documents.empty());
  const TeacherTargets together = source->targets(packed);
  std::int64_t alone_spans = 0, at = 0;
  for (std::int64_t begin = 0, end = 0; begin < packed.columns; begin = end) {
    for (end = begin + 1; end < packed.columns && packed.documents[static_cast<std::size_t>(end)] == packed.documents[static_cast<std::size_t>(begin)];) ++end;
    const TeacherTargets alone = source->targets(batch_of_rows({Ids(packed.ids.begin() + begin, packed.ids.begin() + end)}));
    alone_spans += alone.alignment->spans;
    const std::int64_t length = alone.hidden.size(1);
    CHECK(largest_difference(together.hidden.narrow(1, at, length), alone.hidden) < 1e-5);  // float32, masked against unmasked attention
    at += length;
  }
  CHECK(together.alignment->spans == alone_spans);
}

TEST_CASE("objectives between tokenizers: zero for one and the same model and tokenizer, finite and learnable for two") {
  const auto mine = word_tokenizer(), other = other_tokenizer();
  const std::shared_ptr<Transformer> student = text_model(mine->vocab_size(), 3), teacher = text_model(other->vocab_size(), 4);
  const TaskData data = text_data(*mine, {"the cat sat on the mat", "a cat that sat there", "the thecat"});
  TrainOptions options;
  options.batch_size = 2;
  options.sequence_length = 16;
  const TokenBatch batch = StepBatches(data, options, 3).micro_batches(0).at(0);
  const ModelInput input = to_input(batch, c10::Device(c10::kCPU));
  const TapMap taps;
  const at::Tensor none;
  student->requires_grad(true);
  for (const CrossLoss& row : cross_losses()) {
    INFO(row.name);
    const auto objective = cross_objective(row, *student, *teacher);
    const auto evaluate = [&](TeacherSource& source, const TokenBatch& texts) {
      const ModelInput in = to_input(texts, c10::Device(c10::kCPU));
      const TeacherTargets targets = source.targets(texts);
      std::vector<LossPart> parts;
      const at::Tensor hidden = student->hidden(in);
      const at::Tensor value = objective->loss({*student, in, texts, none, hidden, taps, &targets}, parts);
      value.backward();
      double largest = 0;
      for (const NamedParameter& parameter : student->parameters()) {
        if (parameter.value->grad().defined()) largest = std::max(largest, parameter.value->grad().abs().max().item<double>());
        parameter.value->mutable_grad() = at::Tensor();
      }
      CHECK(parts.size() == 2);
      return std::pair(value.item<double>(), largest);
    };
    const auto self = cross_tokenizer_teacher(student, *mine, *mine);
    const auto [zero, still] = evaluate(*self, batch);
    CHECK(std::abs(zero) < 1e-6);
    CHECK(still < 1e-5);
    const auto cross = cross_tokenizer_teacher(teacher, *mine, *other);
    const auto [value, slope] = evaluate(*cross, batch);
    CHECK(value > 1e-3);
    CHECK(std::isfinite(value));
    CHECK(slope > 1e-5);
    const auto [empty, nothing] = evaluate(*cross, batch_of_rows({{0}}));  // no aligned span
    CHECK(empty == 0);
    CHECK(nothing == 0);
  }
  student->requires_grad(false);
}

TEST_CASE("objectives between tokenizers: rows of a head that no token belongs to take no probability and learn nothing", "[padding]") {
  const auto mine = word_tokenizer(), other = other_tokenizer();
  const std::shared_ptr<Transformer> student = text_model(mine->vocab_size() + 9, 3), teacher = text_model(other->vocab_size() + 5, 4);
  const TokenBatch batch = batch_of_rows({mine->encode("the cat sat on the mat", false, false), mine->encode("a cat that sat there", false, false)});
  const ModelInput input = to_input(batch, c10::Device(c10::kCPU));
  const auto source = cross_tokenizer_teacher(teacher, *mine, *other);
  for (const CrossLoss& row : cross_losses()) {
    INFO(row.name);
    const auto objective = cross_objective(row, *student, *teacher);
    at::Tensor& head = student->lm_head.weight.defined() ? student->lm_head.weight : student->tokens.weight;
    const auto evaluate = [&](double padding) {  // value, largest gradient of a padding row, of another row
      {
        const at::NoGradGuard no_grad;
        head.narrow(0, mine->vocab_size(), 9).fill_(padding);
        teacher->tokens.weight.narrow(0, other->vocab_size(), 5).fill_(padding);
        if (teacher->lm_head.weight.defined()) teacher->lm_head.weight.narrow(0, other->vocab_size(), 5).fill_(padding);
      }
      student->requires_grad(true);
      const TapMap taps;
      const at::Tensor none;
      const TeacherTargets targets = source->targets(batch);
      CHECK(targets.head_weight.size(0) == other->vocab_size() + 5);
      std::vector<LossPart> parts;
      const at::Tensor value = objective->loss({*student, input, batch, none, student->hidden(input), taps, &targets}, parts);
      value.backward();
      const at::Tensor gradient = head.grad().abs();
      const std::array<double, 3> out{value.item<double>(), gradient.narrow(0, mine->vocab_size(), 9).max().item<double>(), gradient.max().item<double>()};
      for (const NamedParameter& parameter : student->parameters()) parameter.value->mutable_grad() = at::Tensor();
      student->requires_grad(false);
      return out;
    };
    const auto small = evaluate(0), large = evaluate(2);
    CHECK(small[0] > 1e-3);
    CHECK(large[0] == small[0]);
    CHECK(small[1] == 0);
    CHECK(large[1] == 0);
    CHECK(large[2] > 1e-5);
  }
}

TEST_CASE("a mean over spans: four micro batches, on one rank or two, give the losses of one large batch") {
  const auto mine = word_tokenizer(), other = other_tokenizer();
  const std::shared_ptr<Transformer> teacher = text_model(other->vocab_size(), 4);
  // Texts with one span a token, and with one for two: weighing by tokens would show.
  std::string dense, sparse;
  for (int i = 0; i < 14; ++i) dense += "qxz", sparse += " the";
  const TaskData data = text_data(*mine, {dense, sparse, dense, sparse, sparse, dense, sparse});
  TrainOptions shape;
  shape.batch_size = 2, shape.accumulate = 4, shape.sequence_length = 12;
  const auto source = cross_tokenizer_teacher(teacher, *mine, *other);
  double least = 1e9, most = 0;
  for (const TokenBatch& batch : StepBatches(data, shape, 1).micro_batches(0)) {
    const std::int64_t spans = source->aligned_spans(batch);
    CHECK(source->targets(batch).alignment->spans == spans);
    CHECK(source->targets(batch).alignment->spans == spans);  // asked for a second time, without being counted before
    const double density = static_cast<double>(spans) / static_cast<double>(count_targets(batch));
    least = std::min(least, density), most = std::max(most, density);
  }
  REQUIRE(most > 1.2 * least);
  for (const CrossLoss& row : cross_losses()) {
    INFO(row.name);
    const auto run = [&](std::int64_t batch_size, std::int64_t accumulate, int world) {
      DistillOptions options;
      options.objective = parse_yaml(str("[{cross_tokenizer: ", row.name, "}, {labels: cross_entropy, weight: 0.5}]"), "test");
      options.train.steps = 3, options.train.batch_size = batch_size, options.train.accumulate = accumulate, options.train.sequence_length = 12, options.train.precision = "float32", options.train.learning_rate = 1e-3;
      std::vector<Json> curves(static_cast<std::size_t>(world));
      const TemporaryFolder work;
      const auto train_one = [&](Collective* ranks) {
        const auto rank = static_cast<std::size_t>(ranks ? ranks->rank() : 0);
        const auto student = text_model(mine->vocab_size(), 3);
        const auto source = cross_tokenizer_teacher(teacher, *mine, *other);
        Json details = Json::object();
        StageContext context;
        context.title = "01-distill", context.work = work.path() / str("rank-", rank), context.seed = 5, context.data = &data, context.teacher = source.get(), context.ranks = ranks, context.details = &details, context.layer_map = {0, 1};
        distill(*student, options, context);
        curves[rank] = details.at("loss_curve");
      };
      if (world == 1) train_one(nullptr);
      else on_ranks(world, [&](Collective& ranks) { train_one(&ranks); });
      return curves[0];
    };
    const Json whole = run(8, 1, 1);
    REQUIRE(whole.size() >= 2);
    std::vector<Json> others{run(2, 4, 1)};
    if (collectives_available()) others.push_back(run(2, 4, 2));
    for (const Json& parts : others) {
      REQUIRE(parts.size() == whole.size());
      for (std::size_t i = 0; i < whole.size(); ++i) {
        CHECK(parts[i].at("loss").get<double>() == Approx(whole[i].at("loss").get<double>()).epsilon(5e-6));
        for (const auto& [name, value] : whole[i].at("parts").items()) CHECK(parts[i].at("parts").at(name).get<double>() == Approx(value.get<double>()).epsilon(5e-6));
      }
    }
  }
}

TEST_CASE("what two vocabularies have in common, and the refusal that says it") {
  const auto mine = word_tokenizer(), other = other_tokenizer();
  const VocabularyComparison same = compare_vocabularies(*mine, 300, *mine, 263);
  CHECK(same.comparable());
  CHECK(same.shared == mine->vocab_size());
  CHECK(contains_all(same.text(), {"37 padding rows", "100.0 %", "special tokens the same", "chat template none"}));
  const VocabularyComparison two = compare_vocabularies(*mine, mine->vocab_size(), *other, other->vocab_size());
  CHECK_FALSE(two.comparable());
  CHECK(two.first_difference == 257);
  CHECK(two.student_token == "th");
  CHECK(two.teacher_token == "he");
  CHECK(contains_all(error_text([&] { check_comparable(two, "stage \"distill\""); }), {"id 257", "\"th\"", "\"he\"", "same spelling", "cross_tokenizer: spans", "stage \"distill\""}));
  check_comparable(same, "");
}

TEST_CASE("objectives between tokenizers and their place in a recipe") {
  const auto read = [](const std::string& yaml, bool classification = false) {
    DistillOptions options;
    Problems problems;
    read_fields(parse_yaml(yaml, "r.yaml"), "stage \"distill\"", problems, [&](FieldVisitor& v) { fields(v, options); });
    check_distill(options, classification, {}, problems);
    problems.throw_if_any("mistakes");
    return options;
  };
  CHECK(crosses_tokenizers(read("{objective: [{cross_tokenizer: spans, temperature: 2}, {labels: cross_entropy}]}").objective));
  CHECK(contains_all(error_text([&] { read("{objective: [{cross_tokenizer: ul}]}"); }), {"did you mean", "uld"}));
  CHECK(contains_all(error_text([&] { read("{objective: [{cross_tokenizer: uld}, {logits: forward_kl}]}"); }), {"token by token", "labels alone"}));
  CHECK(contains_all(error_text([&] { read("{cache: {}, objective: [{cross_tokenizer: uld}]}"); }), {"cache"}));
  CHECK(contains_all(error_text([&] { read("{student: {model: x, keep_layers: [0]}}"); }), {"keep_layers or student.model"}));
  CHECK(contains_all(error_text([&] { read("{student: {model: x}}", true); }), {"student.model is for text"}));
  Problems problems;
  build_objectives(parse_yaml("[{cross_tokenizer: uld}]", "r"), {}, problems);  // as prune and quantize do
  CHECK(contains_all(error_text([&] { problems.throw_if_any("x"); }), {"stage distill"}));
}
