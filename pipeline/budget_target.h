// What a byte budget of the quantize stage may choose from: the exports of the recipe, and the exact size of the first of them.
#pragma once

#include <functional>
#include <string>

#include "data/tokenizer.h"
#include "model/transformer.h"
#include "quantize/budget.h"

namespace kompakt {

struct Recipe;

// `model` (weights, or shapes alone) must outlive the target. `halves`: what has no grid will be half-precision values, as sizes for
// shapes alone take it anyway. `whole`: parameters without a grid whose values half precision will not hold: the file keeps float32.
// Without an export stage the packed format of kompakt is meant. Error when no export saves bytes.
BudgetTarget budget_target(const Recipe& recipe, const Transformer& model, const Tokenizer& tokenizer, bool halves, std::function<bool(const std::string& parameter)> whole = {});

}  // namespace kompakt
