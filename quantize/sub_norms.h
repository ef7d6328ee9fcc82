// SubLN in a trained model: RMSNorms in front of the output and the down projection, before it trains on a coarse grid.
#pragma once

#include "core/json.h"
#include "model/transformer.h"
#include "train/context.h"

namespace kompakt {

// Puts them in (Transformer::add_sub_norms) and gives channel j of the input x of its projection the gain
//   g_j = E[x_j^2 / r] / E[x_j^2 / r^2],  r = sqrt(mean_i x_i^2 + eps),
// which minimises E (x_j - g_j x_j / r)^2 over the tokens of the model before: the student starts as close to its teacher as gains
// allow, exactly where r is the same for all tokens. A channel that never fires takes the gain of all channels together.
// (BitDistill starts from gains of one and leaves the change of the function to the training.)
// Looks at `sequences` training examples (classes), calibration windows, or windows of the training text where there are none.
// The bits do not depend on the number of threads. Returns the part of the report: {tokens, changes: relative squared errors
// of the projections' inputs, [{layer, attention, mlp}]}. Error: the model has sub-norms already; no text to measure on.
Json insert_sub_norms(Transformer& model, std::int64_t sequences, std::int64_t window, StageContext& context);

}  // namespace kompakt
