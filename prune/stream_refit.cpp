#include "prune/stream_refit.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <functional>
#include <stdexcept>

#include "core/error.h"
#include "core/log.h"
#include "core/system.h"
#include "core/text.h"
#include "model/families.h"
#include "model/gram_product.h"
#include "model/invariance.h"
#include "model/parallel.h"

namespace kompakt {
namespace {

using at::Tensor;

// Weighted moments of a linear's input and of what its output lacks, as means over tokens but for the two large ones.
struct StreamMoments {
  Tensor second, cross;                   // [K,K] and [N,K], sums of a z z' (on and above the diagonal) and a r z'; float32
  Tensor input_mean, residual_mean;       // [K] E[a z], [N] E[a r]; float64
  double weight_mean = 0, tokens = 0;     // E[a]
  double before = 0;                      // E[a |r|^2]

  void add(const Tensor& z, const Tensor& r, const Tensor& a) {
    const double count = static_cast<double>(z.size(0)), whole = tokens + count, keep = tokens / whole, share = 1 / whole;
    const Tensor root = a.sqrt().unsqueeze(1), weighted_z = z * root, weighted_r = r * root;
    add_gram(second, {weighted_z}, {weighted_z}, true);
    add_gram(cross, {weighted_r}, {weighted_z}, false);
    const auto mean = [&](Tensor& value, const Tensor& rows) {
      const Tensor sum = (rows * a.unsqueeze(1)).sum(0, false, at::kDouble) * share;
      value = value.defined() ? value * keep + sum : sum;
    };
    mean(input_mean, z);
    mean(residual_mean, r);
    weight_mean = weight_mean * keep + a.sum(at::kDouble).item<double>() * share;
    before = before * keep + weighted_r.square().sum(at::kDouble).item<double>() * share;
    tokens = whole;
  }
};

// W += E[a r z'] (E[a z z'] + lambda)^-1, centred where a bias takes the means.
void stream_solve(Linear& linear, const StreamMoments& moments, double ridge) {
  const bool biased = linear.bias.defined();
  Tensor s = moments.second.triu() + moments.second.triu(1).t(), c = moments.cross;
  s = s.to(at::kDouble) / moments.tokens, c = c.to(at::kDouble) / moments.tokens;
  if (biased) {
    s = s - at::outer(moments.input_mean, moments.input_mean) / moments.weight_mean;
    c = c - at::outer(moments.residual_mean, moments.input_mean) / moments.weight_mean;
  }
  const SingleThread single;
  const double scale = std::max(s.diagonal().mean().item<double>(), 1e-30);
  for (double extra = ridge;; extra = std::max(extra * 10, 1e-12)) {
    if (extra > 10) throw std::logic_error(str("refit of ", linear.name, ": the second moments are not positive semidefinite"));
    Tensor damped = s.clone();
    damped.diagonal().add_(extra * scale);
    const auto [factor, failed] = at::linalg_cholesky_ex(damped);
    if (failed.item<int>() != 0) continue;
    const Tensor change = at::cholesky_solve(c.t().contiguous(), factor).t();
    linear.weight = (linear.weight.detach().to(at::kDouble) + change).to(linear.weight.scalar_type()).contiguous();
    if (biased) linear.bias = (linear.bias.detach().to(at::kDouble) + (moments.residual_mean - at::mv(change, moments.input_mean)) / moments.weight_mean).to(linear.bias.scalar_type());
    return;
  }
}

class StreamRefit {
 public:
  StreamRefit(Transformer& cut, const Transformer& original, const std::vector<std::int64_t>& layers, const CalibrationSet& set, double ridge, const NarrowStream* narrow)
      : cut_(cut), original_(original), layers_(layers), set_(set), ridge_(ridge), narrow_(narrow), family_(*original.config().family), batches_(set.inputs.size()), student_(batches_), teacher_(batches_) {
    if (layers.size() != cut.blocks.size() || layers.empty() || !std::is_sorted(layers.begin(), layers.end()) || layers.back() >= original.config().layers) throw std::logic_error("refit_to_stream: layers of another model");
    if (!narrow) return;
    if (family_.post_norm || static_cast<std::int64_t>(narrow->channels.size()) != cut.config().hidden || narrow->before.blocks.size() != cut.blocks.size()) throw std::logic_error("refit_to_stream: channels of another model");
    channels_ = at::tensor(at::ArrayRef<std::int64_t>(narrow->channels), at::kLong).to(cut.device());
  }

  void run() {
    const at::NoGradGuard no_grad;
    const std::int64_t all = original_.config().layers, count = static_cast<std::int64_t>(layers_.size());
    Progress progress(writers() ? "least-squares refit" : "fit to the narrower stream", count, "layer");
    each([&](std::size_t b) {
      student_[b] = cut_.embed(set_.inputs[b]);
      teacher_[b] = original_.embed(set_.inputs[b]);
      for (std::int64_t layer = 0; layer < layers_[0]; ++layer) teacher_[b] = original_.block_forward(layer, teacher_[b], set_.inputs[b]);
    });
    for (std::int64_t i = 0; i < count; ++i) {
      check_interrupted();
      const std::int64_t first = layers_[static_cast<std::size_t>(i)], last = (i + 1 < count ? layers_[static_cast<std::size_t>(i) + 1] : all) - 1;
      const auto [attention, mlp] = refit_block(i, first, last);
      progress.update(i + 1, writers() ? str("error of the stream ", fixed(attention, 4), " ", fixed(mlp, 4)) : std::string());
    }
    if (narrow_) {
      std::vector<Tensor> outputs(batches_);
      // A tied head was scaled with the embedding (cut_hidden): what it reads is smaller by as much.
      const double scale = cut_.lm_head.weight.defined() ? 1 : cut_.config().embedding_scale / original_.config().embedding_scale;
      each([&](std::size_t b) { outputs[b] = original_.final_norm.forward(teacher_[b]) * scale; });
      fit_norm(cut_.final_norm, student_, outputs, {{&cut_.lm_head, &narrow_->before.lm_head}});
    }
    progress.finish();
  }

 private:
  void each(const std::function<void(std::size_t)>& work) const { for_each_batch(cut_.device(), batches_, work); }

  // Residuals are target - own output. Chunks of batches, so that products are large. Mean square of the residuals before.
  double refit(Linear& linear, const std::vector<Tensor>& inputs, const std::vector<Tensor>& targets, const std::vector<Tensor>& streams) const {
    StreamMoments moments;
    for (std::size_t first = 0; first < batches_;) {
      const std::size_t end = chunk_end(first);
      std::vector<Tensor> z(end - first), r(end - first), a(end - first);
      for_each_batch(cut_.device(), z.size(), [&](std::size_t k) {
        const std::size_t b = first + k;
        z[k] = rows(inputs[b], b), r[k] = rows(targets[b] - linear.forward(inputs[b]), b);
        const Tensor energy = rows(streams[b], b).square().mean(1);
        a[k] = weighted() ? energy.clamp_min(1e-12).reciprocal() : at::ones_like(energy);
      });
      moments.add(at::cat(z), at::cat(r), at::cat(a));
      first = end;
    }
    stream_solve(linear, moments, ridge_);
    return moments.before / static_cast<double>(linear.out_features());  // with weights: relative to the stream
  }

  Tensor rows(const Tensor& x, std::size_t b) const {
    const Tensor flat = x.reshape({-1, x.size(-1)});
    return set_.valid[b].defined() ? flat.index_select(0, set_.valid[b]) : flat;
  }
  bool weighted() const { return !family_.post_norm && !family_.sandwich_norms; }
  bool writers() const { return !narrow_ || narrow_->writers; }
  // The channels of the original that the cut stream has.
  Tensor own_channels(const Tensor& x) const { return narrow_ ? x.index_select(-1, channels_) : x; }

  // Sums over batches in their order: the same for any number of threads.
  double norm_scale(const Norm& norm, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) const {
    std::vector<std::pair<double, double>> sums(batches_);
    each([&](std::size_t b) {
      const Tensor own = rows(norm.forward(inputs[b]), b).to(at::kDouble), target = rows(own_channels(outputs[b]), b).to(at::kDouble);
      sums[b] = {(own * target).sum().item<double>(), own.square().sum().item<double>()};
    });
    double both = 0, own = 0;
    for (const auto& [a, b] : sums) both += a, own += b;
    return own > 0 && both > 0 ? both / own : 1;
  }

  // The gain of a norm, then what reads it. `inputs` [B,T,d'] of the cut stream, `outputs` [B,T,d] of the original's norm;
  // readers: of the cut model, and with all channels.
  void fit_norm(Norm& norm, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, const std::vector<std::pair<Linear*, const Linear*>>& readers) const {
    set_norm_gain(norm, norm_gain(norm) * norm_scale(norm, inputs, outputs));
    if (!narrow_->readers || std::none_of(readers.begin(), readers.end(), [](const auto& pair) { return pair.first->weight.defined(); })) return;
    StreamMoments moments;
    for (std::size_t first = 0; first < batches_;) {
      const std::size_t end = chunk_end(first);
      std::vector<Tensor> own(end - first), target(end - first);
      for_each_batch(cut_.device(), own.size(), [&](std::size_t k) { own[k] = rows(norm.forward(inputs[first + k]), first + k), target[k] = rows(outputs[first + k], first + k); });
      const Tensor z = at::cat(own);
      moments.add(z, at::cat(target), at::ones({z.size(0)}, z.options()));
      first = end;
    }
    const SingleThread single;
    const Tensor second = (moments.second.triu() + moments.second.triu(1).t()).to(at::kDouble), cross = moments.cross.to(at::kDouble);  // sums, as in StreamMoments
    for (const auto& [reader, before] : readers) {
      if (!reader->weight.defined()) continue;
      // What is left is W_before y - W_S y': its moments follow from those of y and y'.
      const Tensor whole = before->weight.detach().to(at::kDouble), now = reader->weight.detach().to(at::kDouble);
      StreamMoments left = moments;
      left.cross = at::matmul(whole, cross) - at::matmul(now, second);
      left.residual_mean = at::mv(whole, moments.residual_mean) - at::mv(now, moments.input_mean);
      stream_solve(*reader, left, ridge_);
    }
  }

  std::size_t chunk_end(std::size_t first) const {
    for (std::int64_t tokens = 0; first < batches_ && tokens < chunk_tokens;) tokens += set_.inputs[first++].ids.numel();
    return first;
  }

  struct Original {
    Tensor attention_output, attention_sum, after_attention, mlp_output, mlp_sum, output;
  };
  Original pass(std::int64_t layer, const Tensor& x, std::size_t b) const {
    const Block& block = original_.blocks[static_cast<std::size_t>(layer)];
    Original out;
    const Tensor context = original_.attention_context(layer, original_.attention_input(layer, x), set_.inputs[b]);
    out.attention_output = block.attention.output.forward(context);
    out.attention_sum = x + out.attention_output;
    out.after_attention = original_.after_attention(layer, x, context);
    const Tensor inner = original_.mlp_inner(layer, original_.mlp_input(layer, out.after_attention));
    out.mlp_output = block.mlp.down.forward(inner);
    out.mlp_sum = out.after_attention + out.mlp_output;
    out.output = original_.after_mlp(layer, out.after_attention, inner);
    return out;
  }

  // Relative errors of the two sums before their refit.
  std::pair<double, double> refit_block(std::int64_t i, std::int64_t first, std::int64_t last) {
    Block& block = cut_.blocks[static_cast<std::size_t>(i)];
    const Block* before = narrow_ ? &narrow_->before.blocks[static_cast<std::size_t>(i)] : nullptr;
    std::vector<Tensor> inputs(batches_), targets(batches_), streams(batches_), mlp_targets(batches_), mlp_streams(batches_), between(batches_);
    std::vector<Tensor> norms(batches_), teacher_between(batches_), teacher_outputs(batches_), teacher_mlp_outputs(batches_);  // narrow alone
    if (narrow_) {
      if (!writers()) each([&](std::size_t b) { student_[b] = own_channels(teacher_[b]); });
      each([&](std::size_t b) { norms[b] = original_.attention_input(first, teacher_[b]); });
      fit_norm(block.attention_norm, student_, norms, {{&block.attention.query, &before->attention.query}, {&block.attention.key, &before->attention.key}, {&block.attention.value, &before->attention.value}});
    }
    each([&](std::size_t b) {
      const Original own = pass(first, teacher_[b], b);
      inputs[b] = cut_.attention_context(i, cut_.attention_input(i, student_[b]), set_.inputs[b]);
      targets[b] = family_.sandwich_norms ? own_channels(own.attention_output) : own_channels(own.attention_sum) - student_[b];
      streams[b] = own_channels(own.attention_sum);
      Original end = own;
      for (std::int64_t layer = first + 1; layer <= last; ++layer) end = pass(layer, end.output, b);
      mlp_targets[b] = own_channels(family_.sandwich_norms ? own.mlp_output : end.mlp_sum);
      mlp_streams[b] = own_channels(end.mlp_sum);
      if (narrow_) teacher_between[b] = own.after_attention, teacher_outputs[b] = own.attention_output, teacher_mlp_outputs[b] = own.mlp_output;
      teacher_[b] = end.output;
    });
    const double attention = writers() ? refit(block.attention.output, inputs, targets, streams) : 0;
    if (family_.post_norm && last > first) {
      const Norm& norm = original_.blocks[static_cast<std::size_t>(last)].mlp_norm;
      block.mlp_norm.weight = norm.weight.detach().clone();
      if (norm.bias.defined()) block.mlp_norm.bias = norm.bias.detach().clone();
    }
    if (narrow_ && family_.sandwich_norms) fit_sandwich(block.post_attention_norm, original_.blocks[static_cast<std::size_t>(first)].post_attention_norm, block.attention.output, inputs, teacher_outputs);
    each([&](std::size_t b) { between[b] = writers() ? cut_.after_attention(i, student_[b], inputs[b]) : own_channels(teacher_between[b]); });
    if (narrow_) {
      each([&](std::size_t b) { norms[b] = original_.mlp_input(first, teacher_between[b]); });
      fit_norm(block.mlp_norm, between, norms, {{&block.mlp.gate, &before->mlp.gate}, {&block.mlp.up, &before->mlp.up}});
    }
    each([&](std::size_t b) {
      if (!family_.sandwich_norms) mlp_targets[b] = mlp_targets[b] - between[b];
      inputs[b] = cut_.mlp_inner(i, cut_.mlp_input(i, between[b]));
    });
    const double mlp = writers() ? refit(block.mlp.down, inputs, mlp_targets, mlp_streams) : 0;
    if (narrow_ && family_.sandwich_norms) fit_sandwich(block.post_mlp_norm, original_.blocks[static_cast<std::size_t>(first)].post_mlp_norm, block.mlp.down, inputs, teacher_mlp_outputs);
    each([&](std::size_t b) { student_[b] = writers() ? cut_.after_mlp(i, between[b], inputs[b]) : own_channels(teacher_[b]); });
    return {attention, mlp};
  }

  // A norm between a linear and the sum: nothing reads it but the stream.
  void fit_sandwich(Norm& norm, const Norm& whole, const Linear& linear, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) const {
    std::vector<Tensor> own(batches_), target(batches_);
    each([&](std::size_t b) { own[b] = linear.forward(inputs[b]), target[b] = whole.forward(outputs[b]); });
    fit_norm(norm, own, target, {});
  }

  static constexpr std::int64_t chunk_tokens = 4096;
  Transformer& cut_;
  const Transformer& original_;
  const std::vector<std::int64_t>& layers_;
  const CalibrationSet& set_;
  const double ridge_;
  const NarrowStream* narrow_;
  const Family& family_;
  const std::size_t batches_;
  std::vector<Tensor> student_, teacher_;  // [B,T,d] in front of the present block
  Tensor channels_;
};

}  // namespace

void refit_to_stream(Transformer& cut, const Transformer& original, const std::vector<std::int64_t>& layers, const CalibrationSet& set, double ridge, const NarrowStream* narrow) {
  if (set.inputs.empty()) throw Error("the least-squares refit needs data, and there is none").at("compensate").hint("give training or calibration data, or set compensate: none");
  StreamRefit(cut, original, layers, set, ridge, narrow).run();
}

}  // namespace kompakt
