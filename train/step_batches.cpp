// From epochs and accumulation to steps.
#include "train/step_batches.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace kompakt {

std::int64_t padding_id(const TaskData& data) {
  const std::int64_t pad = data.tokenizer ? data.tokenizer->special().pad : -1;
  return pad >= 0 ? pad : 0;
}

StepBatches::StepBatches(const TaskData& data, const TrainOptions& options, std::uint64_t seed) : accumulate_(options.accumulate) {
  if (data.kind == TaskData::Kind::classification) {
    if (data.train.ids.empty()) throw Error("the training set is empty").at("data.train").allowed("at least one example");
    examples_ = std::make_unique<ClassificationBatches>(data.train, options.batch_size, options.bucket_batches, seed, padding_id(data));
    batches_per_epoch_ = examples_->batches_per_epoch();
  } else {
    // A tokenizer without an end token puts nothing between documents: their numbers keep them apart.
    const std::int64_t end = data.tokenizer ? data.tokenizer->special().eos : 0;
    text_ = std::make_unique<TextBatches>(data.train_documents, options.sequence_length, options.batch_size, end, data.train_documents.size() > 1, seed);
    batches_per_epoch_ = text_->batches_per_epoch();
  }
  steps_per_epoch_ = (batches_per_epoch_ + accumulate_ - 1) / accumulate_;
  // The small slack keeps 0.1 * 30 = 3.0000000000000004 from becoming 4 steps.
  steps_ = options.steps > 0 ? options.steps : std::max<std::int64_t>(1, static_cast<std::int64_t>(std::ceil(options.epochs * static_cast<double>(steps_per_epoch_) - 1e-9)));
}

TokenBatch StepBatches::batch(std::int64_t epoch, std::int64_t index) const { return examples_ ? examples_->get(epoch, index) : text_->get(epoch, index); }

std::vector<TokenBatch> StepBatches::micro_batches(std::int64_t step) const {
  const std::int64_t epoch = step / steps_per_epoch_, first = (step % steps_per_epoch_) * accumulate_;
  std::vector<TokenBatch> out;
  for (std::int64_t i = first; i < std::min(first + accumulate_, batches_per_epoch_); ++i) out.push_back(batch(epoch, i));
  return out;
}

}  // namespace kompakt
