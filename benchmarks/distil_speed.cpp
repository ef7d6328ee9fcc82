// Distillation of a language model: tokens per CPU second of whole steps (teacher forward, student forward and backward, clipping,
// AdamW), peak memory, and the loss alone with the memory that it takes. benchmarks/distil_speed.py measures PyTorch eager on the
// same weights, tokens and options: run both with the same threads, compare.
//
//   distil_speed TEACHER [--steps 3] [--layers 20] [--batch 4] [--length 512] [--precision float32|bf16] [--recompute] [--cache] [--save FOLDER]
//
// TEACHER: a model folder or .gguf; --save writes it as a folder that transformers reads and ends. --cache: the teacher's outputs come
// from a cache that is filled before the clock starts.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "core/files.h"
#include "core/log.h"
#include "core/random.h"
#include "core/system.h"
#include "core/text.h"
#include "distill/fused_linear.h"
#include "distill/stage.h"
#include "model/checkpoint.h"
#include "pipeline/device.h"
#include "train/chunked_loss.h"
#include "train/teacher.h"

namespace {

using namespace kompakt;

struct Figures {
  double cpu, wall;
};
template <class F>
Figures measured(const F& work) {
  const double cpu = cpu_seconds();
  const auto start = std::chrono::steady_clock::now();
  work();
  return {cpu_seconds() - cpu, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count()};
}

// Token i of the text; the Python side has the same rule.
std::int64_t benchmark_token(std::int64_t i, std::int64_t vocabulary) { return (i * 7919 + (i / 13) * 104729) % (vocabulary - 64) + 64; }

// Forward and backward of projection + forward KL on random hidden states of the head's width.
void loss_alone(const Transformer& model, std::int64_t rows) {
  const HeadWeights head = head_weights(model);
  const at::Tensor weight = head.weight.detach().clone().requires_grad_(), hidden = at::randn({rows, weight.size(1)}).requires_grad_(), teacher = at::randn({rows, weight.size(1)});
  const bool reset = reset_peak_memory();  // first: it gives freed memory back, which would count as a base
  const std::int64_t base = current_memory_bytes();
  const LogitLoss& row = *find_logit_loss("forward_kl");
  double value = 0;
  const Figures f = measured([&] {
    const at::Tensor loss = fused_linear_loss(row, hidden, weight, {}, {{}, teacher, head.weight, {}, nullptr});
    loss.backward();
    value = loss.item<double>();
  });
  std::printf("loss alone: %lld positions x %lld tokens, forward and backward of projection and KL: %.2f cpu s, %.2f s, %.0f MiB beyond its inputs%s, loss %.5f\n", static_cast<long long>(rows),
              static_cast<long long>(weight.size(0)), f.cpu, f.wall, static_cast<double>(peak_memory_bytes() - base) / 1048576, reset ? "" : " (no reset of the peak here)", value);
}

}  // namespace

int main(int argc, char** argv) {
  set_threads();
  std::string teacher_path, precision = "float32", save;
  std::int64_t steps = 3, layers = 20, batch = 4, length = 512;
  bool recompute = false, cache = false;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto next = [&] { return i + 1 < argc ? std::string(argv[++i]) : std::string(); };
    if (word == "--steps") steps = std::atoll(next().c_str());
    else if (word == "--layers") layers = std::atoll(next().c_str());
    else if (word == "--batch") batch = std::atoll(next().c_str());
    else if (word == "--length") length = std::atoll(next().c_str());
    else if (word == "--precision") precision = next();
    else if (word == "--save") save = next();
    else if (word == "--recompute") recompute = true;
    else if (word == "--cache") cache = true;
    else teacher_path = word;
  }
  if (teacher_path.empty()) {
    std::fprintf(stderr, "usage: distil_speed TEACHER [--steps N] [--layers N] [--batch N] [--length N] [--precision P] [--recompute] [--cache] [--save FOLDER]\n");
    return 2;
  }
  set_verbosity(Verbosity::quiet);
  const std::shared_ptr<Transformer> teacher = load_model(teacher_path);
  if (!save.empty()) {
    save_model(*teacher, save);
    return 0;
  }
  StudentOptions shape;
  for (std::int64_t i = 0; i < layers; ++i) shape.keep_layers.push_back(i * teacher->config().layers / layers);
  TaskData data;
  data.kind = TaskData::Kind::text;
  data.hash = "benchmark";
  std::vector<std::int64_t> ids;
  for (std::int64_t i = 0; i < steps * batch * length; ++i) ids.push_back(benchmark_token(i, teacher->config().vocab));
  data.train_documents.push_back(std::move(ids));
  DistillOptions options;
  options.student = shape;
  options.train.steps = steps;
  options.train.batch_size = batch;
  options.train.sequence_length = length;
  options.train.learning_rate = 1e-4;
  options.train.schedule = "constant";
  options.train.warmup = 0;
  options.train.precision = precision;
  options.train.recompute = recompute;
  options.train.save_every_steps = 1 << 30;
  options.has_cache = cache;
  const TemporaryFolder work;
  Json details = Json::object();
  StageContext context;
  context.title = "benchmark";
  context.work = work.path() / "work";
  context.data = &data;
  context.details = &details;
  const std::unique_ptr<TeacherSource> source = cache ? sparse_teacher(teacher, data, length, options.cache, work.path() / "cache") : live_teacher(teacher);
  context.teacher = source.get();
  const auto student = make_student(*teacher, shape);
  if (cache) {
    const auto copy = student->clone();
    StageContext first = context;
    first.work = work.path() / "fill";
    const Figures fill = measured([&] { distill(*copy, options, first); });
    std::printf("with an empty cache: %.2f cpu s\n", fill.cpu);
  }
  reset_peak_memory();
  const std::int64_t base = current_memory_bytes();
  const Figures f = measured([&] { distill(*student, options, context); });
  const double tokens = static_cast<double>(steps * batch * length);
  std::printf("%lld steps of %lld x %lld, %s%s%s: %.1f tokens per cpu second (%.1f a second), peak %.0f MiB, %.0f MiB of them for models that were there\n", static_cast<long long>(steps), static_cast<long long>(batch),
              static_cast<long long>(length), precision.c_str(), recompute ? ", recompute" : "", cache ? ", cached teacher" : "", tokens / f.cpu, tokens / f.wall, static_cast<double>(peak_memory_bytes()) / 1048576, static_cast<double>(base) / 1048576);
  if (cache) std::printf("cache: %.1f bytes a token on disk\n", static_cast<double>(bytes_on_disk(work.path() / "cache")) / tokens);
  std::printf("losses");
  for (const Json& point : details.at("loss_curve")) std::printf(" %.5f", point.at("loss").get<double>());
  std::printf("\n");
  loss_alone(*student, batch * length);
  return 0;
}
