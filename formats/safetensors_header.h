// The JSON header of a safetensors file: strict parsing into rows, and writing.
// Knows the header's grammar only; formats/safetensors.cpp checks offsets against the file.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "formats/tensor_data.h"

namespace kompakt {

struct SafetensorsEntry {
  std::string name, dtype;
  std::vector<std::int64_t> shape;
  std::int64_t begin = 0, end = 0;  // bytes, relative to the data section
};

struct SafetensorsHeader {
  std::vector<SafetensorsEntry> entries;  // in the order of the text
  std::map<std::string, std::string> metadata;
};

// One pass without building a tree, so that a hostile header of the largest size costs memory in proportion to its text.
// Throws Error for bad JSON or UTF-8, duplicate names or keys, unknown or missing keys, numbers that are not whole,
// negative or larger than 2^63-1. `place` is the file's name.
SafetensorsHeader parse_safetensors_header(std::string_view text, const std::string& place);

// The text of a header for tensors laid out one after another in the given order, right-padded to a multiple of 8 bytes.
std::string write_safetensors_header(const std::vector<TensorData>& tensors, const std::map<std::string, std::string>& metadata);

}  // namespace kompakt
