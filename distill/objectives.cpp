// A recipe's list of losses to objectives: a table of kinds, each with its fields and its objective class.
// The losses themselves are in losses.h; the sum of the list and the training loop are train/'s.
#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <stdexcept>
#include <numeric>
#include <span>

#include "core/error.h"
#include "core/text.h"
#include "distill/losses.h"
#include "distill/objective_item.h"
#include "distill/stage.h"
#include "model/families.h"
#include "train/targets.h"

namespace kompakt {

namespace {

using at::Tensor;

// A mean over fewer or more comparisons than others of the step have, as a part of the step's mean.
Tensor objective_share(const Tensor& mean, const ObjectiveInput& input) { return input.weight == 1 ? mean : mean * input.weight; }

std::string objective_tap(std::int64_t layer, const char* what) { return str("layer.", layer, ".", what); }

class HiddenObjective final : public Objective {
 public:
  explicit HiddenObjective(const ObjectiveItem& item) : cosine_(item.name == "cosine"), normalize_(item.normalize), weight_(item.weight), map_(item.layer_map), layers_(item.layers) {
    if (layers_.empty()) {
      layers_.resize(map_.size());
      std::iota(layers_.begin(), layers_.end(), 0);
    }
    const ObjectiveShapes& shapes = item.shapes;
    if (shapes.student_hidden == shapes.teacher_hidden || shapes.student_hidden == 0 || shapes.teacher_hidden == 0) return;
    for (const std::int64_t layer : layers_)
      projections_.emplace_back(str("projection.hidden.", layer), orthogonal_projection(shapes.student_hidden, shapes.teacher_hidden, shapes.seed, str("projection.hidden.", layer)).requires_grad_());
  }
  bool needs_teacher() const override { return true; }
  bool needs_logits() const override { return false; }
  void request_taps(std::set<std::string>& student, std::set<std::string>& teacher) const override {
    if (layers_.empty() || map_.empty()) throw std::logic_error("hidden objective: built without a layer map");
    for (const std::int64_t layer : layers_) {
      student.insert(objective_tap(layer, "output"));
      teacher.insert(objective_tap(map_.at(static_cast<std::size_t>(layer)), "output"));
    }
  }
  std::vector<std::pair<std::string, Tensor>> parameters() override { return projections_; }
  bool counts_comparisons() const override { return true; }  // classes: tokens, of which texts have more or fewer
  std::int64_t comparisons(const TokenBatch& batch, TeacherSource&) const override { return batch.labels.empty() ? count_targets(batch) : batch.tokens(); }

  Tensor loss(const ObjectiveInput& input, std::vector<LossPart>& parts) override {
    const Tensor mask = objective_token_mask(input);
    Tensor total;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const Tensor& student = input.taps.at(objective_tap(layers_[i], "output"));
      const Tensor& teacher = objective_teacher(input).taps.at(objective_tap(map_.at(static_cast<std::size_t>(layers_[i])), "output"));
      const Tensor projection = projections_.empty() ? Tensor() : projections_[i].second.to(student.device());
      const Tensor part = cosine_ ? hidden_cosine(student, teacher, mask, projection) : hidden_mse(student, teacher, mask, projection, normalize_);
      total = total.defined() ? total + part : part;
    }
    total = objective_share(total / static_cast<double>(layers_.size()), input);
    parts.push_back({cosine_ ? "hidden_cosine" : "hidden_mse", total});
    return total * weight_;
  }

 private:
  bool cosine_, normalize_;
  double weight_;
  std::vector<std::int64_t> map_, layers_;
  std::vector<std::pair<std::string, Tensor>> projections_;
};

class RelationObjective final : public Objective {
 public:
  explicit RelationObjective(const ObjectiveItem& item) : options_(item.relation), weight_(item.weight) {
    options_.normalize = item.normalize;
    layer_ = item.layer < 0 ? static_cast<std::int64_t>(item.layer_map.size()) - 1 : item.layer;
    teacher_layer_ = item.layer_map.empty() ? -1 : item.layer_map.at(static_cast<std::size_t>(layer_));
  }
  bool needs_teacher() const override { return true; }
  bool needs_logits() const override { return false; }
  void request_taps(std::set<std::string>& student, std::set<std::string>& teacher) const override {
    if (teacher_layer_ < 0) throw std::logic_error("relation objective: built without a layer map");
    for (const char* part : parts_) {
      student.insert(objective_tap(layer_, part));
      teacher.insert(objective_tap(teacher_layer_, part));
    }
  }
  bool counts_comparisons() const override { return true; }  // every token's relations to the others
  std::int64_t comparisons(const TokenBatch& batch, TeacherSource&) const override { return batch.tokens(); }
  Tensor loss(const ObjectiveInput& input, std::vector<LossPart>& parts) override {
    Tensor total;
    for (const char* part : parts_) {
      const Tensor value = relation_loss(input.taps.at(objective_tap(layer_, part)), objective_teacher(input).taps.at(objective_tap(teacher_layer_, part)), input.input.lengths, input.input.documents, options_);
      total = total.defined() ? total + value : value;
    }
    total = objective_share(total, input);
    parts.push_back({"relation", total});
    return total * weight_;
  }

 private:
  static constexpr std::array<const char*, 3> parts_{"query", "key", "value"};
  RelationOptions options_;
  double weight_;
  std::int64_t layer_ = 0, teacher_layer_ = 0;
};

class LabelObjective final : public Objective {
 public:
  explicit LabelObjective(const ObjectiveItem& item) : inner_(label_cross_entropy(item.label_smoothing)), weight_(item.weight) {}
  bool needs_logits() const override { return inner_->needs_logits(); }
  Tensor loss(const ObjectiveInput& input, std::vector<LossPart>& parts) override { return inner_->loss(input, parts) * weight_; }

 private:
  std::unique_ptr<Objective> inner_;
  double weight_;
};

using ObjectiveList = std::vector<std::shared_ptr<Objective>>;

template <class T>
void objective_add(const ObjectiveItem& item, ObjectiveList& list) { list.push_back(std::make_shared<T>(item)); }

// Logit losses share one pass over the vocabulary.
void objective_add_logits(const ObjectiveItem& item, ObjectiveList& list) {
  const auto found = std::find_if(list.begin(), list.end(), [](const auto& objective) { return dynamic_cast<LogitObjective*>(objective.get()) != nullptr; });
  const std::shared_ptr<LogitObjective> sum = found == list.end() ? std::make_shared<LogitObjective>(item.shapes.decoder, item.shapes.tokens) : std::static_pointer_cast<LogitObjective>(*found);
  if (found == list.end()) list.push_back(sum);
  sum->add(item);
}

const Range objective_positive{.min = 0.0, .open_min = true};

void objective_logit_fields(FieldVisitor& visitor, ObjectiveItem& item) {
  visitor.number("temperature", item.logits.temperature, "softmax(logits / temperature) on both sides", objective_positive);
  visitor.flag("temperature_squared", item.logits.scale_gradient, "multiply by temperature^2, so that the gradient does not shrink beside hard labels");
  const LogitLoss* row = find_logit_loss(item.name);
  if (!row || row->uses_beta) visitor.number("beta", item.logits.beta, "generalized JSD: 0 = forward KL, 1 = reverse KL", {.min = 0.0, .max = 1.0});
  if (!row || row->uses_lambda) visitor.number("lambda", item.logits.lambda, "skewed losses: share of the other distribution in the mixture", {.min = 0.0, .max = 0.99});
  if (row && !row->uses_top) return;
  visitor.integer("top", item.logits.top, "ranking: the teacher's likeliest tokens, whose order counts", {.min = 2.0, .max = 256.0});
  visitor.number("margin", item.logits.margin, "ranking: largest gap of logits that is asked for", objective_positive);
}
void objective_embedding_fields(FieldVisitor& visitor, ObjectiveItem& item) {
  const EmbeddingLoss* row = find_embedding_loss(item.name);
  if (!row || row->temperature) visitor.number("temperature", item.temperature, "of the softmax over the cosines to the texts of the batch", objective_positive);
}
void objective_hidden_fields(FieldVisitor& visitor, ObjectiveItem& item) {
  visitor.integers("layers", item.layers, "student layers that take part, from 0; empty = all", {.min = 0.0});
  if (item.name != "cosine") visitor.flag("normalize", item.normalize, "divide by the variance of the teacher's states, so that layers weigh equally");
}
void objective_relation_fields(FieldVisitor& visitor, ObjectiveItem& item) {
  visitor.integer("layer", item.layer, "student layer, from 0; -1 = the last", {.min = -1.0});
  visitor.integer("heads", item.relation.relation_heads, "relation heads; 0 = greatest common divisor of both head counts", {.min = 0.0});
  visitor.flag("normalize", item.normalize, "vectors of unit length instead of scaled dot products");
  visitor.number("temperature", item.relation.temperature, "of the softmax over the relations", objective_positive);
}
void objective_label_fields(FieldVisitor& visitor, ObjectiveItem& item) {
  visitor.number("label_smoothing", item.label_smoothing, "share of the target spread over all classes", {.min = 0.0, .max = 0.99});
}

std::vector<std::string> objective_hidden_names() { return {"mse", "cosine"}; }
std::vector<std::string> objective_relation_names() { return {"minilm"}; }
std::vector<std::string> objective_embedding_names() {
  std::vector<std::string> names;
  for (const EmbeddingLoss& row : embedding_losses()) names.emplace_back(row.name);
  return names;
}
void objective_cross_fields(FieldVisitor& visitor, ObjectiveItem& item) {
  visitor.number("temperature", item.logits.temperature, "of both distributions; of spans: their log-probabilities are divided by it", objective_positive);
}
void objective_policy_fields(FieldVisitor&, ObjectiveItem&) {}

std::vector<std::string> objective_cross_names() {
  std::vector<std::string> names;
  for (const CrossLoss& row : cross_losses()) names.emplace_back(row.name);
  return names;
}
std::vector<std::string> objective_policy_names() { return {"minillm"}; }
std::vector<std::string> objective_label_names() { return {"cross_entropy"}; }

struct ObjectiveKind {
  const char* key;
  const char* summary;
  std::vector<std::string> (*names)();
  void (*fields)(FieldVisitor&, ObjectiveItem&);
  void (*add)(const ObjectiveItem&, ObjectiveList&);  // to the list, or to what stands there
  bool needs_model;   // intermediate values of a teacher that runs: a cache of its outputs is not enough
  enum class Text { any, encoder, decoder } text = Text::any;  // encoder: works on the pooled vector of a text; decoder: on its tokens
  bool tokens = true;  // of a text: compares token by token, so that both sides must have one tokenizer
};

constexpr std::array<ObjectiveKind, 7> objective_table{{
    {"logits", "the student's output distribution against the teacher's", logit_loss_names, objective_logit_fields, objective_add_logits, false},
    {"hidden", "outputs of student layers against outputs of the teacher layers that they stand for", objective_hidden_names, objective_hidden_fields, objective_add<HiddenObjective>, true},
    {"relation", "self-similarity of queries, keys and values of one layer (any two widths and head counts)", objective_relation_names, objective_relation_fields, objective_add<RelationObjective>, true},
    {"embedding", "pooled vectors of the texts of a batch: themselves, or their similarities to each other", objective_embedding_names, objective_embedding_fields, objective_add<EmbeddingObjective>, true, ObjectiveKind::Text::encoder},
    {"labels", "the data's own labels: class or next token", objective_label_names, objective_label_fields, objective_add<LabelObjective>, false, ObjectiveKind::Text::any, false},
    {"cross_tokenizer", "text: a teacher with another tokenizer, compared where both tokenizers end a token at the same byte", objective_cross_names, objective_cross_fields, objective_add<CrossTokenizerObjective>, true, ObjectiveKind::Text::decoder, false},
    {"policy", "text that the student wrote: what reverse KL of whole texts has beyond {logits: reverse_kl} (MiniLLM)", objective_policy_names, objective_policy_fields, objective_add<PolicyObjective>, true, ObjectiveKind::Text::decoder},
}};

void objective_fields(FieldVisitor& visitor, const ObjectiveKind& kind, ObjectiveItem& item) {
  visitor.choice(kind.key, item.name, kind.summary, kind.names());
  visitor.number("weight", item.weight, "factor of this part in the sum", {.min = 0.0});
  kind.fields(visitor, item);
}

std::vector<std::string> objective_keys() {
  std::vector<std::string> keys;
  for (const ObjectiveKind& kind : objective_table) keys.emplace_back(kind.key);
  return keys;
}

// The one kind whose key stands in the item; a mistake otherwise.
const ObjectiveKind* objective_kind_of(const Node& node, Problems& problems) {
  const std::vector<std::string> keys = objective_keys();
  if (!node.is_map()) {
    problems.add(Error("an objective must be a map such as {logits: forward_kl, temperature: 2}").at(node.place.text()).given(node.is_scalar() ? node.scalar : node.kind_name()).allowed(join(keys, ", ")));
    return nullptr;
  }
  const ObjectiveKind* found = nullptr;
  for (const ObjectiveKind& kind : objective_table) {
    if (!node.find(kind.key)) continue;
    if (found) {
      problems.add(Error(str("one objective names two losses, \"", found->key, "\" and \"", kind.key, "\"")).at(node.place.text()).hint("write two items of the list"));
      return nullptr;
    }
    found = &kind;
  }
  if (!found) {
    std::string first = node.entries.empty() ? "" : node.entries.front().key;
    for (const Node::Entry& entry : node.entries)
      if (nearest(entry.key, keys)) first = entry.key;
    problems.add(Error(str("an objective must name its loss", did_you_mean(first, keys))).at(node.place.text()).given(first.empty() ? "an empty map" : first).allowed(join(keys, ", ")));
  }
  return found;
}

std::vector<std::string> objective_cached_losses() {
  std::vector<std::string> names;
  for (const LogitLoss& row : logit_losses())
    if (row.partition) names.emplace_back(row.name);
  return names;
}

void objective_check_layers(const ObjectiveItem& item, Problems& problems) {
  if (item.layer_map.empty()) return;
  const auto count = static_cast<std::int64_t>(item.layer_map.size());
  std::vector<std::int64_t> asked = item.layers;
  if (item.layer >= 0) asked.push_back(item.layer);
  for (const std::int64_t layer : asked)
    if (layer >= count) problems.add(Error(str("the student has no layer ", layer)).at(item.place.text()).given(str(layer)).allowed(str("0 to ", count - 1)));
}

// Widths that the relation heads must divide.
void objective_check_heads(const ObjectiveItem& item, Problems& problems) {
  const ObjectiveShapes::Heads &student = item.shapes.student_heads, &teacher = item.shapes.teacher_heads;
  if (student.query == 0 || teacher.query == 0) return;
  const auto check = [&](std::int64_t ours, std::int64_t theirs) {
    const std::int64_t heads = item.relation.relation_heads > 0 ? item.relation.relation_heads : std::gcd(ours, theirs);
    check_relation_heads(ours * student.size, heads, "student");
    check_relation_heads(theirs * teacher.size, heads, "teacher");
  };
  try {
    check(student.query, teacher.query);
    check(student.key, teacher.key);
  } catch (const Error& error) {
    problems.add(Error(error).at(item.place.text()));
  }
}

// What a cache of the teacher's likeliest tokens cannot serve.
void objective_check_cache(const ObjectiveKind& kind, const ObjectiveItem& item, Problems& problems) {
  const auto refuse = [&](const std::string& what, const std::string& hint) { problems.add(Error(what).at(item.place.text()).given(str(kind.key, ": ", item.name)).hint(hint)); };
  const LogitLoss* row = kind.names == logit_loss_names ? find_logit_loss(item.name) : nullptr;
  if (kind.needs_model) refuse("the teacher's cache holds probabilities of tokens, not values of its layers, and cannot score other texts", "remove this objective or the cache");
  if (row && !row->partition) refuse("this loss needs all logits of the teacher, and the cache holds the likeliest tokens", "remove the cache, or use one of: " + join(objective_cached_losses(), ", "));
  if (row && item.logits.temperature != 1) refuse(str("the teacher's cache holds probabilities at temperature 1, not at ", shortest(item.logits.temperature)), "set temperature: 1, or remove the cache");
}

// What the texts of the stage are not.
void objective_check_text(const ObjectiveKind& kind, const ObjectiveItem& item, Problems& problems) {
  const ObjectiveShapes& shapes = item.shapes;
  const auto refuse = [&](const std::string& what, const std::string& hint) { problems.add(Error(what).at(item.place.text()).given(str(kind.key, ": ", item.name)).hint(hint)); };
  if (shapes.embeds && (kind.names == logit_loss_names || kind.names == objective_label_names)) refuse("this objective is for predictions, and an encoder without classes makes none", "use embedding, hidden or relation");
  else if (kind.text == ObjectiveKind::Text::decoder && shapes.student_hidden > 0 && !shapes.decoder) refuse("this objective is for text, and the student is a classifier", "use logits, hidden, relation or labels");
  else if (kind.add == objective_add<PolicyObjective> && !shapes.sampled) refuse("this objective learns from texts that the student writes", "add on_policy with lambda above 0 to the stage distill, or remove it");
  else if (kind.add == objective_add<CrossTokenizerObjective> && !shapes.crossed) refuse("a teacher with another tokenizer is for the stage distill", "move this objective there");
  else if (kind.tokens && shapes.crossed) refuse("this objective compares token by token, which a teacher with another tokenizer does not allow", "beside cross_tokenizer use labels alone");
}

}  // namespace

Tensor objective_token_mask(const ObjectiveInput& input) {
  const std::int64_t rows = input.batch.rows, columns = input.batch.columns;
  if (!input.batch.labels.empty()) {
    if (!input.input.lengths.defined()) return {};
    return at::arange(columns, input.input.lengths.options()).unsqueeze(0) < input.input.lengths.unsqueeze(1);
  }
  const std::vector<std::int64_t> targets = next_tokens(input.batch);
  return at::tensor(at::ArrayRef<std::int64_t>(targets), at::kLong).ne(no_target).reshape({rows, columns}).to(input.input.ids.device());
}

const TeacherTargets& objective_teacher(const ObjectiveInput& input) {
  if (!input.teacher) throw std::logic_error("an objective needs the teacher and got none");
  return *input.teacher;
}

std::vector<std::shared_ptr<Objective>> build_objectives(const Node& list, const std::vector<std::int64_t>& layer_map, Problems& problems, const ObjectiveShapes& shapes) {
  std::vector<std::shared_ptr<Objective>> objectives;
  if (!list.is_list() || list.items.empty()) {
    problems.add(Error("\"objective\" must be a list of losses").at(list.place.text()).given(list.is_list() ? "an empty list" : list.kind_name()).allowed("for example [{logits: forward_kl, temperature: 2}, {labels: cross_entropy, weight: 0.5}]"));
    return objectives;
  }
  double sum = 0;
  for (const Node& node : list.items) {
    const ObjectiveKind* kind = objective_kind_of(node, problems);
    if (!kind) continue;
    ObjectiveItem item;
    item.place = node.place;
    item.layer_map = layer_map;
    item.shapes = shapes;
    const std::size_t before = problems.size();
    read_fields(node, str("objective \"", kind->key, "\""), problems, [&](FieldVisitor& visitor) { objective_fields(visitor, *kind, item); });
    if (item.name.empty() && problems.size() == before) problems.add(Error(str("\"", kind->key, "\" has no value")).at(node.place.text()).allowed(join(kind->names(), ", ")));
    objective_check_layers(item, problems);
    if (kind->add == objective_add<RelationObjective> && problems.size() == before) objective_check_heads(item, problems);
    if (problems.size() == before) objective_check_text(*kind, item, problems);
    if (shapes.decoder && kind->text == ObjectiveKind::Text::encoder) problems.add(Error(str("\"", kind->key, "\" compares one vector a text, and a decoder has none")).at(node.place.text()).given(item.name).hint("use hidden, relation or logits"));
    if (shapes.cached && problems.size() == before) objective_check_cache(*kind, item, problems);
    sum += item.weight;
    if (problems.size() == before) kind->add(item, objectives);
  }
  if (sum == 0 && problems.empty()) problems.add(Error("all objectives have weight 0: nothing would be learned").at(list.place.text()).hint("give at least one a positive weight"));
  return objectives;
}

ObjectiveShapes objective_shapes(const ModelConfig& student, const ModelConfig& teacher, std::uint64_t seed) {
  ObjectiveShapes shapes{student.hidden, teacher.hidden, !student.is_classifier() && !student.family->encoder, false, seed};
  shapes.embeds = student.family->encoder && !student.is_classifier();
  const auto heads = [](const ModelConfig& config) { return ObjectiveShapes::Heads{config.heads, config.kv_heads, config.head_dim}; };
  shapes.student_heads = heads(student), shapes.teacher_heads = heads(teacher);
  return shapes;
}

std::shared_ptr<Objective> divergence_monitor(bool decoder, std::int64_t tokens) { return std::make_shared<LogitObjective>(decoder, tokens); }

Node default_objective(const ModelConfig& model) {
  return model.family->encoder && !model.is_classifier() ? parse_yaml("[{embedding: cosine}]", "default objective") : default_objective(model.is_classifier());
}

Node default_objective(bool classifier) {
  const auto item = [](std::vector<std::pair<std::string, std::string>> pairs) {
    Node node = Node::map();
    for (auto& [key, value] : pairs) node.set(key, Node::text(value));
    return node;
  };
  if (!classifier) return Node::list({item({{"logits", "forward_kl"}})});
  return Node::list({item({{"labels", "cross_entropy"}, {"weight", "0.5"}}), item({{"logits", "forward_kl"}, {"temperature", "2"}}), item({{"hidden", "mse"}, {"weight", "10"}})});
}

std::vector<ObjectiveKindInfo> objective_kinds() {
  std::vector<ObjectiveKindInfo> out;
  for (const ObjectiveKind& kind : objective_table) {
    out.push_back({kind.key, kind.summary, kind.names(), explain_fields([&](FieldVisitor& visitor) {
                     ObjectiveItem item;
                     objective_fields(visitor, kind, item);
                   })});
  }
  return out;
}

}  // namespace kompakt
