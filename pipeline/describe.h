// Texts for people about this build, this machine, model files, options and failures. What the command line prints.
#pragma once

#include <exception>
#include <filesystem>
#include <string>
#include <utility>

#include "core/error.h"
#include "core/json.h"

namespace kompakt {

std::string version_text();                       // versions of kompakt, torch, HDF5, CUDA
// An exception that is not our Error: message without a stack trace and the exit code (resource for allocation failures).
std::pair<std::string, ExitCode> describe_failure(const std::exception& error);

// `kompakt inspect`: safetensors, GGUF, HDF5, model folders and artifacts.
Json inspect(const std::filesystem::path& path);
std::string inspect_text(const Json& inspection);

// `kompakt explain`: "" = everything there is; a stage, a key path ("quantize.group"), a grid, loss, exporter, ... name.
Json explain(const std::string& topic);
std::string explain_text(const Json& explanation);

// `kompakt doctor`: build, machine, devices, memory, disk, and a self test on every device present. "healthy": true when all passed.
Json doctor();
std::string doctor_text(const Json& findings);

}  // namespace kompakt
