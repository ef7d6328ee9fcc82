// What a byte budget of the quantize stage may choose from: the exports of the recipe, and the exact size of the first of them.
#pragma once

#include <functional>
#include <string>

#include "data/tokenizer.h"
#include "model/transformer.h"
#include "quantize/budget.h"

namespace kompakt {

struct Recipe;

// `model` (weights, or shapes alone) must outlive the target. `halves`: matrices without a grid will be half-precision values.
// Without an export stage the packed format of kompakt is meant. Error when no export saves bytes.
BudgetTarget budget_target(const Recipe& recipe, const Transformer& model, const Tokenizer& tokenizer, bool halves);

// Sizes for shapes alone take half precision for tensors without a grid. Of those that `whole` names (by parameter), which
// are values that half precision does not hold, the file keeps float32: adds that to target.file_bytes. `shapes` must outlive it.
void keep_whole_floats(BudgetTarget& target, const Transformer& shapes, std::function<bool(const std::string& parameter)> whole);

}  // namespace kompakt
