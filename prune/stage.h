// The stage `prune`: neurons, heads, layers, channels of the residual stream and vocabulary really removed, the result is a plain smaller model; or single
// weights set to zero for good.
#pragma once

#include <memory>
#include <vector>

#include "core/fields.h"
#include "prune/criteria.h"
#include "prune/depth.h"
#include "prune/gradual.h"
#include "prune/structured.h"
#include "prune/unstructured.h"
#include "train/context.h"
#include "train/loop.h"
#include "train/options.h"

namespace kompakt {

struct StructuredOptions {
  double ffn = 1.0;          // share of feed-forward neurons kept
  double heads = 1.0;        // share of attention heads kept (whole key/value groups for grouped queries)
  std::int64_t layers = 0;   // layers to remove
  std::string depth = "block_influence";  // row of the table of depth criteria: which
  double hidden = 1.0;                    // share of the residual stream's channels kept
  std::string hidden_by = "select";       // select: by criterion | rotate: the first principal ones of the rotated stream
  bool untie = false;                     // rotate: a tied head gets a matrix of its own
};

struct VocabularyOptions {
  std::int64_t first_ids = 0;  // besides pieces that the training texts use: keep all ids below this (vocabularies are sorted by frequency)
  std::int64_t max_positions = 0;  // rows of learned position embeddings to keep; 0 = all
  std::int64_t multiple_of = 1;    // the count of kept ids is filled up to a multiple, with the lowest ids that would go
};

struct PruneOptions {
  bool has_unstructured = false;
  UnstructuredOptions unstructured;
  bool has_structured = false;
  StructuredOptions structured;
  bool has_vocabulary = false;
  VocabularyOptions vocabulary;
  std::string criterion = "taylor";   // row of the table of criteria: of neurons, heads, selected channels
  std::int64_t samples = 768;         // training examples (or sequences) that the importance is measured on
  std::int64_t multiple_of = 32;      // widths are rounded to a multiple
  // none | ls: refit to own outputs, of down and output projections, of a narrower stream's readers | stream: to the residual stream
  std::string compensate = "none";
  bool has_schedule = false;          // sparsity grows during the recovery instead of before it
  GradualOptions schedule;
  bool has_recover = false;
  TrainOptions recover;
  Node objective;                     // of the recovery, as in distill
};
void fields(FieldVisitor& visitor, PruneOptions& options);
// Parts of these that other cuts have too: hidden_by and untie; criterion and samples; compensate.
void channel_fields(FieldVisitor& visitor, StructuredOptions& options);
void importance_fields(FieldVisitor& visitor, PruneOptions& options);
void compensate_field(FieldVisitor& visitor, PruneOptions& options);

// Shape after the stage, for `plan` and for the check of the recipe: Error with the nearest valid value where it does not divide.
ModelConfig pruned_config(const ModelConfig& config, const PruneOptions& options);

// Error when the schedule does not go together with the rest of the options.
void check_schedule(const PruneOptions& options);

// Structured pruning (vocabulary excluded), then single weights, then recovery with `objectives` when asked.
void prune(Transformer& model, const PruneOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives, StageContext& context);

// For the report: how important units are in every layer, and how much of that stays.
Json describe_importance(const std::string& criterion, const UnitScores& scores, const std::vector<KeptUnits>& kept, std::size_t examples);
// Teacher layer that each layer follows, without the layers `gone`. A layer that stays answers for the removed ones behind it as
// well: the next kept layer must see its original input.
std::vector<std::int64_t> layer_map_without(const std::vector<std::int64_t>& map, const std::vector<std::int64_t>& gone);

// Single weights alone, without recovery: one block of weights at a time is enough.
bool prunes_by_blocks(const PruneOptions& options);

// Vocabulary: sorted old ids that are kept; then the embedding cut to them. The tokenizer is cut by Tokenizer::restrict_to.
std::vector<std::int64_t> kept_vocabulary(const Tokenizer& tokenizer, const std::vector<std::vector<std::int64_t>>& texts, const VocabularyOptions& options);
void restrict_vocabulary(Transformer& model, const std::vector<std::int64_t>& kept);
// Cuts learned position embeddings to the first `count` rows; 0 = all stay. Error for rotary models, where there is nothing to cut.
void restrict_positions(Transformer& model, std::int64_t count);

}  // namespace kompakt
