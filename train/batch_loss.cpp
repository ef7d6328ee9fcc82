#include "train/batch_loss.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "core/error.h"
#include "core/text.h"
#include "train/dev_score.h"
#include "train/precision.h"
#include "train/step_batches.h"
#include "train/targets.h"
#include "train/teacher.h"

namespace kompakt {

bool is_unlabelled(const TaskData& data) { return data.kind == TaskData::Kind::classification && data.labels.empty(); }

BatchLoss::BatchLoss(Transformer& model, const std::vector<std::shared_ptr<Objective>>& objectives, StageContext& context, bool bf16)
    : model_(model), objectives_(objectives), context_(context), data_(*context.data), bf16_(bf16), classification_(data_.kind == TaskData::Kind::classification) {
  if (objectives_.empty()) throw std::logic_error("train: no objective");
  for (const auto& objective : objectives_) {
    std::set<std::string> student;
    objective->request_taps(student, teacher_taps_);
    student_taps_.insert(student.begin(), student.end());
    needs_teacher_ = needs_teacher_ || objective->needs_teacher();
    needs_logits_ = needs_logits_ || objective->needs_logits();
  }
  needs_teacher_ = needs_teacher_ || !teacher_taps_.empty();
  if (context_.watched && !context_.teacher) throw std::logic_error("train: what is watched needs a teacher");
  if (needs_teacher_ && !context_.teacher) throw Error("an objective needs a teacher, and the run has none").at(context_.title).hint("name a teacher in the recipe, or use labels alone");
  if (classification_) student_taps_.insert("final");
}

at::Tensor BatchLoss::evaluate(const TokenBatch& batch, std::vector<LossPart>& parts, const std::vector<double>& weights, std::vector<LossPart>* watched) {
  AutocastGuard autocast(context_.device, bf16_);
  const ModelInput input = to_input(batch, context_.device);
  TapMap taps(student_taps_);
  at::Tensor hidden, logits;
  if (classification_) {
    logits = model_.forward(input, &taps);
    hidden = taps.at("final");
  } else {
    hidden = model_.hidden(input, &taps);
    if (needs_logits_) logits = model_.head(hidden);
  }
  for (const std::string& name : student_taps_) {
    if (!taps.values().count(name)) throw Error(str("the student has no value \"", name, "\"")).at(context_.title).given(name).hint("layers count from 0; see docs for the names of taps");
  }
  TeacherTargets targets;
  if (needs_teacher_ || watched) targets = context_.teacher->targets(batch);
  at::Tensor total;
  for (std::size_t i = 0; i < objectives_.size(); ++i) {
    const at::Tensor value = objectives_[i]->loss({model_, input, batch, logits, hidden, taps, needs_teacher_ ? &targets : nullptr, weights.empty() ? 1 : weights[i]}, parts);
    total = total.defined() ? total + value : value;
  }
  if (watched) {
    const at::NoGradGuard no_grad;
    context_.watched->loss({model_, input, batch, logits, hidden, taps, &targets}, *watched);
  }
  return total;
}

std::vector<std::vector<double>> BatchLoss::comparison_weights(const std::vector<TokenBatch>& batches, const std::vector<std::size_t>& ours, const std::vector<double>& shares, DataParallel& parallel) {
  if (std::none_of(objectives_.begin(), objectives_.end(), [](const auto& objective) { return objective->counts_comparisons(); })) return {};
  std::vector<std::vector<double>> out(ours.size(), std::vector<double>(objectives_.size(), 1));
  std::vector<double> totals(objectives_.size(), 0);
  for (std::size_t o = 0; o < objectives_.size(); ++o) {
    if (!objectives_[o]->counts_comparisons()) continue;
    for (std::size_t k = 0; k < ours.size(); ++k) {
      out[k][o] = static_cast<double>(objectives_[o]->comparisons(batches[ours[k]], *context_.teacher));
      totals[o] += out[k][o];
    }
  }
  totals = parallel.sum(totals);
  for (std::size_t o = 0; o < objectives_.size(); ++o)
    for (std::size_t k = 0; k < ours.size() && totals[o] > 0; ++k) out[k][o] = out[k][o] / totals[o] / shares[ours[k]];
  return out;
}

double BatchLoss::held_out_score(std::int64_t batch_size, std::int64_t sequence_length) {
  const at::NoGradGuard no_grad;
  if (is_unlabelled(data_)) return objective_score(batch_size);
  if (classification_ || !needs_teacher_) return plain_score();
  double total = 0, count = 0;
  for (const TokenBatch& batch : held_out_batches(data_.heldout, *context_.teacher, sequence_length)) {
    std::vector<LossPart> parts;
    evaluate(batch, parts);
    const auto part = std::find_if(parts.begin(), parts.end(), [](const LossPart& p) { return p.score; });
    if (part == parts.end()) return plain_score();
    const auto targets = static_cast<double>(count_targets(batch));
    total += part->value.item<double>() * targets;
    count += targets;
  }
  return count > 0 ? -total / count : std::numeric_limits<double>::quiet_NaN();
}

double BatchLoss::objective_score(std::int64_t batch_size) {
  if (data_.dev.ids.empty()) return std::numeric_limits<double>::quiet_NaN();
  double total = 0;
  for (const TokenBatch& batch : ClassificationBatches(data_.dev, batch_size, 0, 0, padding_id(data_)).evaluation(batch_size)) {
    std::vector<LossPart> parts;
    total += evaluate(batch, parts).item<double>() * static_cast<double>(batch.rows);
  }
  return -total / static_cast<double>(data_.dev.ids.size());
}

double BatchLoss::plain_score() const {
  const AutocastGuard autocast(context_.device, bf16_);
  return dev_score(model_, data_);
}

}  // namespace kompakt
