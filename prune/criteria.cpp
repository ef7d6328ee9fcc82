// The criteria: first-order Taylor (Fisher gates), coupled weight norms, activation norms, FLAP's fluctuation, random.
#include "prune/criteria.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <set>
#include <stdexcept>

#include "core/error.h"
#include "core/log.h"
#include "core/random.h"
#include "core/text.h"
#include "model/families.h"
#include "prune/channels.h"
#include "train/step_batches.h"
#include "train/targets.h"
#include "train/teacher.h"

namespace kompakt {

using at::Tensor;

Tensor valid_tokens(const ModelInput& input) {
  if (!input.lengths.defined()) return at::ones_like(input.ids, at::kBool);
  return at::arange(input.ids.size(1), input.lengths.options()).unsqueeze(0) < input.lengths.unsqueeze(1);
}

Tensor example_losses(const Tensor& all, const TokenBatch& batch) {
  const Tensor logits = all.to(at::kFloat);
  if (!batch.labels.empty()) {
    const Tensor labels = at::tensor(at::ArrayRef<std::int64_t>(batch.labels), at::kLong).to(logits.device());
    return at::cross_entropy_loss(logits, labels, {}, at::Reduction::None);
  }
  const std::vector<std::int64_t> next = next_tokens(batch);
  const Tensor labels = at::tensor(at::ArrayRef<std::int64_t>(next), at::kLong).to(logits.device());
  const Tensor losses = at::cross_entropy_loss(logits.flatten(0, 1), labels, {}, at::Reduction::None, no_target).reshape({batch.rows, batch.columns});
  return losses.sum(1) / labels.ne(no_target).reshape({batch.rows, batch.columns}).sum(1).clamp_min(1);
}

namespace {

constexpr std::int64_t criteria_batch_tokens = 1024;  // of text: their logits and gradients are in memory as a whole

std::string criteria_tap(std::size_t layer, const char* what) { return str("layer.", layer, ".", what); }

TapMap criteria_taps(const Transformer& model) {
  TapMap taps;
  for (std::size_t i = 0; i < model.blocks.size(); ++i) {
    taps.request(criteria_tap(i, "ffn"));
    taps.request(criteria_tap(i, "context"));
  }
  return taps;
}

UnitScores criteria_zeros(const Transformer& model) {
  UnitScores scores;
  for (const Block& block : model.blocks) {
    scores.ffn.push_back(at::zeros({block.mlp.down.in_features()}, at::kDouble));
    scores.heads.push_back(at::zeros({block.attention.heads}, at::kDouble));
  }
  return scores;
}

// Puts back which parameters want gradients, on every way out.
class GradientFlags {
 public:
  explicit GradientFlags(Transformer& model) {
    for (const NamedParameter& parameter : model.parameters()) flags_.emplace_back(*parameter.value, parameter.value->requires_grad());
    for (auto& [tensor, flag] : flags_) tensor.set_requires_grad(false);
  }
  ~GradientFlags() {
    for (auto& [tensor, flag] : flags_) tensor.set_requires_grad(flag);
  }
  GradientFlags(const GradientFlags&) = delete;
  GradientFlags& operator=(const GradientFlags&) = delete;

 private:
  std::vector<std::pair<Tensor, bool>> flags_;
};

// Gate of unit u: activations times g_u, g_u = 1. d loss_b / d g_u = sum over tokens (and head dimensions) of act * grad; its
// mean square over examples is the diagonal of the empirical Fisher information of the gates: the second-order estimate of
// the loss when the unit is removed (Molchanov et al. 2019). Comparable across layers.
template <class Fold>
UnitScores criteria_gates(Transformer& model, const std::vector<TokenBatch>& batches, const Fold& fold) {
  UnitScores scores = criteria_zeros(model);
  const GradientFlags restore(model);
  // A graph through all layers needs one parameter below them that wants a gradient; none is ever computed for it.
  model.blocks.at(0).attention.value.weight.set_requires_grad(true);
  const std::size_t layers = model.blocks.size();
  double examples = 0;
  std::int64_t total = 0, done = 0;
  for (const TokenBatch& batch : batches) total += batch.rows;
  Progress progress("importance", total, "example");
  for (const TokenBatch& batch : batches) {
    const at::AutoGradMode gradients(true);
    const ModelInput input = to_input(batch, model.device());
    TapMap taps = criteria_taps(model);
    const Tensor loss = example_losses(model.forward(input, &taps), batch).sum();  // examples do not meet: each keeps its own gradient
    std::vector<Tensor> acts;
    for (std::size_t i = 0; i < layers; ++i) {
      acts.push_back(taps.at(criteria_tap(i, "ffn")));
      acts.push_back(taps.at(criteria_tap(i, "context")));
    }
    const auto grads = torch::autograd::grad({loss}, acts);
    const at::NoGradGuard no_grad;
    for (std::size_t i = 0; i < layers; ++i) {
      const Tensor ffn = (acts[2 * i].detach() * grads[2 * i]).sum(1);                                                    // [B,f]
      const Tensor heads = (acts[2 * i + 1].detach() * grads[2 * i + 1]).sum(1).unflatten(-1, {model.blocks[i].attention.heads, -1}).sum(-1);  // [B,H]
      scores.ffn[i] += fold(ffn.to(at::kDouble)).sum(0).cpu();
      scores.heads[i] += fold(heads.to(at::kDouble)).sum(0).cpu();
    }
    examples += static_cast<double>(batch.rows);
    progress.update(done += batch.rows);
  }
  progress.finish();
  for (std::size_t i = 0; i < layers; ++i) {
    scores.ffn[i] /= examples;
    scores.heads[i] /= examples;
  }
  return scores;
}

UnitScores criteria_taylor(Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t) {
  return criteria_gates(model, batches, [](const Tensor& gradients) { return gradients.square(); });
}

// The first-order estimate itself: mean magnitude of the change of an example's loss (Michel et al. 2019).
UnitScores criteria_taylor_abs(Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t) {
  return criteria_gates(model, batches, [](const Tensor& gradients) { return gradients.abs(); });
}

Tensor criteria_row_squares(const Linear& linear) {
  if (!linear.weight.defined()) return {};
  Tensor out = linear.weight.detach().to(at::kDouble).square().sum(1);
  if (linear.bias.defined()) out += linear.bias.detach().to(at::kDouble).square();
  return out.cpu();
}
Tensor criteria_column_squares(const Linear& linear) { return linear.weight.detach().to(at::kDouble).square().sum(0).cpu(); }

// L2 norm over all weights that go with a unit: rows of gate and up, column of down; rows of query, columns of output.
// Keys and values of grouped queries belong to the group and are left out.
UnitScores criteria_magnitude(Transformer& model, const std::vector<TokenBatch>&, std::uint64_t) {
  UnitScores scores;
  for (const Block& block : model.blocks) {
    Tensor ffn = criteria_row_squares(block.mlp.up) + criteria_column_squares(block.mlp.down);
    if (block.mlp.gate.weight.defined()) ffn += criteria_row_squares(block.mlp.gate);
    const Attention& a = block.attention;
    Tensor heads = (criteria_row_squares(a.query) + criteria_column_squares(a.output)).unflatten(0, {a.heads, a.head_dim}).sum(1);
    if (a.kv_heads == a.heads) heads += (criteria_row_squares(a.key) + criteria_row_squares(a.value)).unflatten(0, {a.heads, a.head_dim}).sum(1);
    scores.ffn.push_back(ffn.sqrt());
    scores.heads.push_back(heads.sqrt());
  }
  return scores;
}

// Calls visit(layer, "ffn" or "context" values of the valid tokens of one sequence after the other [B,T,w], valid [B,T]).
template <class Visit>
void criteria_walk(const Transformer& model, const std::vector<TokenBatch>& batches, const Visit& visit) {
  const at::NoGradGuard no_grad;
  for (const TokenBatch& batch : batches) {
    const ModelInput input = to_input(batch, model.device());
    TapMap taps = criteria_taps(model);
    model.hidden(input, &taps);
    const Tensor valid = valid_tokens(input);
    for (std::size_t i = 0; i < model.blocks.size(); ++i) visit(i, taps.at(criteria_tap(i, "ffn")), taps.at(criteria_tap(i, "context")), valid);
  }
}

// Minitron (Muralidharan et al. 2024): sqrt of the sum over sequences of (mean over tokens of |x|)^2, of a head the L2 norm
// over its dimensions.
UnitScores criteria_activation(Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t) {
  UnitScores scores = criteria_zeros(model);
  criteria_walk(model, batches, [&](std::size_t i, const Tensor& ffn, const Tensor& context, const Tensor& valid) {
    const Tensor weight = valid.to(at::kFloat).unsqueeze(-1), count = weight.sum(1);
    const Tensor norms = context.to(at::kFloat).unflatten(-1, {model.blocks[i].attention.heads, -1}).norm(2, -1);
    scores.ffn[i] += ((ffn.to(at::kFloat).abs() * weight).sum(1) / count).to(at::kDouble).square().sum(0).cpu();
    scores.heads[i] += ((norms * weight).sum(1) / count).to(at::kDouble).square().sum(0).cpu();
  });
  for (Tensor* score : {scores.ffn.data(), scores.heads.data()})
    for (std::size_t i = 0; i < model.blocks.size(); ++i) score[i].sqrt_();
  return scores;
}

// FLAP (An et al. 2024): variance of the unit's activation over tokens times the squared norm of the weights that read it.
UnitScores criteria_flap(Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t) {
  const std::size_t layers = model.blocks.size();
  std::vector<std::array<Tensor, 2>> sums(layers), squares(layers);
  double count = 0;
  criteria_walk(model, batches, [&](std::size_t i, const Tensor& ffn, const Tensor& context, const Tensor& valid) {
    const Tensor weight = valid.to(at::kDouble).unsqueeze(-1);
    if (i == 0) count += weight.sum().item<double>();
    const std::array<Tensor, 2> values{ffn, context};
    for (std::size_t k = 0; k < 2; ++k) {
      const Tensor x = values[k].to(at::kDouble) * weight;
      const Tensor sum = x.sum(at::IntArrayRef{0, 1}), square = x.square().sum(at::IntArrayRef{0, 1});
      sums[i][k] = sums[i][k].defined() ? sums[i][k] + sum : sum;
      squares[i][k] = squares[i][k].defined() ? squares[i][k] + square : square;
    }
  });
  UnitScores scores;
  for (std::size_t i = 0; i < layers; ++i) {
    const auto variance = [&](std::size_t k) { return (squares[i][k] / count - (sums[i][k] / count).square()).clamp_min(0).cpu(); };
    scores.ffn.push_back(variance(0) * criteria_column_squares(model.blocks[i].mlp.down));
    scores.heads.push_back((variance(1) * criteria_column_squares(model.blocks[i].attention.output)).unflatten(0, {model.blocks[i].attention.heads, -1}).sum(1));
  }
  return scores;
}

// Optimal brain surgeon for units: the error of the output or down projection when the unit goes and the others make up for it,
// tr(W_u ([C^-1]_uu)^-1 W_u') with C the second moments of the projection's inputs, ridge 1e-2 of their mean diagonal.
UnitScores criteria_obs(Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t) {
  UnitScores scores = criteria_zeros(model);
  const auto layers = static_cast<std::int64_t>(model.blocks.size());
  const std::int64_t f = model.config().ffn, inner = model.config().heads * model.config().head_dim;
  const std::int64_t a_pass = std::clamp<std::int64_t>((std::int64_t{1} << 30) / (8 * (f * f + inner * inner)), 1, layers);
  const at::NoGradGuard no_grad;
  for (std::int64_t begin = 0; begin < layers; begin += a_pass) {
    const std::int64_t end = std::min(layers, begin + a_pass);
    std::vector<std::array<Tensor, 2>> moments(static_cast<std::size_t>(layers));
    double count = 0;
    criteria_walk(model, batches, [&](std::size_t i, const Tensor& ffn, const Tensor& context, const Tensor& valid) {
      if (i == 0) count += valid.sum().item<double>();
      if (static_cast<std::int64_t>(i) < begin || static_cast<std::int64_t>(i) >= end) return;
      const Tensor rows = valid.flatten().nonzero().squeeze(-1);
      const std::array<Tensor, 2> values{ffn, context};
      for (std::size_t k = 0; k < 2; ++k) {
        const Tensor x = values[k].flatten(0, 1).index_select(0, rows).to(at::kFloat);
        const Tensor product = at::mm(x.t(), x).to(at::kDouble);
        moments[i][k] = moments[i][k].defined() ? moments[i][k].add_(product) : product;
      }
    });
    for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i) {
      const Block& block = model.blocks[i];
      for (std::size_t k = 0; k < 2; ++k) {
        Tensor c = moments[i][k] / count;
        c.diagonal().add_(std::max(1e-2 * c.diagonal().mean().item<double>(), 1e-30));
        const Tensor inverse = at::cholesky_inverse(at::linalg_cholesky(c)).cpu();
        if (k == 0) {
          scores.ffn[i] = criteria_column_squares(block.mlp.down) / inverse.diagonal();
          continue;
        }
        const Tensor weight = block.attention.output.weight.detach().to(at::kCPU, at::kDouble);
        const std::int64_t hd = block.attention.head_dim;
        for (std::int64_t h = 0; h < block.attention.heads; ++h) {
          const Tensor part = weight.slice(1, h * hd, (h + 1) * hd), own = inverse.slice(0, h * hd, (h + 1) * hd).slice(1, h * hd, (h + 1) * hd);
          scores.heads[i][h] = (part.t() * at::linalg_solve(own, part.t())).sum();
        }
      }
    }
  }
  return scores;
}

UnitScores criteria_random(Transformer& model, const std::vector<TokenBatch>&, std::uint64_t seed) {
  UnitScores scores = criteria_zeros(model);
  for (std::size_t i = 0; i < model.blocks.size(); ++i) {
    const auto fill = [&](Tensor& into, const char* what) {
      const CounterRandom random(seed, str("prune/random/", what, "/", i));
      for (std::int64_t u = 0; u < into.numel(); ++u) into.data_ptr<double>()[u] = random.uniform(static_cast<std::uint64_t>(u));
    };
    fill(scores.ffn[i], "ffn");
    fill(scores.heads[i], "heads");
  }
  return scores;
}

constexpr std::array<Criterion, 7> criteria_table{{
    {"taylor", "first-order Taylor: mean square of the loss gradient at a gate on the unit (empirical Fisher)", true, true, criteria_taylor, channels_taylor},
    {"taylor_abs", "first-order Taylor: mean magnitude of the same gradient", true, true, criteria_taylor_abs, channels_taylor_abs},
    {"magnitude", "L2 norm of the unit's weights", false, false, criteria_magnitude, channels_magnitude},
    {"activation_norm", "mean activation of the unit, L2 over sequences (Minitron)", true, false, criteria_activation, channels_activation},
    {"flap", "variance of the activation times the squared norm of the weights that read it (FLAP)", true, false, criteria_flap, channels_flap},
    {"obs", "error of the projection behind the unit when the other units make up for it: goes with compensate", true, false, criteria_obs, nullptr},
    {"random", "a seeded draw: the control that every other criterion must beat", false, false, criteria_random, channels_random},
}};

}  // namespace

std::span<const Criterion> criteria() { return criteria_table; }

const Criterion* find_criterion(std::string_view name) {
  for (const Criterion& row : criteria_table)
    if (row.name == name) return &row;
  return nullptr;
}

std::vector<std::string> criterion_names() {
  std::vector<std::string> names;
  for (const Criterion& row : criteria_table) names.emplace_back(row.name);
  return names;
}

std::vector<std::string> channel_criterion_names() {
  std::vector<std::string> names;
  for (const Criterion& row : criteria_table)
    if (row.channels) names.emplace_back(row.name);
  return names;
}

void check_criterion_loss(const Criterion& criterion, const ModelConfig& config) {
  if (!criterion.needs_gradients || !config.family->encoder || config.is_classifier()) return;
  std::vector<std::string> others;
  for (const Criterion& row : criteria_table)
    if (!row.needs_gradients) others.emplace_back(row.name);
  throw Error(str("the criterion ", criterion.name, " needs gradients of a loss, and an encoder without classes has none")).at("criterion").given(std::string(criterion.name)).allowed(join(others, ", "));
}

namespace {

void criteria_check(const Criterion& criterion, Transformer& model, const std::vector<TokenBatch>& batches) {
  if (criterion.needs_data && batches.empty()) throw Error(str("the criterion ", criterion.name, " needs data to measure on, and there is none")).hint("give training or calibration data, or use the criterion magnitude");
  check_criterion_loss(criterion, model.config());
  if (criterion.needs_gradients) {
    for (const Linear* linear : model.linears())
      if (linear->transform || linear->input_transform)
        throw Error(str("the criterion ", criterion.name, " needs gradients, and the model is already quantized or masked")).at(linear->name).hint("prune before quantizing");
  }
}

}  // namespace

UnitScores measure_units(const Criterion& criterion, Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t seed) {
  criteria_check(criterion, model, batches);
  return criterion.measure(model, batches, seed);
}

Tensor measure_channels(const Criterion& criterion, Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t seed) {
  if (!criterion.channels) throw std::logic_error(str("measure_channels: ", criterion.name, " measures none"));
  criteria_check(criterion, model, batches);
  return criterion.channels(model, batches, seed);
}

std::vector<TokenBatch> measuring_batches(const TaskData& data, std::int64_t samples, std::uint64_t seed, std::int64_t batch_size) {
  std::vector<TokenBatch> batches;
  if (data.kind == TaskData::Kind::classification) {
    // A seeded subset, then in order of length so that little is padding.
    const auto count = static_cast<std::int64_t>(data.train.ids.size());
    std::vector<std::int64_t> chosen = CounterRandom(seed, "prune/samples").permutation(count);
    chosen.resize(static_cast<std::size_t>(std::min(samples, count)));
    std::sort(chosen.begin(), chosen.end());
    TokenizedExamples subset;
    for (const std::int64_t i : chosen) {
      subset.ids.push_back(data.train.ids[static_cast<std::size_t>(i)]);
      subset.labels.push_back(data.train.labels[static_cast<std::size_t>(i)]);
    }
    if (subset.ids.empty()) return batches;
    batches = ClassificationBatches(subset, batch_size, 0, seed, padding_id(data)).evaluation(batch_size);
    for (TokenBatch& batch : batches)
      for (std::int64_t& example : batch.examples) example = chosen.at(static_cast<std::size_t>(example));
    return batches;
  }
  const std::int64_t count = std::min<std::int64_t>(samples, static_cast<std::int64_t>(data.calibration.size()));
  if (count > 0) batch_size = std::clamp<std::int64_t>(criteria_batch_tokens / std::max<std::int64_t>(1, static_cast<std::int64_t>(data.calibration.front().size())), 1, batch_size);
  for (std::int64_t begin = 0; begin < count; begin += batch_size) {
    TokenBatch batch;
    batch.rows = std::min(batch_size, count - begin);
    batch.columns = static_cast<std::int64_t>(data.calibration[static_cast<std::size_t>(begin)].size());
    for (std::int64_t i = begin; i < begin + batch.rows; ++i) {
      const std::vector<std::int64_t>& window = data.calibration[static_cast<std::size_t>(i)];
      if (static_cast<std::int64_t>(window.size()) != batch.columns) throw std::logic_error("calibration windows must be equally long");
      batch.ids.insert(batch.ids.end(), window.begin(), window.end());
      batch.lengths.push_back(batch.columns);
      batch.examples.push_back(i);
    }
    batches.push_back(std::move(batch));
  }
  return batches;
}

std::vector<double> block_influence(const Transformer& model, const std::vector<TokenBatch>& batches) {
  const at::NoGradGuard no_grad;
  if (batches.empty()) throw Error("block influence needs data to measure on, and there is none").hint("give training or calibration data");
  std::vector<double> sums(model.blocks.size(), 0);
  double count = 0;
  for (const TokenBatch& batch : batches) {
    const ModelInput input = to_input(batch, model.device());
    TapMap taps;
    for (std::size_t i = 0; i < sums.size(); ++i) {
      taps.request(criteria_tap(i, "input"));
      taps.request(criteria_tap(i, "output"));
    }
    model.hidden(input, &taps);
    const Tensor valid = valid_tokens(input);
    count += valid.sum().item<double>();
    for (std::size_t i = 0; i < sums.size(); ++i) {
      const Tensor cosine = at::cosine_similarity(taps.at(criteria_tap(i, "input")).to(at::kFloat), taps.at(criteria_tap(i, "output")).to(at::kFloat), -1, 1e-8);
      sums[i] += (cosine.to(at::kDouble) * valid).sum().item<double>();
    }
  }
  for (double& sum : sums) sum = 1 - sum / count;
  return sums;
}

}  // namespace kompakt
