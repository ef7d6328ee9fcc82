// The stage `distill`: a student made from the teacher, trained under it.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "core/fields.h"
#include "distill/on_policy.h"
#include "train/context.h"
#include "train/loop.h"
#include "train/options.h"
#include "train/teacher.h"

namespace kompakt {

struct StudentOptions {
  std::vector<std::int64_t> keep_layers;  // teacher layers, from 0; empty = all
  std::vector<std::int64_t> layer_map;    // teacher layer whose output each student layer must match; empty = default_layer_map
  std::string config;                     // text: config.json of a shape that starts from random weights, with the teacher's tokenizer
  std::string model;                      // text: folder or GGUF of another model, the student with its own tokenizer; empty = made from the teacher
};

struct DistillOptions {
  StudentOptions student;
  Node objective;  // list of maps: {logits: forward_kl, temperature: 2, weight: 1}, {relation: minilm, weight: 0.5}, {hidden: mse, weight: 10}, {labels: cross_entropy, weight: 0.5}
  bool has_cache = false;     // text: the teacher's outputs come from a cache of likeliest tokens and draws
  SparseCacheOptions cache;
  bool has_on_policy = false;  // text: a share of the steps learns from what the student writes
  OnPolicyOptions on_policy;
  bool has_teacher_text = false;  // text: completions by the teacher in place of the data's
  CompletionOptions teacher_text{.temperature = 0};
  TrainOptions train;
};
void fields(FieldVisitor& visitor, DistillOptions& options);
// With more fields in the section `student`; `more`: some of them stand in the recipe.
void fields(FieldVisitor& visitor, DistillOptions& options, bool more, const std::function<void(FieldVisitor&)>& student);
// What the fields alone cannot say: objectives, a cache with an odd number of draws, of class labels, or with losses that need more than it
// holds, texts written by a model of classes or under a cache.
void check_distill(const DistillOptions& options, bool classification, const Place& place, Problems& problems);
// What only the shapes of both models tell: layers and heads that they lack, vocabularies that do not fit.
void check_distill_models(const DistillOptions& options, const ModelConfig& student, const ModelConfig& teacher, const std::vector<std::int64_t>& layer_map, bool classification, Problems& problems);

// A copy of the chosen layers of `teacher` with its embedding, norms and head.
std::unique_ptr<Transformer> make_student(const Transformer& teacher, const StudentOptions& options);

// What objectives need to know of the two models. Zero = not known yet (a recipe that is only being checked).
struct ObjectiveShapes {
  std::int64_t student_hidden = 0, teacher_hidden = 0;  // widths that differ get a learned projection, started orthogonal
  bool decoder = false;                                 // logit losses then work from hidden states, in chunks of tokens
  bool cached = false;                                  // the teacher is a cache of likeliest tokens: losses that need more are mistakes
  std::uint64_t seed = 0;                               // of the projections
  bool crossed = false;                                 // the teacher has another tokenizer
  bool sampled = false;                                 // the student writes texts that it learns from
  struct Heads {                                        // of queries, and of keys and values
    std::int64_t query = 0, key = 0, size = 0;
  } student_heads, teacher_heads;
  bool embeds = false;                                  // an encoder without classes on texts without labels
  std::int64_t tokens = 0;                              // decoders: ids of the tokenizer; rows of the heads behind them are padding; 0 = not known
};
// Objectives from a recipe's list. `layer_map[i]` = teacher layer (from 0) whose output student layer i must match.
// Mistakes are collected with their places. A layer map that is empty stands for "not known yet": layers are not checked.
std::vector<std::shared_ptr<Objective>> build_objectives(const Node& list, const std::vector<std::int64_t>& layer_map, Problems& problems, const ObjectiveShapes& shapes = {});
// True when an item of the list is one of the kind `cross_tokenizer`: the source is then cross_tokenizer_teacher().
bool crosses_tokenizers(const Node& objective);
ObjectiveShapes objective_shapes(const ModelConfig& student, const ModelConfig& teacher, std::uint64_t seed);
inline ObjectiveShapes objective_shapes(const Transformer& student, const ModelConfig& teacher, std::uint64_t seed) { return objective_shapes(student.config(), teacher, seed); }
// Logs forward and reverse KL beside objectives that look at other values of the teacher (hidden states, relations, embeddings); teaches nothing.
std::shared_ptr<Objective> divergence_monitor(bool decoder, std::int64_t tokens = 0);
// Columns of logits that are compared: those of the `tokens` of the tokenizer (0 = unknown: all that both have); rows of a head behind them are
// padding, whether or not both have equally many. 0 = all columns. Error where it is another vocabulary or label set: the numbers differ by more
// than a rounding to a multiple of 512.
std::int64_t shared_logits(std::int64_t student, std::int64_t teacher, std::int64_t tokens = 0);
// The list that stands for an absent one. Classifier: 0.5 x label cross entropy + T^2 KL at T = 2 + 10 x hidden MSE;
// text: forward KL at T = 1, which is what evaluation measures.
Node default_objective(bool classifier);
// That of a model: of an encoder without classes 1 - cosine of the pooled vectors.
Node default_objective(const ModelConfig& model);
// Kinds of objectives and their options, for `explain` and documentation: key, names of the rows, fields.
struct ObjectiveKindInfo {
  std::string key, summary;
  std::vector<std::string> names;
  std::vector<FieldInfo> fields;
};
std::vector<ObjectiveKindInfo> objective_kinds();
// Student layer -> teacher layer: the last dropped layer that follows the copied one (the next kept layer sees its original input).
std::vector<std::int64_t> default_layer_map(const std::vector<std::int64_t>& keep_layers, std::int64_t teacher_layers);

// Error unless it names one teacher layer for each student layer.
void check_layer_map(const std::vector<std::int64_t>& map, std::int64_t student_layers, std::int64_t teacher_layers);
// Of a student that is no copy of teacher layers: evenly spread, the last to the last.
std::vector<std::int64_t> even_layer_map(std::int64_t student_layers, std::int64_t teacher_layers);

// The map of the options, checked against both models; the default rule where none is given.
std::vector<std::int64_t> student_layer_map(const StudentOptions& options, std::int64_t teacher_layers);

// Sets context.layer_map. Without keep_layers the student may be one of an earlier stage: its map, in the context, holds.
TrainResult distill(Transformer& student, const DistillOptions& options, StageContext& context);

}  // namespace kompakt
