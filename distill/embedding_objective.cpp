// Losses between the pooled vectors of texts, and their objective.
#include <ATen/ATen.h>

#include <array>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/text.h"
#include "distill/objective_item.h"
#include "train/precision.h"

namespace kompakt {
namespace {

using at::Tensor;

// [B, d] float32 or float64, rows of unit length; the zero vector stays zero.
Tensor embedding_unit(const Tensor& x, const Tensor& projection = {}) {
  Tensor wide = x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
  if (projection.defined()) wide = at::mm(wide, projection.to(wide.scalar_type()));
  return wide / wide.norm(2, -1, true).clamp_min(1e-12);
}

LogitLossOptions embedding_softmax(double temperature) {
  LogitLossOptions options;
  options.temperature = temperature;
  options.scale_gradient = false;
  return options;
}

Tensor embedding_mse(const Tensor& student, const Tensor& teacher, double, const Tensor& projection) { return hidden_mse(student, teacher, {}, projection); }
Tensor embedding_cosine(const Tensor& student, const Tensor& teacher, double, const Tensor& projection) { return hidden_cosine(student, teacher, {}, projection); }
Tensor embedding_similarity_row(const Tensor& student, const Tensor& teacher, double temperature, const Tensor&) { return embedding_similarity(student, teacher, temperature); }

constexpr std::array<EmbeddingLoss, 4> embedding_table{{
    {"mse", false, true, embedding_mse},
    {"cosine", false, true, embedding_cosine},
    {"contrastive", true, true, embedding_contrastive},
    {"similarity", true, false, embedding_similarity_row},
}};

}  // namespace

std::span<const EmbeddingLoss> embedding_losses() { return embedding_table; }

const EmbeddingLoss* find_embedding_loss(std::string_view name) {
  for (const EmbeddingLoss& row : embedding_table)
    if (row.name == name) return &row;
  return nullptr;
}

Tensor embedding_contrastive(const Tensor& student, const Tensor& teacher, double temperature, const Tensor& projection) {
  const NoAutocast float32;
  const Tensor s = embedding_unit(student, projection), t = embedding_unit(teacher.detach());
  if (s.size(1) != t.size(1)) throw Error(str("the embeddings of student and teacher have different widths: ", s.size(1), " and ", t.size(1))).hint("use a projection, or {embedding: similarity}, which compares any two widths");
  return forward_kl(at::mm(s, t.to(s.scalar_type()).t()), at::mm(t, t.t()), embedding_softmax(temperature));
}

Tensor embedding_similarity(const Tensor& student, const Tensor& teacher, double temperature) {
  const NoAutocast float32;
  const Tensor s = embedding_unit(student), t = embedding_unit(teacher.detach());
  if (s.size(0) < 2) return s.sum() * 0;
  const Tensor self = at::eye(s.size(0), s.options().dtype(at::kBool));
  const auto scores = [&](const Tensor& x) { return at::mm(x, x.t()).masked_fill(self, -std::numeric_limits<double>::infinity()); };
  return forward_kl(scores(s), scores(t), embedding_softmax(temperature));
}

EmbeddingObjective::EmbeddingObjective(const ObjectiveItem& item) : name_(item.name), temperature_(item.temperature), weight_(item.weight) {
  const ObjectiveShapes& shapes = item.shapes;
  if (!find_embedding_loss(name_)->projects || shapes.student_hidden == shapes.teacher_hidden || shapes.student_hidden == 0 || shapes.teacher_hidden == 0) return;
  projections_.emplace_back("projection.embedding", orthogonal_projection(shapes.student_hidden, shapes.teacher_hidden, shapes.seed, "projection.embedding").requires_grad_());
}

void EmbeddingObjective::request_taps(std::set<std::string>& student, std::set<std::string>& teacher) const {
  student.insert("pooled");
  teacher.insert("pooled");
}

Tensor EmbeddingObjective::loss(const ObjectiveInput& input, std::vector<LossPart>& parts) {
  const Tensor& student = input.taps.at("pooled");
  const Tensor projection = projections_.empty() ? Tensor() : projections_[0].second.to(student.device());
  const Tensor value = find_embedding_loss(name_)->evaluate(student, objective_teacher(input).taps.at("pooled"), temperature_, projection);
  parts.push_back({"embedding_" + name_, value});
  return value * weight_;
}

}  // namespace kompakt
