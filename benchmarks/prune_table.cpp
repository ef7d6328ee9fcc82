// What pruning costs a decoder, one shot and without training: every criterion of single weights and patterns, every criterion
// of neurons and layers with and without compensation. Perplexity of the test text, divergence from the float model.
//
//   prune_table MODEL CALIBRATION.txt TEST.txt [key=value ...]
//
//   table=weights|shapes|both      weights: also with 4 bits a weight, pruned in the same sweep ("joint") or before it ("apart")
//   tokens=65536 (calibration)   test=20480   length=512
//   true_sequential=1 (0: single weights in the order of the authors' scripts)
//   precision=float32|bf16|auto (of passes over calibration text and of moments, for single weights)
//   ffn=0.75 layers=5 multiple=32  only=TEXT (rows whose name holds it), or exactly these: only==NAME,NAME
//   device=cpu|cuda (there the seconds are wall time)
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/files.h"
#include "core/log.h"
#include "core/system.h"
#include "core/text.h"
#include "data/tokenizer.h"
#include "evaluate/language.h"
#include "model/checkpoint.h"
#include "model/device_memory.h"
#include "prune/stage.h"
#include "quantize/stage.h"

using namespace kompakt;

namespace {

using Windows = std::vector<std::vector<std::int64_t>>;

Windows table_windows(const Tokenizer& tokenizer, const char* file, std::int64_t tokens, std::int64_t length) {
  const std::vector<std::int64_t> ids = tokenizer.encode(read_text(file), false, false);
  Windows out;
  for (std::int64_t at = 0; at + length <= std::min<std::int64_t>(tokens, static_cast<std::int64_t>(ids.size())); at += length) out.emplace_back(ids.begin() + at, ids.begin() + at + length);
  if (out.empty()) throw Error("the text is shorter than one window").at(file);
  return out;
}

struct TableRow {
  std::string name;
  PruneOptions options;
  bool quantizes = false;
  QuantizeOptions quantize = {};
};

std::vector<TableRow> weight_rows() {
  std::vector<TableRow> rows;
  for (const char* pattern : {"", "2:4", "4:8"})
    for (const std::string& criterion : weight_criterion_names())
      for (const char* refit : {"none", "exact"}) {
        TableRow row;
        row.options.has_unstructured = true;
        row.options.unstructured.criterion = criterion, row.options.unstructured.refit = refit, row.options.unstructured.pattern = pattern;
        row.options.unstructured.sparsity = *pattern ? 0 : 0.5;
        row.name = str(criterion, " ", *pattern ? pattern : "50%", *refit == 'e' ? " refit" : "");
        rows.push_back(std::move(row));
      }
  // A row of weights shares a scale and a zero point, as the authors' quantizer has it.
  for (const char* pattern : {"", "2:4"})
    for (const bool joint : {true, false}) {
      TableRow row;
      row.quantizes = true;
      row.quantize.weights = "int4_asym", row.quantize.group = 0, row.quantize.embedding = "none", row.quantize.method = "gptq";
      SparsityOptions& sparse = joint ? row.quantize.sparse : row.options.unstructured;
      sparse.pattern = pattern, sparse.sparsity = *pattern ? 0 : 0.5;
      row.quantize.has_sparse = joint, row.options.has_unstructured = !joint, row.options.unstructured.criterion = "sparsegpt";
      row.name = str("sparsegpt ", *pattern ? pattern : "50%", " 4 bit ", joint ? "joint" : "apart");
      rows.push_back(std::move(row));
    }
  return rows;
}

std::vector<TableRow> shape_rows(double ffn, std::int64_t layers) {
  std::vector<TableRow> rows;
  const auto add = [&](const std::string& criterion, const std::string& depth, const char* compensate, double width, std::int64_t count) {
    TableRow row;
    row.options.has_structured = true;
    row.options.criterion = criterion, row.options.compensate = compensate;
    row.options.structured.ffn = width, row.options.structured.layers = count, row.options.structured.depth = depth;
    row.name = str(width < 1 ? criterion : "", width < 1 && count > 0 ? " + " : "", count > 0 ? depth : "", " ", compensate);
    rows.push_back(std::move(row));
  };
  for (const char* compensate : {"none", "ls", "stream"}) {
    for (const std::string& criterion : criterion_names()) add(criterion, "block_influence", compensate, ffn, layers);
    for (const std::string& depth : depth_criterion_names())
      for (const char* criterion : {"taylor", "magnitude"})
        if (depth != "block_influence") add(criterion, depth, compensate, ffn, layers);
    if (ffn < 1)
      for (const std::string& criterion : criterion_names()) add(criterion, "block_influence", compensate, ffn, 0);
    if (layers > 0)
      for (const std::string& depth : depth_criterion_names()) add("magnitude", depth, compensate, 1, layers);
  }
  return rows;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 4) throw Error("model, calibration text and test text are needed").allowed("prune_table MODEL CALIBRATION.txt TEST.txt [key=value ...]");
  std::map<std::string, std::string> keys = {{"table", "both"}, {"tokens", "65536"}, {"test", "20480"}, {"length", "512"}, {"ffn", "0.75"}, {"layers", "5"}, {"multiple", "32"}, {"only", ""}, {"true_sequential", "1"}, {"precision", "float32"}, {"device", "cpu"}};
  for (int i = 4; i < argc; ++i) {
    const std::string text = argv[i];
    const auto at = text.find('=');
    if (at == std::string::npos || !keys.count(text.substr(0, at))) throw Error("unknown option").given(text);
    keys[text.substr(0, at)] = text.substr(at + 1);
  }
  const auto number = [&](const char* key) { return parse_int(keys.at(key)).value(); };
  const at::NoGradGuard no_grad;
  set_verbosity(std::getenv("VERBOSE") ? Verbosity::normal : Verbosity::quiet);
  const c10::Device device(keys.at("device"));
  const auto teacher = load_model(argv[1], device);
  const auto tokenizer = load_tokenizer(argv[1]);
  TaskData data;
  data.kind = TaskData::Kind::text;
  data.calibration = table_windows(*tokenizer, argv[2], number("tokens"), number("length"));
  const Windows test = table_windows(*tokenizer, argv[3], number("test"), number("length"));
  std::vector<TableRow> rows;
  if (keys.at("table") != "shapes") rows = weight_rows();
  if (keys.at("table") != "weights")
    for (TableRow& row : shape_rows(parse_double(keys.at("ffn")).value(), number("layers"))) rows.push_back(std::move(row));
  const std::vector<std::string> names = keys.at("only").starts_with("=") ? split(keys.at("only").substr(1), ',') : std::vector<std::string>{};
  std::printf("%-44s %10s %9s %9s  %s\n", "", "perplexity", "KL", device.is_cpu() ? "CPU s" : "s", "parameters");
  const LanguageScores dense = score_language(*teacher, nullptr, test);
  std::printf("%-44s %10.4f %9.4f %9.1f  %lld\n", "float", std::exp(dense.mean_nll()), 0.0, 0.0, static_cast<long long>(count_parameters(teacher->config()).total));
  std::fflush(stdout);
  for (TableRow& row : rows) {
    if (!names.empty() ? std::find(names.begin(), names.end(), row.name) == names.end() : row.name.find(keys.at("only")) == std::string::npos) continue;
    Json details = Json::object();
    StageContext context;
    context.title = "table", context.seed = 1, context.data = &data, context.details = &details, context.device = device;
    row.options.samples = static_cast<std::int64_t>(data.calibration.size());
    row.options.multiple_of = number("multiple");
    row.options.unstructured.true_sequential = number("true_sequential") != 0;
    row.options.unstructured.calibration_precision = row.quantize.calibration_precision = keys.at("precision");
    const auto model = teacher->clone();
    const auto clock = [&] { return device.is_cpu() ? cpu_seconds() : std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
    const double start = clock();
    if (row.options.has_structured || row.options.has_unstructured) prune(*model, row.options, {}, context);
    row.quantize.calibration_sequences = row.options.samples;
    if (row.quantizes) quantize(*model, row.quantize, {}, context);
    wait_for_device(device);
    const double seconds = clock() - start;
    const LanguageScores scores = score_language(*model, teacher.get(), test);
    double kl = 0;
    for (const float value : scores.kl) kl += value;
    const std::string removed = details.contains("removed") && details.at("removed").contains("layers") ? details.at("removed").at("layers").dump() : "";
    std::printf("%-44s %10.4f %9.4f %9.1f  %lld %s\n", row.name.c_str(), std::exp(scores.mean_nll()), kl / static_cast<double>(scores.kl.size()), seconds, static_cast<long long>(count_parameters(model->config()).total), removed.c_str());
    std::fflush(stdout);
  }
} catch (const Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
