// Losses between hidden states and between relations of queries, keys and values; projections between widths.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "core/error.h"
#include "core/random.h"
#include "core/text.h"
#include "distill/losses.h"
#include "train/precision.h"

namespace kompakt {
namespace {

using at::Tensor;

at::ScalarType hidden_precision(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Valid rows of both sides [n, d] in float32 (or float64), the student projected to the teacher's width.
std::pair<Tensor, Tensor> hidden_rows(const Tensor& student, const Tensor& teacher, const Tensor& mask, const Tensor& projection) {
  const at::ScalarType type = hidden_precision(student);
  Tensor s = student.reshape({-1, student.size(-1)}), t = teacher.detach().reshape({-1, teacher.size(-1)});
  if (s.size(0) != t.size(0)) throw std::logic_error("hidden loss: student and teacher hold different positions");
  if (mask.defined()) {
    const Tensor valid = mask.reshape({-1}).nonzero().squeeze(-1);
    if (valid.numel() < s.size(0)) s = s.index_select(0, valid), t = t.index_select(0, valid);
  }
  s = s.to(type);
  if (projection.defined()) s = at::mm(s, projection.to(type));
  if (s.size(1) != t.size(1))
    throw Error(str("the hidden states of student and teacher have different widths: ", s.size(1), " and ", t.size(1))).hint("use a projection, or a relation loss, which compares any two widths");
  return {s, t.to(type)};
}

// [B,H,T,hd] -> [B,A,T,H*hd/A]: heads joined, then split again.
Tensor relation_split(const Tensor& x, std::int64_t heads, bool normalize) {
  const std::int64_t b = x.size(0), t = x.size(2), width = x.size(1) * x.size(3);
  Tensor out = x.transpose(1, 2).reshape({b, t, heads, width / heads}).transpose(1, 2).to(hidden_precision(x));
  if (normalize) return out / out.norm(2, -1, true).clamp_min(1e-12);
  return out * std::pow(static_cast<double>(width) / static_cast<double>(heads), -0.25);  // both factors together: 1/sqrt(d_r)
}

}  // namespace

void check_relation_heads(std::int64_t width, std::int64_t heads, const char* whose) {
  if (heads >= 1 && width % heads == 0) return;
  std::int64_t below = std::max<std::int64_t>(1, std::min(heads, width)), above = below;
  while (width % below != 0) --below;
  while (above < width && width % above != 0) ++above;
  throw Error(str("the ", whose, "'s width ", width, " cannot be split into ", heads, " relation heads")).given(str(heads)).allowed(str("a divisor of ", width, "; nearest: ", below, " or ", above));
}

Tensor hidden_mse(const Tensor& student, const Tensor& teacher, const Tensor& mask, const Tensor& projection, bool normalize) {
  const NoAutocast float32;
  const auto [s, t] = hidden_rows(student, teacher, mask, projection);
  if (s.size(0) == 0) return s.sum();
  const Tensor loss = at::mse_loss(s, t);
  return normalize ? loss / t.var(/*unbiased=*/false).clamp_min(1e-12) : loss;
}

Tensor hidden_cosine(const Tensor& student, const Tensor& teacher, const Tensor& mask, const Tensor& projection) {
  const NoAutocast float32;
  const auto [s, t] = hidden_rows(student, teacher, mask, projection);
  if (s.size(0) == 0) return s.sum();
  const Tensor both_zero = (s.detach().abs().amax(-1) == 0).logical_and_(t.abs().amax(-1) == 0);
  return 1 - at::cosine_similarity(s, t, -1, 1e-8).masked_fill(both_zero, 1).mean();
}

Tensor least_squares_projection(const Tensor& student, const Tensor& teacher, double ridge) {
  const at::NoGradGuard no_grad;
  const Tensor s = student.reshape({-1, student.size(-1)}).to(at::kDouble), t = teacher.reshape({-1, teacher.size(-1)}).to(at::kDouble);
  Tensor gram = at::mm(s.t(), s);
  gram.diagonal().add_(ridge * gram.diagonal().mean().item<double>() + 1e-300);
  return at::linalg_solve(gram, at::mm(s.t(), t)).to(at::kFloat);
}

Tensor orthogonal_projection(std::int64_t rows, std::int64_t columns, std::uint64_t seed, std::string_view stream) {
  const CounterRandom random(seed, stream);
  const std::int64_t tall = std::max(rows, columns), narrow = std::min(rows, columns);
  Tensor gauss = at::empty({tall, narrow}, at::kDouble);
  double* values = gauss.data_ptr<double>();
  for (std::int64_t i = 0; i < tall * narrow; ++i) values[i] = random.normal(static_cast<std::uint64_t>(i));
  const auto [q, r] = at::linalg_qr(gauss);
  const Tensor signs = r.diagonal().sign();  // makes the factor unique, so that it does not depend on the LAPACK in use
  const Tensor out = q * at::where(signs == 0, at::ones_like(signs), signs);
  return (rows >= columns ? out : out.t()).to(at::kFloat).contiguous();
}

Tensor relation_loss(const Tensor& student, const Tensor& teacher, const Tensor& lengths, const Tensor& documents, const RelationOptions& options) {
  const NoAutocast float32;
  if (student.size(0) != teacher.size(0) || student.size(2) != teacher.size(2)) throw std::logic_error("relation loss: student and teacher hold different positions");
  const std::int64_t rows = student.size(0), tokens = student.size(2);
  const std::int64_t heads = options.relation_heads > 0 ? options.relation_heads : std::gcd(student.size(1), teacher.size(1));
  check_relation_heads(student.size(1) * student.size(3), heads, "student");
  check_relation_heads(teacher.size(1) * teacher.size(3), heads, "teacher");
  const Tensor s = relation_split(student, heads, options.normalize), t = relation_split(teacher.detach(), heads, options.normalize);
  Tensor scores = at::matmul(s, s.transpose(-1, -2)), target = at::matmul(t, t.transpose(-1, -2));

  LogitLossOptions loss;
  loss.temperature = options.temperature;
  loss.scale_gradient = false;
  if (lengths.defined() || documents.defined()) {
    const Tensor valid = lengths.defined() ? at::arange(tokens, lengths.options()).unsqueeze(0) < lengths.unsqueeze(1) : at::ones({rows, tokens}, student.options().dtype(at::kBool));
    Tensor hidden = valid.logical_not().unsqueeze(1).expand({rows, tokens, tokens});  // [B, row, column]
    if (documents.defined()) hidden = hidden.logical_or(documents.unsqueeze(1) != documents.unsqueeze(2));
    const double minus_infinity = -std::numeric_limits<double>::infinity();
    const Tensor row_of_padding = valid.logical_not().unsqueeze(2);
    hidden = hidden.logical_and(row_of_padding.logical_not());  // rows of padding are left out below; they must only stay finite
    scores = scores.masked_fill(hidden.unsqueeze(1), minus_infinity);
    target = target.masked_fill(hidden.unsqueeze(1), minus_infinity);
    loss.mask = valid.unsqueeze(1).expand({rows, heads, tokens});
  }
  return forward_kl(scores, target, loss);
}

}  // namespace kompakt
