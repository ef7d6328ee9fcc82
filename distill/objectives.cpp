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
#include "distill/fused_linear.h"
#include "distill/losses.h"
#include "distill/stage.h"
#include "train/chunked_loss.h"
#include "train/targets.h"

namespace kompakt {
namespace {

using at::Tensor;

// Everything that an item of the list can say; a kind visits the part that it reads, so that other keys are mistakes.
struct ObjectiveItem {
  std::string name;
  double weight = 1;
  LogitLossOptions logits;
  std::vector<std::int64_t> layers;
  std::int64_t layer = -1;  // -1 = the last
  bool normalize = false;
  RelationOptions relation;
  double label_smoothing = 0;
  Place place;
  ObjectiveShapes shapes;
  std::vector<std::int64_t> layer_map;
};

// Positions that count, [B,T]: of text those that have a next token, as for the labels; else all that are not padding.
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

std::string objective_tap(std::int64_t layer, const char* what) { return str("layer.", layer, ".", what); }

class LogitObjective final : public Objective {
 public:
  explicit LogitObjective(const ObjectiveItem& item) : row_(*find_logit_loss(item.name)), options_(item.logits), weight_(item.weight), decoder_(item.shapes.decoder) {}
  bool needs_teacher() const override { return true; }
  bool needs_logits() const override { return !decoder_; }

  Tensor loss(const ObjectiveInput& input, std::vector<LossPart>& parts) override {
    const Tensor& teacher = objective_teacher(input).logits;
    LogitLossOptions options = options_;
    Tensor value;
    if (input.batch.labels.empty()) options.mask = objective_token_mask(input);
    if (input.logits.defined()) {
      // A padded vocabulary on one side only: what both have are the real columns.
      if (input.logits.size(-1) != teacher.size(-1)) options.vocabulary = shared_vocabulary(input.logits.size(-1), teacher.size(-1));
      value = logit_loss(row_, input.logits, teacher, options);
    } else {
      const InputTransform& transform = input.student.lm_head.input_transform;
      const HeadWeights head = head_weights(input.student);
      const Tensor hidden = transform ? transform(input.hidden) : input.hidden;
      if (head.weight.size(0) != teacher.size(-1)) options.vocabulary = shared_vocabulary(head.weight.size(0), teacher.size(-1));
      options.mask = options.mask.reshape({-1});
      value = fused_linear_loss(row_, hidden.flatten(0, 1), head.weight, head.bias, {teacher.flatten(0, 1), {}, {}, {}}, options);
    }
    parts.push_back({std::string(row_.name), value});
    return value * weight_;
  }

 private:
  // Padding rows are at most a rounding to a multiple of 512; anything else is another vocabulary.
  static std::int64_t shared_vocabulary(std::int64_t student, std::int64_t teacher) {
    if (std::abs(student - teacher) < 512 && std::min(student, teacher) > 1024) return std::min(student, teacher);
    throw Error(str("student and teacher do not share a vocabulary or label set: ", student, " and ", teacher, " logits")).hint("use hidden or relation losses and labels, or a teacher with the same tokenizer and labels");
  }
  const LogitLoss& row_;
  LogitLossOptions options_;
  double weight_;
  bool decoder_;
};

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
    total = total / static_cast<double>(layers_.size());
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
  Tensor loss(const ObjectiveInput& input, std::vector<LossPart>& parts) override {
    Tensor total;
    for (const char* part : parts_) {
      const Tensor value = relation_loss(input.taps.at(objective_tap(layer_, part)), objective_teacher(input).taps.at(objective_tap(teacher_layer_, part)), input.input.lengths, input.input.documents, options_);
      total = total.defined() ? total + value : value;
    }
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

template <class T>
std::shared_ptr<Objective> objective_make(const ObjectiveItem& item) { return std::make_shared<T>(item); }

const Range objective_positive{.min = 0.0, .open_min = true};

void objective_logit_fields(FieldVisitor& visitor, ObjectiveItem& item) {
  visitor.number("temperature", item.logits.temperature, "softmax(logits / temperature) on both sides", objective_positive);
  visitor.flag("temperature_squared", item.logits.scale_gradient, "multiply by temperature^2, so that the gradient does not shrink beside hard labels");
  const LogitLoss* row = find_logit_loss(item.name);
  if (!row || row->uses_beta) visitor.number("beta", item.logits.beta, "generalized JSD: 0 = forward KL, 1 = reverse KL", {.min = 0.0, .max = 1.0});
  if (!row || row->uses_lambda) visitor.number("lambda", item.logits.lambda, "skewed losses: share of the other distribution in the mixture", {.min = 0.0, .max = 0.99});
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
std::vector<std::string> objective_label_names() { return {"cross_entropy"}; }

struct ObjectiveKind {
  const char* key;
  const char* summary;
  std::vector<std::string> (*names)();
  void (*fields)(FieldVisitor&, ObjectiveItem&);
  std::shared_ptr<Objective> (*make)(const ObjectiveItem&);
};

constexpr std::array<ObjectiveKind, 4> objective_table{{
    {"logits", "the student's output distribution against the teacher's", logit_loss_names, objective_logit_fields, objective_make<LogitObjective>},
    {"hidden", "outputs of student layers against outputs of the teacher layers that they stand for", objective_hidden_names, objective_hidden_fields, objective_make<HiddenObjective>},
    {"relation", "self-similarity of queries, keys and values of one layer (any two widths and head counts)", objective_relation_names, objective_relation_fields, objective_make<RelationObjective>},
    {"labels", "the data's own labels: class or next token", objective_label_names, objective_label_fields, objective_make<LabelObjective>},
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

void objective_check_layers(const ObjectiveItem& item, Problems& problems) {
  if (item.layer_map.empty()) return;
  const auto count = static_cast<std::int64_t>(item.layer_map.size());
  std::vector<std::int64_t> asked = item.layers;
  if (item.layer >= 0) asked.push_back(item.layer);
  for (const std::int64_t layer : asked)
    if (layer >= count) problems.add(Error(str("the student has no layer ", layer)).at(item.place.text()).given(str(layer)).allowed(str("0 to ", count - 1)));
}

}  // namespace

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
    sum += item.weight;
    if (problems.size() == before) objectives.push_back(kind->make(item));
  }
  if (sum == 0 && problems.empty()) problems.add(Error("all objectives have weight 0: nothing would be learned").at(list.place.text()).hint("give at least one a positive weight"));
  return objectives;
}

ObjectiveShapes objective_shapes(const Transformer& student, const ModelConfig& teacher, std::uint64_t seed) {
  return {student.config().hidden, teacher.hidden, !student.config().is_classifier(), seed};
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
