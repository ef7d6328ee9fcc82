// What is minimised: a weighted sum of parts over student outputs, taps, labels and teacher targets.
// Stages build their own; the loop knows nothing of what they compute.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "data/batches.h"
#include "model/taps.h"
#include "model/transformer.h"

namespace kompakt {

// A teacher's next-token distribution in short: its likeliest tokens, what is left, and draws from what is left.
struct SparseTargets {
  at::Tensor ids;                // [.., k] int64, different from each other
  at::Tensor log_p;              // [.., k] float32
  at::Tensor log_rest;           // [..] float32: log-probability of all other tokens together
  at::Tensor draws;              // [.., N] int64: drawn from the rest, the first half independent of the second; N = 0: none
  at::Tensor draw_log_p;         // [.., N] float32: log-probability of the drawn token within the rest
  std::int64_t vocabulary = 0;   // of the teacher
};

struct TextAlignment;  // distill/span_alignment.h

// One of the three: logits; hidden states and the head that makes logits of them; the distribution in short.
struct TeacherTargets {
  at::Tensor logits;                       // [B,C] or [B,T,V] float32
  std::map<std::string, at::Tensor> taps;  // same names and shapes as the student's taps, teacher width
  at::Tensor hidden;                       // [B,T,d] what the head sees: with it tokens x vocabulary need not exist
  at::Tensor head_weight, head_bias;       // [V,d]; [V] or undefined
  SparseTargets sparse;                    // ids [B,T,k] and so on
  std::shared_ptr<const TextAlignment> alignment;  // set by a teacher of another tokenizer: `hidden` is of its own tokens
};

// Where teacher outputs come from: a live model or a cache. Same example, same values, whatever the batch.
class TeacherSource {
 public:
  virtual ~TeacherSource() = default;
  // Called once before training with the taps that objectives need; may do all the work (cache).
  virtual void prepare(const std::set<std::string>& taps) = 0;
  virtual TeacherTargets targets(const TokenBatch& batch) = 0;
  virtual bool takes(std::int64_t columns) const { (void)columns; return true; }  // false: no targets for rows of this length
  virtual std::int64_t aligned_spans(const TokenBatch& batch) { (void)batch; return 0; }  // of a teacher with another tokenizer: `spans` of the batch's alignment, before its targets are asked for
  virtual const ModelConfig& config() const = 0;
  virtual std::string fingerprint() const = 0;  // weights + tokenizer + data
};

struct ObjectiveInput {
  const Transformer& student;
  const ModelInput& input;
  const TokenBatch& batch;
  const at::Tensor& logits;        // [B,C] or [B,T,V]; undefined when every objective said wants_hidden()
  const at::Tensor& hidden;        // [B,T,d] last hidden states
  const TapMap& taps;              // student's
  const TeacherTargets* teacher;   // null when no objective asked for it
  double weight = 1;               // of an objective with comparisons of its own: share of the step's that this batch has, over its share of the step's targets
};

struct LossPart {
  std::string name;  // "forward_kl", "cross_entropy"
  at::Tensor value;  // scalar, not yet weighted, detached by the loop for logging
  bool score = false;  // of text: its held-out mean decides which weights are best (less is better), instead of that of the labels' loss
};

class Objective {
 public:
  virtual ~Objective() = default;
  virtual bool needs_teacher() const { return false; }
  virtual bool needs_logits() const { return true; }  // false: works from hidden states (fused linear + loss)
  virtual void request_taps(std::set<std::string>& student, std::set<std::string>& teacher) const { (void)student, (void)teacher; }
  // Extra trainable tensors (projections); saved with the state, not with the model.
  virtual std::vector<std::pair<std::string, at::Tensor>> parameters() { return {}; }
  // True: the mean of loss() is over comparisons() instead of the batch's targets (count_targets), and loss() multiplies it by input.weight, so that
  // the mean over a step's micro batches is that of one large batch.
  virtual bool counts_comparisons() const { return false; }
  virtual std::int64_t comparisons(const TokenBatch& batch, TeacherSource& teacher) const { (void)batch, (void)teacher; return 0; }
  // Weighted total; appends every part. Mean per valid token or example.
  virtual at::Tensor loss(const ObjectiveInput& input, std::vector<LossPart>& parts) = 0;
};

// Cross entropy with the labels (classification) or the next token (text, document boundaries respected).
std::unique_ptr<Objective> label_cross_entropy(double label_smoothing = 0);

}  // namespace kompakt
