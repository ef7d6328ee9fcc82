// The end of a training whose numbers are no numbers any more.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "data/batches.h"
#include "train/telemetry.h"

namespace kompakt {

// Throws the Error that names the step and its numbers; `write`: leaves the step's batches in folder/bad_batch.json first.
[[noreturn]] void stop_for_bad_batch(const std::filesystem::path& folder, const std::string& title, const std::vector<TokenBatch>& batches, const StepRecord& record, bool write);

}  // namespace kompakt
