// Structured pruning: the plan of counts, the choice by score, the cut, the refit.
#include "prune/structured.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <numeric>
#include <stdexcept>

#include "core/error.h"
#include "core/log.h"
#include "core/text.h"
#include "model/families.h"
#include "model/invariance.h"
#include "train/teacher.h"

namespace kompakt {
namespace {

using at::Tensor;

constexpr double structured_share_slack = 0.005;

std::optional<std::int64_t> structured_count(std::int64_t all, double share) {
  const auto count = static_cast<std::int64_t>(std::llround(share * static_cast<double>(all)));
  if (count < 1 || std::abs(share - static_cast<double>(count) / static_cast<double>(all)) > structured_share_slack) return std::nullopt;
  return count;
}

// The `count` best of `scores`, as rising numbers; equal scores: the lower number stays.
std::vector<std::int64_t> structured_best(const std::vector<double>& scores, std::int64_t count) {
  std::vector<std::int64_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return scores[static_cast<std::size_t>(a)] > scores[static_cast<std::size_t>(b)]; });
  order.resize(static_cast<std::size_t>(count));
  std::sort(order.begin(), order.end());
  return order;
}

std::vector<double> structured_values(const Tensor& scores) {
  const Tensor flat = scores.to(at::kCPU, at::kDouble).contiguous();
  if (!flat.isfinite().all().item<bool>()) throw Error("the importance of some units is not finite").hint("check the model for NaN or infinite activations on the training data");
  return {flat.data_ptr<double>(), flat.data_ptr<double>() + flat.numel()};
}

Tensor structured_index(const std::vector<std::int64_t>& list, const Tensor& like) { return at::tensor(at::ArrayRef<std::int64_t>(list), at::kLong).to(like.device()); }

// Numbers of heads -> numbers of the rows of their dimensions.
std::vector<std::int64_t> structured_dimensions(const std::vector<std::int64_t>& heads, std::int64_t head_dim) {
  std::vector<std::int64_t> out;
  for (const std::int64_t head : heads)
    for (std::int64_t i = 0; i < head_dim; ++i) out.push_back(head * head_dim + i);
  return out;
}

void structured_check_plain(const Linear& linear) {
  if (linear.transform || linear.input_transform) throw std::logic_error(str("cannot cut ", linear.name, ": a weight transform is attached"));
}

void structured_keep_rows(Linear& linear, const std::vector<std::int64_t>& rows) {
  if (!linear.weight.defined()) return;
  structured_check_plain(linear);
  if (static_cast<std::int64_t>(rows.size()) == linear.out_features()) return;
  linear.weight = linear.weight.detach().index_select(0, structured_index(rows, linear.weight));
  if (linear.bias.defined()) linear.bias = linear.bias.detach().index_select(0, structured_index(rows, linear.bias));
}

void structured_keep_columns(Linear& linear, const std::vector<std::int64_t>& columns) {
  structured_check_plain(linear);
  if (static_cast<std::int64_t>(columns.size()) == linear.in_features()) return;
  linear.weight = linear.weight.detach().index_select(1, structured_index(columns, linear.weight)).contiguous();
}

// A mean over the units that stay: with this gain, units that were zero are gone without a trace.
void structured_keep_gains(Norm& norm, const std::vector<std::int64_t>& units) {
  if (!norm.weight.defined() || static_cast<std::int64_t>(units.size()) == norm.weight.numel()) return;
  const double share = static_cast<double>(units.size()) / static_cast<double>(norm.weight.numel()), shift = norm.plus_one ? 1 : 0;
  norm.weight = (norm.weight.detach().index_select(0, structured_index(units, norm.weight)) + shift) / std::sqrt(share) - shift;
}

void structured_check_kept(const Transformer& model, const std::vector<KeptUnits>& kept) {
  if (kept.size() != model.blocks.size()) throw std::logic_error("cut_units: one entry a layer is needed");
  for (const KeptUnits& units : kept) {
    if (units.ffn.empty() || units.heads.empty() || units.kv_heads.empty()) throw std::logic_error("cut_units: nothing would stay");
    if (units.ffn.size() != kept[0].ffn.size() || units.heads.size() != kept[0].heads.size() || units.kv_heads.size() != kept[0].kv_heads.size())
      throw std::logic_error("cut_units: layers of different shape");
    // The head with number i reads the key/value head i / (heads / kv_heads), before and after the cut.
    const auto group = static_cast<std::int64_t>(units.heads.size() / units.kv_heads.size());
    if (units.heads.size() % units.kv_heads.size() != 0) throw std::logic_error("cut_units: query heads do not divide among the key/value heads");
    const std::int64_t old_group = model.config().heads / model.config().kv_heads;
    for (std::size_t i = 0; i < units.heads.size(); ++i)
      if (units.heads[i] / old_group != units.kv_heads[i / static_cast<std::size_t>(group)]) throw std::logic_error("cut_units: a query head lost its key/value head");
  }
}

// Means of x and x x' over the valid tokens, float64.
struct StructuredMoments {
  Tensor second, sum;
  double count = 0;
  void add(const Tensor& x, const Tensor& valid) {
    const Tensor rows = x.flatten(0, 1).index_select(0, valid.flatten().nonzero().squeeze(-1)).to(at::kFloat);
    // The product of one batch in float32, the sum over batches in float64: exact enough, and fast.
    const Tensor product = at::mm(rows.t(), rows).to(at::kDouble), total = rows.to(at::kDouble).sum(0);
    second = second.defined() ? second.add_(product) : product;
    sum = sum.defined() ? sum.add_(total) : total;
    count += static_cast<double>(rows.size(0));
  }
};

}  // namespace

HeadPlan plan_heads(std::int64_t heads, std::int64_t kv_heads, double share) {
  if (share >= 1) return {heads, kv_heads};
  const std::int64_t group = heads / kv_heads;
  if (const auto groups = structured_count(kv_heads, share)) return {*groups * group, *groups};
  if (const auto queries = structured_count(group, share)) return {*queries * kv_heads, kv_heads};
  std::vector<std::int64_t> counts;
  for (std::int64_t n = 1; n <= kv_heads; ++n) counts.push_back(n * group);
  for (std::int64_t n = 1; n <= group; ++n) counts.push_back(n * kv_heads);
  std::sort(counts.begin(), counts.end(), [&](std::int64_t a, std::int64_t b) {
    const auto gap = [&](std::int64_t n) { return std::abs(share - static_cast<double>(n) / static_cast<double>(heads)); };
    return gap(a) != gap(b) ? gap(a) < gap(b) : a > b;
  });
  counts.erase(std::unique(counts.begin(), counts.end()), counts.end());
  std::vector<std::string> nearest;
  for (std::size_t i = 0; i < counts.size() && i < 2; ++i) nearest.push_back(str(fixed(static_cast<double>(counts[i]) / static_cast<double>(heads), 4), " (", counts[i], " heads)"));
  std::string shape = str(heads, " attention heads");
  if (group > 1) shape += str(" in ", kv_heads, " groups of ", group, ", of which only whole groups, or equally many heads of each, can go");
  throw Error(str("a share of ", shortest(share), " is no valid number of ", shape)).at("structured.heads").given(shortest(share)).allowed(str("nearest: ", join(nearest, " or ")));
}

std::int64_t plan_width(std::int64_t width, double share, std::int64_t multiple, const WidthWords& words) {
  if (share >= 1) return width;
  const auto round_to = [&](double x) { return static_cast<std::int64_t>(std::llround(x / static_cast<double>(multiple))) * multiple; };
  const std::int64_t kept = round_to(share * static_cast<double>(width));
  if (kept >= 1 && kept < width) return kept;
  const std::int64_t largest = (width - 1) / multiple * multiple, nearest = kept < 1 ? std::min(multiple, largest) : largest;
  const std::string what = str("would ", kept < 1 ? "leave" : "remove", " no ", words.unit);
  Error error(str("a share of ", shortest(share), " of ", width, " rounded to a multiple of ", multiple, " ", what));
  error.at(words.key).given(shortest(share));
  if (nearest >= 1) error.allowed(str("nearest: ", fixed(static_cast<double>(nearest) / static_cast<double>(width), 4), " (", nearest, " ", words.plural, ")"));
  error.hint("or choose a smaller multiple_of");
  throw error;
}

std::vector<KeptUnits> choose_units(const Transformer& model, const UnitScores& scores, std::int64_t width, const HeadPlan& plan) {
  const std::int64_t heads = model.config().heads, kv_heads = model.config().kv_heads, group = heads / kv_heads;
  std::vector<KeptUnits> kept;
  for (std::size_t layer = 0; layer < model.blocks.size(); ++layer) {
    KeptUnits units;
    units.ffn = structured_best(structured_values(scores.ffn.at(layer)), width);
    const std::vector<double> head_scores = structured_values(scores.heads.at(layer));
    std::vector<double> group_scores(static_cast<std::size_t>(kv_heads), 0);
    for (std::int64_t h = 0; h < heads; ++h) group_scores[static_cast<std::size_t>(h / group)] += head_scores[static_cast<std::size_t>(h)];
    units.kv_heads = structured_best(group_scores, plan.kv_heads);
    const std::int64_t per_group = plan.heads / plan.kv_heads;
    for (const std::int64_t kv : units.kv_heads) {
      const std::vector<double> own(head_scores.begin() + kv * group, head_scores.begin() + (kv + 1) * group);
      for (const std::int64_t h : structured_best(own, per_group)) units.heads.push_back(kv * group + h);
    }
    kept.push_back(std::move(units));
  }
  return kept;
}

void cut_units(Transformer& model, const std::vector<KeptUnits>& kept) {
  const at::NoGradGuard no_grad;
  structured_check_kept(model, kept);
  for (const Linear* linear : model.linears()) structured_check_plain(*linear);
  for (std::size_t layer = 0; layer < kept.size(); ++layer) {
    const KeptUnits& units = kept[layer];
    Mlp& mlp = model.blocks[layer].mlp;
    structured_keep_rows(mlp.gate, units.ffn);
    structured_keep_rows(mlp.up, units.ffn);
    structured_keep_columns(mlp.down, units.ffn);
    structured_keep_gains(mlp.sub_norm, units.ffn);
    Attention& attention = model.blocks[layer].attention;
    const std::vector<std::int64_t> queries = structured_dimensions(units.heads, attention.head_dim), keys = structured_dimensions(units.kv_heads, attention.head_dim);
    structured_keep_rows(attention.query, queries);
    structured_keep_rows(attention.key, keys);
    structured_keep_rows(attention.value, keys);
    structured_keep_columns(attention.output, queries);
    structured_keep_gains(attention.sub_norm, queries);
    attention.heads = static_cast<std::int64_t>(units.heads.size());
    attention.kv_heads = static_cast<std::int64_t>(units.kv_heads.size());
  }
  ModelConfig& config = model.config();  // head_dim stays: hidden / heads no longer gives it
  config.ffn = static_cast<std::int64_t>(kept[0].ffn.size());
  config.heads = static_cast<std::int64_t>(kept[0].heads.size());
  config.kv_heads = static_cast<std::int64_t>(kept[0].kv_heads.size());
}

void cut_hidden(Transformer& model, const std::vector<std::int64_t>& kept) {
  const at::NoGradGuard no_grad;
  ModelConfig& config = model.config();
  const std::int64_t width = config.hidden, count = static_cast<std::int64_t>(kept.size());
  if (config.family->encoder || config.family->post_norm) throw std::logic_error("cut_hidden: a stream with norms behind the sums");
  if (kept.empty() || kept.front() < 0 || kept.back() >= width || std::adjacent_find(kept.begin(), kept.end(), std::greater_equal<>()) != kept.end()) throw std::logic_error("cut_hidden: channels out of order or of range");
  if (model.tokens.compacted() || model.tokens.transform) throw std::logic_error("cut_hidden: the embedding is compacted or transformed");
  for (const Linear* linear : model.linears()) structured_check_plain(*linear);
  if (count == width) return;
  const at::Tensor index = structured_index(kept, model.tokens.weight);
  const auto norm = [&](Norm& n) {
    if (n.weight.defined()) n.weight = n.weight.detach().index_select(0, index);
  };
  model.tokens.weight = model.tokens.weight.detach().index_select(1, index).contiguous();
  for (Block& block : model.blocks) {
    for (Norm* n : {&block.attention_norm, &block.mlp_norm, &block.post_attention_norm, &block.post_mlp_norm}) norm(*n);
    for (Linear* reader : {&block.attention.query, &block.attention.key, &block.attention.value, &block.mlp.gate, &block.mlp.up})
      if (reader->weight.defined()) structured_keep_columns(*reader, kept);
    for (Linear* writer : {&block.attention.output, &block.mlp.down}) structured_keep_rows(*writer, kept);
  }
  norm(model.final_norm);
  if (model.lm_head.weight.defined()) structured_keep_columns(model.lm_head, kept);
  config.hidden = count;
  if (config.embedding_scale == 1) return;
  const double ratio = std::sqrt(static_cast<double>(width) / static_cast<double>(count));
  config.embedding_scale /= ratio;
  model.tokens.weight = model.tokens.weight * ratio;
  if (!model.lm_head.weight.defined()) set_norm_gain(model.final_norm, norm_gain(model.final_norm) / ratio);
}

Refit refit_linear(const Linear& linear, const std::vector<std::int64_t>& kept, const Tensor& second, const Tensor& mean, double ridge) {
  const at::NoGradGuard no_grad;
  structured_check_plain(linear);
  const std::int64_t width = linear.in_features();
  std::vector<bool> stays(static_cast<std::size_t>(width), false);
  for (const std::int64_t i : kept) stays.at(static_cast<std::size_t>(i)) = true;
  std::vector<std::int64_t> gone;
  for (std::int64_t i = 0; i < width; ++i)
    if (!stays[static_cast<std::size_t>(i)]) gone.push_back(i);
  const Tensor s = structured_index(kept, second), p = structured_index(gone, second);
  const Tensor weight = linear.weight.detach().to(second.device(), at::kDouble);
  const Tensor weight_s = weight.index_select(1, s), weight_p = weight.index_select(1, p);
  const bool biased = linear.bias.defined();
  const Tensor c = biased ? second - at::outer(mean, mean) : second;
  Tensor css = c.index_select(0, s).index_select(1, s).contiguous();
  const Tensor cps = c.index_select(0, p).index_select(1, s);
  const double scale = std::max(css.diagonal().mean().item<double>(), 1e-30);
  // Cholesky needs a positive definite matrix: where the asked ridge is too small for that, more of it.
  Tensor solution;
  for (double extra = ridge;; extra = std::max(extra * 10, 1e-12)) {
    Tensor damped = css.clone();
    damped.diagonal().add_(extra * scale);
    const auto [factor, failed] = at::linalg_cholesky_ex(damped);
    if (failed.item<int>() == 0) {
      solution = at::cholesky_solve(cps.t(), factor).t();  // C_PS (C_SS + lambda)^-1
      break;
    }
    if (extra > 1) throw std::logic_error(str("refit of ", linear.name, ": the second moments are not positive semidefinite"));
  }
  const Tensor refitted = weight_s + at::mm(weight_p, solution);
  Refit out;
  out.weight = refitted.to(linear.weight.device(), linear.weight.scalar_type()).contiguous();
  if (biased) out.bias = (linear.bias.detach().to(second.device(), at::kDouble) + at::mv(weight, mean) - at::mv(refitted, mean.index_select(0, s))).to(linear.bias.device(), linear.bias.scalar_type());
  return out;
}

void cut_units_with_refit(Transformer& model, const std::vector<KeptUnits>& kept, const std::vector<TokenBatch>& batches, double ridge) {
  const at::NoGradGuard no_grad;
  structured_check_kept(model, kept);
  if (batches.empty()) throw Error("the least-squares refit needs data, and there is none").at("compensate").hint("give training or calibration data, or set compensate: none");
  const auto layers = static_cast<std::int64_t>(model.blocks.size());
  // Second moments of wide models do not fit in memory for all layers at once: as many passes over the data as it takes.
  const std::int64_t f = model.config().ffn, inner = model.config().heads * model.config().head_dim;
  const std::int64_t a_pass = std::clamp<std::int64_t>((std::int64_t{1} << 30) / (8 * (f * f + inner * inner)), 1, layers);
  std::vector<std::array<Refit, 2>> refits(static_cast<std::size_t>(layers));
  double tokens = 0;
  for (std::int64_t begin = 0; begin < layers; begin += a_pass) {
    const std::int64_t end = std::min(layers, begin + a_pass);
    std::vector<std::array<StructuredMoments, 2>> moments(static_cast<std::size_t>(end - begin));
    for (const TokenBatch& batch : batches) {
      const ModelInput input = to_input(batch, model.device());
      TapMap taps;
      for (std::int64_t i = begin; i < end; ++i) {
        taps.request(str("layer.", i, ".ffn"));
        taps.request(str("layer.", i, ".context"));
      }
      model.hidden(input, &taps);
      const Tensor valid = input.lengths.defined() ? at::arange(batch.columns, input.lengths.options()).unsqueeze(0) < input.lengths.unsqueeze(1) : at::ones_like(input.ids, at::kBool);
      for (std::int64_t i = begin; i < end; ++i) {
        moments[static_cast<std::size_t>(i - begin)][0].add(taps.at(str("layer.", i, ".ffn")), valid);
        moments[static_cast<std::size_t>(i - begin)][1].add(taps.at(str("layer.", i, ".context")), valid);
      }
    }
    for (std::int64_t i = begin; i < end; ++i) {
      const auto at_layer = static_cast<std::size_t>(i);
      const Block& block = model.blocks[at_layer];
      const std::vector<std::int64_t> dimensions = structured_dimensions(kept[at_layer].heads, block.attention.head_dim);
      for (std::size_t k = 0; k < 2; ++k) {
        const StructuredMoments& m = moments[static_cast<std::size_t>(i - begin)][k];
        const std::vector<std::int64_t>& stays = k == 0 ? kept[at_layer].ffn : dimensions;
        const Linear& linear = k == 0 ? block.mlp.down : block.attention.output;
        tokens = m.count;
        if (static_cast<std::int64_t>(stays.size()) < linear.in_features()) refits[at_layer][k] = refit_linear(linear, stays, m.second / m.count, m.sum / m.count, ridge);
      }
    }
  }
  if (tokens < static_cast<double>(f)) log_warning(str("the least-squares refit of ", f, " neurons saw only ", static_cast<std::int64_t>(tokens), " tokens: more samples would make it better"));
  cut_units(model, kept);
  for (std::int64_t i = 0; i < layers; ++i) {
    Block& block = model.blocks[static_cast<std::size_t>(i)];
    for (std::size_t k = 0; k < 2; ++k) {
      Refit& refit = refits[static_cast<std::size_t>(i)][k];
      Linear& linear = k == 0 ? block.mlp.down : block.attention.output;
      if (refit.weight.defined()) linear.weight = refit.weight;
      if (refit.bias.defined()) linear.bias = refit.bias;
    }
  }
}

}  // namespace kompakt
