#include "pipeline/student_width.h"

#include <algorithm>
#include <array>
#include <vector>

#include "core/error.h"
#include "core/text.h"
#include "pipeline/recipe.h"
#include "pipeline/shape_target.h"
#include "pipeline/stages.h"
#include "prune/shape_planner.h"

namespace kompakt {
namespace {

constexpr const char* width_place = "distill.student.width";

std::vector<std::int64_t> width_heads(const ModelConfig& config, std::int64_t, const ShapeTarget& target) {
  std::vector<std::int64_t> out;
  for (const HeadPlan& plan : valid_heads(config, target)) out.push_back(plan.heads);
  return out;
}

struct WidthAxis {
  const char *key, *unit;
  std::int64_t StudentWidth::*asked;
  std::int64_t ModelConfig::*full;
  double StructuredOptions::*share;
  std::vector<std::int64_t> (*valid)(const ModelConfig& config, std::int64_t multiple, const ShapeTarget& target);
};
constexpr std::array<WidthAxis, 3> width_axes{{
    {"hidden", "channels", &StudentWidth::hidden, &ModelConfig::hidden, &StructuredOptions::hidden, valid_hidden},
    {"ffn", "neurons", &StudentWidth::ffn, &ModelConfig::ffn, &StructuredOptions::ffn, valid_widths},
    {"heads", "heads", &StudentWidth::heads, &ModelConfig::heads, &StructuredOptions::heads, width_heads},
}};

bool width_has(const std::vector<std::int64_t>& valid, std::int64_t value) { return std::find(valid.begin(), valid.end(), value) != valid.end(); }

// Error that names the two valid sizes next to the asked one.
[[noreturn]] void refuse_width(const WidthAxis& axis, std::int64_t asked, const ModelConfig& config, std::vector<std::int64_t> valid, const std::string& why) {
  std::stable_sort(valid.begin(), valid.end(), [&](std::int64_t a, std::int64_t b) { return std::abs(a - asked) < std::abs(b - asked); });
  std::vector<std::string> near;
  for (std::size_t i = 0; i < valid.size() && i < 2; ++i) near.push_back(str(valid[i]));
  throw Error(str("a student of ", asked, " ", axis.unit, " cannot be made from a teacher of ", config.*axis.full, ": ", why)).at(str(width_place, ".", axis.key)).given(str(asked))
      .allowed(near.empty() ? std::string("no size fits") : str("nearest: ", join(near, " or "))).hint("choose one of these sizes, or leave the key out");
}

}  // namespace

void fields(FieldVisitor& visitor, DistillRecipe& options) {
  fields(visitor, options, options.has_width, [&](FieldVisitor& student) {
    student.section("width", options.has_width, "the student is narrower than the teacher: the most important units of the teacher's stay, chosen as in the stage prune", [&](FieldVisitor& inner) {
      StudentWidth& width = options.width;
      inner.integer("hidden", width.hidden, "hidden size: channels of the residual stream (decoders); 0 = the teacher's", {.min = 0.0});
      inner.integer("ffn", width.ffn, "feed-forward neurons; 0 = the teacher's", {.min = 0.0});
      inner.integer("heads", width.heads, "attention heads; with grouped queries whole groups, or equally many heads of each; 0 = the teacher's", {.min = 0.0});
      channel_fields(inner, width.how.structured);
      importance_fields(inner, width.how);
      compensate_field(inner, width.how);
    });
  });
}

void check_width(const DistillRecipe& options, const Place& place, Problems& problems) {
  if (!options.has_width) return;
  if (!options.student.config.empty() || !options.student.model.empty())
    problems.add(Error("a narrower student is cut from the teacher, and this one is another model").at(place.text()).given(options.student.model.empty() ? "student: {config, width}" : "student: {model, width}").hint("remove student.width, or student.config and student.model"));
  if (std::all_of(width_axes.begin(), width_axes.end(), [&](const WidthAxis& axis) { return options.width.*axis.asked == 0; }))
    problems.add(Error("student.width names no size").at(place.text()).allowed("at least one of hidden, ffn, heads").hint("write width: {ffn: 1024}, or leave width out"));
}

PruneOptions width_cut(const StudentWidth& width, const ModelConfig& config) {
  PruneOptions cut = width.how;
  cut.has_structured = true;
  cut.multiple_of = 1;  // sizes are exact
  for (const WidthAxis& axis : width_axes) {
    const std::int64_t asked = width.*axis.asked, full = config.*axis.full;
    if (asked == 0 || asked == full) continue;
    if (asked > full) refuse_width(axis, asked, config, {full}, "a cut only removes");
    if (axis.asked == &StudentWidth::heads && !width_has(width_heads(config, 1, {}), asked)) refuse_width(axis, asked, config, width_heads(config, 1, {}), str("of ", config.kv_heads, " key/value groups only whole ones, or equally many heads of each, can go"));
    cut.structured.*axis.share = static_cast<double>(asked) / static_cast<double>(full);
  }
  if (cut.structured.hidden == 1 && cut.structured.ffn == 1 && cut.structured.heads == 1)
    throw Error("the student would be as wide as the teacher").at(width_place).given(str("hidden ", config.hidden, ", ffn ", config.ffn, ", heads ", config.heads)).hint("choose a smaller size, or leave width out");
  try {
    pruned_config(config, cut);
  } catch (const Error& error) {
    throw Error(error).at(width_place);
  }
  return cut;
}

void plan_width_cut(const StudentWidth& width, const PlanInput& input, PlannedModel& model) {
  const PruneOptions cut = width_cut(width, model.config);
  const bool measures = find_criterion(cut.criterion)->needs_data && !(cut.structured.hidden_by == "rotate" && cut.structured.ffn == 1 && cut.structured.heads == 1);
  const bool narrows = cut.structured.hidden < 1;  // refits and rotations look at data whatever the criterion
  const bool none = input.recipe.is_classification() ? input.train_examples == 0 : input.calibration_windows == 0;
  if (none && (measures || narrows || cut.compensate != "none"))
    throw Error("which units of the teacher stay is measured on data, and the recipe has none for it").at(width_place).given(str("criterion: ", cut.criterion, narrows ? ", hidden" : "", cut.compensate == "none" ? std::string() : str(", compensate: ", cut.compensate)))
        .hint(str("name ", input.recipe.is_classification() ? "training examples under data.train" : "text files under data.calibration", narrows || cut.compensate != "none" ? "" : ", or take criterion: magnitude, which looks at the weights alone"));
  if (input.tokenizer) {
    const ShapeTarget target = shape_target(input.recipe, input.stage, *input.tokenizer, input.pruned_tokenizer);
    const ModelConfig after = pruned_config(model.config, cut);
    for (const WidthAxis& axis : width_axes) {
      if (after.*axis.full == model.config.*axis.full) continue;
      const std::vector<std::int64_t> valid = axis.valid(model.config, 1, target);
      if (!width_has(valid, after.*axis.full)) refuse_width(axis, after.*axis.full, model.config, valid, str("its rows cannot be stored as ", target.grids.empty() ? target.format : target.format.empty() ? target.grids : str(target.format, " with ", target.grids)));
    }
    std::vector<ShapeAxis> shapes = plan_shapes(model.config, cut, target);
    std::erase_if(shapes, [](const ShapeAxis& axis) { return axis.key == "structured.layers"; });  // keep_layers says which
    for (ShapeAxis& axis : shapes) axis.key.replace(0, std::string_view("structured").size(), "student.width");
    model.shapes = shapes_json(shapes);
  }
  model.config = pruned_config(model.config, cut);
}

}  // namespace kompakt
