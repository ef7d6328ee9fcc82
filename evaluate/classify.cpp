#include "evaluate/classify.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "evaluate/inputs.h"

namespace kompakt {

Predictions predict(const Transformer& model, const TokenizedExamples& examples, std::int64_t pad, std::int64_t batch_size, const std::function<void(std::int64_t)>& progress) {
  const at::NoGradGuard no_grad;
  const auto count = static_cast<std::int64_t>(examples.ids.size());
  Predictions result;
  result.classes = static_cast<std::int64_t>(model.config().labels.size());
  result.labels.resize(examples.ids.size());
  result.logits.resize(static_cast<std::size_t>(count * result.classes));
  std::int64_t done = 0;
  for (const TokenBatch& batch : ClassificationBatches(examples, batch_size, 0, 0, pad).evaluation(batch_size)) {
    const at::Tensor logits = model.forward(batch_input(batch, model.device())).to(at::kFloat).cpu().contiguous();
    const float* values = logits.const_data_ptr<float>();
    for (std::int64_t row = 0; row < batch.rows; ++row) {
      const auto example = static_cast<std::size_t>(batch.examples[static_cast<std::size_t>(row)]);
      const float* begin = values + row * result.classes;
      std::copy_n(begin, result.classes, result.logits.begin() + static_cast<std::ptrdiff_t>(example) * result.classes);
      result.labels[example] = std::max_element(begin, begin + result.classes) - begin;
    }
    done += batch.rows;
    if (progress) progress(done);
  }
  return result;
}

double max_difference(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) throw std::logic_error("logit lists of different length");
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    if (std::isnan(difference)) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, difference);
  }
  return worst;
}

}  // namespace kompakt
