// Distillation of a language model: tokens per CPU second of whole steps (teacher forward, student forward and backward, clipping,
// AdamW), peak memory, and the loss alone with the memory that it takes. benchmarks/distil_speed.py measures PyTorch eager on the
// same weights, tokens and options: run both with the same threads, compare.
//
//   distil_speed TEACHER [--steps 3] [--layers 20] [--batch 4] [--length 512] [--precision float32|bf16] [--recompute] [--text FILE] [--cache] [--device cpu|cuda] [--save FOLDER]
//
// TEACHER: a model folder or .gguf; --save writes it as a folder that transformers reads and ends. --text: real text, by the teacher's
// tokenizer, in place of numbers that any program can make. --cache: a cache of the teacher's likeliest tokens is filled and read,
// each with its speed, and its gradient is compared with that of the live teacher; the steps then take it. On a GPU wall time counts, and
// the peak is that of LibTorch's allocator.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <set>

#include "core/files.h"
#include "core/log.h"
#include "core/random.h"
#include "core/system.h"
#include "core/text.h"
#include "data/batches.h"
#include "data/tokenizer.h"
#include "distill/fused_linear.h"
#include "distill/stage.h"
#include "model/checkpoint.h"
#include "model/device_memory.h"
#include "pipeline/device.h"
#include "train/chunked_loss.h"
#include "train/teacher.h"

namespace {

using namespace kompakt;

struct Figures {
  double cpu, wall;
};
c10::Device device = c10::Device(c10::kCPU);

template <class F>
Figures measured(const F& work) {
  wait_for_device(device);
  const double cpu = cpu_seconds();
  const auto start = std::chrono::steady_clock::now();
  work();
  wait_for_device(device);
  return {cpu_seconds() - cpu, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count()};
}

double clock_seconds() {  // CPU time on a CPU: other programs do not count
  if (device.is_cpu()) return cpu_seconds();
  wait_for_device(device);
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Memory high-water mark, of the device if it has one of its own.
std::int64_t measured_peak() { return device_peak_memory_bytes(device).value_or(peak_memory_bytes()); }
std::int64_t measured_memory() { return device_memory_bytes(device).value_or(current_memory_bytes()); }
bool measured_reset() {
  reset_device_peak_memory(device);
  return reset_peak_memory();
}

// A live teacher that looks at the clock whenever it is asked: once a step.
class ClockedTeacher final : public TeacherSource {
 public:
  explicit ClockedTeacher(TeacherSource& inner) : inner_(inner) {}
  void prepare(const std::set<std::string>& taps) override { inner_.prepare(taps); }
  TeacherTargets targets(const TokenBatch& batch) override {
    times_.push_back(clock_seconds());
    return inner_.targets(batch);
  }
  bool takes(std::int64_t columns) const override { return inner_.takes(columns); }
  const ModelConfig& config() const override { return inner_.config(); }
  std::string fingerprint() const override { return inner_.fingerprint(); }
  // Seconds between two calls.
  std::vector<double> steps() const {
    std::vector<double> out;
    for (std::size_t i = 1; i < times_.size(); ++i) out.push_back(times_[i] - times_[i - 1]);
    return out;
  }

 private:
  TeacherSource& inner_;
  std::vector<double> times_;
};

// Gradient of forward KL in all weights of the student under a source of targets.
at::Tensor gradient_under(Transformer& student, TeacherSource& teacher, const TokenBatch& batch) {
  const ModelInput input = to_input(batch, device);
  student.requires_grad(true);
  const at::Tensor hidden = student.hidden(input).flatten(0, 1);
  const TeacherTargets targets = teacher.targets(batch);
  const SparseTargets& s = targets.sparse;
  const bool sparse = s.ids.defined();
  const SparseTargets rows = sparse ? SparseTargets{s.ids.flatten(0, 1), s.log_p.flatten(0, 1), s.log_rest.flatten(0, 1), s.draws.flatten(0, 1), s.draw_log_p.flatten(0, 1), s.vocabulary} : SparseTargets{};
  const HeadWeights head = head_weights(student);
  fused_linear_loss(*find_logit_loss("forward_kl"), hidden, head.weight, head.bias, {{}, sparse ? at::Tensor() : targets.hidden.flatten(0, 1), targets.head_weight, targets.head_bias, sparse ? &rows : nullptr}).backward();
  std::vector<at::Tensor> all;
  for (const NamedParameter& parameter : student.parameters()) {
    all.push_back(parameter.value->grad().flatten().to(at::kDouble));  // a sum of 10^8 products in float32 is off by a percent
    parameter.value->mutable_grad() = at::Tensor();
  }
  student.requires_grad(false);
  return at::cat(all);
}

// What a cache costs and what it keeps: bytes, speed of filling and reading, gradient beside the live teacher's.
void cache_alone(Transformer& student, const std::shared_ptr<Transformer>& teacher, const TaskData& data, std::int64_t batch, std::int64_t length, std::int64_t steps, const std::filesystem::path& folder) {
  const TextBatches batches(data.train_documents, length, batch, -1, true, 0);
  const double tokens = static_cast<double>(steps * batch * length);
  const std::unique_ptr<TeacherSource> live = live_teacher(teacher);
  live->prepare({});
  const Figures forward = measured([&] {
    for (std::int64_t i = 0; i < steps; ++i) live->targets(batches.get(0, i));
  });
  const Figures write = measured([&] {
    const std::unique_ptr<TeacherSource> cache = sparse_teacher(teacher, data, length, {}, folder);
    cache->prepare({});
    for (std::int64_t i = 0; i < steps; ++i) cache->targets(batches.get(0, i));
  });
  const std::unique_ptr<TeacherSource> cache = sparse_teacher(teacher, data, length, {}, folder);
  cache->prepare({});
  const Figures read = measured([&] {
    for (std::int64_t i = 0; i < steps; ++i) cache->targets(batches.get(0, i));
  });
  std::printf("cache: %.1f bytes a token, written at %.1f tokens per cpu second (the teacher without its head: %.1f), read at %.1f\n", static_cast<double>(bytes_on_disk(folder)) / tokens, tokens / write.cpu, tokens / forward.cpu, tokens / read.cpu);
  const TokenBatch first = batches.get(0, 0);
  const at::Tensor full = gradient_under(student, *live, first), kept = gradient_under(student, *cache, first);
  std::printf("cache: cosine of the gradient to that of the live teacher, one batch: %.5f\n", (full.dot(kept) / (full.norm() * kept.norm())).item<double>());
}

// Token i of the text; the Python side has the same rule.
std::int64_t benchmark_token(std::int64_t i, std::int64_t vocabulary) { return (i * 7919 + (i / 13) * 104729) % (vocabulary - 64) + 64; }

// Forward and backward of projection + forward KL on random hidden states of the head's width.
void loss_alone(const Transformer& model, std::int64_t rows) {
  const HeadWeights head = head_weights(model);
  const at::Tensor weight = head.weight.detach().clone().requires_grad_(), hidden = at::randn({rows, weight.size(1)}, weight.options()).requires_grad_(), teacher = at::randn({rows, weight.size(1)}, weight.options());
  const bool reset = measured_reset();  // first: it gives freed memory back, which would count as a base
  const std::int64_t base = measured_memory();
  const LogitLoss& row = *find_logit_loss("forward_kl");
  double value = 0;
  const Figures f = measured([&] {
    const at::Tensor loss = fused_linear_loss(row, hidden, weight, {}, {{}, teacher, head.weight, {}, nullptr});
    loss.backward();
    value = loss.item<double>();
  });
  std::printf("loss alone: %lld positions x %lld tokens, forward and backward of projection and KL: %.2f cpu s, %.2f s, %.0f MiB beyond its inputs%s, loss %.5f\n", static_cast<long long>(rows),
              static_cast<long long>(weight.size(0)), f.cpu, f.wall, static_cast<double>(measured_peak() - base) / 1048576, reset ? "" : " (no reset of the peak here)", value);
}

}  // namespace

int main(int argc, char** argv) {
  set_threads();
  std::string teacher_path, precision = "float32", save, text;
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
    else if (word == "--text") text = next();
    else if (word == "--device") device = parse_device(next());
    else if (word == "--recompute") recompute = true;
    else if (word == "--cache") cache = true;
    else teacher_path = word;
  }
  if (teacher_path.empty()) {
    std::fprintf(stderr, "usage: distil_speed TEACHER [--steps N] [--layers N] [--batch N] [--length N] [--precision P] [--recompute] [--text FILE] [--cache] [--device D] [--save FOLDER]\n");
    return 2;
  }
  set_verbosity(Verbosity::quiet);
  const std::shared_ptr<Transformer> teacher = load_model(teacher_path);
  if (!save.empty()) {
    save_model(*teacher, save);
    return 0;
  }
  teacher->to(device);
  StudentOptions shape;
  for (std::int64_t i = 0; i < layers; ++i) shape.keep_layers.push_back(i * teacher->config().layers / layers);
  TaskData data;
  data.kind = TaskData::Kind::text;
  data.hash = "benchmark";
  std::vector<std::int64_t> ids;
  const std::int64_t wanted = steps * batch * length;
  if (text.empty()) {
    for (std::int64_t i = 0; i < wanted; ++i) ids.push_back(benchmark_token(i, teacher->config().vocab));
  } else {
    ids = load_tokenizer(teacher_path)->encode(read_text(text).substr(0, static_cast<std::size_t>(wanted * 12)));
    if (static_cast<std::int64_t>(ids.size()) < wanted) return std::fprintf(stderr, "%s: fewer than %lld tokens\n", text.c_str(), static_cast<long long>(wanted)), 2;
    ids.resize(static_cast<std::size_t>(wanted));
  }
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
  context.device = device;
  context.details = &details;
  const auto student = make_student(*teacher, shape);
  if (cache) cache_alone(*student, teacher, data, batch, length, steps, work.path() / "alone");
  const std::unique_ptr<TeacherSource> source = cache ? sparse_teacher(teacher, data, length, options.cache, work.path() / "cache") : live_teacher(teacher);
  ClockedTeacher clock(*source);
  context.teacher = &clock;
  measured_reset();
  const std::int64_t base = measured_memory();
  const Figures f = measured([&] { distill(*student, options, context); });
  const double tokens = static_cast<double>(steps * batch * length);
  std::printf("%lld steps of %lld x %lld, %s%s%s: %.1f tokens per cpu second (%.1f a second), peak %.0f MiB, %.0f MiB of them for models that were there\n", static_cast<long long>(steps), static_cast<long long>(batch),
              static_cast<long long>(length), precision.c_str(), recompute ? ", recompute" : "", cache ? ", cached teacher" : "", tokens / f.cpu, tokens / f.wall, static_cast<double>(measured_peak()) / 1048576, static_cast<double>(base) / 1048576);
  std::printf("%s seconds of the steps but the last:", device.is_cpu() ? "cpu" : "wall");
  const std::vector<double> each = clock.steps();
  for (const double seconds : each) std::printf(" %.2f", seconds);
  if (!each.empty()) std::printf("; the fastest is %.1f tokens a second of that clock", static_cast<double>(batch * length) / *std::min_element(each.begin(), each.end()));
  std::printf("\n");
  std::printf("losses");
  for (const Json& point : details.at("loss_curve")) std::printf(" %.5f", point.at("loss").get<double>());
  std::printf("\n");
  loss_alone(*student, batch * length);
  return 0;
}
