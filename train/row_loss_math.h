// Arithmetic of losses over rows of logits, shared by the CUDA kernels (train/cuda) and their CPU twins (train/row_losses.h): softmax in one
// pass over a row, and one element-wise form for all divergences. No torch, no allocation; C++17 so that nvcc compiles it.
//
// p = softmax(t / T) is the teacher's, q = softmax(s / T) the student's distribution of a row. A divergence is the sum over columns of
// `value`; with h_j = q_j dL/dq_j its gradient in the student's scaled logits is h_j - q_j sum(h) (what softmax makes of any dL/dq). Rows of
// the table that know their gradient without that sum give it as h and say so (row_projects).
//
// A row is added up by row_lanes partial sums, column j by lane j mod row_lanes, which are then added in pairs: the threads of a block on
// the device, the same order on the CPU.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace kompakt::rows {

constexpr int row_lanes = 256;
constexpr int most_terms = 4;                // of a sum of losses
constexpr int most_slots = most_terms + 1;   // temperatures; the first is 1, at which both divergences are logged

enum class RowLoss { none, forward_kl, reverse_kl, generalized_jsd, skew_forward_kl, skew_reverse_kl, total_variation, logits_mse };

struct RowTerm {
  RowLoss loss = RowLoss::none;
  int slot = 0;                 // of its temperature
  double parameter = 0;         // beta of generalized JSD, lambda of the skewed losses; both inside of (0, 1)
  double value_factor = 1;      // of the value that is reported
  double gradient_factor = 1;   // dL/ds = gradient_factor x (gradient in s / T)
};
// A weighted sum of losses over the same two rows. Plain data: it is an argument of a kernel.
struct RowTerms {
  int count = 0, slots = 1;
  double inverse_temperature[most_slots] = {1, 1, 1, 1, 1};
  RowTerm terms[most_terms];
};

// What a call works on. Row-major, each row `width` elements apart; only the first `columns` of a row are real, and the gradient behind them
// is 0. With a gradient the student's logits are overwritten by it.
template <class I>
struct RowPair {
  I* student;
  const I* teacher;
  std::int64_t rows, student_width, teacher_width, columns;
};
// Cross entropy with labels: targets [rows], 0 to width - 1. The gradient is multiplied by `factor`.
template <class I>
struct RowLabels {
  I* logits;
  const std::int64_t* targets;
  std::int64_t rows, width;
  double smoothing, factor;
};

// ---- numbers ----------------------------------------------------------------------------------------------------------

// A bfloat16 by its bits, so that no header of a device or of a library is needed.
struct Bf16 {
  std::uint16_t bits;
};

// The type in which logits of type I are computed with.
template <class I>
struct RowReal {
  using Type = I;
};
template <>
struct RowReal<Bf16> {
  using Type = float;
};

KOMPAKT_HD float row_load(float x) { return x; }
KOMPAKT_HD double row_load(double x) { return x; }
KOMPAKT_HD float row_load(Bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
KOMPAKT_HD void row_store(float value, float& to) { to = value; }
KOMPAKT_HD void row_store(double value, double& to) { to = value; }
KOMPAKT_HD void row_store(float value, Bf16& to) {  // to nearest, ties to even
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = static_cast<std::uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

KOMPAKT_HD float row_exp(float x) { return expf(x); }
KOMPAKT_HD double row_exp(double x) { return exp(x); }
KOMPAKT_HD float row_log(float x) { return logf(x); }
KOMPAKT_HD double row_log(double x) { return log(x); }
KOMPAKT_HD float row_log1p(float x) { return log1pf(x); }
KOMPAKT_HD double row_log1p(double x) { return log1p(x); }

// A column that is -inf in one of the two rows is removed from both.
template <class R>
KOMPAKT_HD bool row_removed(R student, R teacher) {
  return student == -static_cast<R>(INFINITY) || teacher == -static_cast<R>(INFINITY);
}

// ---- softmax in one pass ----------------------------------------------------------------------------------------------

// The largest logit so far and, for every temperature, sum exp((x - top) / T) (Milakov and Gimelshein 2018, arXiv 1805.02867).
template <class R>
struct RowSoftmax {
  R top;
  R sums[most_slots];
  std::int64_t seen;
};

template <class R>
KOMPAKT_HD void row_clear(RowSoftmax<R>& s) {
  s.top = -static_cast<R>(INFINITY);
  for (int k = 0; k < most_slots; ++k) s.sums[k] = 0;
  s.seen = 0;
}

// x is not -inf. NaN stays in the sums.
template <class R>
KOMPAKT_HD void row_push(RowSoftmax<R>& s, const RowTerms& terms, R x) {
  const bool higher = x > s.top;
  for (int k = 0; k < most_slots; ++k) {
    if (k >= terms.slots) continue;
    const R inverse = static_cast<R>(terms.inverse_temperature[k]), step = row_exp((higher ? s.top - x : x - s.top) * inverse);
    s.sums[k] = higher ? s.sums[k] * step + 1 : s.sums[k] + step;
  }
  if (higher) s.top = x;
  ++s.seen;
}

template <class R>
KOMPAKT_HD void row_merge(RowSoftmax<R>& into, const RowSoftmax<R>& other, const RowTerms& terms) {
  const bool higher = other.top > into.top;
  const R top = higher ? other.top : into.top;
  for (int k = 0; k < most_slots; ++k) {
    if (k >= terms.slots) continue;
    const R inverse = static_cast<R>(terms.inverse_temperature[k]);
    // A side without a column has no largest logit, and nothing to scale.
    const R a = into.seen > 0 ? into.sums[k] * row_exp((into.top - top) * inverse) : 0, b = other.seen > 0 ? other.sums[k] * row_exp((other.top - top) * inverse) : 0;
    into.sums[k] = a + b;
  }
  into.top = top;
  into.seen += other.seen;
}

// What turns the logits of a row into log-probabilities.
template <class R>
struct RowNormalizers {
  R top_student, top_teacher;
  R log_student[most_slots], log_teacher[most_slots];  // of the sums
  R columns;                                           // that are not removed
};

template <class R>
KOMPAKT_HD void row_normalizers(const RowSoftmax<R>& student, const RowSoftmax<R>& teacher, const RowTerms& terms, RowNormalizers<R>& out) {
  out.top_student = student.top, out.top_teacher = teacher.top;
  for (int k = 0; k < terms.slots; ++k) out.log_student[k] = row_log(student.sums[k]), out.log_teacher[k] = row_log(teacher.sums[k]);
  out.columns = static_cast<R>(student.seen);
}

// ---- divergences ------------------------------------------------------------------------------------------------------

// log(a e^x + (1 - a) e^y), 0 < a < 1.
template <class R>
KOMPAKT_HD R row_log_mixture(R x, R y, R a) {
  x += row_log(a), y += row_log1p(-a);
  return x > y ? x + row_log1p(row_exp(y - x)) : y + row_log1p(row_exp(x - y));
}

// False where `slope` below is the whole gradient.
KOMPAKT_HD bool row_projects(RowLoss loss) { return loss != RowLoss::forward_kl && loss != RowLoss::logits_mse; }

template <class R>
struct RowElement {
  R value, slope;
};

// One column. log_p, log_q: of teacher and student; `difference`: (s - t) / T; `columns`: that are not removed.
// Formulas: distill/losses.cpp, whose rows of the same names compute the same.
template <class R>
KOMPAKT_HD RowElement<R> row_element(RowLoss loss, R parameter, R log_p, R log_q, R difference, R columns) {
  const R p = row_exp(log_p), q = row_exp(log_q);
  switch (loss) {
    case RowLoss::forward_kl: return {p * (log_p - log_q), q - p};
    case RowLoss::reverse_kl: {
      const R value = q * (log_q - log_p);
      return {value, value};
    }
    case RowLoss::generalized_jsd: {
      const R log_m = row_log_mixture(log_p, log_q, parameter), to_student = (1 - parameter) * q * (log_q - log_m);
      return {parameter * p * (log_p - log_m) + to_student, to_student};
    }
    case RowLoss::skew_forward_kl: {
      const R ratio = log_p - row_log_mixture(log_p, log_q, parameter);
      return {p * ratio, (parameter - 1) * q * row_exp(ratio)};
    }
    case RowLoss::skew_reverse_kl: {
      const R ratio = log_q - row_log_mixture(log_p, log_q, 1 - parameter);
      return {q * ratio, q * (ratio - parameter * row_exp(ratio))};
    }
    case RowLoss::total_variation: {
      const R gap = q - p, half = static_cast<R>(0.5);
      return {half * (gap < 0 ? -gap : gap), gap > 0 ? half * q : gap < 0 ? -half * q : gap};  // NaN stays NaN
    }
    case RowLoss::logits_mse: return {difference * difference / columns, 2 * difference / columns};
    case RowLoss::none: break;
  }
  return {0, 0};
}

// Sums over the columns of one lane; then, in float64, over all.
template <class R>
struct RowSums {
  R value[most_terms] = {}, slope[most_terms] = {}, forward = 0, reverse = 0;
};

template <class R>
KOMPAKT_HD RowElement<R> row_term_element(const RowTerms& terms, int i, const RowNormalizers<R>& n, R student, R teacher) {
  const RowTerm& term = terms.terms[i];
  const R inverse = static_cast<R>(terms.inverse_temperature[term.slot]);
  const R log_q = (student - n.top_student) * inverse - n.log_student[term.slot], log_p = (teacher - n.top_teacher) * inverse - n.log_teacher[term.slot];
  return row_element(term.loss, static_cast<R>(term.parameter), log_p, log_q, (student - teacher) * inverse, n.columns);
}

template <class R>
KOMPAKT_HD void row_add(RowSums<R>& sums, const RowTerms& terms, const RowNormalizers<R>& n, R student, R teacher) {
  const R log_q = student - n.top_student - n.log_student[0], log_p = teacher - n.top_teacher - n.log_teacher[0];
  sums.forward += row_exp(log_p) * (log_p - log_q);
  sums.reverse += row_exp(log_q) * (log_q - log_p);
  for (int i = 0; i < most_terms; ++i) {
    if (i >= terms.count) continue;
    const RowElement<R> element = row_term_element(terms, i, n, student, teacher);
    sums.value[i] += element.value, sums.slope[i] += element.slope;
  }
}

// dL/ds of one column; slopes[i]: sum of the slopes of term i.
template <class R>
KOMPAKT_HD R row_gradient(const RowTerms& terms, const RowNormalizers<R>& n, const R* slopes, R student, R teacher) {
  R total = 0;
  for (int i = 0; i < most_terms; ++i) {
    if (i >= terms.count) continue;
    const RowTerm& term = terms.terms[i];
    R slope = row_term_element(terms, i, n, student, teacher).slope;
    if (row_projects(term.loss)) slope -= row_exp((student - n.top_student) * static_cast<R>(terms.inverse_temperature[term.slot]) - n.log_student[term.slot]) * slopes[i];
    total += static_cast<R>(term.gradient_factor) * slope;
  }
  return total;
}

KOMPAKT_HD bool row_needs_slopes(const RowTerms& terms) {
  bool needed = false;
  for (int i = 0; i < terms.count; ++i) needed = needed || row_projects(terms.terms[i].loss);
  return needed;
}

// ---- cross entropy ----------------------------------------------------------------------------------------------------

// (1 - e) (log Z - s_y) + e (log Z - mean s), log Z = top + log_sum; every part is taken from `top`, so that large logits cost no digits.
template <class R>
KOMPAKT_HD double row_cross_entropy(R top, R log_sum, R chosen, double sum_below_top, std::int64_t columns, double smoothing) {
  double value = log_sum + (1 - smoothing) * static_cast<double>(top - chosen);
  if (smoothing > 0) value += smoothing * sum_below_top / static_cast<double>(columns);  // of top - s over all columns
  return value;
}

template <class R>
KOMPAKT_HD R row_cross_entropy_gradient(R log_q, bool chosen, std::int64_t columns, double smoothing, double factor) {
  R slope = row_exp(log_q);
  if (chosen) slope -= static_cast<R>(1 - smoothing);
  if (smoothing > 0) slope -= static_cast<R>(smoothing / static_cast<double>(columns));
  return slope * static_cast<R>(factor);
}

}  // namespace kompakt::rows
