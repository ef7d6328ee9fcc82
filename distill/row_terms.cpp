// Rows of the table of losses as rows of the kernels' table.
#include "distill/row_terms.h"

#include <ATen/ATen.h>

#include <stdexcept>

#include "train/row_losses.h"

namespace kompakt {
namespace {

// The ends of an option's range are other rows: a mixture that holds one side alone has no logarithm of the other's share.
rows::RowTerm row_term_loss(const LogitTerm& term) {
  using rows::RowLoss;
  const LogitLossOptions& o = term.options;
  rows::RowTerm out;
  out.loss = term.loss->row;
  if (term.loss->uses_beta) {
    out.parameter = o.beta;
    if (o.beta == 0) out.loss = RowLoss::forward_kl;
    if (o.beta == 1) out.loss = RowLoss::reverse_kl;
  }
  if (term.loss->uses_lambda) {
    out.parameter = o.lambda;
    if (o.lambda == 0) out.loss = out.loss == RowLoss::skew_forward_kl ? RowLoss::forward_kl : RowLoss::reverse_kl;
  }
  return out;
}

}  // namespace

std::optional<rows::RowTerms> row_terms(std::span<const LogitTerm> terms, double scale) {
  if (terms.size() > rows::most_terms) return {};
  rows::RowTerms out;
  for (const LogitTerm& term : terms) {
    if (term.loss->row == rows::RowLoss::none) return {};
    const double inverse = 1 / term.options.temperature, factor = gradient_factor(term.options);
    rows::RowTerm& row = out.terms[out.count++];
    row = row_term_loss(term);
    while (row.slot < out.slots && out.inverse_temperature[row.slot] != inverse) ++row.slot;
    if (row.slot == out.slots) out.inverse_temperature[out.slots++] = inverse;
    row.value_factor = factor;
    row.gradient_factor = scale * term.weight * factor * inverse;
  }
  return out;
}

LogitSums evaluate_row_terms(const rows::RowTerms& terms, at::Tensor student, const at::Tensor& teacher, std::int64_t vocabulary, bool gradient) {
  if (vocabulary == 0 && student.size(1) != teacher.size(1)) throw std::logic_error("evaluate_row_terms: student and teacher have different columns");
  const at::Tensor values = divergence_rows(terms, student, teacher, vocabulary > 0 ? vocabulary : student.size(1), gradient);
  return {values.sum(0), gradient ? student : at::Tensor()};
}

}  // namespace kompakt
