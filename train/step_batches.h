// Which micro batches make up which optimizer step: a pure function of (seed, step).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "data/batches.h"
#include "train/context.h"
#include "train/options.h"

namespace kompakt {

// The padding id of the data's tokenizer; 0 where it has none (padding is masked everywhere).
std::int64_t padding_id(const TaskData& data);

class StepBatches {
 public:
  // `data` must outlive the object. Errors: no training examples; text shorter than one row.
  StepBatches(const TaskData& data, const TrainOptions& options, std::uint64_t seed);

  std::int64_t steps() const { return steps_; }
  std::int64_t steps_per_epoch() const { return steps_per_epoch_; }
  // True for the last step of an epoch and the last of all.
  bool ends_epoch(std::int64_t step) const { return (step + 1) % steps_per_epoch_ == 0 || step + 1 == steps_; }
  // An epoch whose batches do not fill its last step gives that step fewer.
  std::vector<TokenBatch> micro_batches(std::int64_t step) const;

 private:
  TokenBatch batch(std::int64_t epoch, std::int64_t index) const;
  std::unique_ptr<ClassificationBatches> examples_;
  std::unique_ptr<TextBatches> text_;
  std::int64_t batches_per_epoch_ = 0, accumulate_ = 1, steps_per_epoch_ = 0, steps_ = 0;
};

}  // namespace kompakt
