// Softmax of both sides, both divergences and the gradient, a row at a time: the row stays in the second-level cache.
#include "distill/kl_rows.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "model/lanes.h"
#include "model/parallel.h"

namespace kompakt {
namespace {

constexpr std::int64_t kl_block = 1024;  // numbers that one register sums before the sum goes on in double

struct KlRow {
  double forward = 0, reverse = 0;
};

template <class R>
KOMPAKT_LANES_INLINE R kl_largest(const R* row, std::int64_t size) {
  using Register = typename Registers<R>::Type;
  constexpr std::int64_t count = Registers<R>::count;
  R top = row[0];
  std::int64_t j = 0;
  if (size >= count) {
    Register largest, x;
    std::memcpy(&largest, row, sizeof largest);
    for (j = count; j + count <= size; j += count) {
      std::memcpy(&x, row + j, sizeof x);
      largest = x > largest ? x : largest;
    }
    for (std::int64_t i = 0; i < count; ++i) top = largest[i] > top ? largest[i] : top;
  }
  for (; j < size; ++j) top = row[j] > top ? row[j] : top;
  return top;
}

template <class R>
KOMPAKT_LANES_INLINE bool kl_removes(const R* row, std::int64_t size) {
  constexpr R infinite = -std::numeric_limits<R>::infinity();
  bool found = false;
  for (std::int64_t j = 0; j < size; ++j) found |= row[j] == infinite;
  return found;
}

// With d = (t - max t) - (s - max s): KL(p || q) = sum(e^(t - max t) d) / P - log P + log Q. The gradient is q - p.
// NaN comes through d, which the exponentials would swallow.
template <class R>
KOMPAKT_LANES_INLINE KlRow kl_row(R* s, R* t, std::int64_t size, bool gradient, R scale) {
  using Register = typename Registers<R>::Type;
  constexpr std::int64_t count = Registers<R>::count;
  const R top_s = kl_largest(s, size), top_t = kl_largest(t, size);
  double q = 0, p = 0, qd = 0, pd = 0;
  for (std::int64_t block = 0; block < size; block += kl_block) {
    const std::int64_t end = std::min(block + kl_block, size);
    Register sum_q = {}, sum_p = {}, sum_qd = {}, sum_pd = {}, x = {}, y = {};
    std::int64_t j = block;
    for (; j + count <= end; j += count) {
      std::memcpy(&x, s + j, sizeof x);
      std::memcpy(&y, t + j, sizeof y);
      x -= top_s, y -= top_t;
      const Register d = y - x;
      lanes_exp<R>(x);
      lanes_exp<R>(y);
      sum_q += x, sum_p += y, sum_qd += x * d, sum_pd += y * d;
      std::memcpy(s + j, &x, sizeof x);
      std::memcpy(t + j, &y, sizeof y);
    }
    if (j < end) {  // the end of the row: what is behind it counts 0
      const auto rest = static_cast<std::size_t>(end - j) * sizeof(R);
      Register real = {};
      for (std::int64_t i = 0; i < end - j; ++i) real[i] = 1;
      x = Register{} + top_s, y = Register{} + top_t;
      std::memcpy(&x, s + j, rest);
      std::memcpy(&y, t + j, rest);
      x -= top_s, y -= top_t;
      const Register d = y - x;
      lanes_exp<R>(x);
      lanes_exp<R>(y);
      x *= real, y *= real;
      sum_q += x, sum_p += y, sum_qd += x * d, sum_pd += y * d;
      std::memcpy(s + j, &x, rest);
      std::memcpy(t + j, &y, rest);
    }
    q += lanes_sum<R>(sum_q), p += lanes_sum<R>(sum_p), qd += lanes_sum<R>(sum_qd), pd += lanes_sum<R>(sum_pd);
  }
  const double gap = std::log(q) - std::log(p);
  if (gradient) {
    // In this form rows that are equal give exact zeros, with fused multiply-add too.
    const R of_q = static_cast<R>(scale / q), ratio = static_cast<R>(q / p);
    for (std::int64_t j = 0; j < size; ++j) s[j] = (s[j] - t[j] * ratio) * of_q;
  }
  return {pd / p + gap, -qd / q - gap};
}

KOMPAKT_LANES_CLONES KlRow kl_run(float* s, float* t, std::int64_t size, bool gradient, double scale) { return kl_row<float>(s, t, size, gradient, static_cast<float>(scale)); }
KOMPAKT_LANES_CLONES KlRow kl_run_wide(double* s, double* t, std::int64_t size, bool gradient, double scale) { return kl_row<double>(s, t, size, gradient, scale); }
KOMPAKT_LANES_CLONES bool kl_run_removes(const float* row, std::int64_t size) { return kl_removes<float>(row, size); }
KOMPAKT_LANES_CLONES bool kl_run_removes_wide(const double* row, std::int64_t size) { return kl_removes<double>(row, size); }
KlRow kl_call(float* s, float* t, std::int64_t size, bool gradient, double scale) { return kl_run(s, t, size, gradient, scale); }
KlRow kl_call(double* s, double* t, std::int64_t size, bool gradient, double scale) { return kl_run_wide(s, t, size, gradient, scale); }
bool kl_call_removes(const float* row, std::int64_t size) { return kl_run_removes(row, size); }
bool kl_call_removes(const double* row, std::int64_t size) { return kl_run_removes_wide(row, size); }

// A column that is -inf in one of the two is removed from both.
template <class R>
KlRow kl_row_with_removed(R* s, R* t, std::int64_t size, bool gradient, double scale) {
  constexpr R infinite = -std::numeric_limits<R>::infinity(), masked = R(-1e30);
  std::vector<std::int64_t> removed;
  for (std::int64_t j = 0; j < size; ++j) {
    if (s[j] != infinite && t[j] != infinite) continue;
    s[j] = t[j] = masked;
    removed.push_back(j);
  }
  const KlRow out = kl_call(s, t, size, gradient, scale);
  if (gradient)
    for (const std::int64_t j : removed) s[j] = 0;
  return out;
}

template <class R>
void kl_rows(at::Tensor& student, at::Tensor& teacher, std::int64_t columns, bool gradient, double scale, std::vector<KlRow>& out) {
  const std::int64_t width = student.size(1), other = teacher.size(1);
  R *s = student.data_ptr<R>(), *t = teacher.data_ptr<R>();
  at::parallel_for(0, student.size(0), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      R *row = s + i * width, *target = t + i * other;
      const bool removes = kl_call_removes(row, columns) || kl_call_removes(target, columns);
      out[static_cast<std::size_t>(i)] = removes ? kl_row_with_removed(row, target, columns, gradient, scale) : kl_call(row, target, columns, gradient, scale);
      if (gradient) std::fill(row + columns, row + width, R(0));
    }
  });
}

}  // namespace

bool fits_kl_rows(std::span<const LogitTerm> terms, const at::Tensor& logits) {
  const bool real = logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kDouble;
  return terms.size() == 1 && terms[0].loss->by_rows && terms[0].options.temperature == 1 && logits.is_cpu() && real && logits.size(1) > 0;
}

LogitSums evaluate_kl_rows(const LogitTerm& term, at::Tensor student, at::Tensor teacher, std::int64_t vocabulary, bool gradient, double scale) {
  const std::int64_t columns = vocabulary > 0 ? vocabulary : student.size(1);
  if (columns > student.size(1) || columns > teacher.size(1) || student.scalar_type() != teacher.scalar_type() || !student.is_contiguous() || !teacher.is_contiguous())
    throw std::logic_error("evaluate_kl_rows: shapes or types differ");
  std::vector<KlRow> rows(static_cast<std::size_t>(student.size(0)));
  const double factor = scale * term.weight;  // T^2 is 1
  if (student.scalar_type() == at::kDouble) kl_rows<double>(student, teacher, columns, gradient, factor, rows);
  else kl_rows<float>(student, teacher, columns, gradient, factor, rows);
  double forward = 0, reverse = 0;
  for (const KlRow& row : rows) forward += row.forward, reverse += row.reverse;
  return {at::tensor({forward, forward, reverse}, at::kDouble), gradient ? student : at::Tensor()};
}

}  // namespace kompakt
