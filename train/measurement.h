// What was measured of a model once and serves other runs too: token weights, sensitivities, importance of units. One file each,
// named by a hash over all that decides its content, in a folder that the runs of a store share: another budget, method or tuning
// of the same model on the same text measures nothing again, and neither does a run that was killed.
#pragma once

#include <filesystem>
#include <functional>
#include <string_view>

#include "core/json.h"
#include "model/transformer.h"
#include "train/context.h"

namespace kompakt {

// The file, which need not exist, in `context.measurements`, without that in `context.work`; empty when both are (nothing is kept).
// `kind` names what is measured and the revision of the code that does ("token-weights/1"), `depends` the rest: options, data.
// The model's weights and shape and the seed always count. One pass over the weights.
std::filesystem::path measurement_file(const StageContext& context, const Transformer& model, std::string_view kind, const Json& depends, std::string_view extension);

// Whether `read` took over what `file` holds. False where there is no such file, and with a warning where it is damaged (`read` throws):
// the caller measures then, and writes it anew.
bool recall_measurement(const StageContext& context, const std::filesystem::path& file, std::string_view what, const std::function<void()>& read);

}  // namespace kompakt
