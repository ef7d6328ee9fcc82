// The list of fields of the training options: recipe keys, ranges and help come from here.
#include "train/options.h"

#include "train/precision.h"
#include "train/schedule.h"

namespace kompakt {

void fields(FieldVisitor& visitor, TrainOptions& options) {
  visitor.number("epochs", options.epochs, "passes over the training data; may be a fraction; ignored when steps > 0", {.min = 0, .open_min = true});
  visitor.integer("steps", options.steps, "optimizer steps; 0 = from epochs", {.min = 0});
  visitor.integer("batch_size", options.batch_size, "sequences per micro batch", {.min = 1, .max = 65536});
  visitor.integer("accumulate", options.accumulate, "micro batches per optimizer step", {.min = 1, .max = 65536});
  visitor.integer("sequence_length", options.sequence_length, "tokens per row of packed text", {.min = 2});
  visitor.number("learning_rate", options.learning_rate, "peak learning rate", {.min = 0, .max = 1, .open_min = true});
  visitor.number("head_learning_rate", options.head_learning_rate, "peak learning rate of the classifier; 0 = learning_rate", {.min = 0, .max = 1});
  visitor.number("embedding_learning_rate", options.embedding_learning_rate, "peak learning rate of the embeddings; 0 = learning_rate", {.min = 0, .max = 1});
  visitor.number("weight_decay", options.weight_decay, "decoupled weight decay of the matrices of blocks and head", {.min = 0, .max = 1});
  visitor.number("beta1", options.beta1, "AdamW: decay of the first moment", {.min = 0, .max = 0.9999});
  visitor.number("beta2", options.beta2, "AdamW: decay of the second moment", {.min = 0, .max = 0.999999});
  visitor.number("epsilon", options.epsilon, "AdamW: added to the root of the second moment", {.min = 0, .max = 1, .open_min = true});
  visitor.choice("schedule", options.schedule, "course of the learning rate after the warm-up", schedule_names());
  visitor.number("warmup", options.warmup, "share of all steps with rising learning rate", {.min = 0, .max = 1});
  visitor.number("final_ratio", options.final_ratio, "learning rate at the end / peak", {.min = 0, .max = 1});
  visitor.number("clip", options.clip, "largest global gradient norm; 0 = off", {.min = 0});
  visitor.number("dropout", options.dropout, "dropout on the pooled vector of a classifier", {.min = 0, .max = 0.95});
  visitor.number("label_smoothing", options.label_smoothing, "share of the target spread over all classes", {.min = 0, .max = 0.95});
  visitor.integer("bucket_batches", options.bucket_batches, "sort by length inside chunks of so many batches; 0 = no sorting", {.min = 0});
  visitor.choice("precision", options.precision, "auto = bf16 autocast where the hardware multiplies bf16, else float32", precision_names());
  visitor.texts("freeze", options.freeze, "patterns of parameter names that stay as they are (* = anything)");
  visitor.choice("keep", options.keep, "weights at the end: of the last step, or of the best epoch on dev", {"last", "best"});
  visitor.integer("save_every_steps", options.save_every_steps, "steps between two saved states", {.min = 1});
}

}  // namespace kompakt
