#include "pipeline/earlier_task.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "core/error.h"
#include "core/files.h"
#include "core/hash.h"
#include "core/json.h"
#include "core/log.h"
#include "core/random.h"
#include "core/text.h"
#include "model/checkpoint.h"
#include "pipeline/recipe.h"
#include "pipeline/stages.h"

namespace kompakt {
namespace fs = std::filesystem;
namespace {

bool earlier_has(const std::vector<std::string>& names, const std::string& name) { return std::find(names.begin(), names.end(), name) != names.end(); }

std::vector<std::string> earlier_without(const std::vector<std::string>& names, const std::vector<std::string>& known) {
  std::vector<std::string> out;
  for (const std::string& name : names)
    if (!earlier_has(known, name)) out.push_back(name);
  return out;
}

std::string earlier_list(const std::vector<std::string>& names) {
  constexpr std::size_t shown = 8;
  std::vector<std::string> first(names.begin(), names.begin() + static_cast<std::ptrdiff_t>(std::min(shown, names.size())));
  return join(first, ", ") + (names.size() > shown ? str(" and ", names.size() - shown, " more") : "");
}

}  // namespace

std::string model_inside(const fs::path& path) {
  if (!fs::is_directory(path) || fs::exists(path / "config.json")) return "";
  if (fs::exists(path / "model.gguf")) return "/model.gguf";
  if (!fs::exists(path / "manifest.json")) return "";
  const std::string place = (path / "manifest.json").string();
  const Json manifest = read_json(place);
  std::string inner;
  if (const auto artifact = manifest.find("artifact"); artifact != manifest.end() && artifact->is_object()) {
    inner = "/artifact";
    if (const std::string format = json_get_or<std::string>(*artifact, "format", place, ""); !format.empty() && fs::is_directory(path / "artifact" / format)) inner += "/" + format;
  } else if (const auto stages = manifest.find("stages"); stages != manifest.end() && stages->is_array()) {
    for (const Json& stage : *stages)
      if (const std::string name = json_get_or<std::string>(stage, "name", place, ""); fs::exists(path / name / "config.json")) inner = "/" + name;
  }
  if (inner.empty()) throw Error("the run folder holds no model").at(path.string()).hint("finish that run, or name a folder with config.json and safetensors");
  return inner + model_inside(path.string() + inner);
}

std::vector<std::string> earlier_labels(const Recipe& recipe) {
  const ModelConfig config = load_config(recipe.path_of(recipe.teacher.path));
  if (!config.is_classifier()) throw Error("data.previous is for a model that does a task already, and the one that the run begins with has no classifier").at("teacher.path").given(recipe.teacher.path).hint("name the artifact or a stage of an earlier run, or remove data.previous");
  return config.labels;
}

std::vector<std::string> continued_labels(const Recipe& recipe, const std::vector<std::string>& names) {
  const bool previous = recipe.find_data("previous");
  const std::vector<std::string> known = previous ? earlier_labels(recipe) : load_config(recipe.path_of(recipe.teacher.path)).labels;
  if (known.empty()) return names;
  const auto changes = std::find_if(recipe.stages.begin(), recipe.stages.end(), [](const RecipeStage& stage) { return stage.row->changes_weights; });
  const bool finetunes = std::any_of(recipe.stages.begin(), recipe.stages.end(), [](const RecipeStage& stage) { return stage.row->name == "finetune"; });
  const std::vector<std::string> fresh = earlier_without(names, known);
  if (fresh.empty() && (previous || !finetunes || names.size() == known.size())) return known;
  if (!previous && finetunes) return names;  // a classifier of its own takes the place of the model's
  if (!previous && fresh.size() == names.size() && names.size() <= known.size()) {
    log_warning(str("no label of the data is one of the model (", earlier_list(known), "): they are matched by their order (", earlier_list(names), ")"));
    return names;
  }
  if (!finetunes || changes->row->name != "finetune")
    throw Error(str("the model that the run begins with does not know ", fresh.size() == 1 ? "the label " : "the labels ", earlier_list(fresh))).at(recipe.teacher.path).given(str(names.size(), " labels in the data, ", known.size(), " in the model"))
        .hint("begin the stages with finetune: with data.previous it adds rows for new labels and keeps the old ones, without it makes a new classifier");
  std::vector<std::string> out = known;
  out.insert(out.end(), fresh.begin(), fresh.end());
  return out;
}

ClassificationSet relabel(ClassificationSet set, const std::vector<std::string>& names, const std::string& who) {
  if (set.label_names == names) return set;
  const std::vector<std::string> unknown = earlier_without(set.label_names, names);
  if (!unknown.empty()) throw Error(str(who, unknown.size() == 1 ? " does not know the label " : " does not know the labels ", earlier_list(unknown), did_you_mean(unknown.front(), names))).given(str(set.examples.size(), " examples")).allowed(earlier_list(names));
  for (Example& example : set.examples) {
    const auto place = std::find(names.begin(), names.end(), set.label_names[static_cast<std::size_t>(example.label)]);
    example.label = place - names.begin();
  }
  set.label_names = names;
  set.hash = sha256(str(set.hash, "\n", join(names, "\n")));
  return set;
}

ClassificationSet with_rehearsal(ClassificationSet train, const ClassificationSet& old, double share, std::uint64_t seed) {
  if (old.label_names != train.label_names) throw std::logic_error("with_rehearsal: other labels");
  std::size_t count = old.examples.size();
  if (share > 0) count = std::min(count, static_cast<std::size_t>(std::llround(share / (1 - share) * static_cast<double>(train.examples.size()))));
  std::vector<std::int64_t> order = CounterRandom(seed, "rehearsal").permutation(static_cast<std::int64_t>(old.examples.size()));
  order.resize(count);
  std::sort(order.begin(), order.end());
  for (const std::int64_t i : order) train.examples.push_back(old.examples[static_cast<std::size_t>(i)]);
  train.hash = sha256(str(train.hash, "\n", old.hash, "\n", count));
  return train;
}

}  // namespace kompakt
