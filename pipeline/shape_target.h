// What the stages behind a prune stage can store, for the shape planner: grids of quantize, exporters, exact sizes of files.
#pragma once

#include <cstddef>

#include "data/tokenizer.h"
#include "prune/shape_planner.h"

namespace kompakt {

struct Recipe;

// `stage`: index of the prune stage in the recipe. `tokenizer`: of the model as it is; `pruned`: after its vocabulary was cut, or null.
// Both must outlive the target.
// Grids are those of the next quantize stage (of a byte budget: any of its formats, sizes of the smallest choice); exporters
// those of the export stage, sizes those of the first that saves bytes; without either, of plain float32 weights.
ShapeTarget shape_target(const Recipe& recipe, std::size_t stage, const Tokenizer& tokenizer, const Tokenizer* pruned);

}  // namespace kompakt
