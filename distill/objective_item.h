// What an item of a recipe's list of losses says, shared by the classes of objectives. Internal to distill/.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/node.h"
#include "distill/cross_tokenizer.h"
#include "distill/losses.h"
#include "distill/stage.h"

namespace kompakt {

// Everything that an item can say; a kind visits the part that it reads, so that other keys are mistakes.
struct ObjectiveItem {
  std::string name;
  double weight = 1;
  LogitLossOptions logits;
  std::vector<std::int64_t> layers;
  std::int64_t layer = -1;  // -1 = the last
  bool normalize = false;
  RelationOptions relation;
  double temperature = 0.05;  // of embeddings
  double label_smoothing = 0;
  Place place;
  ObjectiveShapes shapes;
  std::vector<std::int64_t> layer_map;
};

// Positions that count, [B,T]: of text those that have a next token, as for the labels; else all that are not padding.
at::Tensor objective_token_mask(const ObjectiveInput& input);
const TeacherTargets& objective_teacher(const ObjectiveInput& input);

// All `logits:` items of a list: one pass over the vocabulary computes their sum.
class LogitObjective final : public Objective {
 public:
  LogitObjective(bool decoder, std::int64_t tokens) : decoder_(decoder), tokens_(tokens) {}
  void add(const ObjectiveItem& item) { terms_.push_back({find_logit_loss(item.name), item.logits, item.weight}); }
  bool needs_teacher() const override { return true; }
  bool needs_logits() const override { return !decoder_; }
  // Parts: every term by its name, then forward and reverse KL at temperature 1, whatever is minimised.
  at::Tensor loss(const ObjectiveInput& input, std::vector<LossPart>& parts) override;

 private:
  std::vector<LogitTerm> terms_;
  bool decoder_;
  std::int64_t tokens_;
};

// One row of cross_losses().
class CrossTokenizerObjective final : public Objective {
 public:
  explicit CrossTokenizerObjective(const ObjectiveItem& item);
  bool needs_teacher() const override { return true; }
  bool needs_logits() const override { return false; }
  bool counts_comparisons() const override { return true; }
  std::int64_t comparisons(const TokenBatch& batch, TeacherSource& teacher) const override { return teacher.aligned_spans(batch); }
  // Parts: the loss, and aligned spans per token that is learned.
  at::Tensor loss(const ObjectiveInput& input, std::vector<LossPart>& parts) override;

 private:
  const CrossLoss* row_;
  double temperature_, weight_;
};

// What reverse KL of whole sampled texts has beyond that of single tokens (MiniLLM). Zero on texts of the data.
class PolicyObjective final : public Objective {
 public:
  explicit PolicyObjective(const ObjectiveItem& item) : weight_(item.weight), tokens_(item.shapes.tokens) {}
  bool needs_teacher() const override { return true; }
  bool needs_logits() const override { return false; }
  at::Tensor loss(const ObjectiveInput& input, std::vector<LossPart>& parts) override;

 private:
  double weight_;
  std::int64_t tokens_;  // of the tokenizer, among which texts are drawn; 0 = all rows of the head
};

// Pooled vectors of texts, student against teacher (encoders).
class EmbeddingObjective final : public Objective {
 public:
  explicit EmbeddingObjective(const ObjectiveItem& item);
  bool needs_teacher() const override { return true; }
  bool needs_logits() const override { return false; }
  void request_taps(std::set<std::string>& student, std::set<std::string>& teacher) const override;
  std::vector<std::pair<std::string, at::Tensor>> parameters() override { return projections_; }
  at::Tensor loss(const ObjectiveInput& input, std::vector<LossPart>& parts) override;

 private:
  std::string name_;
  double temperature_, weight_;
  std::vector<std::pair<std::string, at::Tensor>> projections_;  // one, where the widths differ
};
// Rows of the kind `embedding`; `temperature`: which of them read it, `projects`: which compare vectors of one width.
struct EmbeddingLoss {
  std::string_view name;
  bool temperature, projects;
  at::Tensor (*evaluate)(const at::Tensor& student, const at::Tensor& teacher, double temperature, const at::Tensor& projection);
};
std::span<const EmbeddingLoss> embedding_losses();
const EmbeddingLoss* find_embedding_loss(std::string_view name);

}  // namespace kompakt
