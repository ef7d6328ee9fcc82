#pragma once

#include "core/json.h"

namespace kompakt {

// Checks of all CUDA kernels on all devices present, as entries {check, passed, note}; passed is null where nothing could run.
Json doctor_kernels();

}  // namespace kompakt
