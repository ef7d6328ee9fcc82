// basis: auto. Candidates are compared by what counts, the divergence of the quantized model, on its first blocks.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <limits>
#include <numeric>

#include "core/error.h"
#include "core/files.h"
#include "core/log.h"
#include "core/random.h"
#include "core/text.h"
#include "evaluate/classify.h"
#include "evaluate/language.h"
#include "model/depth.h"
#include "quantize/basis.h"
#include "model/invariance.h"
#include "quantize/methods.h"
#include "quantize/stage.h"
#include "quantize/tensors.h"

namespace kompakt {
namespace {

constexpr std::int64_t probe_heldout_tokens = 4096, probe_heldout_examples = 256;
constexpr double probe_margin = 0.99;

// Texts that a probe calibrates on, and others to measure on.
struct ProbeData {
  TaskData calibration;
  std::vector<std::vector<std::int64_t>> windows;  // text
  TokenizedExamples examples;                      // classification
};

ProbeData probe_data(const BasisChange& change) {
  const TaskData* data = change.context.data;
  const auto missing = [&](const char* what) {
    return Error(str("basis auto compares bases on ", what, " and the run has too few")).at(change.context.title).hint("name texts under data.calibration (or examples under data.train), or name the basis: fold");
  };
  if (!data) throw missing("calibration texts");
  ProbeData out{*data, {}, {}};
  if (data->kind == TaskData::Kind::text) {
    auto& windows = out.calibration.calibration;
    if (windows.empty() || (windows.size() < 2 && data->heldout.empty())) throw missing("calibration texts");
    if (!data->heldout.empty()) {
      out.windows = data->heldout;
    } else {
      const std::size_t kept = windows.size() - std::max<std::size_t>(1, windows.size() / 4);
      out.windows.assign(windows.begin() + static_cast<std::ptrdiff_t>(kept), windows.end());
      windows.resize(kept);
    }
    const auto limit = [](std::vector<std::vector<std::int64_t>>& list, std::int64_t tokens) {
      const auto count = static_cast<std::size_t>(std::max<std::int64_t>(1, tokens / std::max<std::int64_t>(1, static_cast<std::int64_t>(list.front().size()))));
      if (list.size() > count) list.resize(count);
    };
    limit(out.windows, probe_heldout_tokens);
    limit(windows, change.options.basis.tokens);
    return out;
  }
  if (data->train.ids.size() < 4) throw missing("training examples");
  const auto order = CounterRandom(change.context.seed, "basis-probe").permutation(static_cast<std::int64_t>(data->train.ids.size()));
  const std::size_t held = std::min<std::size_t>(order.size() / 4, static_cast<std::size_t>(probe_heldout_examples));
  TokenizedExamples rest;
  for (std::size_t i = 0; i < order.size(); ++i) {
    TokenizedExamples& into = i < held ? out.examples : rest;
    into.ids.push_back(data->train.ids[static_cast<std::size_t>(order[i])]);
    into.labels.push_back(data->train.labels[static_cast<std::size_t>(order[i])]);
  }
  out.calibration.train = std::move(rest);
  return out;
}

// Mean KL(reference || model), nats per token or example.
double probe_divergence(const Transformer& reference, const Transformer& model, const ProbeData& data) {
  if (data.calibration.kind == TaskData::Kind::text) {
    const LanguageScores scores = score_language(model, &reference, data.windows);
    return std::accumulate(scores.kl.begin(), scores.kl.end(), 0.0) / static_cast<double>(scores.kl.size());
  }
  const std::int64_t pad = data.calibration.tokenizer && data.calibration.tokenizer->special().pad >= 0 ? data.calibration.tokenizer->special().pad : 0;
  const auto log_probabilities = [&](const Transformer& m) {
    const Predictions p = predict(m, data.examples, pad);
    return at::log_softmax(at::tensor(at::ArrayRef<float>(p.logits), at::kFloat).reshape({-1, p.classes}).to(at::kDouble), 1);
  };
  const at::Tensor p = log_probabilities(reference), q = log_probabilities(model);
  return (p.exp() * (p - q)).sum(1).mean().item<double>();
}

// The first blocks of `model` quantized as the stage would, in place.
void probe_quantize(Transformer& model, const BasisChange& change, const TaskData& data, const std::string& name) {
  const auto first = model.clone();
  std::vector<std::int64_t> keep(static_cast<std::size_t>(std::min<std::int64_t>(change.options.basis.blocks, static_cast<std::int64_t>(model.blocks.size()))));
  std::iota(keep.begin(), keep.end(), 0);
  keep_blocks(*first, keep);
  QuantizeOptions options = change.options;
  options.basis = {}, options.embedding = options.head = "none";
  options.has_block_tune = options.has_tuning = options.has_activations = options.has_kv_cache = false, options.tune = "none", options.token_weights = "uniform";
  if (find_quantization_method(options.method)->needs_train) {  // the keys of its training go with it
    options.method = "rtn";
    options.subln = options.has_pretrain = false, options.gradual = 0, options.gradual_schedule = QuantizeOptions().gradual_schedule;
  }
  const QuantizationPlan plan = plan_quantization(model.config(), change.options);
  options.keep_float.clear();
  for (const Linear* linear : first->linears())
    if (!plan.tensors.count(linear->name)) options.keep_float.push_back(linear->name);
  StageContext context = change.context;
  context.title += " probe " + name;
  context.data = &data, context.details = nullptr, context.resume = false;
  if (!context.work.empty()) context.work /= "basis-probe";
  quantize(*first, options, {}, context);
  if (!context.work.empty()) std::filesystem::remove_all(context.work);
  for (const Linear* linear : first->linears()) model.find_linear(linear->name)->weight = linear->weight;
}

}  // namespace

std::string choose_basis(BasisChange& change) {
  const at::NoGradGuard no_grad;
  const std::filesystem::path saved = change.context.work.empty() ? std::filesystem::path() : change.context.work / "basis.json";
  if (change.context.resume && !saved.empty() && std::filesystem::exists(saved)) {
    const Json choice = read_json(saved);
    change.figures["candidates"] = choice.at("candidates");
    return choice.at("name");
  }
  const ProbeData data = probe_data(change);
  QuantizeOptions options = change.options;
  options.basis.untie = false;
  Json candidates = Json::object();
  std::string best;
  double least = std::numeric_limits<double>::infinity();
  for (const Basis& row : bases()) {
    if (!row.candidate) continue;
    const auto copy = change.model.clone();
    StageContext context = change.context;
    context.data = &data.calibration, context.details = nullptr;
    BasisChange probe{*copy, options, context};
    probe.search_blocks = options.basis.blocks;
    try {
      row.apply(probe);
    } catch (const Error& error) {
      if (error.code() != ExitCode::user) throw;
      change.notes.push_back(str(row.name, " not tried: ", error.message()));
      continue;
    }
    probe_quantize(*copy, change, data.calibration, std::string(row.name));
    const double divergence = probe_divergence(change.model, *copy, data);
    log_info(str(change.context.title, ": basis ", row.name, ": divergence ", fixed(divergence, 5), " with the first ", std::min<std::int64_t>(options.basis.blocks, change.model.config().layers), " blocks quantized"));
    candidates[std::string(row.name)] = divergence;
    if (best.empty() || divergence < probe_margin * least) best = row.name, least = divergence;
  }
  if (!saved.empty()) {
    make_folder(change.context.work);
    write_json(saved, Json{{"name", best}, {"candidates", candidates}});
  }
  change.figures["candidates"] = std::move(candidates);
  return best;
}

}  // namespace kompakt
