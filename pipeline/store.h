// Content-addressed store of finished stage outputs: one folder per key, written whole or not at all.
//
// A key is a hash over everything that decides a stage's bytes: input model, teacher, data, options, seed, code version.
// Runs link the files, so that an ablation which changes only `quantize` reuses everything before it.
#pragma once

#include <filesystem>
#include <functional>
#include <optional>
#include <string>

#include "core/json.h"

namespace kompakt {

class Store {
 public:
  explicit Store(std::filesystem::path root);
  // Folder of a finished stage, or nothing. A damaged entry (missing or changed file sizes) is removed with a warning.
  std::optional<std::filesystem::path> find(const std::string& key) const;
  // `fill` writes into a temporary folder that becomes the entry; records sizes and SHA-256 of all files in outputs.json.
  std::filesystem::path add(const std::string& key, const std::function<void(const std::filesystem::path&)>& fill);
  // name -> sha256 of an entry's files, bookkeeping (stage.json) left out.
  static Json outputs(const std::filesystem::path& entry);
  // Hard links (or copies) all files of an entry but its bookkeeping into `target`, replacing what was there.
  static void link_into(const std::filesystem::path& entry, const std::filesystem::path& target);
  const std::filesystem::path& root() const { return root_; }

 private:
  std::filesystem::path root_;
};

// ~/.cache/kompakt (or $XDG_CACHE_HOME/kompakt) when `configured` is empty.
std::filesystem::path store_folder(const std::string& configured, const std::filesystem::path& base);

}  // namespace kompakt
