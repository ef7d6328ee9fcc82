// Every objective of text on one small student at equal steps: loss and divergence on text that no training has seen, and divergence on
// texts that the student itself writes. The table of docs/objectives.md.
//
//   python3 scripts/make_toy_model.py --out /tmp/stories --llama2c stories260K.bin --tokenizer tok512.bin stories.txt
//   objective_table /tmp/stories [steps] [learning rate] [part of a row's name ...]
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "benchmarks/story_model.h"
#include "core/error.h"
#include "core/log.h"
#include "core/text.h"
#include "data/tokenizer.h"
#include "distill/cross_tokenizer.h"
#include "distill/stage.h"
#include "model/generate.h"
#include "train/teacher.h"

using namespace kompakt;

namespace {

struct ObjectiveTableRow {
  const char *name, *options;  // keys of the stage distill
};
constexpr ObjectiveTableRow objective_rows[] = {
    {"labels alone", "{objective: [{labels: cross_entropy}]}"},
    {"forward_kl", "{objective: [{logits: forward_kl}]}"},
    {"reverse_kl", "{objective: [{logits: reverse_kl}]}"},
    {"generalized_jsd 0.5", "{objective: [{logits: generalized_jsd, beta: 0.5, weight: 4}]}"},
    {"skew_forward_kl", "{objective: [{logits: skew_forward_kl}]}"},
    {"skew_reverse_kl", "{objective: [{logits: skew_reverse_kl}]}"},
    {"adaptive_kl", "{objective: [{logits: adaptive_kl}]}"},
    {"total_variation", "{objective: [{logits: total_variation}]}"},
    {"logits_mse", "{objective: [{logits: logits_mse}]}"},
    {"ranking", "{objective: [{logits: ranking}]}"},
    {"forward_kl + labels", "{objective: [{logits: forward_kl}, {labels: cross_entropy, weight: 0.5}]}"},
    {"labels + hidden cosine", "{objective: [{labels: cross_entropy}, {hidden: cosine}]}"},
    {"labels + hidden mse", "{objective: [{labels: cross_entropy}, {hidden: mse, normalize: true}]}"},
    {"labels + relation", "{objective: [{labels: cross_entropy}, {relation: minilm}]}"},
    {"forward_kl + hidden cosine", "{objective: [{logits: forward_kl}, {hidden: cosine}]}"},
    {"forward_kl, cache 64 + 32", "{objective: [{logits: forward_kl}], cache: {}}"},
    {"cross_tokenizer: spans", "{objective: [{cross_tokenizer: spans}]}"},
    {"cross_tokenizer: shared", "{objective: [{cross_tokenizer: shared}]}"},
    {"cross_tokenizer: uld", "{objective: [{cross_tokenizer: uld}]}"},
    {"cross_tokenizer: spans + labels", "{objective: [{cross_tokenizer: spans}, {labels: cross_entropy, weight: 0.5}]}"},
    {"labels + cross_tokenizer: shared", "{objective: [{labels: cross_entropy}, {cross_tokenizer: shared}]}"},
    {"labels + cross_tokenizer: uld", "{objective: [{labels: cross_entropy}, {cross_tokenizer: uld}]}"},
    {"teacher's texts, labels", "{teacher_text: {temperature: 1, max_new_tokens: 96}, objective: [{labels: cross_entropy}]}"},
    {"teacher's texts, greedy", "{teacher_text: {temperature: 0, max_new_tokens: 96}, objective: [{labels: cross_entropy}]}"},
    {"on-policy 0.5, forward_kl", "{on_policy: {lambda: 0.5, temperature: 1, max_new_tokens: 96}, objective: [{logits: forward_kl}]}"},
    {"on-policy 0.5, jsd", "{on_policy: {lambda: 0.5, temperature: 1, max_new_tokens: 96}, objective: [{logits: generalized_jsd, weight: 4}]}"},
    {"on-policy 0.5, reverse_kl", "{on_policy: {lambda: 0.5, temperature: 1, max_new_tokens: 96}, objective: [{logits: reverse_kl}]}"},
    {"on-policy 1, reverse_kl", "{on_policy: {lambda: 1, temperature: 1, max_new_tokens: 96}, objective: [{logits: reverse_kl}]}"},
    {"on-policy 1, reverse_kl + policy", "{on_policy: {lambda: 1, temperature: 1, max_new_tokens: 96}, objective: [{logits: reverse_kl}, {policy: minillm, weight: 0.3}]}"},
};

// Mean KL(student || teacher) a token on what the student writes after the first 32 tokens of the windows.
double objective_own_texts(const Transformer& student, const Transformer& teacher, const Windows& windows) {
  const at::NoGradGuard no_grad;
  Windows prompts;
  std::vector<std::uint64_t> seeds;
  for (std::size_t i = 0; i < std::min<std::size_t>(64, windows.size()); ++i) prompts.emplace_back(windows[i].begin(), windows[i].begin() + 32), seeds.push_back(i);
  GenerateOptions options;
  options.temperature = 1, options.max_new_tokens = 128;
  const Windows texts = generate_batch(student, prompts, options, seeds);
  std::vector<std::int64_t> flat;
  for (std::size_t i = 0; i < texts.size(); ++i) {
    flat.insert(flat.end(), prompts[i].begin(), prompts[i].end());
    flat.insert(flat.end(), texts[i].begin(), texts[i].end());
  }
  ModelInput input;
  input.ids = at::tensor(flat, at::kLong).view({static_cast<std::int64_t>(texts.size()), -1});
  const at::Tensor q = at::log_softmax(student.forward(input).narrow(1, 31, 128), -1), p = at::log_softmax(teacher.forward(input).narrow(1, 31, 128), -1);
  return (q.exp() * (q - p)).sum(-1).mean().item<double>();
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) throw Error("no model folder").allowed("objective_table FOLDER [steps] [learning rate] [part of a row's name ...]");
  set_verbosity(std::getenv("VERBOSE") ? Verbosity::normal : Verbosity::quiet);
  const std::filesystem::path folder = argv[1];
  const std::int64_t steps = argc > 2 ? std::atoll(argv[2]) : 300;
  const double rate = argc > 3 ? std::atof(argv[3]) : 2e-3;
  const std::shared_ptr<Transformer> teacher = load_model(folder);
  const SafetensorsFile tokens = SafetensorsFile::open(folder / "tokens.safetensors");
  const Windows text = story_windows(tokens, "calibration"), evaluation = story_windows(tokens, "evaluation");
  TaskData data;
  data.kind = TaskData::Kind::text;
  data.train_documents.emplace_back();  // one document: the rows of the loop are exactly the windows
  for (const auto& window : text) data.train_documents[0].insert(data.train_documents[0].end(), window.begin(), window.end());
  data.hash = "objectives";
  StudentOptions half;
  for (std::int64_t layer = 0; layer < teacher->config().layers; layer += 2) half.keep_layers.push_back(layer);
  const auto sequence = static_cast<std::int64_t>(text.front().size());

  std::printf("%zu of %lld layers, %lld steps of 8 x %lld tokens, learning rate %g; %zu windows of training text, %zu held out\n", half.keep_layers.size(), static_cast<long long>(teacher->config().layers),
              static_cast<long long>(steps), static_cast<long long>(sequence), rate, text.size(), evaluation.size());
  std::printf("%-34s %9s %9s %7s %9s %8s\n", "objective", "loss", "KL", "top1", "own KL", "seconds");
  const auto report = [&](const char* name, const Transformer& model, double seconds) {
    const StoryScore score = story_score(model, *teacher, evaluation);
    std::printf("%-34s %9.4f %9.4f %7.4f %9.4f %8.1f\n", name, score.loss, score.kl, score.same_top1, objective_own_texts(model, *teacher, evaluation), seconds);
    std::fflush(stdout);
  };
  report("(the teacher)", *teacher, 0);
  report("(not trained)", *make_student(*teacher, half), 0);
  for (const ObjectiveTableRow& row : objective_rows) {
    if (!row_wanted(row.name, argc, argv, 4)) continue;
    DistillOptions options;
    Problems problems;
    read_fields(parse_yaml(row.options, row.name), row.name, problems, [&](FieldVisitor& v) { fields(v, options); });
    check_distill(options, false, {}, problems);
    problems.throw_if_any("the options of a row");
    options.student = half;
    TrainOptions& train = options.train;
    train.steps = steps, train.batch_size = 8, train.sequence_length = sequence, train.learning_rate = rate;
    train.schedule = "cosine", train.warmup = 0.05, train.beta2 = 0.95, train.precision = "float32", train.save_every_steps = steps;
    StageContext context;
    context.title = "objectives", context.seed = 1, context.data = &data;
    context.work = row_folder("objectives");
    // Of one tokenizer on both sides: what these objectives learn from what they compare.
    const bool crosses = crosses_tokenizers(options.objective);
    const std::unique_ptr<Tokenizer> tokenizer = crosses ? load_tokenizer(folder) : nullptr;
    const auto source = crosses ? cross_tokenizer_teacher(teacher, *tokenizer, *tokenizer) : options.has_cache ? sparse_teacher(teacher, data, sequence, options.cache, context.work) : live_teacher(teacher);
    context.teacher = source.get();
    std::unique_ptr<BatchSampler> writer;
    if (options.has_teacher_text) writer = teacher_text_sampler(teacher, options.teacher_text, train.batch_size, context.work, {data, sequence, context.seed, context.title});
    context.sampler = writer.get();
    const auto student = make_student(*teacher, half);
    const auto start = std::chrono::steady_clock::now();
    distill(*student, options, context);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::filesystem::remove_all(context.work);
    report(row.name, *student, seconds);
  }
} catch (const Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
