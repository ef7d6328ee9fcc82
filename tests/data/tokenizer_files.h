// Tokenizer files of the shared data, unpacked where needed.
#pragma once

#include <cstdlib>
#include <memory>
#include <string>

#include "core/files.h"
#include "data/tokenizer.h"
#include "tests/support.h"

namespace kompakt::testing {

// tokenizers/hf/<name>/*.xz through the xz program; nullptr where data or program are absent.
inline std::unique_ptr<Tokenizer> unpacked_tokenizer(const std::string& name) {
  const auto folder = shared_data("tokenizers/hf/" + name);
  if (!folder) return nullptr;
  const TemporaryFolder temporary;
  for (const std::string file : {"tokenizer.json", "tokenizer_config.json"}) {
    const std::string command = "xz -dc '" + (*folder / (file + ".xz")).string() + "' > '" + (temporary.path() / file).string() + "'";
    if (std::system(command.c_str()) != 0) return nullptr;
  }
  return load_tokenizer(temporary.path());
}

}  // namespace kompakt::testing
