// Valid widths and head counts, exact refusals with the nearest valid value, what is shown.
#include "prune/shape_planner.h"

#include "tests/catch_torch.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;

// Rows of linears must divide into groups of `group`; bytes are parameters.
ShapeTarget planner_target(std::int64_t group) {
  ShapeTarget target;
  target.format = "test", target.grids = "grid";
  target.holds = [group](const std::string&, std::int64_t columns, std::string& why) {
    why = str("rows of ", columns, " do not divide into groups of ", group);
    return columns % group == 0;
  };
  target.size = [](const ModelConfig& config) { return FileSize{count_parameters(config).total, count_parameters(config).embedding}; };
  return target;
}

PruneOptions planner_options(double ffn, double heads, std::int64_t multiple) {
  PruneOptions options;
  options.has_structured = true, options.structured.ffn = ffn, options.structured.heads = heads, options.multiple_of = multiple;
  return options;
}

}  // namespace

TEST_CASE("valid widths are multiples that the target holds, valid heads keep groups whole", "[prune][shape]") {
  const ModelConfig config = testing::tiny_decoder(1)->config();  // feed-forward 40, 6 heads of 4 in 3 groups
  CHECK(valid_widths(config, 8, {}) == std::vector<std::int64_t>{40, 32, 24, 16, 8});
  CHECK(valid_widths(config, 8, planner_target(16)) == std::vector<std::int64_t>{32, 16});
  CHECK(valid_widths(config, 64, {}) == std::vector<std::int64_t>{40});
  const auto counts = [&](const ShapeTarget& target) {
    std::vector<std::pair<std::int64_t, std::int64_t>> out;
    for (const HeadPlan& plan : valid_heads(config, target)) out.emplace_back(plan.heads, plan.kv_heads);
    return out;
  };
  // 3 groups of 2: whole groups 6, 4, 2; one query head of each group: 3.
  CHECK(counts({}) == std::vector<std::pair<std::int64_t, std::int64_t>>{{6, 3}, {4, 2}, {3, 3}, {2, 1}});
  CHECK(counts(planner_target(8)) == std::vector<std::pair<std::int64_t, std::int64_t>>{{6, 3}, {4, 2}, {2, 1}});  // 3 heads make rows of 12
}

TEST_CASE("a shape that cannot be stored is refused with the reason and the nearest valid values", "[prune][shape]") {
  const ModelConfig config = testing::tiny_decoder(1)->config();
  CHECK_NOTHROW(check_shape(config, planner_options(0.8, 1, 8), planner_target(16)));  // 32
  const std::string width = error_text([&] { check_shape(config, planner_options(0.6, 1, 8), planner_target(16)); });  // 24
  CHECK(contains_all(width, {"structured.ffn", "24", "test with grid", "rows of 24 do not divide into groups of 16", "0.8 (32 neurons)", "0.4 (16 neurons)", "multiple_of"}));
  const std::string heads = error_text([&] { check_shape(config, planner_options(1, 0.5, 8), planner_target(8)); });  // 3 heads: rows of 12
  CHECK(contains_all(heads, {"structured.heads", "3 heads of size 4", "rows of 12", "0.6667 (4 heads)", "0.3333 (2 heads)"}));
  CHECK(contains_all(error_text([&] { check_shape(config, planner_options(0.01, 1, 8), planner_target(16)); }), {"would leave no feed-forward neuron"}));
  CHECK(contains_all(error_text([&] { check_shape(config, planner_options(0.8, 1, 8), planner_target(7)); }), {"no multiple of multiple_of fits"}));
}

TEST_CASE("the plan shows the asked value, its neighbours and exact bytes", "[prune][shape]") {
  const ModelConfig config = testing::tiny_decoder(1)->config();
  PruneOptions options = planner_options(0.6, 0.667, 8);
  options.structured.layers = 1;
  const std::vector<ShapeAxis> axes = plan_shapes(config, options, planner_target(8));
  REQUIRE(axes.size() == 3);
  CHECK(axes[0].full == 40);
  REQUIRE(axes[0].choices.size() == 5);
  CHECK(axes[0].choices[2].asked);
  CHECK(axes[0].choices[2].value == 24);
  // Everything else is as the stage leaves it.
  ModelConfig shape = pruned_config(config, options);
  CHECK(axes[0].choices[2].size.bytes == count_parameters(shape).total);
  shape.ffn = 40;
  CHECK(axes[0].choices[0].size.bytes == count_parameters(shape).total);
  CHECK(axes[2].choices.size() == 3);
  CHECK(axes[2].choices[1].asked);
  const std::string text = shapes_text(shapes_json(axes), "  ");
  CHECK(contains_all(text, {"feed-forward width, now 40", "multiples of 8 whose rows grid can store", "->      24     0.6", "2 kv", "embedding"}));
  CHECK(plan_shapes(config, options, planner_target(8), 0, 3)[0].choices.size() == 5);  // ends, the asked one and its neighbours always
  const ModelConfig wide = [&] {
    ModelConfig c = config;
    c.ffn = 4096;
    return c;
  }();
  const auto many = plan_shapes(wide, planner_options(0.5, 1, 8), {}, 0, 9)[0].choices;
  CHECK(many.size() <= 9);
  CHECK(many.front().value == 4096);
  CHECK(many.back().value == 8);
  CHECK(std::count_if(many.begin(), many.end(), [](const ShapeChoice& c) { return c.asked && c.value == 2048; }) == 1);
}

}  // namespace kompakt
