// Options of the training loop, shared by finetune, distill, recovery after pruning and quantization-aware training.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/fields.h"

namespace kompakt {

struct LoraOptions {
  std::int64_t rank = 8;
  double alpha = 16;                  // the adapter's output is scaled by alpha / rank
  std::vector<std::string> targets;   // patterns of linear layers; empty = all of the blocks
  bool dora = false;                  // a trained length of every row of W + alpha / rank B A beside its direction
};

struct TrainOptions {
  double epochs = 3;                      // may be a fraction; ignored when steps > 0
  std::int64_t steps = 0;                 // optimizer steps
  std::int64_t batch_size = 32;           // sequences per micro batch
  std::int64_t accumulate = 1;            // micro batches per step; losses are means over the whole step
  std::int64_t sequence_length = 512;     // text data only
  double learning_rate = 1e-4;
  bool find_learning_rate = false;        // by a sweep before the first step; the other rates move with it
  double head_learning_rate = 0;          // classifier; 0 = learning_rate
  double embedding_learning_rate = 0;     // 0 = learning_rate
  double norm_learning_rate = 0;          // vectors: norms and biases; 0 = learning_rate
  double weight_decay = 0.01;             // matrices of blocks and head only
  std::string optimizer = "adamw";        // adamw | adamw_8bit
  double beta1 = 0.9, beta2 = 0.98, epsilon = 1e-6;
  std::string schedule = "linear";        // row of the table of schedules
  double warmup = 0.1;                    // share of all steps
  double final_ratio = 0;                 // learning rate at the end / peak
  double clip = 1.0;                      // global gradient norm; 0 = off
  double dropout = 0.1;                   // on the pooled vector
  double label_smoothing = 0;
  std::int64_t bucket_batches = 16;       // sort by length inside chunks of so many batches
  std::string precision = "auto";         // auto | float32 | bf16 (autocast, float32 masters)
  bool recompute = false;                 // activation checkpointing
  double ema = 0;                         // decay of the running mean of weights that the training ends with; 0 = off
  bool has_lora = false;                  // only low-rank adapters (and a classifier) train
  LoraOptions lora;
  std::int64_t evaluate_every_steps = 0;  // held-out score also between epochs; 0 = at their ends only
  std::int64_t stop_after = 0;            // held-out scores in a row without a better one that end the training; 0 = never
  std::vector<std::string> freeze;        // patterns of parameter names (* = anything)
  std::string keep = "last";              // last | best (epoch by dev score)
  std::int64_t save_every_steps = 100;    // state for resume
};
void fields(FieldVisitor& visitor, TrainOptions& options);

}  // namespace kompakt
