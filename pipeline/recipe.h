// A recipe file to checked options. Every mistake is found and reported at once, with file:line:column.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "core/fields.h"
#include "data/dataset.h"

namespace kompakt {

struct StageRow;

struct TeacherSettings {
  std::string path;       // HF folder or .gguf, relative to the recipe
  std::string tokenizer;  // where the tokenizer lies, when not in `path`
  std::string precision = "float32";  // of the weights while stages ask the teacher for its outputs (quantize/held_weights.h)
};

struct RecipeStage {
  const StageRow* row = nullptr;
  Node options;       // as written, then resolved
  std::string title;  // "02-distill"
  Place place;
};

struct Recipe {
  std::string name;
  std::uint64_t seed = 17;
  TeacherSettings teacher;
  std::map<std::string, DataSource> data;  // train, dev, test, calibration, heldout, previous, rehearsal
  double rehearsal_share = 0;              // of data.rehearsal in the training data; 0 = all of it
  std::vector<RecipeStage> stages;
  std::vector<std::string> gates;
  bool tensorboard = false;          // event files beside metrics.jsonl
  std::string store;                 // folder of the stage store; "" = ~/.cache/kompakt
  std::filesystem::path base;        // folder of the recipe: relative paths start here
  std::string file;
  Node resolved;                     // with every default written out
  std::filesystem::path path_of(const std::string& relative) const;
  const DataSource* find_data(const std::string& name) const;
  bool is_classification() const;    // the train (or test) data are texts of their own, with labels or without
  bool has_labels() const;           // and they have labels
};

// Reads, applies --set assignments, checks everything that needs no data: unknown keys, types, ranges, names, gates' grammar,
// missing files, stages without what they need. Throws one Error that lists all mistakes.
Recipe read_recipe(const std::filesystem::path& file, const std::vector<std::string>& sets = {});
Recipe recipe_from_node(Node root, const std::string& file, const std::filesystem::path& base);

// A recipe for one verb alone: `kompakt quantize --model DIR --set quantize.weights=int4 --set data.calibration.files=[a.txt]`.
Recipe single_stage_recipe(const std::string& stage, const std::filesystem::path& model, const std::vector<std::string>& sets);

std::vector<FieldInfo> explain_recipe();  // the top level

}  // namespace kompakt
