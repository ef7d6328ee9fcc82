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

namespace kompakt {
namespace {

using at::Tensor;

// Weighted moments of a linear's input and of what its output lacks, as means over tokens.
struct StreamMoments {
  Tensor second, cross;                   // [K,K] E[a z z'], [N,K] E[a r z']; float32
  Tensor input_mean, residual_mean;       // [K] E[a z], [N] E[a r]; float64
  double weight_mean = 0, tokens = 0;     // E[a]
  double before = 0;                      // E[a |r|^2]

  void add(const Tensor& z, const Tensor& r, const Tensor& a) {
    const double count = static_cast<double>(z.size(0)), whole = tokens + count, keep = tokens / whole, share = 1 / whole;
    const Tensor root = a.sqrt().unsqueeze(1), weighted_z = z * root, weighted_r = r * root;
    add_product(second, weighted_z, weighted_z, true, keep, share);
    add_product(cross, weighted_r, weighted_z, false, keep, share);
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
  s = s.to(at::kDouble), c = c.to(at::kDouble);
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
  StreamRefit(Transformer& cut, const Transformer& original, const std::vector<std::int64_t>& layers, const CalibrationSet& set, double ridge)
      : cut_(cut), original_(original), layers_(layers), set_(set), ridge_(ridge), family_(*original.config().family), batches_(set.inputs.size()), student_(batches_), teacher_(batches_) {
    if (layers.size() != cut.blocks.size() || layers.empty() || !std::is_sorted(layers.begin(), layers.end()) || layers.back() >= original.config().layers) throw std::logic_error("refit_to_stream: layers of another model");
  }

  void run() {
    const at::NoGradGuard no_grad;
    const std::int64_t all = original_.config().layers, count = static_cast<std::int64_t>(layers_.size());
    Progress progress("least-squares refit", count, "layer");
    each([&](std::size_t b) {
      student_[b] = cut_.embed(set_.inputs[b]);
      teacher_[b] = original_.embed(set_.inputs[b]);
      for (std::int64_t layer = 0; layer < layers_[0]; ++layer) teacher_[b] = original_.block_forward(layer, teacher_[b], set_.inputs[b]);
    });
    for (std::int64_t i = 0; i < count; ++i) {
      check_interrupted();
      const std::int64_t first = layers_[static_cast<std::size_t>(i)], last = (i + 1 < count ? layers_[static_cast<std::size_t>(i) + 1] : all) - 1;
      const auto [attention, mlp] = refit_block(i, first, last);
      progress.update(i + 1, str("error of the stream ", fixed(attention, 4), " ", fixed(mlp, 4)));
    }
    progress.finish();
  }

 private:
  void each(const std::function<void(std::size_t)>& work) const { for_each_batch(cut_.device(), batches_, work); }

  // Residuals are target - own output. Chunks of batches, so that products are large. Mean square of the residuals before.
  double refit(Linear& linear, const std::vector<Tensor>& inputs, const std::vector<Tensor>& targets, const std::vector<Tensor>& streams) const {
    StreamMoments moments;
    for (std::size_t first = 0; first < batches_;) {
      std::size_t end = first;
      for (std::int64_t tokens = 0; end < batches_ && tokens < chunk_tokens;) tokens += set_.inputs[end++].ids.numel();
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
    std::vector<Tensor> inputs(batches_), targets(batches_), streams(batches_), mlp_targets(batches_), mlp_streams(batches_), between(batches_);
    each([&](std::size_t b) {
      const Original own = pass(first, teacher_[b], b);
      inputs[b] = cut_.attention_context(i, cut_.attention_input(i, student_[b]), set_.inputs[b]);
      targets[b] = family_.sandwich_norms ? own.attention_output : own.attention_sum - student_[b];
      streams[b] = own.attention_sum;
      Original end = own;
      for (std::int64_t layer = first + 1; layer <= last; ++layer) end = pass(layer, end.output, b);
      mlp_targets[b] = family_.sandwich_norms ? own.mlp_output : end.mlp_sum;
      mlp_streams[b] = end.mlp_sum;
      teacher_[b] = end.output;
    });
    const double attention = refit(block.attention.output, inputs, targets, streams);
    if (family_.post_norm && last > first) {
      const Norm& norm = original_.blocks[static_cast<std::size_t>(last)].mlp_norm;
      block.mlp_norm.weight = norm.weight.detach().clone();
      if (norm.bias.defined()) block.mlp_norm.bias = norm.bias.detach().clone();
    }
    each([&](std::size_t b) {
      between[b] = cut_.after_attention(i, student_[b], inputs[b]);
      if (!family_.sandwich_norms) mlp_targets[b] = mlp_targets[b] - between[b];
      inputs[b] = cut_.mlp_inner(i, cut_.mlp_input(i, between[b]));
    });
    const double mlp = refit(block.mlp.down, inputs, mlp_targets, mlp_streams);
    each([&](std::size_t b) { student_[b] = cut_.after_mlp(i, between[b], inputs[b]); });
    return {attention, mlp};
  }

  static constexpr std::int64_t chunk_tokens = 4096;
  Transformer& cut_;
  const Transformer& original_;
  const std::vector<std::int64_t>& layers_;
  const CalibrationSet& set_;
  const double ridge_;
  const Family& family_;
  const std::size_t batches_;
  std::vector<Tensor> student_, teacher_;  // [B,T,d] in front of the present block
};

}  // namespace

void refit_to_stream(Transformer& cut, const Transformer& original, const std::vector<std::int64_t>& layers, const CalibrationSet& set, double ridge) {
  if (set.inputs.empty()) throw Error("the least-squares refit needs data, and there is none").at("compensate").hint("give training or calibration data, or set compensate: none");
  StreamRefit(cut, original, layers, set, ridge).run();
}

}  // namespace kompakt
