// The twins add up a row in the lanes of a block of the device, one after the other.
#include "train/row_losses.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <array>
#include <stdexcept>

#include "core/text.h"
#include "model/parallel.h"
#ifdef KOMPAKT_KERNELS
#include "train/cuda/row_losses.h"
#endif

namespace kompakt {

namespace cpu {
namespace {

using rows::row_lanes;
using rows::RowTerms;

template <class R>
using RowLanes = std::array<rows::RowSoftmax<R>, row_lanes>;

template <class R>
void row_clear_lanes(RowLanes<R>& lanes) {
  for (rows::RowSoftmax<R>& lane : lanes) rows::row_clear(lane);
}

std::size_t row_lane(std::int64_t column) { return static_cast<std::size_t>(column % row_lanes); }

template <class R>
const rows::RowSoftmax<R>& row_whole(RowLanes<R>& lanes, const RowTerms& terms) {
  for (std::size_t half = row_lanes / 2; half > 0; half /= 2)
    for (std::size_t i = 0; i < half; ++i) rows::row_merge(lanes[i], lanes[i + half], terms);
  return lanes[0];
}

// Of one number per lane, in float64 and in pairs.
template <class Lane>
double row_total(const Lane& of_lane) {
  std::array<double, row_lanes> sums;
  for (std::size_t i = 0; i < row_lanes; ++i) sums[i] = static_cast<double>(of_lane(i));
  for (std::size_t half = row_lanes / 2; half > 0; half /= 2)
    for (std::size_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

template <class I, class R = typename rows::RowReal<I>::Type>
void divergence_row(const RowTerms& terms, I* student, const I* teacher, const rows::RowPair<I>& call, bool gradient, double* values) {
  RowLanes<R> of_student, of_teacher;
  row_clear_lanes<R>(of_student);
  row_clear_lanes<R>(of_teacher);
  for (std::int64_t j = 0; j < call.columns; ++j) {
    const R s = rows::row_load(student[j]), t = rows::row_load(teacher[j]);
    if (rows::row_removed(s, t)) continue;
    rows::row_push(of_student[row_lane(j)], terms, s);
    rows::row_push(of_teacher[row_lane(j)], terms, t);
  }
  rows::RowNormalizers<R> normalizers;
  rows::row_normalizers(row_whole(of_student, terms), row_whole(of_teacher, terms), terms, normalizers);

  std::array<rows::RowSums<R>, row_lanes> sums{};
  for (std::int64_t j = 0; j < call.columns; ++j) {
    const R s = rows::row_load(student[j]), t = rows::row_load(teacher[j]);
    if (!rows::row_removed(s, t)) rows::row_add(sums[row_lane(j)], terms, normalizers, s, t);
  }
  R slopes[rows::most_terms] = {};
  for (int i = 0; i < terms.count; ++i) {
    values[i] = terms.terms[i].value_factor * row_total([&](std::size_t lane) { return sums[lane].value[i]; });
    slopes[i] = static_cast<R>(row_total([&](std::size_t lane) { return sums[lane].slope[i]; }));
  }
  values[terms.count] = row_total([&](std::size_t lane) { return sums[lane].forward; });
  values[terms.count + 1] = row_total([&](std::size_t lane) { return sums[lane].reverse; });
  if (!gradient) return;
  for (std::int64_t j = 0; j < call.student_width; ++j) {
    const bool real = j < call.columns && !rows::row_removed<R>(rows::row_load(student[j]), rows::row_load(teacher[j]));
    rows::row_store(real ? rows::row_gradient<R>(terms, normalizers, slopes, rows::row_load(student[j]), rows::row_load(teacher[j])) : R(0), student[j]);
  }
}

template <class I, class R = typename rows::RowReal<I>::Type>
void cross_entropy_row(const rows::RowLabels<I>& call, I* logits, std::int64_t target, bool gradient, double& value) {
  const RowTerms alone;
  RowLanes<R> lanes;
  row_clear_lanes<R>(lanes);
  R chosen = static_cast<R>(NAN);
  for (std::int64_t j = 0; j < call.width; ++j) {
    const R s = rows::row_load(logits[j]);
    if (j == target) chosen = s;
    if (s != -static_cast<R>(INFINITY)) rows::row_push(lanes[row_lane(j)], alone, s);
  }
  const rows::RowSoftmax<R>& whole = row_whole(lanes, alone);
  const R top = whole.top, log_sum = rows::row_log(whole.sums[0]);
  std::array<R, row_lanes> below{};
  if (call.smoothing > 0)
    for (std::int64_t j = 0; j < call.width; ++j) below[row_lane(j)] += top - rows::row_load(logits[j]);
  value = rows::row_cross_entropy(top, log_sum, chosen, row_total([&](std::size_t lane) { return below[lane]; }), call.width, call.smoothing);
  if (!gradient) return;
  for (std::int64_t j = 0; j < call.width; ++j)
    rows::row_store(rows::row_cross_entropy_gradient<R>(rows::row_load(logits[j]) - top - log_sum, j == target, call.width, call.smoothing, call.factor), logits[j]);
}

}  // namespace

template <class I>
void divergence_rows(const RowTerms& terms, const rows::RowPair<I>& call, bool gradient, double* values) {
  at::parallel_for(0, call.rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) divergence_row<I>(terms, call.student + r * call.student_width, call.teacher + r * call.teacher_width, call, gradient, values + r * (terms.count + 2));
  });
}
template void divergence_rows<float>(const RowTerms&, const rows::RowPair<float>&, bool, double*);
template void divergence_rows<double>(const RowTerms&, const rows::RowPair<double>&, bool, double*);
template void divergence_rows<rows::Bf16>(const RowTerms&, const rows::RowPair<rows::Bf16>&, bool, double*);

template <class I>
void cross_entropy_rows(const rows::RowLabels<I>& call, bool gradient, double* values) {
  at::parallel_for(0, call.rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) cross_entropy_row<I>(call, call.logits + r * call.width, call.targets[r], gradient, values[r]);
  });
}
template void cross_entropy_rows<float>(const rows::RowLabels<float>&, bool, double*);
template void cross_entropy_rows<double>(const rows::RowLabels<double>&, bool, double*);
template void cross_entropy_rows<rows::Bf16>(const rows::RowLabels<rows::Bf16>&, bool, double*);

}  // namespace cpu

namespace {

#ifdef KOMPAKT_KERNELS
// The stream on which torch would run its own operators, so that a kernel waits for the products before it.
cuda::Stream row_stream(c10::Device device) {
  return static_cast<cuda::Stream>(c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle());
}
void row_check_launch(int error) {
  if (error != 0) throw std::runtime_error(str("a kernel of the losses was not launched: ", cuda::row_error_text(error)));
}
template <class I>
void row_launch(const rows::RowTerms& terms, const rows::RowPair<I>& call, bool gradient, double* values, c10::Device device) {
  const c10::DeviceGuard guard(device);
  row_check_launch(cuda::divergence_rows(terms, call, gradient, values, row_stream(device)));
}
template <class I>
void row_launch(const rows::RowLabels<I>& call, bool gradient, double* values, c10::Device device) {
  const c10::DeviceGuard guard(device);
  row_check_launch(cuda::cross_entropy_rows(call, gradient, values, row_stream(device)));
}
#else
template <class... Arguments>
void row_launch(const Arguments&...) {
  throw std::logic_error("losses by rows: the kernels are not compiled in");
}
#endif

template <class I>
void row_divergences(const rows::RowTerms& terms, at::Tensor& student, const at::Tensor& teacher, std::int64_t columns, bool gradient, double* values) {
  const rows::RowPair<I> call{static_cast<I*>(student.data_ptr()), static_cast<const I*>(teacher.const_data_ptr()), student.size(0), student.size(1), teacher.size(1), columns};
  if (student.is_cpu()) return cpu::divergence_rows(terms, call, gradient, values);
  if constexpr (!std::is_same_v<I, double>) row_launch(terms, call, gradient, values, student.device());
}

template <class I>
void row_labels(at::Tensor& logits, const at::Tensor& targets, double smoothing, double factor, bool gradient, double* values) {
  const rows::RowLabels<I> call{static_cast<I*>(logits.data_ptr()), targets.const_data_ptr<std::int64_t>(), logits.size(0), logits.size(1), smoothing, factor};
  if (logits.is_cpu()) return cpu::cross_entropy_rows(call, gradient, values);
  if constexpr (!std::is_same_v<I, double>) row_launch(call, gradient, values, logits.device());
}

void row_check(bool fits, const at::Tensor& logits, const char* what) {
  const at::ScalarType type = logits.scalar_type();
  const bool known = type == at::kFloat || type == at::kBFloat16 || (type == at::kDouble && logits.is_cpu());
  if (!fits || logits.dim() != 2 || !logits.is_contiguous() || !known || !(logits.is_cpu() || has_row_kernels(logits.device(), type))) throw std::logic_error(str(what, ": shapes, types or devices do not fit"));
}

}  // namespace

bool has_row_kernels(c10::Device device, at::ScalarType type) {
#ifdef KOMPAKT_KERNELS
  return device.is_cuda() && (type == at::kFloat || type == at::kBFloat16);
#else
  (void)device, (void)type;
  return false;
#endif
}

at::Tensor divergence_rows(const rows::RowTerms& terms, at::Tensor& student, const at::Tensor& teacher, std::int64_t columns, bool gradient) {
  const bool fits = teacher.dim() == 2 && student.dim() == 2 && teacher.is_contiguous() && teacher.scalar_type() == student.scalar_type() && teacher.device() == student.device() && teacher.size(0) == student.size(0) &&
                    columns >= 0 && columns <= student.size(1) && columns <= teacher.size(1);
  row_check(fits, student, "divergence_rows");
  at::Tensor values = at::empty({student.size(0), terms.count + 2}, student.options().dtype(at::kDouble));
  double* out = values.data_ptr<double>();
  if (student.scalar_type() == at::kDouble) row_divergences<double>(terms, student, teacher, columns, gradient, out);
  else if (student.scalar_type() == at::kFloat) row_divergences<float>(terms, student, teacher, columns, gradient, out);
  else row_divergences<rows::Bf16>(terms, student, teacher, columns, gradient, out);
  return values;
}

at::Tensor cross_entropy_rows(at::Tensor& logits, const at::Tensor& targets, double smoothing, double factor, bool gradient) {
  const bool fits = logits.dim() == 2 && targets.dim() == 1 && targets.size(0) == logits.size(0) && targets.scalar_type() == at::kLong && targets.is_contiguous() && targets.device() == logits.device();
  row_check(fits, logits, "cross_entropy_rows");
  at::Tensor values = at::empty({logits.size(0)}, logits.options().dtype(at::kDouble));
  double* out = values.data_ptr<double>();
  if (logits.scalar_type() == at::kDouble) row_labels<double>(logits, targets, smoothing, factor, gradient, out);
  else if (logits.scalar_type() == at::kFloat) row_labels<float>(logits, targets, smoothing, factor, gradient, out);
  else row_labels<rows::Bf16>(logits, targets, smoothing, factor, gradient, out);
  return values;
}

}  // namespace kompakt
