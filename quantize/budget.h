// Mixed precision under a byte budget: every matrix gets the format with which the whole file fits the budget and the predicted
// divergence from the float model is least. Sensitivities (sensitivity.h) and an exact knapsack (knapsack.h); afterwards the
// method of the stage runs with the formats that were chosen.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/fields.h"
#include "quantize/grids.h"
#include "train/context.h"

namespace kompakt {

struct QuantizeOptions;
struct QuantizedModel;

struct BudgetOptions {
  std::int64_t bytes = 0;              // of the whole file
  double bits_per_weight = 0;          // the same as bits of the file per parameter
  std::string not_larger_than;         // the same as the size of another file
  std::vector<std::string> pareto;     // sizes that the predicted curve must hold; alone: the largest is the budget
  std::vector<std::string> formats;    // grids, "int4:128" with a group; empty = those that suit the export
  bool fuse_qkv = false;               // one format for query, key and value of a layer
  std::int64_t tokens = 2048;          // calibration tokens of the backward pass
  std::string errors = "rounding";     // E of a candidate: rounding | method
};
void fields(FieldVisitor& visitor, BudgetOptions& options);
// What one key alone cannot tell. `place` names the stage in messages.
void check_budget(const QuantizeOptions& options, const std::string& place, Problems& problems);
// "q4_0" or "int4:128"; nothing, and a problem at `place`, for what is no grid or no group of it.
std::optional<GridSpec> grid_format(const std::string& text, const std::string& place, Problems& problems);

// What the exports of the run can hold, and how large the first of them becomes. Made by the pipeline.
struct BudgetTarget {
  std::string format;                      // "gguf", for messages
  std::vector<std::string> formats;        // grids when the recipe names none
  std::function<bool(const GridSpec& spec, std::int64_t columns, std::string& why)> holds;  // all exports of the run
  std::function<std::int64_t(const GridSpec& spec, std::int64_t rows, std::int64_t columns)> tensor_bytes;
  std::function<std::int64_t(const std::map<std::string, GridSpec>& plan)> file_bytes;      // tokenizer and metadata included
};

struct BudgetTensor {
  std::string name;
  std::int64_t rows = 0, columns = 0;
  std::vector<GridSpec> formats;  // that its rows and the exports allow
};

// What is known without weights or data: the tensors that take part, their formats, the limits.
struct BudgetFrame {
  std::vector<BudgetTensor> tensors;
  std::map<std::string, GridSpec> smallest;           // the plan of the smallest file
  std::int64_t limit = 0, smallest_bytes = 0, largest_bytes = 0;
  std::vector<std::int64_t> pareto;
  std::vector<std::string> left_out;                  // "q4_k: NAME: rows of 576 do not divide into super-blocks of 256 (and 3 more)"
  std::string note() const;                           // for `plan`
};
// Error for an unknown format, one that no tensor can take, a tensor without any, and a budget below the smallest file.
BudgetFrame budget_frame(const ModelConfig& config, const QuantizeOptions& options, const BudgetTarget& target);

// Sensitivities, allocation, quantization with the chosen formats. Fills details["budget"]: chosen format of every tensor,
// predicted bytes and divergence, divergence measured on the tokens of the backward pass, the curve.
// Sensitivities are kept in context.work: a resumed run does not compute them again.
QuantizedModel quantize_within_budget(Transformer& model, const QuantizeOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives, StageContext& context,
                                      const BudgetTarget& target);

}  // namespace kompakt
