// A teacher in fewer bits: peak memory of its forward pass, seconds, and what it costs in precision.
//
//   teacher_memory TEACHER PRECISION [--length 512] [--batch 4] [--batches 4] [--text FILE] [--kl]
//
// TEACHER: a model folder or .gguf. PRECISION: float32, bf16, int8 or int4, as teacher.precision of a recipe. Runs the live teacher as a
// training does (hidden states and head of every batch) and prints the program's high-water mark; one process, one figure. --kl: in place
// of that KL and same top-1 to the float32 teacher on the same text, both in memory.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/files.h"
#include "core/system.h"
#include "core/text.h"
#include "data/tokenizer.h"
#include "evaluate/language.h"
#include "model/checkpoint.h"
#include "quantize/held_weights.h"
#include "train/teacher.h"

namespace {

using namespace kompakt;

double mebibytes(std::int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

int measure_teacher(const std::filesystem::path& path, const HeldPrecision& precision, std::int64_t length, std::int64_t batch, std::int64_t batches, const std::string& text, bool divergence) {
  std::vector<std::int64_t> ids;
  if (text.empty())
    for (std::int64_t i = 0; i < length * batch * batches; ++i) ids.push_back(i * 7919 % 40000);
  else ids = load_tokenizer(path)->encode(read_text(text).substr(0, static_cast<std::size_t>(8 * length * batch * batches)), false, false);
  const auto windows = std::min<std::int64_t>(batch * batches, static_cast<std::int64_t>(ids.size()) / length);
  const auto window = [&](std::int64_t w) { return std::vector<std::int64_t>(ids.begin() + w * length, ids.begin() + (w + 1) * length); };
  const at::NoGradGuard no_grad;
  if (divergence) {
    std::vector<std::vector<std::int64_t>> all;
    for (std::int64_t w = 0; w < windows; ++w) all.push_back(window(w));
    const auto held = load_held_model(path, precision), exact = load_model(path);
    const LanguageScores scores = score_language(*held, exact.get(), all, 512);
    double kl = 0, same = 0, teacher = 0;
    for (std::size_t i = 0; i < scores.kl.size(); ++i) kl += scores.kl[i], same += scores.same_top1[i];
    for (const double nll : scores.teacher_window_nll) teacher += nll;
    const auto count = static_cast<double>(scores.kl.size());
    std::printf("%-8s %8.0f tokens   KL %.5f   same top-1 %.4f   NLL %.4f (float32 %.4f)\n", std::string(precision.name).c_str(), count, kl / count, same / count, scores.mean_nll(), teacher / count);
    return 0;
  }
  const std::int64_t before = current_memory_bytes();
  reset_peak_memory();
  const auto model = std::shared_ptr<const Transformer>(load_held_model(path, precision));
  const std::int64_t loaded = current_memory_bytes(), loading = peak_memory_bytes();
  const auto teacher = live_teacher(model);
  teacher->prepare({});
  reset_peak_memory();
  const double start = cpu_seconds();
  for (std::int64_t b = 0; b + batch <= windows; b += batch) {
    TokenBatch tokens{.lengths = std::vector<std::int64_t>(static_cast<std::size_t>(batch), length), .rows = batch, .columns = length};
    for (std::int64_t r = 0; r < batch; ++r) {
      const auto row = window(b + r);
      tokens.ids.insert(tokens.ids.end(), row.begin(), row.end());
    }
    teacher->targets(tokens);
  }
  std::printf("%-8s before %6.0f MiB   loaded %6.0f   peak of loading %6.0f   peak of %lld batches of %lld x %lld tokens %6.0f (predicted weights %6.0f)   %.2f CPU seconds\n", std::string(precision.name).c_str(), mebibytes(before), mebibytes(loaded),
              mebibytes(loading), static_cast<long long>(windows / batch), static_cast<long long>(batch), static_cast<long long>(length), mebibytes(peak_memory_bytes()), mebibytes(held_bytes(model->config(), precision)), cpu_seconds() - start);
  return 0;
}

}  // namespace

int main(int count, char** values) {
  try {
    std::vector<std::string> rest;
    std::int64_t length = 512, batch = 4, batches = 4;
    std::string text;
    bool divergence = false;
    for (int i = 1; i < count; ++i) {
      const std::string argument = values[i];
      const auto next = [&]() -> std::string { return i + 1 < count ? values[++i] : ""; };
      if (argument == "--length") length = std::atoll(next().c_str());
      else if (argument == "--batch") batch = std::atoll(next().c_str());
      else if (argument == "--batches") batches = std::atoll(next().c_str());
      else if (argument == "--text") text = next();
      else if (argument == "--kl") divergence = true;
      else rest.push_back(argument);
    }
    if (rest.size() != 2) return std::fprintf(stderr, "usage: teacher_memory TEACHER PRECISION [--length N] [--batch N] [--batches N] [--text FILE] [--kl]\n"), 2;
    return measure_teacher(rest[0], find_held_precision(rest[1]), length, batch, batches, text, divergence);
  } catch (const Error& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 2;
  }
}
