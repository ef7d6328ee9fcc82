// What a block-by-block run has finished, on disk: a killed run goes on with the next block, to the same bytes.
#pragma once

#include <chrono>
#include <filesystem>

#include "core/json.h"
#include "quantize/stage.h"
#include "train/calibration.h"
#include "train/state.h"

namespace kompakt {

class BlockRecords {
 public:
  // In context.work; without a work folder nothing is kept. `identity`: what the results depend on beside the model; records of
  // another one are an Error when the run resumes.
  BlockRecords(const StageContext& context, Json identity);

  struct Record {
    QuantizedModel quantized;  // of the block alone
    Json layers;               // its rows of the report
    WeightMasks masks;         // of weights that became zero in the block
  };
  // The record of block `layer` with its norms and biases put into the model; nothing when there is none.
  std::optional<Record> load(std::int64_t layer, Transformer& model) const;
  void save(std::int64_t layer, Transformer& model, const QuantizedModel& quantized, const Json& layers, const WeightMasks& masks) const;

  // Activations in front of a block. Saved at most every half minute: what lies between is computed again, which takes less.
  // The first block that they were saved for, or 0.
  std::int64_t load_activations(SequentialCalibration& calibration) const;
  void save_activations(std::int64_t layer, const SequentialCalibration& calibration);

 private:
  std::filesystem::path block_folder(std::int64_t layer) const;
  std::filesystem::path activation_file() const;
  std::filesystem::path work_;
  bool resume_;
  Json identity_;
  std::chrono::steady_clock::time_point saved_ = std::chrono::steady_clock::now();
};

}  // namespace kompakt
