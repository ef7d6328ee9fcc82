#include "prune/channels.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <initializer_list>
#include <numeric>
#include <stdexcept>

#include "core/error.h"
#include "core/log.h"
#include "core/random.h"
#include "core/text.h"
#include "model/families.h"
#include "model/invariance.h"
#include "model/parallel.h"
#include "train/calibration.h"
#include "train/inverse_factor.h"
#include "train/teacher.h"

namespace kompakt {
namespace {

using at::Tensor;

// Calls visit(site, y [B,T,d]) for what every norm puts out: 2 i in front of the attention of block i, 2 i + 1 in front of its MLP,
// twice the layers in front of the head. Returns the last one.
template <class Visit>
Tensor channels_forward(const Transformer& model, const ModelInput& input, Tensor x, const Visit& visit) {
  const auto layers = static_cast<std::int64_t>(model.blocks.size());
  for (std::int64_t i = 0; i < layers; ++i) {
    const Tensor attention = model.attention_input(i, x);
    visit(2 * i, attention);
    const Tensor h = model.after_attention(i, x, model.attention_context(i, attention, input));
    const Tensor mlp = model.mlp_input(i, h);
    visit(2 * i + 1, mlp);
    x = model.after_mlp(i, h, model.mlp_inner(i, mlp));
  }
  const Tensor last = model.final_norm.forward(x);
  visit(2 * layers, last);
  return last;
}

// The same over batches, without gradients: visit(site, y of one batch [B,T,d], valid [B,T]).
template <class Visit>
void channels_walk(const Transformer& model, const std::vector<TokenBatch>& batches, const Visit& visit) {
  const at::NoGradGuard no_grad;
  std::int64_t total = 0, done = 0;
  for (const TokenBatch& batch : batches) total += batch.rows;
  Progress progress("importance of channels", total, "sequence");
  for (const TokenBatch& batch : batches) {
    const ModelInput input = to_input(batch, model.device());
    const Tensor valid = valid_tokens(input);
    channels_forward(model, input, model.embed(input), [&](std::int64_t site, const Tensor& y) { visit(site, y, valid); });
    progress.update(done += batch.rows);
  }
  progress.finish();
}

std::size_t channels_sites(const Transformer& model) { return 2 * model.blocks.size() + 1; }

// Sum of squares of the columns of everything that reads what the norm of a site puts out.
Tensor channels_reader_squares(const Transformer& model, std::size_t site) {
  std::vector<Tensor> weights;
  const auto add = [&](std::initializer_list<const Linear*> linears) {
    for (const Linear* linear : linears)
      if (linear->weight.defined()) weights.push_back(linear->weight);
  };
  if (site == 2 * model.blocks.size()) {
    weights.push_back(model.lm_head.weight.defined() ? model.lm_head.weight : model.tokens.weight);
  } else if (const Block& block = model.blocks[site / 2]; site % 2 == 0) {
    add({&block.attention.query, &block.attention.key, &block.attention.value});
  } else {
    add({&block.mlp.gate, &block.mlp.up});
  }
  Tensor out = at::zeros({model.config().hidden}, at::kDouble);
  for (const Tensor& weight : weights) out += weight.detach().square().sum(0, false, at::kDouble).cpu();
  return out;
}

// d loss_b / d g_c of a gate g_c = 1 on channel c behind every norm: the sum over norms and tokens of y * gradient. What a
// criterion makes of it is averaged over examples.
template <class Fold>
Tensor channels_gates(Transformer& model, const std::vector<TokenBatch>& batches, const Fold& fold) {
  Tensor scores = at::zeros({model.config().hidden}, at::kDouble);
  double examples = 0;
  std::int64_t total = 0, done = 0;
  for (const TokenBatch& batch : batches) total += batch.rows;
  Progress progress("importance of channels", total, "example");
  for (const TokenBatch& batch : batches) {
    const at::AutoGradMode gradients(true);
    const ModelInput input = to_input(batch, model.device());
    std::vector<Tensor> sites;
    // The graph begins at the embedded tokens: no gradient of a parameter is computed.
    const Tensor hidden = channels_forward(model, input, model.embed(input).detach().requires_grad_(true), [&](std::int64_t, const Tensor& y) { sites.push_back(y); });
    const Tensor loss = example_losses(model.head(hidden), batch).sum();
    const auto grads = torch::autograd::grad({loss}, sites);
    const at::NoGradGuard no_grad;
    Tensor gate;
    for (std::size_t i = 0; i < sites.size(); ++i) {
      const Tensor part = (sites[i].detach() * grads[i]).sum(1).to(at::kDouble);  // [B,d]
      gate = gate.defined() ? gate + part : part;
    }
    scores += fold(gate).sum(0).cpu();
    examples += static_cast<double>(batch.rows);
    progress.update(done += batch.rows);
  }
  progress.finish();
  return scores / examples;
}

}  // namespace

std::string hidden_obstacle(const ModelConfig& config) {
  const Family& family = *config.family;
  if (family.encoder || family.post_norm) return str("the hidden size of a ", family.name, " model is its heads times their size, and LayerNorm stands behind every sum");
  return {};
}

std::string hidden_rotation_obstacle(const ModelConfig& config, bool untie) {
  if (std::string obstacle = hidden_obstacle(config); !obstacle.empty()) return obstacle;
  const Family& family = *config.family;
  if (!family.rms_norm) return "LayerNorm subtracts the mean over channels, which a rotation of the stream does not keep";
  if (family.sandwich_norms) return str("a ", family.name, " model has norms with a weight per channel between each block and the stream, which a rotation of the stream does not pass");
  if (config.tied && !untie) return "the head shares the embedding and the final norm has a weight per channel: exact only with a head of its own";
  return {};
}

// Mean square of the gradient: the diagonal of the empirical Fisher information of the gates.
Tensor channels_taylor(Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t) {
  return channels_gates(model, batches, [](const Tensor& gradients) { return gradients.square(); });
}

Tensor channels_taylor_abs(Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t) {
  return channels_gates(model, batches, [](const Tensor& gradients) { return gradients.abs(); });
}

// L2 norm over all weights that go with a channel: embedding and head columns, reader columns with the gain in front of them,
// writer rows.
Tensor channels_magnitude(Transformer& model, const std::vector<TokenBatch>&, std::uint64_t) {
  const at::NoGradGuard no_grad;
  Tensor squares = model.tokens.weight.detach().square().sum(0, false, at::kDouble).cpu();
  for (std::size_t site = 0; site < channels_sites(model); ++site) {
    const bool head = site == 2 * model.blocks.size();
    const Norm& norm = head ? model.final_norm : site % 2 == 0 ? model.blocks[site / 2].attention_norm : model.blocks[site / 2].mlp_norm;
    if (!head || model.lm_head.weight.defined()) squares += channels_reader_squares(model, site) * norm_gain(norm).square().cpu();
  }
  for (const Block& block : model.blocks)
    for (const Linear* writer : {&block.attention.output, &block.mlp.down}) {
      squares += writer->weight.detach().square().sum(1, false, at::kDouble).cpu();
      if (writer->bias.defined()) squares += writer->bias.detach().to(at::kDouble).square().cpu();
    }
  return squares.sqrt();
}

// Minitron (Muralidharan et al. 2024): over all norms the sum of sqrt(sum over sequences of (mean over tokens of |y|)^2).
Tensor channels_activation(Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t) {
  std::vector<Tensor> sums(channels_sites(model), at::zeros({model.config().hidden}, at::kDouble));
  channels_walk(model, batches, [&](std::int64_t site, const Tensor& y, const Tensor& valid) {
    const Tensor weight = valid.to(at::kFloat).unsqueeze(-1);
    Tensor& sum = sums[static_cast<std::size_t>(site)];
    sum = sum + ((y.to(at::kFloat).abs() * weight).sum(1) / weight.sum(1)).to(at::kDouble).square().sum(0).cpu();
  });
  Tensor scores = at::zeros({model.config().hidden}, at::kDouble);
  for (const Tensor& sum : sums) scores += sum.sqrt();
  return scores;
}

// FLAP (An et al. 2024): over all norms the sum of the variance over tokens times the squared norm of the weights that read it.
Tensor channels_flap(Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t) {
  const std::size_t sites = channels_sites(model);
  std::vector<Tensor> sums(sites, at::zeros({model.config().hidden}, at::kDouble)), squares = sums;
  double count = 0;
  channels_walk(model, batches, [&](std::int64_t site, const Tensor& y, const Tensor& valid) {
    const auto at_site = static_cast<std::size_t>(site);
    if (site == 0) count += valid.sum().item<double>();
    const Tensor x = y.to(at::kDouble) * valid.to(at::kDouble).unsqueeze(-1);
    sums[at_site] = sums[at_site] + x.sum(at::IntArrayRef{0, 1}).cpu();
    squares[at_site] = squares[at_site] + x.square().sum(at::IntArrayRef{0, 1}).cpu();
  });
  Tensor scores = at::zeros({model.config().hidden}, at::kDouble);
  for (std::size_t i = 0; i < sites; ++i) scores += (squares[i] / count - (sums[i] / count).square()).clamp_min(0) * channels_reader_squares(model, i);
  return scores;
}

Tensor channels_random(Transformer& model, const std::vector<TokenBatch>&, std::uint64_t seed) {
  Tensor scores = at::zeros({model.config().hidden}, at::kDouble);
  const CounterRandom random(seed, "prune/random/hidden");
  for (std::int64_t c = 0; c < scores.numel(); ++c) scores.data_ptr<double>()[c] = random.uniform(static_cast<std::uint64_t>(c));
  return scores;
}

std::vector<std::int64_t> best_channels(const Tensor& scores, std::int64_t count) {
  const Tensor flat = scores.to(at::kCPU, at::kDouble).contiguous();
  if (!flat.isfinite().all().item<bool>()) throw Error("the importance of some channels is not finite").hint("check the model for NaN or infinite activations on the training data");
  const double* value = flat.data_ptr<double>();
  std::vector<std::int64_t> order(static_cast<std::size_t>(flat.numel()));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return value[a] > value[b]; });
  order.resize(static_cast<std::size_t>(count));
  std::sort(order.begin(), order.end());
  return order;
}

Tensor rotate_to_principal(Transformer& model, const std::vector<TokenBatch>& batches, bool untie) {
  const at::NoGradGuard no_grad;
  if (batches.empty()) throw Error("the rotation of the residual stream needs data, and there is none").at("structured.hidden_by").given("rotate").hint("give training or calibration data, or select channels: hidden_by: select, criterion: magnitude");
  if (untie && !model.lm_head.weight.defined()) untie_head(model);
  fold_norms(model);
  // Every batch alone, products in float32; their sum in float64 and in order: the same bits for any number of threads.
  constexpr std::size_t together = 8;
  Tensor whole = at::zeros({model.config().hidden, model.config().hidden}, at::kDouble);
  double rows = 0;
  std::int64_t total = 0, done = 0;
  for (const TokenBatch& batch : batches) total += batch.rows;
  Progress progress("principal channels", total, "sequence");
  for (std::size_t first = 0; first < batches.size(); first += together) {
    std::vector<Tensor> products(std::min(together, batches.size() - first));
    std::vector<double> counts(products.size(), 0);
    for_each_batch(model.device(), products.size(), [&](std::size_t k) {
      const at::NoGradGuard worker;
      const ModelInput input = to_input(batches[first + k], model.device());
      const Tensor valid = valid_tokens(input).flatten().nonzero().squeeze(-1);
      channels_forward(model, input, model.embed(input), [&](std::int64_t, const Tensor& y) {
        const Tensor x = y.flatten(0, 1).index_select(0, valid).to(at::kFloat), product = at::mm(x.t(), x);
        products[k] = products[k].defined() ? products[k] + product : product;
        counts[k] += static_cast<double>(x.size(0));
      });
    });
    for (std::size_t k = 0; k < products.size(); ++k) whole += products[k].to(at::kCPU, at::kDouble), rows += counts[k], done += batches[first + k].rows;
    progress.update(done);
  }
  progress.finish();
  whole = (whole + whole.t()) / (2 * rows);
  if (!whole.isfinite().all().item<bool>()) throw Error("the residual stream is not finite on the calibration data").hint("check the model for NaN or infinite activations");
  const SingleThread single;
  const auto [values, vectors] = at::linalg_eigh(whole);  // rising
  rotate_residual(model, vectors.flip(1).contiguous());
  return values.flip(0).clamp_min(0);
}

}  // namespace kompakt
