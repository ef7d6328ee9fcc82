#include "pipeline/shape_target.h"

#include <c10/core/Device.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <set>

#include "core/text.h"
#include "export/exporters.h"
#include "pipeline/budget_target.h"
#include "pipeline/recipe.h"
#include "pipeline/stage_options.h"
#include "pipeline/stages.h"
#include "prune/stage.h"
#include "quantize/stage.h"
#include "train/optimizer.h"

namespace kompakt {
namespace {

template <class Options>
Options target_options(const RecipeStage& stage) {
  Options options;
  Problems problems;
  read_fields(stage.options, "stage \"" + std::string(stage.row->name) + "\"", problems, [&](FieldVisitor& v) { fields(v, options); });
  problems.throw_if_any("the stage's options are not valid");
  return options;
}

std::string target_spec_name(const GridSpec& spec) { return spec.group > 0 && !spec.grid->group_fixed ? str(spec.grid->name, ":", spec.group) : std::string(spec.grid->name); }

// Bytes of the token embedding under a plan, as the exporter stores it.
std::int64_t target_embedding(const Exporter* exporter, const Transformer& shapes, const std::map<std::string, GridSpec>& plan, std::int64_t float_size) {
  const ModelConfig& config = shapes.config();
  const auto found = plan.find(shapes.tokens.name);
  return found != plan.end() && exporter && exporter->tensor_bytes ? exporter->tensor_bytes(found->second, config.vocab, config.hidden) : config.vocab * config.hidden * float_size;
}

// What half precision does not hold: all after a training; behind a narrower stream the gains of its norms, and an embedding whose
// scale follows the hidden size.
std::function<bool(const std::string&)> target_whole(const ModelConfig& config, bool trained) {
  return [trained, scaled = config.embedding_scale != 1](const std::string& name) {
    const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
    return trained || (has("norm") && !has("q_norm") && !has("k_norm")) || (scaled && has("embed_tokens"));
  };
}

}  // namespace

ShapeTarget shape_target(const Recipe& recipe, std::size_t stage, const Tokenizer& tokenizer, const Tokenizer* pruned) {
  std::shared_ptr<QuantizeOptions> quantize;
  std::vector<const Exporter*> exports;
  for (std::size_t i = stage + 1; i < recipe.stages.size(); ++i) {
    if (!quantize && recipe.stages[i].row->name == "quantize") quantize = std::make_shared<QuantizeOptions>(target_options<QuantizeOptions>(recipe.stages[i]));
    if (recipe.stages[i].row->name == "export")
      for (const std::string& format : target_options<ExportOptions>(recipe.stages[i]).formats) exports.push_back(find_exporter(format));
  }
  const auto saves = std::find_if(exports.begin(), exports.end(), [](const Exporter* e) { return e->file_bytes != nullptr; });
  const Exporter* first = saves == exports.end() ? nullptr : *saves;
  if (exports.empty() && quantize) first = find_exporter("kompakt");
  // What was trained has values that half precision does not hold; what is as the checkpoint has it is taken to have none.
  bool trained = false, narrower = false;
  for (std::size_t i = 0; i <= stage; ++i) {
    const Node& options = recipe.stages[i].options;
    const Node* compensate = options.find("compensate");
    trained = trained || recipe.stages[i].row->needs_train || options.find("recover") || (compensate && compensate->scalar != "none");
    if (recipe.stages[i].row->name != "prune") continue;
    const StructuredOptions shape = target_options<PruneOptions>(recipe.stages[i]).structured;
    narrower = narrower || shape.hidden < 1;
    trained = trained || (shape.hidden < 1 && shape.hidden_by == "rotate");
  }
  ShapeTarget target;
  if (first) target.format = std::string(first->name);
  const auto words = [full = &tokenizer, pruned](const ModelConfig& config) -> const Tokenizer& { return pruned && pruned->vocab_size() == config.vocab ? *pruned : *full; };
  if (!quantize) {
    target.size = [first, words, &recipe, trained, narrower](const ModelConfig& config) -> FileSize {
      const Transformer shapes(config, 0, c10::Device(c10::kMeta));
      const std::int64_t floats = count_parameters(config).total * 4;
      const std::int64_t bytes = first ? budget_target(recipe, shapes, words(config), false, trained || narrower ? target_whole(config, trained) : nullptr).file_bytes({}) : floats;
      return {bytes, target_embedding(first, shapes, {}, first ? 2 : 4)};
    };
    return target;
  }
  std::vector<GridSpec> specs;
  if (quantize->has_budget) {
    std::vector<std::string> names = quantize->budget.formats;
    if (names.empty() && first) names.assign(first->budget_formats.begin(), first->budget_formats.end());
    for (const std::string& name : names) {
      Problems told_by_quantize;
      if (const auto spec = grid_format(name, "quantize.budget.formats", told_by_quantize)) specs.push_back(*spec);
    }
  } else if (const Grid* grid = find_grid(quantize->weights)) {
    specs.push_back({grid, grid->group_fixed || quantize->group < 0 ? grid->default_group : quantize->group});
    if (const Grid* fallback = find_grid(quantize->fallback); fallback && quantize->allow_fallback) specs.push_back({fallback, fallback->default_group});
  }
  std::vector<std::string> names;
  for (const GridSpec& spec : specs) names.push_back(target_spec_name(spec));
  target.grids = join(names, " or ");
  target.holds = [specs, exports, keep = quantize->keep_float](const std::string& linear, std::int64_t columns, std::string& why) {
    if (std::any_of(keep.begin(), keep.end(), [&](const std::string& pattern) { return matches_pattern(linear, pattern) || matches_pattern(linear + ".weight", pattern); })) return true;
    std::string reason;
    for (const GridSpec& spec : specs) {
      std::string own;
      bool fits = columns % spec.span_for(columns) == 0;
      if (!fits) own = str("rows of ", columns, " do not divide into groups of ", spec.span_for(columns), " (", spec.grid->name, ")");
      for (const Exporter* exporter : exports) fits = fits && exporter->holds(spec, columns, own);
      if (fits) return true;
      if (reason.empty()) reason = own;
    }
    why = reason;
    return specs.empty();
  };
  if (!first) return target;
  target.size = [quantize, first, words, &recipe, trained, narrower](const ModelConfig& config) -> FileSize {
    const Transformer shapes(basis_config(config, quantize->basis), 0, c10::Device(c10::kMeta));
    const bool halves = quantize->others == "f16";
    const BudgetTarget files = budget_target(recipe, shapes, words(config), halves, (trained || narrower) && !halves ? target_whole(config, trained) : nullptr);
    std::map<std::string, GridSpec> plan;
    try {
      if (quantize->has_budget) {
        QuantizeOptions open = *quantize;
        open.budget.bytes = std::numeric_limits<std::int64_t>::max() / 4, open.budget.bits_per_weight = 0, open.budget.not_larger_than.clear(), open.budget.pareto.clear();
        plan = budget_frame(shapes.config(), open, files).smallest;
      } else {
        plan = plan_quantization(config, *quantize).tensors;
      }
    } catch (const Error&) {
      return {};  // the shape does not go together with the stage quantize, whose own check tells why
    }
    return {files.file_bytes(plan), target_embedding(first, shapes, plan, 2)};
  };
  return target;
}

}  // namespace kompakt
