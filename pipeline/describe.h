// Texts for people about this build, this machine, model files, options and failures. What the command line prints.
#pragma once

#include <cstdint>
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

// `kompakt doctor --latency-table FILE --model DIR`: measures, writes the table (pipeline/latency_table.h) and tells what is in it.
Json write_latency_table(const std::filesystem::path& model, const std::filesystem::path& file, std::int64_t tokens);
std::string latency_table_text(const Json& table);

// `kompakt explain KEY RECIPE`: shapes that the recipe's prune stages may lead to, with bytes (prune/shape_planner.h).
Json explain_shapes(const std::filesystem::path& recipe);
std::string explain_shapes_text(const Json& stages);

}  // namespace kompakt
