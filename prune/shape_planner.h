// Which shapes structured pruning may lead to: widths, head counts, layers and vocabulary sizes that the model's own rules and
// every format of the recipe allow, and what each does to the bytes of the whole file. Computes nothing on weights.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/json.h"
#include "model/config.h"
#include "prune/stage.h"
#include "prune/structured.h"

namespace kompakt {

struct FileSize {
  std::int64_t bytes = 0, embedding = 0;  // whole file, and the token embedding (with a head that is tied to it) in it
};

// What stores the model in the end, as far as shapes go. Made by the pipeline from the stages that follow.
struct ShapeTarget {
  std::string format;  // "gguf", for messages
  std::string grids;   // "q4_0", for messages; "" = weights stay float
  // Whether rows of `columns` weights of a linear can be stored; `why` says why not. Not set: any can.
  std::function<bool(const std::string& linear, std::int64_t columns, std::string& why)> holds;
  // Size of the file of a shape; not set: unknown.
  std::function<FileSize(const ModelConfig& config)> size;
};

struct ShapeChoice {
  std::int64_t value = 0, kv_heads = 0;  // neurons, heads, layers or pieces; kv_heads of head counts alone
  double share = 1;                      // of what there is now
  FileSize size;                         // with everything else as the stage leaves it; zeros when unknown
  bool asked = false;
};

struct ShapeAxis {
  std::string name, key;  // "feed-forward width", "structured.ffn"
  std::int64_t full = 0;
  std::string rule;       // "multiples of 32 whose rows q4_0 can store"
  std::vector<ShapeChoice> choices;  // falling, the present value first where it is valid
};

// All valid values, falling. Widths: multiples of `multiple`, and the present one. Heads: whole key/value groups, or equally
// many query heads of every group.
std::vector<std::int64_t> valid_widths(const ModelConfig& config, std::int64_t multiple, const ShapeTarget& target);
std::vector<std::int64_t> valid_hidden(const ModelConfig& config, std::int64_t multiple, const ShapeTarget& target);
std::vector<HeadPlan> valid_heads(const ModelConfig& config, const ShapeTarget& target);

// Error with the reason and the nearest valid values when the shape that `options` lead to cannot be stored by `target`.
// What pruned_config refuses is refused first.
void check_shape(const ModelConfig& config, const PruneOptions& options, const ShapeTarget& target);

// The axes that the options move, each at most `most` values: the asked one, its neighbours and some between. `pieces`: size
// of the vocabulary after the stage, 0 = it stays.
std::vector<ShapeAxis> plan_shapes(const ModelConfig& config, const PruneOptions& options, const ShapeTarget& target, std::int64_t pieces = 0, std::size_t most = 9);

Json shapes_json(const std::vector<ShapeAxis>& axes);
// A few lines for people, indented by `indent`.
std::string shapes_text(const Json& axes, const std::string& indent);

}  // namespace kompakt
