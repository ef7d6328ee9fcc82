// What the objectives say of a batch: one forward pass of the student, the teacher's answer, the weighted sum; and the score of held-out
// data that goes by the same losses.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "train/context.h"
#include "train/data_parallel.h"
#include "train/objective.h"

namespace kompakt {

class BatchLoss {
 public:
  // All must outlive it. `bf16`: passes run under autocast. Error where an objective needs a teacher that the context does not have.
  BatchLoss(Transformer& model, const std::vector<std::shared_ptr<Objective>>& objectives, StageContext& context, bool bf16);

  bool needs_teacher() const { return needs_teacher_; }
  const std::set<std::string>& teacher_taps() const { return teacher_taps_; }

  // Weighted sum of the objectives' means over the batch; their parts are added to `parts`. `weights`: ObjectiveInput::weight of every
  // objective, empty = 1. `watched`: gets the parts of context.watched, null = not measured.
  at::Tensor evaluate(const TokenBatch& batch, std::vector<LossPart>& parts, const std::vector<double>& weights = {}, std::vector<LossPart>* watched = nullptr);

  // [micro batch of `ours`][objective] for evaluate(); empty where all means are over targets. `shares`: of the step's targets, by micro batch.
  std::vector<std::vector<double>> comparison_weights(const std::vector<TokenBatch>& batches, const std::vector<std::size_t>& ours, const std::vector<double>& shares, DataParallel& parallel);

  // Higher is better; NaN without held-out data. Of text: minus the held-out mean of the part that an objective marks as score (KL to the
  // teacher) where there is one, else dev_score(); of texts without labels: minus what is minimised, on the development set.
  double held_out_score(std::int64_t batch_size, std::int64_t sequence_length);

 private:
  double objective_score(std::int64_t batch_size);
  double plain_score() const;

  Transformer& model_;
  const std::vector<std::shared_ptr<Objective>>& objectives_;
  StageContext& context_;
  const TaskData& data_;
  const bool bf16_, classification_;
  bool needs_teacher_ = false, needs_logits_ = false;
  std::set<std::string> student_taps_, teacher_taps_;
};

// Texts without labels, for encoders that give a vector for each.
bool is_unlabelled(const TaskData& data);

}  // namespace kompakt
