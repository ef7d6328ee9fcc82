// The stage `distill`: options, objectives of the list (or the default one), the shared training loop.
#include "distill/stage.h"

#include <stdexcept>

#include "core/error.h"
#include "core/log.h"
#include "core/text.h"

namespace kompakt {

void fields(FieldVisitor& visitor, DistillOptions& options) {
  bool student = !options.student.keep_layers.empty() || !options.student.layer_map.empty();
  visitor.section("student", student, "how the student is made from the teacher", [&](FieldVisitor& inner) {
    inner.integers("keep_layers", options.student.keep_layers, "teacher layers that the student copies, from 0; empty = all", {.min = 0.0});
    inner.integers("layer_map", options.student.layer_map, "teacher layer whose output each student layer must match; empty = the last dropped layer behind each copied one", {.min = 0.0});
  });
  visitor.subtree("objective", options.objective, "list of losses, each {kind: row, weight, ...}: logits, hidden, relation, embedding, labels");
  visitor.section("cache", options.has_cache, "text: keep the teacher's likeliest tokens on disk instead of running it at every step", [&](FieldVisitor& inner) {
    inner.integer("top", options.cache.top, "likeliest tokens kept of every position", {.min = 1.0, .max = 4096.0});
    inner.integer("tail", options.cache.tail, "draws from all other tokens, an even number; they make forward KL unbiased; 0 = none", {.min = 0.0, .max = 4096.0});
  });
  fields(visitor, options.train);
}

void check_distill(const DistillOptions& options, bool classification, const Place& place, Problems& problems) {
  if (!options.has_cache) return;
  if (options.cache.tail % 2 != 0) problems.add(Error("cache.tail must be even: each half of the draws is independent of the other").at(place.text()).given(str(options.cache.tail)).allowed(str(options.cache.tail + 1)));
  if (classification) problems.add(Error("\"cache\" is for text: of classes the teacher's outputs are always kept").at(place.text()).hint("remove the key"));
  ObjectiveShapes shapes;
  shapes.cached = true;
  if (!options.objective.is_null()) build_objectives(options.objective, {}, problems, shapes);
}

TrainResult distill(Transformer& student, const DistillOptions& options, StageContext& context) {
  if (!context.data) throw std::logic_error("distill: no data");
  if (!context.teacher) throw Error("the stage distill needs a teacher").at(context.title).hint("name one under \"teacher:\" of the recipe");
  if (options.train.label_smoothing > 0)
    throw Error("label_smoothing of the stage distill would not be used").at(context.title).given(str(options.train.label_smoothing)).hint("write it into the objective: {labels: cross_entropy, label_smoothing: ...}");
  const ModelConfig& teacher = context.teacher->config();
  const bool earlier = options.student.keep_layers.empty() && options.student.layer_map.empty() && !context.layer_map.empty();
  const std::vector<std::int64_t> map = earlier ? context.layer_map : student_layer_map(options.student, teacher.layers);
  if (static_cast<std::int64_t>(map.size()) != student.config().layers)
    throw std::logic_error(str("distill: the student has ", student.config().layers, " layers, keep_layers stands for ", map.size()));

  context.layer_map = map;
  const bool classifier = context.data->kind == TaskData::Kind::classification;
  const Node list = options.objective.is_null() ? default_objective(classifier) : options.objective;
  Problems problems;
  ObjectiveShapes shapes = objective_shapes(student, teacher, context.seed);
  shapes.cached = options.has_cache;
  const auto objectives = build_objectives(list, map, problems, shapes);
  problems.throw_if_any("the objectives of the stage distill have mistakes");

  if (context.details) {
    (*context.details)["objective"] = to_json(list);
    (*context.details)["keep_layers"] = options.student.keep_layers;
    (*context.details)["layer_map"] = map;
  }
  log_info(str(context.title, ": ", student.config().layers, " of ", teacher.layers, " layers, ", list.items.size(), list.items.size() == 1 ? " objective" : " objectives"));
  return train(student, options.train, objectives, {}, context);
}

}  // namespace kompakt
