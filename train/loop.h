// The one training loop: objectives and constraints come from outside. Resumes to the same bytes after any kill.
#pragma once

#include <memory>
#include <vector>

#include "train/constraint.h"
#include "train/context.h"
#include "train/monitor.h"
#include "train/objective.h"
#include "train/options.h"

namespace kompakt {

struct TrainResult {
  std::int64_t steps = 0;
  double final_loss = 0;
  double dev_score = 0;   // classification: accuracy of the last (or best) epoch on dev; text: -KL or -NLL; NaN without dev
  double seconds = 0;
};

// Trains `model` in place. State (weights, optimizer by parameter name, step) is written to context.work every
// save_every_steps and on SIGINT/SIGTERM (then throws with exit code 130/143). Everything random is a function of
// (seed, step), so a resumed run gives the bytes of an unbroken one on the same machine and thread count.
// A loss that is NaN or infinite stops with an Error and leaves the batch in work/bad_batch.json.
// Weights that context.masks holds at zero stay exactly zero, beside what `constraints` ask for.
// Writes context.details["loss_curve"] and ["dev_curve"], with context.watched ["watched_curve"], and metrics events. One work folder serves one call: a stage that trains twice gives each its own.
// `monitor` (may be null) is asked after every step; what it remembers is saved with the state.
TrainResult train(Transformer& model, const TrainOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives,
                  const std::vector<std::shared_ptr<Constraint>>& constraints, StageContext& context, TrainMonitor* monitor = nullptr);

// The stage `finetune`: labels as objective. A classifier head is added and, for the first stage, filled from class centroids.
struct FinetuneOptions {
  TrainOptions train;
  std::string pooling = "mean";
  bool centroid_head = true;  // start the head from the class centroids of the pooled vectors
  std::int64_t centroid_examples = 0;  // of each class, the first in order; 0 = all
};
void fields(FieldVisitor& visitor, FinetuneOptions& options);
TrainResult finetune(Transformer& model, const FinetuneOptions& options, StageContext& context);

// Head rows = 8 x unit-length class mean of centred, unit-length pooled vectors; bias such that the centring is undone.
// One forward pass, deterministic: 84.7–85.3 % on banking77 with all-MiniLM-L6-v2 before any training.
// `per_class` > 0: of the first so many examples of each class.
void set_centroid_head(Transformer& model, const TokenizedExamples& examples, std::int64_t pad, std::int64_t per_class = 0);

// Arithmetic and peak memory of a training, for `plan`; frozen blocks are counted as what they save.
struct TrainCost {
  double flops = 0;              // forward + backward of all steps, the teacher's forwards included
  std::int64_t memory_bytes = 0; // weights, gradients, optimizer, activations; without the teacher and its cache
};
// `teacher`: null when none is asked for.
TrainCost predict_cost(const ModelConfig& config, const TrainOptions& options, std::int64_t examples, double tokens_per_example, std::int64_t touched_vocabulary, const ModelConfig* teacher);

}  // namespace kompakt
