// A tiny but complete setting in a temporary folder: BERT teacher of two layers, WordPiece vocabulary, labelled texts, recipe.
#pragma once

#include <filesystem>
#include <string>

#include "core/files.h"

namespace kompakt::testing {

class TinySetting {
 public:
  TinySetting();
  const std::filesystem::path& folder() const { return folder_.path(); }
  std::filesystem::path recipe() const { return folder() / "recipe.yaml"; }
  std::filesystem::path out(const std::string& name) const { return folder() / "runs" / name; }
  // The whole chain with a handful of steps per stage; `stages` replaces the list when given.
  void write_recipe(const std::string& stages = "", const std::string& extra = "");

 private:
  TemporaryFolder folder_;
};

// Relative name -> contents of all files below a folder.
std::string folder_bytes(const std::filesystem::path& folder);

}  // namespace kompakt::testing
