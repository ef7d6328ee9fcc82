// What the benchmarks on a folder of scripts/make_toy_model.py share: its windows of tokens, rows chosen by name, scores.
#pragma once

#include <ATen/ATen.h>

#include <chrono>
#include <filesystem>
#include <string>
#include <vector>

#include "core/text.h"
#include "evaluate/language.h"
#include "formats/safetensors.h"
#include "model/checkpoint.h"

namespace kompakt {

using Windows = std::vector<std::vector<std::int64_t>>;

// Rows of a matrix of tokens.safetensors: "calibration" or "evaluation".
inline Windows story_windows(const SafetensorsFile& file, const char* name) {
  const at::Tensor rows = as_tensor(*file.find(name)).to(at::kLong);
  Windows out;
  for (std::int64_t r = 0; r < rows.size(0); ++r) {
    const at::Tensor row = rows[r].contiguous();
    out.emplace_back(row.const_data_ptr<std::int64_t>(), row.const_data_ptr<std::int64_t>() + row.numel());
  }
  return out;
}

// Arguments from `first` on are parts of names; none = every row.
inline bool row_wanted(const std::string& name, int argc, char** argv, int first) {
  bool wanted = argc <= first;
  for (int i = first; i < argc; ++i) wanted = wanted || name.find(argv[i]) != std::string::npos;
  return wanted;
}

// A folder of its own, made, for one row.
inline std::filesystem::path row_folder(const char* program) {
  const auto folder = std::filesystem::temp_directory_path() / str("kompakt-", program, "-", static_cast<long>(std::chrono::steady_clock::now().time_since_epoch().count()));
  std::filesystem::create_directories(folder);
  return folder;
}

struct StoryScore {
  double kl, same_top1, loss;  // means over tokens
};
inline StoryScore story_score(const Transformer& model, const Transformer& teacher, const Windows& text) {
  const LanguageScores scores = score_language(model, &teacher, text);
  double kl = 0, same = 0;
  for (const float value : scores.kl) kl += value;
  for (const unsigned char value : scores.same_top1) same += value;
  const auto count = static_cast<double>(scores.kl.size());
  return {kl / count, same / count, scores.mean_nll()};
}

}  // namespace kompakt
