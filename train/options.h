// Options of the training loop, shared by finetune, distill, recovery after pruning and quantization-aware training.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/fields.h"

namespace kompakt {

struct TrainOptions {
  double epochs = 3;                      // may be a fraction; ignored when steps > 0
  std::int64_t steps = 0;                 // optimizer steps
  std::int64_t batch_size = 32;           // sequences per micro batch
  std::int64_t accumulate = 1;            // micro batches per step; losses are means over the whole step
  std::int64_t sequence_length = 512;     // text data only
  double learning_rate = 1e-4;
  double head_learning_rate = 0;          // classifier; 0 = learning_rate
  double embedding_learning_rate = 0;     // 0 = learning_rate
  double weight_decay = 0.01;             // matrices of blocks and head only
  double beta1 = 0.9, beta2 = 0.98, epsilon = 1e-6;
  std::string schedule = "linear";        // row of the table of schedules
  double warmup = 0.1;                    // share of all steps
  double final_ratio = 0;                 // learning rate at the end / peak
  double clip = 1.0;                      // global gradient norm; 0 = off
  double dropout = 0.1;                   // on the pooled vector
  double label_smoothing = 0;
  std::int64_t bucket_batches = 16;       // sort by length inside chunks of so many batches
  std::string precision = "auto";         // auto | float32 | bf16 (autocast, float32 masters)
  std::vector<std::string> freeze;        // patterns of parameter names (* = anything)
  std::string keep = "last";              // last | best (epoch by dev score)
  std::int64_t save_every_steps = 100;    // state for resume
};
void fields(FieldVisitor& visitor, TrainOptions& options);

}  // namespace kompakt
