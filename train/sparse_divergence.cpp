#include "train/sparse_divergence.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "core/system.h"
#include "train/sparse_codec.h"
#include "train/teacher.h"

namespace kompakt {
namespace {

using at::Tensor;

// Largest distance between a value and what its code says (sparse_codec.h), of decoded values.
Tensor divergence_code_step(const Tensor& decoded, double largest) { return ((decoded.clamp_min(0) / largest).sqrt().mul_(255).add_(0.25)).mul_(largest / (255.0 * 255.0)); }

constexpr double divergence_half_step = 1.0 / 2048;  // of a half float, relative

// Whether the code of a distance is 0. That also says a distance below 0, of what would lie above the decoded value in front of it: then the
// error there stays.
Tensor divergence_no_distance(const Tensor& decoded, double largest) { return decoded.lt(largest / (255.0 * 255.0 * 2)); }

// Of the distances of kept tokens [n,k]. Each gap is coded against the decoded sum of those before it: errors do not add up.
Tensor divergence_own_error(const Tensor& log_p) {
  const Tensor gaps = log_p.narrow(1, 0, log_p.size(1) - 1) - log_p.narrow(1, 1, log_p.size(1) - 1);
  const Tensor own = at::cat({at::zeros({log_p.size(0), 1}, log_p.options()), divergence_code_step(gaps, sparse_largest_gap)}, 1);
  const Tensor none = divergence_no_distance(gaps, sparse_largest_gap);
  for (std::int64_t i = 1; i < own.size(1); ++i) own.select(1, i).copy_(at::where(none.select(1, i - 1), at::maximum(own.select(1, i), own.select(1, i - 1)), own.select(1, i)));
  return own;
}

// d of the header for kept tokens: the codes of their distances, and the sum that fixes the likeliest one.
Tensor divergence_kept_error(const Tensor& log_p, const Tensor& own, const Tensor& rest, const Tensor& rest_error) {
  const Tensor share = at::softmax(log_p, 1);
  const Tensor sum = (share * own.exp()).sum(1, true).log();
  const Tensor kept = (rest_error / (1 - rest - rest_error).clamp_min(1e-6)).unsqueeze(1);
  return own + sum + kept;
}

}  // namespace

SparseDivergence sparse_divergence(const Tensor& logits, const SparseTargets& teacher) {
  const at::NoGradGuard no_grad;
  const std::int64_t vocabulary = teacher.vocabulary, known = teacher.ids.size(1), drawn = teacher.draws.defined() ? teacher.draws.size(1) : 0;
  if (logits.size(1) < vocabulary) throw std::logic_error("sparse_divergence: the model has fewer tokens than the teacher");
  if (drawn % 2 != 0) throw std::logic_error("sparse_divergence: an even number of draws is needed");
  const Tensor log_q = at::log_softmax(logits.narrow(1, 0, vocabulary).to(at::kFloat), 1);
  const Tensor log_p = teacher.log_p.to(at::kDouble), p = log_p.exp();
  const Tensor ratio = log_p - log_q.gather(1, teacher.ids).to(at::kDouble);
  SparseDivergence out;
  out.same_top1 = log_q.argmax(1).eq(teacher.ids.select(1, 0));
  const Tensor kept = (p * ratio).sum(1);
  const bool whole = known >= vocabulary;  // every token is known: there is no rest
  const Tensor log_rest = whole ? at::full_like(kept, -std::numeric_limits<double>::infinity()) : teacher.log_rest.to(at::kDouble);
  const Tensor rest = log_rest.exp(), rest_step = whole ? at::zeros_like(kept) : log_rest.abs() * divergence_half_step;
  const Tensor rest_error = rest * rest_step.expm1();
  const Tensor own_error = divergence_own_error(log_p), kept_error = divergence_kept_error(log_p, own_error, rest, rest_error);
  const Tensor codes = (p * kept_error.expm1() * (ratio.abs() + kept_error)).sum(1);
  out.variance = at::zeros_like(kept);
  if (whole) {
    out.kl = kept, out.code_error = codes;
    out.at_least = (kept - codes).clamp_min(0), out.at_most = kept + codes;
    return out;
  }
  const double infinity = std::numeric_limits<double>::infinity();
  const Tensor lowest = log_q.scatter(1, teacher.ids, infinity).amin(1).to(at::kDouble);
  const Tensor log_rest_q = at::logsumexp(log_q.scatter(1, teacher.ids, -infinity), 1).to(at::kDouble);
  // The rest with every log-ratio the same: what the codes can add to it. `step`: of the log-probabilities that stand in it.
  const auto rest_codes = [&](const Tensor& log_ratio, const Tensor& step) { return codes + rest_error * (1 + log_ratio.abs() + step) + rest * step; };
  const Tensor flat = log_rest - log_rest_q, steepest = at::minimum(log_p.select(1, known - 1), log_rest) - lowest;
  const Tensor last_error = kept_error.select(1, known - 1);
  out.at_least = (kept + rest * flat - rest_codes(flat, rest_step)).clamp_min(0);
  out.at_most = kept + rest * steepest + rest_codes(steepest, last_error);
  if (drawn == 0) {
    out.kl = kept + rest * flat, out.code_error = rest_codes(flat, rest_step);
    return out;
  }
  const Tensor log_drawn = log_rest.unsqueeze(1) + teacher.draw_log_p.to(at::kDouble);
  const Tensor halves = (log_drawn - log_q.gather(1, teacher.draws).to(at::kDouble)).view({-1, 2, drawn / 2}).mean(2);  // [n,2]
  const Tensor mean = halves.mean(1);
  const Tensor depth = log_p.narrow(1, known - 1, 1) - log_drawn, depth_step = divergence_code_step(depth, sparse_largest_depth);
  const Tensor depth_own = at::where(divergence_no_distance(depth, sparse_largest_depth), at::maximum(depth_step, own_error.narrow(1, known - 1, 1)), depth_step);
  const Tensor depth_error = depth_own.mean(1) + kept_error.select(1, 0);
  out.kl = kept + rest * mean;
  out.variance = (rest * (halves.select(1, 0) - halves.select(1, 1)) / 2).square();
  out.code_error = rest_codes(mean, depth_error);
  return out;
}

SparseScores score_language(const Transformer& model, TeacherSource& teacher, const std::vector<std::vector<std::int64_t>>& windows, std::int64_t chunk, const std::function<void(std::int64_t)>& progress) {
  const at::NoGradGuard no_grad;
  if (windows.empty()) throw std::logic_error("score_language: no windows");
  const auto length = static_cast<std::int64_t>(windows.front().size());
  if (length < 2) throw std::logic_error("score_language: windows of one token");
  SparseScores out;
  out.scores.scored_per_window = length - 1;
  double variance = 0;
  for (std::size_t index = 0; index < windows.size(); ++index) {
    check_interrupted();
    const TokenBatch batch{.ids = windows[index], .lengths = {length}, .examples = {static_cast<std::int64_t>(index)}, .rows = 1, .columns = length};
    const ModelInput input = to_input(batch, model.device());
    const SparseTargets all = teacher.targets(batch).sparse;
    const Tensor hidden = model.hidden(input).squeeze(0), ids = input.ids.squeeze(0);
    double nll = 0;
    for (std::int64_t first = 0; first < length - 1; first += chunk) {
      const std::int64_t last = std::min(first + chunk, length - 1);
      const auto rows = [&](const Tensor& x) { return x.squeeze(0).slice(0, first, last).to(model.device()); };
      const Tensor logits = model.head(hidden.slice(0, first, last)).to(at::kFloat);
      nll -= at::log_softmax(logits, -1).gather(1, ids.slice(0, first + 1, last + 1).unsqueeze(1)).to(at::kDouble).sum().item<double>();
      const SparseDivergence part = sparse_divergence(logits, {rows(all.ids), rows(all.log_p), rows(all.log_rest), rows(all.draws), rows(all.draw_log_p), all.vocabulary});
      out.sampled = all.draws.size(-1) > 0;
      const Tensor kl = part.kl.to(at::kCPU, at::kFloat).contiguous(), same = part.same_top1.to(at::kCPU, at::kByte).contiguous();
      out.scores.kl.insert(out.scores.kl.end(), kl.const_data_ptr<float>(), kl.const_data_ptr<float>() + kl.numel());
      out.scores.same_top1.insert(out.scores.same_top1.end(), same.const_data_ptr<std::uint8_t>(), same.const_data_ptr<std::uint8_t>() + same.numel());
      variance += part.variance.sum().item<double>();
      out.code_error += part.code_error.sum().item<double>();
      out.at_least += part.at_least.sum().item<double>(), out.at_most += part.at_most.sum().item<double>();
    }
    out.scores.window_nll.push_back(nll);
    if (progress) progress(static_cast<std::int64_t>(index) + 1);
  }
  const auto positions = static_cast<double>(out.scores.kl.size());
  out.standard_error = std::sqrt(variance) / positions;
  for (double* mean : {&out.code_error, &out.at_least, &out.at_most}) *mean /= positions;
  return out;
}

}  // namespace kompakt
