// The list of fields of the training options: recipe keys, ranges and help come from here.
#include "train/options.h"

#include "train/optimizer.h"
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
  visitor.flag("find_learning_rate", options.find_learning_rate, "choose learning_rate by a sweep of 80 steps on a copy of the weights: where the loss falls fastest; the other rates move with it");
  visitor.number("head_learning_rate", options.head_learning_rate, "peak learning rate of the classifier; 0 = learning_rate", {.min = 0, .max = 1});
  visitor.number("embedding_learning_rate", options.embedding_learning_rate, "peak learning rate of the embeddings; 0 = learning_rate", {.min = 0, .max = 1});
  visitor.number("norm_learning_rate", options.norm_learning_rate, "peak learning rate of norms and biases; 0 = learning_rate", {.min = 0, .max = 1});
  visitor.number("weight_decay", options.weight_decay, "decoupled weight decay of the matrices of blocks and head", {.min = 0, .max = 1});
  visitor.choice("optimizer", options.optimizer, "AdamW with moments in float32, or in 8 bits by blocks: a quarter of their memory", optimizer_names());
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
  visitor.flag("recompute", options.recompute, "activation checkpointing: keep the inputs of blocks alone and run them again in the backward pass; a third more time");
  visitor.number("ema", options.ema, "decay of the running mean of the weights, which is scored and kept; 0 = the weights themselves", {.min = 0, .max = 0.99999});
  visitor.section("lora", options.has_lora, "train low-rank adapters and the classifier alone; merged into the weights at the end", [&](FieldVisitor& inner) {
    inner.integer("rank", options.lora.rank, "inner dimension of an adapter", {.min = 1, .max = 1024});
    inner.number("alpha", options.lora.alpha, "the adapter's output is multiplied by alpha / rank", {.min = 0, .open_min = true});
    inner.texts("targets", options.lora.targets, "patterns of linear layers that get one (* = anything); empty = all of the blocks");
    inner.flag("dora", options.lora.dora, "train the length of every weight row too, apart from its direction");
  });
  visitor.integer("evaluate_every_steps", options.evaluate_every_steps, "steps between two held-out scores; 0 = at the end of each epoch", {.min = 0});
  visitor.integer("stop_after", options.stop_after, "stop after so many held-out scores in a row that are no better; 0 = never", {.min = 0});
  visitor.texts("freeze", options.freeze, "patterns of parameter names that stay as they are (* = anything)");
  visitor.choice("keep", options.keep, "weights at the end: of the last step, or of the best epoch on dev", {"last", "best"});
  visitor.integer("save_every_steps", options.save_every_steps, "steps between two saved states", {.min = 1});
}

}  // namespace kompakt
