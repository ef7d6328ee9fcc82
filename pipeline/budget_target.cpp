#include "pipeline/budget_target.h"

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"
#include "data/tokenizer_gguf.h"
#include "export/exporters.h"
#include "model/families.h"
#include "pipeline/recipe.h"
#include "pipeline/stage_options.h"
#include "pipeline/stages.h"

namespace kompakt {
namespace {

std::vector<const Exporter*> target_exporters(const Recipe& recipe) {
  std::vector<const Exporter*> out;
  for (const RecipeStage& stage : recipe.stages) {
    if (stage.row->name != "export") continue;
    ExportOptions options;
    Problems problems;
    read_fields(stage.options, "stage \"export\"", problems, [&](FieldVisitor& v) { fields(v, options); });
    problems.throw_if_any("the export cannot be read");
    for (const std::string& format : options.formats) out.push_back(find_exporter(format));
  }
  if (out.empty()) out.push_back(find_exporter("kompakt"));
  return out;
}

}  // namespace

BudgetTarget budget_target(const Recipe& recipe, const Transformer& model, const Tokenizer& tokenizer, bool halves, std::function<bool(const std::string& parameter)> whole) {
  const std::vector<const Exporter*> all = target_exporters(recipe);
  const Exporter* first = nullptr;
  for (const Exporter* exporter : all)
    if (!first && exporter->file_bytes) first = exporter;
  if (!first) throw Error("a byte budget needs an export that saves bytes").at("stage \"export\"").given(std::string(all.front()->name)).allowed("gguf, kompakt").hint("add the format to export.formats");
  for (const Exporter* exporter : all)
    for (const std::string& obstacle : exporter->obstacles(model.config(), {})) throw Error(str("the model cannot be written as ", exporter->name, ": ", obstacle)).at("stage \"export\"");

  BudgetTarget target;
  target.format = std::string(first->name);
  for (const std::string_view name : first->budget_formats) target.formats.emplace_back(name);
  target.holds = [all](const GridSpec& spec, std::int64_t columns, std::string& why) {
    for (const Exporter* exporter : all)
      if (!exporter->holds(spec, columns, why)) return false;
    return true;
  };
  target.tensor_bytes = first->tensor_bytes;
  std::vector<std::pair<std::string, GgufValue>> metadata;
  std::int64_t beside = 0;
  if (first->needs_gguf_tokenizer) {
    metadata = gguf_tokenizer_metadata(tokenizer, model.config().vocab);
  } else {
    const TemporaryFolder folder;
    tokenizer.save_compact(folder.path());
    beside = static_cast<std::int64_t>(bytes_on_disk(folder.path()));
  }
  target.file_bytes = [first, &model, halves, beside, whole = std::move(whole), metadata = std::move(metadata), name = recipe.name](const std::map<std::string, GridSpec>& plan) {
    return first->file_bytes({model, plan, name, halves, metadata, whole}) + beside;
  };
  return target;
}

}  // namespace kompakt
