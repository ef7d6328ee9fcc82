#include "quantize/joint_options.h"

#include <algorithm>

#include "core/error.h"
#include "core/text.h"
#include "quantize/masked.h"
#include "quantize/stage.h"
#include "train/optimizer.h"

namespace kompakt {

void fields(FieldVisitor& visitor, JointOptions& options) {
  visitor.number("sparsity", options.sparsity, "share of the weights that become zero, of every block of 128 columns; 0 = the pattern says it", {.min = 0.0, .max = 0.99});
  visitor.text("pattern", options.pattern, "N:M, for example \"2:4\": of every M weights in a row N stay");
  visitor.texts("skip", options.skip, "patterns of linears that stay dense (* = anything)");
}

SparsityPattern joint_pattern(const JointOptions& options) {
  if (options.pattern.empty() == (options.sparsity == 0))
    throw Error(options.pattern.empty() ? "pruning in the sweep needs a sparsity or a pattern" : "sparsity and pattern say two different things").at("quantize.sparse").hint("write sparse: {sparsity: 0.5}, or sparse: {pattern: \"2:4\"}");
  if (options.pattern.empty()) return {options.sparsity};
  const std::optional<SparsityPattern> pattern = parse_pattern(options.pattern);
  if (!pattern || pattern->n < 1 || pattern->n >= pattern->m)
    throw Error("the pattern is not of the form N:M with N below M").at("quantize.sparse.pattern").given(options.pattern).allowed("such as 2:4 or 4:8").hint("of every M weights in a row N stay");
  return *pattern;
}

bool prunes_jointly(const JointOptions& options, const std::string& linear) {
  return std::none_of(options.skip.begin(), options.skip.end(), [&](const std::string& pattern) { return matches_pattern(linear, pattern); });
}

void check_joint(const QuantizeOptions& options, Problems& problems) {
  if (!options.has_sparse) return;
  if (options.method != "gptq") problems.add(Error(str("method ", options.method, " has no sweep that prunes and rounds together")).at("quantize.sparse").given(str("method: ", options.method)).allowed("method: gptq").hint("or prune before: prune: {unstructured: ...}, whose masks every method keeps"));
  if (options.has_budget) problems.add(Error("the sensitivities of a budget know nothing of pruning in the sweep").at("quantize.sparse").given("quantize.budget").hint("name the grid with weights, or prune before: prune: {unstructured: ...}"));
  if (options.tunes_model() || options.tunes_blocks()) problems.add(Error("tuning would fill the weights that the sweep prunes").at("quantize.sparse").given(options.tunes_model() ? "tune" : "block_tune").hint("leave tuning out, or prune before and take method: qad, which keeps zeros"));
  try {
    joint_pattern(options.sparse);
  } catch (const Error& error) {
    problems.add(error);
  }
}

void check_joint_plan(const QuantizeOptions& options, const QuantizationPlan& plan, const std::vector<std::pair<std::string, std::int64_t>>& linears, Problems& problems) {
  if (!options.has_sparse) return;
  const SparsityPattern pattern = joint_pattern(options.sparse);
  std::vector<std::string> names;
  for (const auto& [name, columns] : linears) names.push_back(name);
  for (const std::string& skip : options.sparse.skip)
    if (std::none_of(names.begin(), names.end(), [&](const std::string& name) { return matches_pattern(name, skip); }))
      problems.add(Error(str("no linear of the blocks matches the pattern \"", skip, "\"", did_you_mean(skip, names))).at("quantize.sparse.skip").given(skip).allowed(str("names such as ", names.front(), "; * stands for anything")));
  std::size_t sparse = 0;
  for (const auto& [name, columns] : linears) {
    const auto planned = plan.tensors.find(name);
    if (planned == plan.tensors.end() || !prunes_jointly(options.sparse, name)) continue;
    ++sparse;
    const GridSpec& spec = planned->second;
    if (!grid_keeps_zero(spec)) {
      std::vector<std::string> fitting;
      for (const Grid& grid : grids())
        if (grid_keeps_zero({&grid, grid.default_group})) fitting.emplace_back(grid.name);
      problems.add(Error(str("the grid ", spec.grid->name, " has no zero")).at("quantize.sparse").given(str("weights: ", spec.grid->name)).allowed(join(fitting, ", ")).hint("choose a grid that has one, or leave sparse out"));
      return;
    }
    try {
      check_pattern(pattern, columns);
      if (const std::int64_t span = spec.span_for(columns); pattern.grouped() && span % pattern.m != 0)
        throw Error(str("scales over ", span, " weights do not hold whole groups of ", pattern.m)).given(pattern.text()).allowed(str("a pattern whose M divides ", span)).hint("or choose another group");
    } catch (Error& error) {
      problems.add(error.at(name));
      return;
    }
  }
  if (sparse == 0) problems.add(Error("no matrix is left to prune").at("quantize.sparse").given(join(options.sparse.skip, ", ")).hint("skip fewer, or leave sparse out"));
}

}  // namespace kompakt
