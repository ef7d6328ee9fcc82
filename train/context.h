// What the pipeline hands to every stage.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "core/json.h"
#include "data/batches.h"
#include "data/dataset.h"
#include "data/tokenizer.h"
#include "train/objective.h"

namespace kompakt {

class Collective;

class BatchSampler;

// Data tokenized for the model that the stage works on. The test set is never handed to a stage.
struct TaskData {
  enum class Kind { classification, text };
  Kind kind = Kind::classification;
  const Tokenizer* tokenizer = nullptr;
  std::vector<std::string> labels;
  TokenizedExamples train, dev;                        // classification
  std::vector<std::vector<std::int64_t>> train_documents;  // text: token ids per document (training)
  std::vector<std::vector<std::int64_t>> calibration;      // text: windows of equal length
  std::vector<std::vector<std::int64_t>> heldout;          // text: windows for early stopping
  std::string hash;                                    // over everything above
};

// Which weights an earlier stage set to zero for good: name of the Linear -> [out, in] bool, true = stays.
using WeightMasks = std::map<std::string, at::Tensor>;

struct StageContext {
  std::string title;              // "02-distill", for progress and metrics
  std::filesystem::path work;     // scratch of this stage; survives a kill, removed when the stage is done
  std::filesystem::path measurements;  // what other runs measured and this one may take over (train/measurement.h); empty = nothing
  bool resume = false;            // use what `work` holds
  std::uint64_t seed = 0;
  c10::Device device = c10::Device(c10::kCPU);
  const TaskData* data = nullptr;
  TeacherSource* teacher = nullptr;  // null when the run has none
  BatchSampler* sampler = nullptr;   // puts generated texts in place of the data's; null = none
  Objective* watched = nullptr;      // what the loop measures now and then and does not learn from; needs the teacher; null = nothing
  std::vector<std::int64_t> layer_map;  // student layer -> teacher layer whose output it follows; kept from stage to stage
  WeightMasks masks;             // in and out, kept from stage to stage: train() and the stage quantize leave these weights zero
  Collective* ranks = nullptr;   // the other processes that train with this one; null = none
  Json* details = nullptr;           // the stage's part of the report: loss_curve, layers, removed, ...
};

}  // namespace kompakt
