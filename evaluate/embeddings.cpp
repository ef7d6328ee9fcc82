#include "evaluate/embeddings.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"
#include "core/system.h"
#include "core/text.h"
#include "evaluate/inputs.h"
#include "model/parallel.h"

namespace kompakt {
namespace {

constexpr std::int64_t embedding_rows = 64;  // texts whose cosines with all others exist at once

// Ranks 0 .. n-1 of the values, equal ones at their mean.
std::vector<double> embedding_ranks(const std::vector<float>& values) {
  std::vector<std::size_t> order(values.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t i, std::size_t j) { return values[i] != values[j] ? values[i] < values[j] : i < j; });
  std::vector<double> ranks(values.size());
  for (std::size_t first = 0; first < order.size();) {
    std::size_t end = first + 1;
    while (end < order.size() && values[order[end]] == values[order[first]]) ++end;
    for (std::size_t i = first; i < end; ++i) ranks[order[i]] = static_cast<double>(first + end - 1) / 2;
    first = end;
  }
  return ranks;
}

double embedding_correlation(const std::vector<double>& a, const std::vector<double>& b) {
  const double middle = (static_cast<double>(a.size()) - 1) / 2;  // the mean of ranks, with ties too
  double ab = 0, aa = 0, bb = 0;
  for (std::size_t i = 0; i < a.size(); ++i) ab += (a[i] - middle) * (b[i] - middle), aa += (a[i] - middle) * (a[i] - middle), bb += (b[i] - middle) * (b[i] - middle);
  return aa > 0 && bb > 0 ? ab / std::sqrt(aa * bb) : 0;
}

// Of one row of cosines, without the text itself.
std::vector<float> embedding_others(const float* row, std::int64_t count, std::int64_t self) {
  std::vector<float> out(row, row + count);
  out.erase(out.begin() + self);
  return out;
}

std::ptrdiff_t embedding_largest(const std::vector<float>& values) { return std::max_element(values.begin(), values.end()) - values.begin(); }

}  // namespace

at::Tensor embed_texts(const Transformer& model, const TokenizedExamples& examples, std::int64_t pad, std::int64_t batch_size, const std::function<void(std::int64_t)>& progress, const std::function<std::int64_t(std::int64_t)>& number) {
  const at::NoGradGuard no_grad;
  at::Tensor out;
  std::int64_t done = 0;
  for (const TokenBatch& batch : ClassificationBatches(examples, batch_size, 0, 0, pad).evaluation(batch_size)) {
    check_interrupted();
    const ModelInput input = batch_input(batch, model.device());
    const at::Tensor vectors = model.pooled(model.hidden(input), input).to(at::kCPU, at::kFloat), units = vectors / vectors.norm(2, {1}, true).clamp_min(1e-30);
    if (!out.defined()) out = at::empty({static_cast<std::int64_t>(examples.ids.size()), units.size(1)});
    const at::Tensor finite = units.isfinite().all(1);
    for (std::int64_t row = 0; row < batch.rows; ++row) {
      const std::int64_t text = batch.examples[static_cast<std::size_t>(row)];
      if (!finite[row].item<bool>()) throw Error("the vector of a text is not finite").at(str("text ", number ? number(text) : text + 1)).hint("check the model on this text: an activation has overflowed");
      out[text] = units[row];
    }
    done += batch.rows;
    if (progress) progress(done);
  }
  return out;
}

EmbeddingComparison compare_embeddings(const at::Tensor& a, const at::Tensor& b) {
  const at::NoGradGuard no_grad;
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(0) && a.size(0) >= 3, "compare_embeddings: vectors of the same three or more texts");
  const std::int64_t count = a.size(0);
  EmbeddingComparison out;
  out.rank_correlation.resize(static_cast<std::size_t>(count)), out.same_nearest.resize(static_cast<std::size_t>(count));
  if (a.size(1) == b.size(1)) {
    const at::Tensor cosine = (a.to(at::kDouble) * b.to(at::kDouble)).sum(1).contiguous();
    out.cosine.assign(cosine.const_data_ptr<double>(), cosine.const_data_ptr<double>() + count);
  }
  const at::Tensor left = a.to(at::kFloat).t().contiguous(), right = b.to(at::kFloat).t().contiguous();
  for (std::int64_t first = 0; first < count; first += embedding_rows) {
    check_interrupted();
    const std::int64_t end = std::min(count, first + embedding_rows);
    const at::Tensor mine = at::matmul(a.slice(0, first, end).to(at::kFloat), left).contiguous(), theirs = at::matmul(b.slice(0, first, end).to(at::kFloat), right).contiguous();
    at::parallel_for(first, end, 1, [&](std::int64_t from, std::int64_t to) {
      for (std::int64_t text = from; text < to; ++text) {
        const auto x = embedding_others(mine.const_data_ptr<float>() + (text - first) * count, count, text), y = embedding_others(theirs.const_data_ptr<float>() + (text - first) * count, count, text);
        out.rank_correlation[static_cast<std::size_t>(text)] = embedding_correlation(embedding_ranks(x), embedding_ranks(y));
        out.same_nearest[static_cast<std::size_t>(text)] = embedding_largest(x) == embedding_largest(y);
      }
    });
  }
  return out;
}

}  // namespace kompakt
