// Divergence of a quantized decoder from its float teacher in every basis, for the model as it is and for two spoiled bases of
// the same function: log-normal factors between norm weights and linears, and the residual stream turned to its principal axes.
//
//   basis_table FOLDER [grid] [group] [method] [part of a basis ...]
//
// FOLDER: a decoder, and tokens.safetensors with the matrices "calibration" and "evaluation" (token ids, a window a row).
// The bad bases need a head of its own (or are made on a copy that has one).
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/log.h"
#include "core/random.h"
#include "core/text.h"
#include "evaluate/inputs.h"
#include "evaluate/language.h"
#include "formats/safetensors.h"
#include "model/checkpoint.h"
#include "model/invariance.h"
#include "quantize/stage.h"

using namespace kompakt;

namespace {

using Windows = std::vector<std::vector<std::int64_t>>;

Windows table_windows(const SafetensorsFile& file, const char* name, std::size_t limit) {
  const at::Tensor rows = as_tensor(*file.find(name)).to(at::kLong);
  Windows out;
  for (std::int64_t r = 0; r < rows.size(0) && out.size() < limit; ++r) {
    const at::Tensor row = rows[r].contiguous();
    out.emplace_back(row.const_data_ptr<std::int64_t>(), row.const_data_ptr<std::int64_t>() + row.numel());
  }
  return out;
}

// Log-normal factors, three of them 20 times larger, moved from the columns of the linears into the norms in front.
void table_tear(Transformer& model, const Windows&) {
  for (Block& block : model.blocks)
    for (auto [norm, readers] : std::initializer_list<std::pair<Norm*, std::vector<Linear*>>>{
             {&block.attention_norm, {&block.attention.query, &block.attention.key, &block.attention.value}}, {&block.mlp_norm, {&block.mlp.gate, &block.mlp.up}}}) {
      const CounterRandom random(1, norm->name);
      at::Tensor factor = at::empty(norm->weight.sizes(), at::kDouble);
      for (std::int64_t i = 0; i < factor.numel(); ++i) factor.data_ptr<double>()[i] = std::exp(random.normal(static_cast<std::uint64_t>(i))) * (i % (factor.numel() / 3) == 5 ? 20 : 1);
      set_norm_gain(*norm, norm_gain(*norm) * factor);
      for (Linear* reader : readers) reader->weight = (reader->weight.to(at::kDouble) / factor).to(at::kFloat);
    }
}

// The residual stream behind the middle block, turned to its principal axes.
void table_principal(Transformer& model, const Windows& windows) {
  if (!model.lm_head.weight.defined()) untie_head(model);
  fold_norms(model);
  at::Tensor second;
  for (std::size_t w = 0; w < windows.size(); ++w) {
    TapMap taps({str("layer.", model.config().layers / 2, ".output")});
    model.hidden(window_input(windows, w, 1, model.device()), &taps);
    const at::Tensor x = taps.values().begin()->second.reshape({-1, model.config().hidden}).to(at::kDouble);
    second = second.defined() ? second + at::matmul(x.t(), x) : at::matmul(x.t(), x);
  }
  rotate_residual(model, std::get<1>(at::linalg_eigh(second)));
}

struct Spoiled {
  const char* name;
  void (*make)(Transformer&, const Windows&);
};

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) throw Error("no model folder").allowed("basis_table FOLDER [grid] [group] [method] [part of a basis ...]");
  const at::NoGradGuard no_grad;
  set_verbosity(std::getenv("VERBOSE") ? Verbosity::normal : Verbosity::quiet);
  const std::filesystem::path folder = argv[1];
  const std::unique_ptr<Transformer> teacher = load_model(folder);
  const SafetensorsFile tokens = SafetensorsFile::open(folder / "tokens.safetensors");
  TaskData data;
  data.kind = TaskData::Kind::text;
  data.calibration = table_windows(tokens, "calibration", 64);
  const Windows evaluation = table_windows(tokens, "evaluation", 96);
  struct Row {
    std::string name, basis;
    bool untie;
  };
  std::vector<Row> rows;
  for (const std::string& name : basis_names()) {
    rows.push_back({name, name, false});
    if (name == "hadamard" && teacher->config().tied) rows.push_back({"hadamard, untied", name, true});
  }
  for (const Spoiled& spoiled : {Spoiled{"as trained", nullptr}, Spoiled{"log-normal norms", table_tear}, Spoiled{"principal axes", table_principal}}) {
    const auto start_model = teacher->clone();
    if (spoiled.make) spoiled.make(*start_model, data.calibration);
    for (const Row& row : rows) {
      if (row.untie && !start_model->config().tied) continue;
      bool wanted = argc <= 5;
      for (int i = 5; i < argc; ++i) wanted = wanted || row.name.find(argv[i]) != std::string::npos;
      if (!wanted) continue;
      QuantizeOptions options;
      options.weights = argc > 2 ? argv[2] : "ternary", options.group = argc > 3 ? std::atoll(argv[3]) : 64, options.method = argc > 4 ? argv[4] : "gptq";
      options.embedding = "none", options.basis.basis = row.basis, options.basis.untie = row.untie, options.calibration_sequences = 64;
      Json details = Json::object();
      StageContext context;
      context.title = "table", context.seed = 1, context.data = &data, context.details = &details;
      const auto model = start_model->clone();
      const auto start = std::chrono::steady_clock::now();
      quantize(*model, options, {}, context);
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      const LanguageScores scores = score_language(*model, teacher.get(), evaluation);
      double kl = 0;
      for (const float value : scores.kl) kl += value;
      std::string note;
      if (row.basis == "auto") note = str(details["basis"]["parts"][0].get<std::string>(), " ", details["basis"]["figures"]["candidates"].dump());
      std::printf("%-18s %-18s %9.4f %8.1f s  %s\n", spoiled.name, row.name.c_str(), kl / static_cast<double>(scores.kl.size()), seconds, note.c_str());
      std::fflush(stdout);
    }
  }
} catch (const Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
