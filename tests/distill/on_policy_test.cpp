// Texts that models write in place of the data's: prompts, batches, determinism, resume, refusals; MiniLLM's long part.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"

#include "core/files.h"
#include "core/log.h"
#include "distributed/collective.h"
#include "distill/stage.h"
#include "model/generate.h"
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

DistillOptions policy_options(double lambda) {
  DistillOptions options;
  options.has_on_policy = true;
  options.on_policy.lambda = lambda;
  options.on_policy.max_new_tokens = 6;
  options.on_policy.prompt_tokens = 5;
  options.objective = parse_yaml("[{logits: generalized_jsd, beta: 0.5}]", "test");
  options.student.keep_layers = {0, 2};
  options.train.steps = 10;
  options.train.batch_size = 3;
  options.train.sequence_length = 16;
  options.train.learning_rate = 3e-3;
  options.train.precision = "float32";
  options.train.save_every_steps = 3;
  return options;
}

struct Outcome {
  std::vector<std::pair<std::string, at::Tensor>> weights;
  Json details = Json::object();
};

Outcome run_distill_stage(const DistillOptions& options, const TaskData& data, const std::filesystem::path& work, bool resume = false, BatchSampler* sampler = nullptr) {
  const std::shared_ptr<Transformer> teacher = tiny_decoder(3);
  const auto student = make_student(*teacher, options.student);
  const auto live = live_teacher(teacher);
  Outcome out;
  StageContext context;
  context.title = "01-distill";
  context.work = work;
  context.resume = resume;
  context.seed = 5;
  context.data = &data;
  context.teacher = live.get();
  context.sampler = sampler;
  context.details = &out.details;
  distill(*student, options, context);
  out.weights = copy_of(*student);
  return out;
}

std::vector<TokenBatch> batches_of(const TaskData& data, const DistillOptions& options, std::int64_t step = 0) { return StepBatches(data, options.train, 1).micro_batches(step); }

}  // namespace

TEST_CASE("a batch of prompts: every row as alone, whatever its length; rows that end leave") {
  const auto model = tiny_decoder(4);
  const std::vector<Ids> prompts = {{3, 4, 5}, {6}, {7, 8, 9, 10, 11}, {12, 13}};
  const std::vector<std::uint64_t> seeds = {1, 2, 3, 4};
  for (const auto& [temperature, top_p, top_k] : {std::tuple(0.0, 1.0, 0), std::tuple(1.0, 1.0, 0), std::tuple(0.8, 0.7, 0), std::tuple(1.3, 0.9, 7)}) {
    GenerateOptions options;
    options.max_new_tokens = 9;
    options.temperature = temperature, options.top_p = top_p, options.top_k = top_k;
    const auto together = generate_batch(*model, prompts, options, seeds);
    REQUIRE(together.size() == 4);
    for (std::size_t r = 0; r < prompts.size(); ++r) {
      options.seed = seeds[r];
      CHECK(together[r] == generate(*model, prompts[r], options));
    }
    options.stop = {together[1][4], together[2][0]};
    const auto stopped = generate_batch(*model, prompts, options, seeds);
    for (std::size_t r = 0; r < prompts.size(); ++r) {
      const auto end = std::find_first_of(together[r].begin(), together[r].end(), options.stop.begin(), options.stop.end());
      CHECK(stopped[r] == Ids(together[r].begin(), end == together[r].end() ? end : end + 1));  // the end token included
    }
  }
  CHECK(generate_batch(*model, {}, {}, {}).empty());
  GenerateOptions none;
  none.max_new_tokens = 0;
  CHECK(generate_batch(*model, {{3}}, none, {1}) == std::vector<Ids>{{}});
  CHECK(contains_all(error_text([&] { generate_batch(*model, {{3}, {}}, {}, {1, 2}); }), {"no tokens"}));
  CHECK_THROWS_AS(generate_batch(*model, {{3}}, {}, {}), std::logic_error);
}

TEST_CASE("a prompt is given, not learned") {
  TokenBatch batch;
  batch.rows = 2, batch.columns = 4;
  batch.ids = {5, 6, 7, 8, 9, 10, 11, 0};
  batch.lengths = {4, 3};
  batch.prompts = {2, 3};
  CHECK(next_tokens(batch) == Ids{no_target, 7, 8, no_target, no_target, no_target, no_target, no_target});
  CHECK(count_targets(batch) == 2);
  batch.prompts = {1, 1};
  CHECK(count_targets(batch) == 5);
}

TEST_CASE("what the student writes: prompts of the rows, completions of its own, the same on one and two threads") {
  const TaskData data = tiny_text();
  const DistillOptions options = policy_options(1);
  const auto model = tiny_decoder(4);
  const auto sampled = [&](std::int64_t step) {
    const auto sampler = on_policy_sampler(options.on_policy, model->config(), {data, 16, 5, "t"});
    std::vector<TokenBatch> batches = batches_of(data, options);
    sampler->sample(*model, step, batches);
    return batches.at(0);
  };
  const TokenBatch rows = batches_of(data, options).at(0), first = sampled(0);
  REQUIRE(first.rows == rows.rows);
  CHECK(first.examples == rows.examples);
  CHECK(first.documents.empty());
  for (std::int64_t r = 0; r < first.rows; ++r) {
    const std::int64_t prompt = first.prompts.at(static_cast<std::size_t>(r)), length = first.lengths.at(static_cast<std::size_t>(r));
    CHECK(prompt <= 5);
    CHECK(length > prompt);
    CHECK(length <= prompt + 6);
    // The prompt stands in the row, in one document.
    const Ids ids(first.ids.begin() + r * first.columns, first.ids.begin() + r * first.columns + prompt), row(rows.ids.begin() + r * 16, rows.ids.begin() + (r + 1) * 16);
    CHECK(std::search(row.begin(), row.end(), ids.begin(), ids.end()) != row.end());
  }
  const int threads = at::get_num_threads();
  at::set_num_threads(2);
  CHECK(sampled(0).ids == first.ids);
  at::set_num_threads(threads);
  CHECK(sampled(0).ids == first.ids);
  CHECK(sampled(1).ids != first.ids);  // another step, other draws
}

TEST_CASE("no text has a token of the padding rows") {
  const auto model = tiny_decoder(4);
  {
    const at::NoGradGuard no_grad;
    model->lm_head.weight.narrow(0, 43, 7).mul_(40);
  }
  GenerateOptions options;
  options.max_new_tokens = 30, options.temperature = 1;
  const auto largest = [&] {
    std::int64_t out = 0;
    for (const Ids& text : generate_batch(*model, {{3, 4}, {5}}, options, {1, 2})) out = std::max(out, *std::max_element(text.begin(), text.end()));
    return out;
  };
  CHECK(largest() >= 43);
  options.vocabulary = 43;
  CHECK(largest() < 43);
  options.temperature = 0;
  CHECK(largest() < 43);
  options.temperature = 1, options.top_p = 0.9;
  CHECK(largest() < 43);
  options.vocabulary = 99;  // more than there are rows
  CHECK(largest() >= 43);
}

TEST_CASE("ranks share the writing: each writes for its micro batches, and all have all texts") {
  if (!collectives_available()) return skip("built without Gloo");
  const TaskData data = tiny_text();
  DistillOptions options = policy_options(1);
  options.train.batch_size = 2, options.train.accumulate = 4;
  const auto alone = [&](std::uint64_t seed, Collective* ranks) {
    const auto model = tiny_decoder(seed);
    std::vector<TokenBatch> batches = batches_of(data, options);
    on_policy_sampler(options.on_policy, model->config(), {data, 16, 5, "t", ranks})->sample(*model, 0, batches);
    return batches;
  };
  const std::vector<TokenBatch> first = alone(4, nullptr), second = alone(6, nullptr);
  REQUIRE(first.size() == 4);
  REQUIRE(first[1].ids != second[1].ids);
  // Ranks with different weights, which a training never has, tell who wrote what.
  std::vector<std::vector<TokenBatch>> found(2);
  on_ranks(2, [&](Collective& ranks) { found[static_cast<std::size_t>(ranks.rank())] = alone(ranks.leader() ? 4 : 6, &ranks); });
  for (const auto& batches : found)
    for (std::size_t i = 0; i < 4; ++i) {
      CHECK(batches.at(i).ids == (i % 2 == 0 ? first : second)[i].ids);
      CHECK(batches.at(i).lengths == (i % 2 == 0 ? first : second)[i].lengths);
      CHECK(batches.at(i).prompts == (i % 2 == 0 ? first : second)[i].prompts);
    }
  // More ranks than micro batches.
  options.train.accumulate = 1;
  const std::vector<TokenBatch> one = alone(4, nullptr);
  on_ranks(2, [&](Collective& ranks) { found[static_cast<std::size_t>(ranks.rank())] = alone(ranks.leader() ? 4 : 6, &ranks); });
  CHECK(found[0].at(0).ids == one[0].ids);
  CHECK(found[1].at(0).ids == one[0].ids);
}

TEST_CASE("on-policy and the teacher's texts on 1, 2 and 4 ranks: the same losses; one file of texts") {
  if (!collectives_available()) return skip("built without Gloo");
  const TaskData data = tiny_text();
  for (const bool by_teacher : {false, true}) {
    INFO((by_teacher ? "teacher's texts" : "on-policy"));
    DistillOptions options = policy_options(0.6);
    options.train.batch_size = 2, options.train.accumulate = 4, options.train.steps = 5;
    if (by_teacher) options.has_on_policy = false, options.has_teacher_text = true, options.teacher_text = CompletionOptions{.max_new_tokens = 6, .temperature = 0.9, .prompt_tokens = 5}, options.objective = Node();
    const std::shared_ptr<Transformer> teacher = tiny_decoder(3);
    std::vector<std::vector<double>> curves;
    std::vector<std::string> files;
    for (const int world : {1, 2, 4}) {
      const TemporaryFolder work, store;
      std::vector<Json> details(static_cast<std::size_t>(world), Json::object());
      const auto run = [&](Collective* ranks) {
        const auto rank = static_cast<std::size_t>(ranks ? ranks->rank() : 0);
        const auto student = make_student(*teacher, options.student);
        const auto live = live_teacher(teacher);
        StageContext context;
        context.title = "01-distill", context.work = work.path() / str("rank-", rank), context.seed = 5, context.data = &data, context.teacher = live.get(), context.ranks = ranks, context.details = &details[rank];
        std::unique_ptr<BatchSampler> writer;
        if (by_teacher) writer = teacher_text_sampler(teacher, options.teacher_text, 2, store.path(), {data, 16, 5, "t", ranks}), context.sampler = writer.get();
        distill(*student, options, context);
      };
      if (world == 1) run(nullptr);
      else on_ranks(world, [&](Collective& ranks) { run(&ranks); });
      curves.emplace_back();
      for (const Json& point : details[0].at("loss_curve")) curves.back().push_back(point.at("loss").get<double>());
      for (const auto& entry : std::filesystem::directory_iterator(store.path())) files.push_back(read_text(entry.path()));
    }
    REQUIRE(curves[0].size() >= 5);
    for (const std::vector<double>& curve : curves) {
      REQUIRE(curve.size() == curves[0].size());
      for (std::size_t i = 0; i < curve.size(); ++i) CHECK(curve[i] == Approx(curves[0][i]).margin(1e-5).epsilon(0));
    }
    if (!by_teacher) continue;
    REQUIRE(files.size() == 3);
    CHECK(files[1] == files[0]);
    CHECK(files[2] == files[0]);
  }
}

TEST_CASE("lambda: none is the ordinary training bit by bit, and the share of steps is near what was asked") {
  const TaskData data = tiny_text();
  const TemporaryFolder a, b, c;
  DistillOptions plain = policy_options(0);
  plain.has_on_policy = false;
  const Outcome ordinary = run_distill_stage(plain, data, a.path() / "w");
  CHECK(same_parameters(run_distill_stage(policy_options(0), data, b.path() / "w").weights, ordinary.weights));
  CHECK_FALSE(same_parameters(run_distill_stage(policy_options(0.5), data, c.path() / "w").weights, ordinary.weights));
  OnPolicyOptions options = policy_options(0.3).on_policy;
  options.max_new_tokens = 1;
  const auto model = tiny_decoder(4);
  const auto sampler = on_policy_sampler(options, model->config(), {data, 16, 5, "t"});
  int count = 0;
  for (std::int64_t step = 0; step < 300; ++step) {
    std::vector<TokenBatch> batches = batches_of(data, policy_options(0.3));
    batches.at(0).rows = 1;
    sampler->sample(*model, step, batches);
    count += !batches.at(0).prompts.empty();
  }
  CHECK(count > 60);
  CHECK(count < 120);
}

TEST_CASE("on-policy training lowers reverse KL, on held-out text and on what the student writes, and is another training than that on the data") {
  const TaskData data = tiny_text();
  const std::shared_ptr<Transformer> teacher = tiny_decoder(3);
  DistillOptions options = policy_options(1);
  options.objective = parse_yaml("[{logits: reverse_kl}]", "test");
  options.on_policy.temperature = 1, options.on_policy.max_new_tokens = 10;
  options.train.steps = 80, options.train.batch_size = 8, options.train.learning_rate = 5e-3;
  ModelInput heldout;  // text of another seed
  {
    Ids ids;
    for (const Ids& document : tiny_text(2).train_documents) ids.insert(ids.end(), document.begin(), document.begin() + 32);
    heldout.ids = at::tensor(ids, at::kLong).view({-1, 32});
  }
  // Mean KL(student || teacher) a token, of texts or of continuations that the student writes after their first five tokens.
  const auto reverse = [&](const Transformer& student, bool own) {
    const at::NoGradGuard no_grad;
    ModelInput input = heldout;
    if (own) {
      std::vector<Ids> prompts;
      std::vector<std::uint64_t> seeds;
      for (std::int64_t r = 0; r < 64; ++r) {
        const std::int64_t* row = heldout.ids.const_data_ptr<std::int64_t>() + r % heldout.ids.size(0) * 32 + r / heldout.ids.size(0);
        prompts.emplace_back(row, row + 5);
        seeds.push_back(static_cast<std::uint64_t>(r));
      }
      GenerateOptions generate;
      generate.temperature = 1, generate.max_new_tokens = 10;
      const auto texts = generate_batch(student, prompts, generate, seeds);
      Ids ids;
      for (std::size_t r = 0; r < texts.size(); ++r) ids.insert(ids.end(), prompts[r].begin(), prompts[r].end()), ids.insert(ids.end(), texts[r].begin(), texts[r].end());
      input.ids = at::tensor(ids, at::kLong).view({64, -1});
    }
    const at::Tensor q = at::log_softmax(student.forward(input).to(at::kDouble), -1), p = at::log_softmax(teacher->forward(input).to(at::kDouble), -1);
    return (q.exp() * (q - p)).sum(-1).mean().item<double>();
  };
  const TemporaryFolder work;
  const auto trained = [&](const char* name) {
    const Outcome outcome = run_distill_stage(options, data, work.path() / name);
    auto student = make_student(*teacher, options.student);
    const at::NoGradGuard no_grad;
    for (const NamedParameter& parameter : student->parameters())
      for (const auto& [other, value] : outcome.weights)
        if (other == parameter.name) parameter.value->copy_(value);
    return student;
  };
  const auto start = make_student(*teacher, options.student), on_policy = trained("on");
  options.on_policy.lambda = 0;
  const auto off_policy = trained("off");
  INFO("held out: " << reverse(*start, false) << " to " << reverse(*on_policy, false) << " (off-policy " << reverse(*off_policy, false) << "); own texts: " << reverse(*start, true) << " to "
                    << reverse(*on_policy, true) << " (off-policy " << reverse(*off_policy, true) << ")");
  CHECK(reverse(*on_policy, false) < 0.8 * reverse(*start, false));
  CHECK(reverse(*on_policy, true) < 0.8 * reverse(*start, true));
  CHECK(reverse(*on_policy, true) < reverse(*off_policy, true));  // it learned from its own texts
  CHECK_FALSE(same_parameters(copy_of(*on_policy), copy_of(*off_policy)));
}

TEST_CASE("on-policy training: killed and resumed to the same bytes; the metric of each sampled step") {
  class Killing final : public TeacherSource {
   public:
    Killing(std::unique_ptr<TeacherSource> inner, int calls) : inner_(std::move(inner)), calls_(calls) {}
    void prepare(const std::set<std::string>& taps) override { inner_->prepare(taps); }
    TeacherTargets targets(const TokenBatch& batch) override {
      if (calls_-- == 0) throw std::runtime_error("killed");
      return inner_->targets(batch);
    }
    const ModelConfig& config() const override { return inner_->config(); }
    std::string fingerprint() const override { return inner_->fingerprint(); }

   private:
    std::unique_ptr<TeacherSource> inner_;
    int calls_;
  };
  const TaskData data = tiny_text();
  const DistillOptions options = policy_options(0.6);
  const TemporaryFolder whole_work, broken_work;
  const Outcome whole = run_distill_stage(options, data, whole_work.path() / "w");
  const std::shared_ptr<Transformer> teacher = tiny_decoder(3);
  const auto student = make_student(*teacher, options.student);
  Killing killing(live_teacher(teacher), 7);
  StageContext context;
  context.title = "01-distill";
  context.work = broken_work.path() / "w";
  context.seed = 5;
  context.data = &data;
  context.teacher = &killing;
  CHECK_THROWS_WITH(distill(*student, options, context), "killed");
  CHECK(context.sampler == nullptr);
  const std::filesystem::path metrics = broken_work.path() / "metrics.jsonl";
  open_metrics(metrics);
  CHECK(same_parameters(run_distill_stage(options, data, broken_work.path() / "w", true).weights, whole.weights));
  close_metrics();
  CHECK(contains_all(read_text(metrics), {"\"sampled\"", "tokens_per_second", "mean_length"}));
  DistillOptions changed = options;
  changed.on_policy.temperature = 0.5;  // a state of other texts
  CHECK(contains_all(error_text([&] { run_distill_stage(changed, data, broken_work.path() / "w", true); }), {"sampler"}));
}

TEST_CASE("the teacher's texts: written once, kept, the same after a cut file; learned by cross entropy") {
  const TaskData data = tiny_text();
  DistillOptions options = policy_options(0);
  options.has_on_policy = false;
  options.has_teacher_text = true;
  options.teacher_text = CompletionOptions{.max_new_tokens = 6, .temperature = 0, .prompt_tokens = 5};
  options.objective = Node();
  const std::shared_ptr<Transformer> teacher = tiny_decoder(3);
  const TemporaryFolder store, work;
  const auto run = [&](const std::string& name) {
    const auto sampler = teacher_text_sampler(teacher, options.teacher_text, 3, store.path(), {data, 16, 5, "t"});
    return run_distill_stage(options, data, work.path() / name, false, sampler.get());
  };
  const Outcome first = run("a");
  CHECK(first.details.at("loss_curve").back().at("parts").contains("cross_entropy"));
  std::filesystem::path file;
  for (const auto& entry : std::filesystem::directory_iterator(store.path())) file = entry.path();
  REQUIRE_FALSE(file.empty());
  const std::string text = read_text(file);
  CHECK(same_parameters(run("b").weights, first.weights));
  CHECK(read_text(file) == text);
  std::filesystem::resize_file(file, text.size() / 2);  // killed while writing
  CHECK(same_parameters(run("c").weights, first.weights));
  write_text(file, "1 2 x\n");
  CHECK(contains_all(error_text([&] { run("d"); }), {"damaged", "delete the file"}));
}

TEST_CASE("whole documents as prompts, in the chat template where asked") {
  const auto tokenizer = byte_tokenizer({"Ġ t"}, "{{ '<|im_start|>' + message['role'] }}<|im_end|>");
  TaskData data;
  data.kind = TaskData::Kind::text;
  data.tokenizer = tokenizer.get();
  for (const char* text : {"one", "two", "three", "four", "a long one that fills a row alone"}) data.train_documents.push_back(tokenizer->encode(text, false, false));
  data.hash = "prompts";
  const Json json = {{"model_type", "llama"}, {"hidden_size", 16}, {"num_hidden_layers", 1}, {"num_attention_heads", 2}, {"num_key_value_heads", 1}, {"intermediate_size", 24}, {"vocab_size", 260},
                     {"max_position_embeddings", 128}, {"rms_norm_eps", 1e-5}, {"hidden_act", "silu"}, {"tie_word_embeddings", false}};
  const Transformer model(config_from_json(json, "tiny"), 1);
  OnPolicyOptions options;
  options.lambda = 1, options.max_new_tokens = 2, options.prompt_tokens = 0;
  TrainOptions train;
  train.batch_size = 8, train.sequence_length = 12;
  const auto prompts = [&](const OnPolicyOptions& wanted) {
    std::vector<TokenBatch> batches = StepBatches(data, train, 1).micro_batches(0);
    on_policy_sampler(wanted, model.config(), {data, 12, 5, "t"})->sample(model, 0, batches);
    std::vector<std::string> out;
    for (std::int64_t r = 0; r < batches[0].rows; ++r) {
      const auto begin = batches[0].ids.begin() + r * batches[0].columns;
      out.push_back(tokenizer->decode(Ids(begin, begin + batches[0].prompts[static_cast<std::size_t>(r)])));
    }
    return out;
  };
  for (const std::string& prompt : prompts(options)) CHECK(contains_all("|one|two|three|four|a long one that fills a row alone|", {prompt.c_str()}));
  options.chat = true;
  for (const std::string& prompt : prompts(options)) CHECK(contains_all(prompt, {"<|im_start|>user", "<|im_end|>"}));
  options.max_new_tokens = 120;
  CHECK(contains_all(error_text([&] { prompts(options); }), {"exceed the model's context", "at most 128"}));
}

TEST_CASE("options of written texts: read, checked, refused where they make no sense") {
  const auto read = [](const std::string& yaml, bool classification = false) {
    DistillOptions options;
    Problems problems;
    read_fields(parse_yaml(yaml, "r.yaml"), "stage \"distill\"", problems, [&](FieldVisitor& v) { fields(v, options); });
    check_distill(options, classification, {}, problems);
    problems.throw_if_any("mistakes");
    return options;
  };
  const DistillOptions defaults = read("{on_policy: {}}");
  CHECK(defaults.has_on_policy);
  CHECK(defaults.on_policy.lambda == 0.5);
  CHECK(defaults.on_policy.temperature == 0.9);
  CHECK(read("{teacher_text: {}}").teacher_text.temperature == 0);
  CHECK(contains_all(error_text([&] { read("{on_policy: {lambda: 1.5}}"); }), {"lambda", "1.5"}));
  CHECK(contains_all(error_text([&] { read("{on_policy: {top_p: 0}}"); }), {"top_p"}));
  CHECK(contains_all(error_text([&] { read("{on_policy: {}, cache: {}}"); }), {"live teacher", "remove the cache"}));
  CHECK(contains_all(error_text([&] { read("{on_policy: {}}", true); }), {"a classifier writes none"}));
  CHECK(contains_all(error_text([&] { read("{on_policy: {}, teacher_text: {}}"); }), {"keep one of them"}));
  CHECK(contains_all(error_text([&] { read("{on_policy: {}, objective: [{logits: reverse_kl}, {labels: cross_entropy}]}"); }), {"wrote itself"}));
  CHECK(contains_all(error_text([&] { read("{on_policy: {prompt_tokens: 0}}"); }), {"lambda: 1"}));
  CHECK(contains_all(error_text([&] { read("{on_policy: {chat: true}}"); }), {"prompt_tokens: 0"}));
  CHECK(contains_all(error_text([&] { read("{objective: [{policy: minillm}]}"); }), {"on_policy"}));
  CHECK(read("{on_policy: {lambda: 1, temperature: 1}, objective: [{logits: reverse_kl}, {policy: minillm}]}").on_policy.lambda == 1);
  CHECK(contains_all(error_text([&] { read("{on_policy: {lambda: 1}, objective: [{logits: reverse_kl}, {policy: minillm}]}"); }), {"policy: minillm", "temperature: 0.9", "temperature: 1"}));
  CHECK(contains_all(error_text([&] { read("{on_policy: {lambda: 1, temperature: 1, top_p: 0.9}, objective: [{policy: minillm}]}"); }), {"top_p: 0.9"}));
  const TaskData data = tiny_text();
  const TemporaryFolder work;
  DistillOptions options = policy_options(1);
  options.on_policy.max_new_tokens = 60;
  CHECK(contains_all(error_text([&] { run_distill_stage(options, data, work.path() / "a"); }), {"5 tokens and 60 new", "at most 64"}));
  options.on_policy.max_new_tokens = 6, options.on_policy.prompt_tokens = 16;
  CHECK(contains_all(error_text([&] { run_distill_stage(options, data, work.path() / "b"); }), {"sequence_length"}));
}

TEST_CASE("MiniLLM's long part: golden, nothing on texts of the data, zero where student equals teacher") {
  const std::shared_ptr<Transformer> model = tiny_decoder(4);
  Problems problems;
  ObjectiveShapes shapes = objective_shapes(*model, model->config(), 0);
  shapes.sampled = true;
  const auto objective = build_objectives(parse_yaml("[{policy: minillm}]", "test"), {}, problems, shapes).at(0);
  const at::Tensor none;
  const TapMap taps;
  // Student and teacher whose head is the identity: hidden states are logits.
  const Json item = read_json(source_folder() / "tests/goldens/cross_tokenizer.json").at("policy").at(0);
  const Json json = {{"model_type", "llama"}, {"hidden_size", 6}, {"num_hidden_layers", 1}, {"num_attention_heads", 1}, {"num_key_value_heads", 1}, {"intermediate_size", 8}, {"vocab_size", 5},
                     {"max_position_embeddings", 16}, {"rms_norm_eps", 1e-5}, {"hidden_act", "silu"}, {"tie_word_embeddings", false}};
  Transformer shell(config_from_json(json, "tiny"), 1);
  shell.lm_head.weight = at::eye(5, at::kDouble);
  // Rows of 3, 2 and 1 learned tokens after a prompt of one.
  TokenBatch batch;
  batch.rows = 3, batch.columns = 4;
  batch.ids = {0, 1, 4, 0, 0, 2, 2, 0, 0, 3, 0, 0};
  batch.lengths = {4, 3, 2}, batch.prompts = {1, 1, 1}, batch.examples = {0, 1, 2};
  const at::Tensor places = at::tensor(Ids{0, 1, 2, 4, 5, 8}, at::kLong);
  TeacherTargets targets;
  targets.hidden = at::zeros({12, 5}, at::kDouble).index_copy(0, places, tensor_of(item.at("teacher"), {6, 5})).view({3, 4, 5});
  targets.head_weight = at::eye(5, at::kDouble);
  const ModelInput input = to_input(batch, c10::Device(c10::kCPU));
  const auto loss = [&](const at::Tensor& logits) {
    std::vector<LossPart> parts;
    const at::Tensor hidden = at::zeros({12, 5}, at::kDouble).index_copy(0, places, logits).view({3, 4, 5});
    return objective->loss({shell, input, batch, none, hidden, taps, &targets}, parts);
  };
  const auto [value, gradient] = gradient_of(loss, tensor_of(item.at("student"), {6, 5}));
  CHECK(value == Approx(item.at("value").get<double>()).epsilon(1e-10));
  CHECK(largest_difference(gradient, tensor_of(item.at("gradient"), {6, 5})) < 1e-10);
  CHECK(gradient_of(loss, tensor_of(item.at("teacher"), {6, 5})).second.abs().max().item<double>() < 1e-12);
  batch.prompts.clear();
  CHECK(gradient_of(loss, tensor_of(item.at("student"), {6, 5})).second.abs().max().item<double>() == 0);
}
