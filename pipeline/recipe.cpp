#include "pipeline/recipe.h"

#include <algorithm>
#include <cstdlib>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"
#include "pipeline/earlier_task.h"
#include "pipeline/stages.h"
#include "quantize/held_weights.h"
#include "report/gates.h"

namespace kompakt {
namespace fs = std::filesystem;
namespace {

struct DataRole {
  const char* name;
  const char* help;
};
constexpr DataRole data_roles[] = {
    {"train", "what the model learns from"},
    {"dev", "held-out part of the training data that choices are made on; made from train by `holdout` when absent"},
    {"test", "what the report measures; never seen by a stage"},
    {"calibration", "text that post-training quantization looks at"},
    {"heldout", "text for early stopping"},
    {"previous", "test data of the task that the model did before: every model is measured on them too, against the one that the run begins with"},
    {"rehearsal", "training data of the task before, mixed into train"},
};

void recipe_top(FieldVisitor& v, Recipe& recipe, Node& data, Node& stages) {
  std::int64_t seed = static_cast<std::int64_t>(recipe.seed);
  bool has_teacher = true;
  v.text("name", recipe.name, "name of the run; its folder is runs/NAME");
  v.integer("seed", seed, "everything random is a function of it", {.min = 0});
  recipe.seed = static_cast<std::uint64_t>(seed);
  v.section("teacher", has_teacher, "the big model", [&](FieldVisitor& t) {
    t.text("path", recipe.teacher.path, "Hugging Face folder (config.json + safetensors), .gguf file, artifact, or run folder (its artifact, else its last stage)");
    t.text("tokenizer", recipe.teacher.tokenizer, "folder or file of the tokenizer when it does not lie with the weights");
    t.choice("precision", recipe.teacher.precision, "how its weights are held while it answers the stages that learn from it, decoded layer by layer: float32; bf16; int8 (a scale a row); int4 (groups of 64, embedding and head int8). Other outputs, so another cache; figures of the report always come from float32", held_precision_names());
  });
  v.subtree("data", data, "train, dev, test, calibration, heldout, previous, rehearsal: each a map of files, format, ...");
  v.subtree("stages", stages, "list of stages in the order in which they run");
  v.texts("gates", recipe.gates, "conditions on the report; exit code 3 when one is not met");
  v.flag("tensorboard", recipe.tensorboard, "write the numbers of every training as TensorBoard event files too, into RUN/tensorboard");
  v.text("store", recipe.store, "folder where stage outputs are kept and shared between runs; empty = ~/.cache/kompakt");
}

void data_fields(FieldVisitor& v, const std::string& role, DataSource& source, double& rehearsal_share) {
  fields(v, source);
  if (role == "rehearsal") v.number("share", rehearsal_share, "classification: part of the training examples that come from here, drawn by seed; 0 = all of them are added", {.min = 0, .max = 0.95});
}

void read_data(const Node& node, Recipe& recipe, Problems& problems) {
  if (node.is_null()) return;
  if (!node.is_map()) {
    problems.add(Error("\"data\" must be a map").at(node.place.text()).given(node.kind_name()));
    return;
  }
  std::vector<std::string> names;
  for (const DataRole& role : data_roles) names.emplace_back(role.name);
  for (const Node::Entry& entry : node.entries) {
    if (std::find(names.begin(), names.end(), entry.key) == names.end()) {
      problems.add(Error(str("unknown data set \"", entry.key, "\"", did_you_mean(entry.key, names))).at(entry.place.text()).allowed(join(names, ", ")));
      continue;
    }
    DataSource source;
    read_fields(entry.value, str("data set \"", entry.key, "\""), problems, [&](FieldVisitor& v) { data_fields(v, entry.key, source, recipe.rehearsal_share); });
    if (source.files.empty()) problems.add(Error(str("data set \"", entry.key, "\" names no files")).at(entry.place.text()).hint("add files: [FILE, ...]"));
    for (const std::string& file : source.files) {
      const fs::path path = recipe.path_of(file);
      if (!fs::exists(path)) problems.add(Error(str("there is no file for data set \"", entry.key, "\"")).at(entry.value.place.text()).given(path.string()).hint("check the path; relative paths start at the recipe's folder"));
    }
    recipe.data[entry.key] = std::move(source);
  }
}

// The path of a run folder or of an artifact becomes that of the model in it.
void resolve_model(std::string& path, const Recipe& recipe, const std::string& place, Problems& problems) {
  try {
    path += model_inside(recipe.path_of(path));
  } catch (const Error& error) {
    problems.add(error.place().empty() ? Error(error).at(place) : error);
  }
}

void resolve_student(Node& options, const Recipe& recipe, Problems& problems) {
  const Node* student = options.find("student");
  const Node* model = student && student->is_map() ? student->find("model") : nullptr;
  if (!model || model->scalar.empty()) return;
  std::string path = model->scalar;
  if (!fs::exists(recipe.path_of(path))) {
    problems.add(Error("there is no student").at("distill.student.model").given(recipe.path_of(path).string()).hint("check the path; relative paths start at the recipe's folder"));
    return;
  }
  resolve_model(path, recipe, "distill.student.model", problems);
  Node resolved = *student;
  resolved.set("model", Node::text(path, true));
  options.set("student", std::move(resolved));
}

// quantize.budget.not_larger_than becomes the size of that file: what a run depends on is the number, not the place.
void resolve_budget(Node& options, const Recipe& recipe, Problems& problems) {
  const Node* budget = options.find("budget");
  if (!budget || !budget->is_map()) return;
  const Node* other = budget->find("not_larger_than");
  if (!other || other->scalar.empty()) return;
  const fs::path path = recipe.path_of(other->scalar);
  if (!fs::is_regular_file(path)) {
    problems.add(Error("there is no file to compare the budget with").at("quantize.budget.not_larger_than").given(path.string()).hint("check the path; relative paths start at the recipe's folder"));
    return;
  }
  Node resolved = *budget;
  resolved.set("bytes", Node::text(std::to_string(fs::file_size(path))));
  resolved.set("not_larger_than", Node::text("", true));
  options.set("budget", std::move(resolved));
}

void read_stages(const Node& node, Recipe& recipe, Problems& problems) {
  if (!node.is_list() || node.items.empty()) {
    problems.add(Error("\"stages\" must be a list with at least one stage").at(node.is_null() ? recipe.file : node.place.text()).allowed(join(stage_names(), ", ")));
    return;
  }
  int number = 0;
  for (const Node& item : node.items) {
    ++number;
    const bool bare = item.is_scalar();
    if (!bare && (!item.is_map() || item.entries.size() != 1)) {
      problems.add(Error("a stage is a list item with one key").at(item.place.text()).given(item.is_map() ? str(item.entries.size(), " keys") : std::string(item.kind_name())).hint("write \"- distill: {...}\""));
      continue;
    }
    const std::string name = bare ? item.scalar : item.entries.front().key;
    const Place place = bare ? item.place : item.entries.front().place;
    const StageRow* row = find_stage(name);
    if (!row) {
      problems.add(Error(str("unknown stage \"", name, "\"", did_you_mean(name, stage_names()))).at(place.text()).allowed(join(stage_names(), ", ")));
      continue;
    }
    RecipeStage stage;
    stage.row = row;
    stage.place = place;
    stage.title = str(number < 10 ? "0" : "", number, "-", name);
    Node options = bare || item.entries.front().value.is_null() ? Node::map() : item.entries.front().value;
    if (options.place.line == 0) options.place = place;
    stage.options = row->check(options, str("stage \"", name, "\""), problems);
    resolve_budget(stage.options, recipe, problems);
    resolve_student(stage.options, recipe, problems);
    recipe.stages.push_back(std::move(stage));
  }
}

bool has_kind(const Recipe& recipe) { return recipe.find_data("train") || recipe.find_data("test") || recipe.find_data("dev"); }

// Texts without labels, for encoders: what would ask for labels.
void check_sentences(const Recipe& recipe, Problems& problems) {
  for (const auto& [name, source] : recipe.data)
    if (name != "calibration" && source.format != "sentences") problems.add(Error(str("data set \"", name, "\" is of another kind than the other data")).at(recipe.file).given(source.format).allowed("sentences").hint("give it the same format"));
  for (const char* name : {"previous", "rehearsal"})
    if (recipe.find_data(name)) problems.add(Error(str("data set \"", name, "\" is for labels and for running text")).at(recipe.file).given("format: sentences").hint("remove it"));
  for (const RecipeStage& stage : recipe.stages)
    if (stage.row->name == "finetune" || stage.row->name == "search" || stage.row->name == "tune")
      problems.add(Error(str("stage \"", stage.row->name, "\" needs labels or running text, and the data are sentences")).at(stage.place.text()).given("format: sentences").allowed("distill, prune, quantize, export, evaluate"));
}

// What one key alone cannot tell: stages without the data or the order that they need.
void check_together(const Recipe& recipe, Problems& problems) {
  const bool has_train = recipe.find_data("train");
  bool exported = false;
  for (const RecipeStage& stage : recipe.stages) {
    if (stage.row->needs_train && !has_train) problems.add(Error(str("stage \"", stage.row->name, "\" needs training data")).at(stage.place.text()).hint("add data: {train: {files: [...], ...}}"));
    if (exported && stage.row->changes_weights) problems.add(Error(str("stage \"", stage.row->name, "\" stands after \"export\"")).at(stage.place.text()).hint("move \"export\" behind the last stage that changes the model"));
    exported = exported || stage.row->name == "export";
  }
  const DataSource *previous = recipe.find_data("previous"), *rehearsal = recipe.find_data("rehearsal");
  if (recipe.is_classification() && !recipe.has_labels()) check_sentences(recipe, problems);
  else
    for (const char* name : {"train", "dev", "test", "previous", "rehearsal"})
      if (const DataSource* source = recipe.find_data(name); source && source->format == "sentences")
        problems.add(Error(str("data set \"", name, "\" has no labels, and the others are of another kind")).at(recipe.file).given("format: sentences").allowed(recipe.has_labels() ? "format: classification" : "format: text").hint("give all data sets of a run the same format"));
  if (rehearsal && !has_train) problems.add(Error("data set \"rehearsal\" is mixed into training data, and there are none").at(recipe.file).hint("add data: {train: {files: [...], ...}}, or remove rehearsal"));
  if (rehearsal && rehearsal->format == "text" && recipe.rehearsal_share > 0) problems.add(Error("rehearsal.share is for classification").at(recipe.file).given(shortest(recipe.rehearsal_share)).hint("of text, rehearsal.tokens says how much is mixed in"));
  for (const auto& [name, source] : {std::pair("previous", previous), std::pair("rehearsal", rehearsal)}) {
    if (source && has_kind(recipe) && (source->format == "classification") != recipe.is_classification())
      problems.add(Error(str("data set \"", name, "\" is of another kind than the other data")).at(recipe.file).given(source->format).hint("a run measures either labels or text: give it the same format"));
    if (source && source == rehearsal && (source->max_length > 0 || source->refuse_long))
      problems.add(Error("max_length and refuse_long of data set \"rehearsal\" would not be used").at(recipe.file).hint("its texts are cut as those of train are: set them there"));
    if (source && source->holdout > 0) problems.add(Error(str("\"holdout\" of data set \"", name, "\" would not be used")).at(recipe.file).hint("it is for train"));
  }
  if (previous && rehearsal && !previous->files.empty() && previous->files == rehearsal->files)
    problems.add(Error("data sets \"previous\" and \"rehearsal\" are the same files").at(recipe.file).given(join(previous->files, ", ")).hint("what is trained on is no test: give data.previous test data"));
  for (const std::string& gate : recipe.gates)
    if (!previous && (gate.find("previous_") != std::string::npos || gate.find("start.") != std::string::npos))
      problems.add(Error("the gate asks for the task before, and the recipe names no data of it").at(recipe.file + ": gates").given(gate).hint("add data: {previous: {files: [...], ...}}"));
  for (const auto& [name, source] : recipe.data)
    if (source.format == "text" && source.holdout > 0) problems.add(Error(str("\"holdout\" of data set \"", name, "\" is for classification only")).at(recipe.file).hint("give data: {heldout: {...}} for text"));
  std::vector<std::string> subjects;
  for (const RecipeStage& stage : recipe.stages) subjects.insert(subjects.end(), {stage.title, std::string(stage.row->name)});
  for (const std::string& gate : recipe.gates) {
    try {
      parse_gate(gate, subjects);
    } catch (const Error& error) {
      problems.add(Error(error.message()).at(recipe.file + ": gates").given(gate));
    }
  }
}

}  // namespace

fs::path Recipe::path_of(const std::string& relative) const {
  if (starts_with(relative, "~/"))
    if (const char* home = std::getenv("HOME")) return fs::path(home) / relative.substr(2);
  return fs::path(relative).is_absolute() ? fs::path(relative) : (base / relative).lexically_normal();
}

const DataSource* Recipe::find_data(const std::string& name) const {
  const auto found = data.find(name);
  return found == data.end() ? nullptr : &found->second;
}

bool Recipe::is_classification() const {
  for (const char* name : {"train", "test", "dev", "previous"})
    if (const DataSource* source = find_data(name)) return source->format != "text";
  return false;
}

bool Recipe::has_labels() const {
  for (const char* name : {"train", "test", "dev", "previous"})
    if (const DataSource* source = find_data(name)) return source->format == "classification";
  return false;
}

Recipe recipe_from_node(Node root, const std::string& file, const fs::path& base) {
  Problems problems;
  Recipe recipe;
  recipe.file = file;
  recipe.base = base;
  Node data, stages;
  read_fields(root, "the recipe", problems, [&](FieldVisitor& v) { recipe_top(v, recipe, data, stages); });
  if (recipe.name.empty()) recipe.name = fs::path(file).stem().string();
  if (recipe.name.find('/') != std::string::npos || recipe.name[0] == '.') problems.add(Error("a name may not hold \"/\" or start with a dot").at(file).given(recipe.name));
  if (recipe.teacher.path.empty()) problems.add(Error("the recipe names no teacher").at(file).hint("add teacher: {path: FOLDER}"));
  else if (!fs::exists(recipe.path_of(recipe.teacher.path))) problems.add(Error("there is no teacher").at(file).given(recipe.path_of(recipe.teacher.path).string()).hint("check the path; scripts/fetch_teacher.sh fetches those of the shipped recipes"));
  else resolve_model(recipe.teacher.path, recipe, "teacher.path", problems);
  read_data(data, recipe, problems);
  read_stages(stages, recipe, problems);
  check_together(recipe, problems);
  problems.throw_if_any("the recipe cannot run");

  Node data_node = Node::map();
  for (auto& [name, source] : recipe.data) data_node.set(name, write_fields([&, role = name](FieldVisitor& v) { data_fields(v, role, source, recipe.rehearsal_share); }));
  Node stage_list = Node::list();
  for (const RecipeStage& stage : recipe.stages) {
    Node item = Node::map();
    item.set(std::string(stage.row->name), stage.options);
    stage_list.items.push_back(std::move(item));
  }
  recipe.resolved = write_fields([&](FieldVisitor& v) { recipe_top(v, recipe, data_node, stage_list); });
  return recipe;
}

Recipe read_recipe(const fs::path& file, const std::vector<std::string>& sets) {
  Node root = read_yaml(file);
  if (!root.is_map()) throw Error("a recipe is a map of keys and values").at(file.string()).given(root.kind_name()).hint("recipes/quickstart.yaml is an example");
  for (const std::string& set : sets) set_path(root, set);
  return recipe_from_node(std::move(root), file.string(), file.has_parent_path() ? file.parent_path() : fs::path("."));
}

Recipe single_stage_recipe(const std::string& stage, const fs::path& model, const std::vector<std::string>& sets) {
  Node root = Node::map();
  root.set("name", Node::text(stage, true));
  Node teacher = Node::map();
  teacher.set("path", Node::text(fs::absolute(model).string(), true));
  root.set("teacher", std::move(teacher));
  Node item = Node::map();
  item.set(stage, Node::map());
  root.set("stages", Node::list({std::move(item)}));
  const std::string prefix = stage + ".";
  for (const std::string& set : sets) set_path(root, starts_with(set, prefix) ? "stages." + set : set);
  return recipe_from_node(std::move(root), str("kompakt ", stage), fs::current_path());
}

std::vector<FieldInfo> explain_recipe() {
  Recipe recipe;
  Node data, stages;
  return explain_fields([&](FieldVisitor& v) { recipe_top(v, recipe, data, stages); });
}

}  // namespace kompakt
