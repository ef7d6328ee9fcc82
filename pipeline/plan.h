// `kompakt plan`: everything `run` checks, plus predicted bytes, memory and time. Computes no stage.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/json.h"
#include "pipeline/recipe.h"
#include "pipeline/task_data.h"
#include "quantize/grids.h"

namespace kompakt {

struct StagePrediction {
  std::string title;
  std::int64_t bytes = 0;         // files that the stage writes
  std::int64_t memory_bytes = 0;  // peak resident memory
  double seconds = 0;
  std::int64_t parameters = 0;
  std::map<std::string, std::string> formats;  // tensor -> grid, of the quantize stage
  std::vector<std::string> notes;
  Json shapes;                                 // of stages that change the shape
};

// Shapes are carried through all stages; a shape that a stage or an exporter cannot take is an Error here, before any work.
std::vector<StagePrediction> predict_stages(const Recipe& recipe, const LoadedData& data);
std::string plan_table(const Recipe& recipe, const std::vector<StagePrediction>& predictions);
Json plan_json(const Recipe& recipe, const std::vector<StagePrediction>& predictions);

// Bytes of the packed artifact of a shape: codes, scales, floats as halves, header; tokenizer estimated from the vocabulary.
std::int64_t predict_packed_bytes(const ModelConfig& config, const std::map<std::string, GridSpec>& quantized);
// GFLOP/s of a float32 matrix product with all threads, measured for a fifth of a second.
double measure_gigaflops();

}  // namespace kompakt
