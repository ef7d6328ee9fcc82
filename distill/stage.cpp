// The stage `distill`: options, objectives of the list (or the default one), the shared training loop.
#include "distill/stage.h"

#include <algorithm>
#include <stdexcept>

#include "core/error.h"
#include "core/log.h"
#include "core/text.h"
#include "model/families.h"

namespace kompakt {

void fields(FieldVisitor& visitor, DistillOptions& options) { fields(visitor, options, false, {}); }

void fields(FieldVisitor& visitor, DistillOptions& options, bool more, const std::function<void(FieldVisitor&)>& more_of_student) {
  bool student = more || !options.student.keep_layers.empty() || !options.student.layer_map.empty() || !options.student.model.empty() || !options.student.config.empty();
  visitor.section("student", student, "how the student is made from the teacher", [&](FieldVisitor& inner) {
    inner.integers("keep_layers", options.student.keep_layers, "teacher layers that the student copies, from 0; empty = all", {.min = 0.0});
    inner.integers("layer_map", options.student.layer_map, "teacher layer whose output each student layer must match; empty = the last dropped layer behind each copied one", {.min = 0.0});
    inner.text("config", options.student.config, "text: config.json of a decoder that starts from random weights, with the teacher's tokenizer; empty = made from the teacher");
    inner.text("model", options.student.model, "text: folder or GGUF file of another model that is the student, with its own tokenizer; empty = made from the teacher");
    if (more_of_student) more_of_student(inner);
  });
  visitor.subtree("objective", options.objective, "list of losses, each {kind: row, weight, ...}: logits, hidden, relation, embedding, labels, cross_tokenizer, policy");
  visitor.section("cache", options.has_cache, "text: keep the teacher's likeliest tokens on disk instead of running it at every step", [&](FieldVisitor& inner) {
    inner.integer("top", options.cache.top, "likeliest tokens kept of every position", {.min = 1.0, .max = 4096.0});
    inner.choice("fill", options.cache.fill, "who computes rows that are not there: teacher = this run as it meets them; elsewhere = scripts/capture_teacher.py on any machine, and the run says what it wants", {"teacher", "elsewhere"});
    inner.integer("tail", options.cache.tail, "draws from all other tokens, an even number; they make forward KL unbiased; 0 = none", {.min = 0.0, .max = 4096.0});
  });
  visitor.section("on_policy", options.has_on_policy, "text: in a share of the steps the student writes the texts and the live teacher scores them (GKD)",
                  [&](FieldVisitor& inner) { fields(inner, options.on_policy); });
  visitor.section("teacher_text", options.has_teacher_text, "text: the teacher's completions, written once, in place of the data's (sequence-level distillation)",
                  [&](FieldVisitor& inner) { fields(inner, options.teacher_text); });
  fields(visitor, options.train);
}

namespace {

bool distill_samples(const DistillOptions& options) { return options.has_on_policy && options.on_policy.lambda > 0; }

bool distill_has(const Node& list, std::string_view key) {
  return list.is_list() && std::any_of(list.items.begin(), list.items.end(), [&](const Node& item) { return item.is_map() && item.find(key); });
}

Node distill_default(const DistillOptions& options, const ModelConfig& student, bool classifier) {
  if (distill_samples(options)) return parse_yaml("[{logits: generalized_jsd, beta: 0.5}]", "default objective");
  if (options.has_teacher_text) return parse_yaml("[{labels: cross_entropy}]", "default objective");
  return classifier ? default_objective(student) : default_objective(false);
}

// Heads whose rows can be compared, padding apart.
bool distill_shares_rows(const ModelConfig& student, const ModelConfig& teacher) {
  try {
    shared_logits(student.vocab, teacher.vocab);
    return true;
  } catch (const Error&) {
    return false;
  }
}

// Whether the divergence is measured on its own: the teacher runs for other values, and both models predict the same things.
bool distill_monitored(const Node& list, const ModelConfig& student, const ModelConfig& teacher, const ObjectiveShapes& shapes) {
  const bool predicts = student.is_classifier() ? student.labels.size() == teacher.labels.size() : !student.family->encoder && !teacher.family->encoder && distill_shares_rows(student, teacher);
  return predicts && !shapes.crossed && !distill_has(list, "logits") && (distill_has(list, "hidden") || distill_has(list, "relation") || distill_has(list, "embedding"));
}

ObjectiveShapes distill_shapes(const DistillOptions& options, const Node& list, const ModelConfig& student, const ModelConfig& teacher, bool classifier, std::uint64_t seed) {
  ObjectiveShapes shapes = objective_shapes(student, teacher, seed);
  shapes.decoder = !classifier;
  shapes.cached = options.has_cache;
  shapes.crossed = distill_has(list, "cross_tokenizer");
  shapes.sampled = distill_samples(options);
  return shapes;
}

// Text whose objectives ask nothing of the teacher (labels alone) or no distribution: the divergence is measured now and then. Of classes
// the teacher's outputs are a pass over all examples, which nobody asked for. A cache that is filled elsewhere knows no rows yet; a student
// that is another model may have other tokens.
bool distill_watched(const DistillOptions& options, const Node& list, const ModelConfig& student, const ModelConfig& teacher, const ObjectiveShapes& shapes) {
  return shapes.decoder && !shapes.crossed && distill_shares_rows(student, teacher) && options.student.model.empty() && !(options.has_cache && options.cache.fill == "elsewhere") && !distill_has(list, "logits") &&
         !distill_monitored(list, student, teacher, shapes);
}

// The objectives of the list; mistakes that only the shapes of both models tell are among the problems.
std::vector<std::shared_ptr<Objective>> distill_objectives(const Node& list, const std::vector<std::int64_t>& map, const ObjectiveShapes& shapes, const ModelConfig& student, const ModelConfig& teacher, Problems& problems) {
  auto objectives = build_objectives(list, map, problems, shapes);
  if (!shapes.decoder || shapes.crossed || !distill_has(list, "logits")) return objectives;
  try {
    shared_logits(student.vocab, teacher.vocab);
  } catch (const Error& error) {
    problems.add(Error(error).at(list.place.text()));
  }
  return objectives;
}

}  // namespace

bool crosses_tokenizers(const Node& objective) { return distill_has(objective, "cross_tokenizer"); }

void check_distill(const DistillOptions& options, bool classification, const Place& place, Problems& problems) {
  const auto refuse = [&](const std::string& what, const std::string& hint) { problems.add(Error(what).at(place.text()).hint(hint)); };
  const bool writes = options.has_on_policy || options.has_teacher_text;
  if (options.has_cache && options.cache.tail % 2 != 0) problems.add(Error("cache.tail must be even: each half of the draws is independent of the other").at(place.text()).given(str(options.cache.tail)).allowed(str(options.cache.tail + 1)));
  if (options.has_cache && options.cache.fill == "elsewhere" && options.cache.tail != 0) problems.add(Error("engines that serve models give likeliest tokens and no draws from the rest").at(place.text()).given(str("cache: {fill: elsewhere, tail: ", options.cache.tail, "}")).allowed("tail: 0"));
  if (classification && options.has_cache) refuse("\"cache\" is for text: of classes the teacher's outputs are always kept", "remove the key");
  if (classification && writes) refuse("on_policy and teacher_text are for text: a classifier writes none", "remove them");
  if (classification && !options.student.model.empty()) refuse("student.model is for text", "of a classifier choose layers with student.keep_layers");
  if (classification && crosses_tokenizers(options.objective)) refuse("cross_tokenizer is for text, and the student is a classifier", "use logits, hidden, relation or labels");
  if (!options.student.model.empty() && !options.student.keep_layers.empty()) refuse("a student is either made of the teacher's layers or another model", "remove student.keep_layers or student.model");
  if (!options.student.config.empty() && !(options.student.keep_layers.empty() && options.student.model.empty())) refuse("a student starts from random weights, is made of the teacher's layers, or is another model", "keep one of student.config, student.keep_layers and student.model");
  if (classification && !options.student.config.empty()) refuse("student.config is for text", "of a classifier choose layers with student.keep_layers");
  if (options.has_on_policy && options.has_teacher_text) refuse("on_policy and teacher_text both write the texts", "keep one of them");
  if (options.has_cache && options.has_on_policy) refuse("on_policy needs the live teacher: a cache knows the data's texts alone", "remove the cache");
  if (options.has_cache && options.has_teacher_text) refuse("the cache holds outputs on the data's texts, and teacher_text replaces them", "remove one of the two");
  if (options.has_cache && crosses_tokenizers(options.objective)) refuse("the cache holds outputs on the student's tokens, and the teacher has others", "remove the cache");
  if (options.has_on_policy) check_completions(options.on_policy, "on_policy", place, problems);
  if (options.has_teacher_text) check_completions(options.teacher_text, "teacher_text", place, problems);
  if (options.has_on_policy && options.on_policy.prompt_tokens == 0 && options.on_policy.lambda < 1)
    problems.add(Error("whole documents as prompts leave the data no completions for the other steps").at(place.text()).given(str("lambda: ", shortest(options.on_policy.lambda))).allowed("1").hint("set lambda: 1, or take beginnings with prompt_tokens"));
  if (distill_samples(options) && distill_has(options.objective, "policy") && (options.on_policy.temperature != 1 || options.on_policy.top_p != 1))
    problems.add(Error("{policy: minillm} is a gradient over texts that the student itself draws, and these would be drawn from another distribution").at(place.text()).given(str("on_policy: {temperature: ", shortest(options.on_policy.temperature), ", top_p: ", shortest(options.on_policy.top_p), "}"))
                     .allowed("temperature: 1, top_p: 1").hint("write on_policy: {temperature: 1}"));
  if (distill_samples(options) && distill_has(options.objective, "labels")) refuse("labels would teach the student what it wrote itself", "remove labels from the objective, or on_policy");
  ObjectiveShapes shapes;
  shapes.cached = options.has_cache;
  shapes.crossed = crosses_tokenizers(options.objective);
  shapes.sampled = distill_samples(options);
  if (!options.objective.is_null()) build_objectives(options.objective, {}, problems, shapes);
}

void check_distill_models(const DistillOptions& options, const ModelConfig& student, const ModelConfig& teacher, const std::vector<std::int64_t>& layer_map, bool classification, Problems& problems) {
  const Node list = options.objective.is_null() ? distill_default(options, student, classification) : options.objective;
  distill_objectives(list, layer_map, distill_shapes(options, list, student, teacher, classification, 0), student, teacher, problems);
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
  const Node list = options.objective.is_null() ? distill_default(options, student.config(), classifier) : options.objective;
  Problems problems;
  ObjectiveShapes shapes = distill_shapes(options, list, student.config(), teacher, classifier, context.seed);
  if (!classifier && context.data->tokenizer) shapes.tokens = context.data->tokenizer->vocab_size();
  auto objectives = distill_objectives(list, map, shapes, student.config(), teacher, problems);
  problems.throw_if_any("the objectives of the stage distill have mistakes");
  if (distill_monitored(list, student.config(), teacher, shapes)) objectives.push_back(divergence_monitor(!classifier, shapes.tokens));
  const std::shared_ptr<Objective> watched = distill_watched(options, list, student.config(), teacher, shapes) ? divergence_monitor(true, shapes.tokens) : nullptr;
  context.watched = watched.get();
  struct Restore {
    StageContext& context;
    BatchSampler* sampler = context.sampler;
    ~Restore() { context.watched = nullptr, context.sampler = sampler; }
  } restore{context};

  if (context.details) {
    (*context.details)["objective"] = to_json(list);
    (*context.details)["keep_layers"] = options.student.keep_layers;
    (*context.details)["layer_map"] = map;
  }
  log_info(str(context.title, ": ", student.config().layers, " of ", teacher.layers, " layers, ", list.items.size(), list.items.size() == 1 ? " objective" : " objectives"));
  if (!distill_samples(options)) return train(student, options.train, objectives, {}, context);
  ModelConfig limits = student.config();  // the teacher reads the texts too
  if (teacher.max_positions > 0 && !shapes.crossed) limits.max_positions = limits.max_positions > 0 ? std::min(limits.max_positions, teacher.max_positions) : teacher.max_positions;
  const auto sampler = on_policy_sampler(options.on_policy, limits, {*context.data, options.train.sequence_length, context.seed, context.title, context.ranks});
  context.sampler = sampler.get();
  return train(student, options.train, objectives, {}, context);
}

}  // namespace kompakt
