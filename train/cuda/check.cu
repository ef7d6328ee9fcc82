#include "train/cuda/check.h"

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "core/cuda_check.h"
#include "train/cuda/row_losses.h"

namespace kompakt {

namespace cpu {  // train/row_losses.h without its torch headers
template <class I>
void divergence_rows(const rows::RowTerms& terms, const rows::RowPair<I>& call, bool gradient, double* values);
template <class I>
void cross_entropy_rows(const rows::RowLabels<I>& call, bool gradient, double* values);
}  // namespace cpu

namespace cuda {
namespace {

using rows::Bf16;
using rows::RowLoss;
using rows::RowTerm;
using rows::RowTerms;

struct CheckedTerms {
  const char* name;
  RowTerms terms;
};

// At temperature 2 with its factor 4; the sum has two temperatures besides 1.
const CheckedTerms checked_terms[] = {
    {"forward_kl", {1, 1, {1}, {{RowLoss::forward_kl, 0, 0, 1, 0.5}}}},
    {"forward_kl at 2", {1, 2, {1, 0.5}, {{RowLoss::forward_kl, 1, 0, 4, 2}}}},
    {"reverse_kl", {1, 1, {1}, {{RowLoss::reverse_kl, 0, 0, 1, 1}}}},
    {"generalized_jsd", {1, 1, {1}, {{RowLoss::generalized_jsd, 0, 0.3, 1, 1}}}},
    {"skew_forward_kl", {1, 1, {1}, {{RowLoss::skew_forward_kl, 0, 0.1, 1, 1}}}},
    {"skew_reverse_kl", {1, 1, {1}, {{RowLoss::skew_reverse_kl, 0, 0.1, 1, 1}}}},
    {"total_variation", {1, 1, {1}, {{RowLoss::total_variation, 0, 0, 1, 1}}}},
    {"logits_mse", {1, 1, {1}, {{RowLoss::logits_mse, 0, 0, 1, 1}}}},
    {"a sum of three", {3, 3, {1, 0.5, 2}, {{RowLoss::reverse_kl, 1, 0, 4, 2}, {RowLoss::forward_kl, 0, 0, 1, 0.3}, {RowLoss::generalized_jsd, 2, 0.5, 0.25, 0.1}}}},
    {"no loss, both divergences", {0, 1, {1}, {}}},
};

template <class I>
struct RowType;
template <>
struct RowType<float> {
  static constexpr const char* name = "float32";
  static constexpr double gradients = 1e-5;
};
template <>
struct RowType<Bf16> {
  static constexpr const char* name = "bfloat16";
  // A gradient whose last bits differ may round to the neighbour, 2^-8 away: about one in a thousand does.
  static constexpr double gradients = 1e-3;
};

template <class I>
std::vector<I> logits_like(std::size_t count, std::uint32_t seed) {
  const std::vector<float> numbers = weights_like(count, seed);
  std::vector<I> out(count);
  for (std::size_t i = 0; i < count; ++i) rows::row_store(6 * numbers[i], out[i]);
  return out;
}

template <class I>
std::vector<float> as_floats(const std::vector<I>& values) {
  std::vector<float> out(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) out[i] = rows::row_load(values[i]);
  return out;
}

// The gradient lies where the logits were: `result` is compared as numbers.
template <class I>
void close_logits(Checker& checker, const std::string& name, int launch, DeviceArray<I>& result, const std::vector<I>& expected) {
  const std::vector<I> host = result.host();  // waits for the kernel
  DeviceArray<float> numbers(as_floats(host));
  checker.close(name, launch != 0 ? launch : static_cast<int>(result.status()), numbers, as_floats(expected), RowType<I>::gradients);
}

// Odd widths, padding behind the columns, removed columns on either side and a row that is removed altogether.
template <class I>
void check_divergences(Checker& checker) {
  const std::int64_t rows = 5, student_width = 1033, teacher_width = 1030, columns = 1029;
  std::vector<I> student = logits_like<I>(rows * student_width, 3);
  std::vector<I> teacher = logits_like<I>(rows * teacher_width, 4);
  rows::row_store(-INFINITY, student[7]);
  rows::row_store(-INFINITY, teacher[2 * teacher_width + 1028]);
  for (std::int64_t j = 0; j < columns; ++j) rows::row_store(-INFINITY, student[3 * student_width + j]);
  for (const CheckedTerms& c : checked_terms) {
    const std::string name = std::string("loss by rows, ") + RowType<I>::name + ", " + c.name;
    std::vector<I> expected = student;
    std::vector<double> values(rows * (c.terms.count + 2));
    cpu::divergence_rows<I>(c.terms, rows::RowPair<I>{expected.data(), teacher.data(), rows, student_width, teacher_width, columns}, true, values.data());
    DeviceArray<I> on_student(student), on_teacher(teacher);
    DeviceArray<double> on_values(std::vector<double>(values.size(), -1.0));
    const int launch = divergence_rows(c.terms, rows::RowPair<I>{on_student.get(), on_teacher.get(), rows, student_width, teacher_width, columns}, true, on_values.get(), nullptr);
    checker.close(name + ", value", launch, on_values, values);
    close_logits(checker, name + ", gradient", launch, on_student, expected);
  }
}

template <class I>
void check_cross_entropy(Checker& checker) {
  const std::int64_t rows = 4, width = 1031;
  const std::vector<I> logits = logits_like<I>(rows * width, 5);
  const std::vector<std::int64_t> targets = {0, 1030, 17, 256};
  DeviceArray<std::int64_t> on_targets(targets);
  for (const double smoothing : {0.0, 0.1}) {
    const std::string name = std::string("cross entropy by rows, ") + RowType<I>::name + (smoothing > 0 ? ", smoothed" : "");
    std::vector<I> expected = logits;
    std::vector<double> values(rows);
    cpu::cross_entropy_rows<I>(rows::RowLabels<I>{expected.data(), targets.data(), rows, width, smoothing, 0.25}, true, values.data());
    DeviceArray<I> on_logits(logits);
    DeviceArray<double> on_values(std::vector<double>(values.size(), -1.0));
    const int launch = cross_entropy_rows(rows::RowLabels<I>{on_logits.get(), on_targets.get(), rows, width, smoothing, 0.25}, true, on_values.get(), nullptr);
    checker.close(name + ", value", launch, on_values, values);
    close_logits(checker, name + ", gradient", launch, on_logits, expected);
  }
}

}  // namespace

std::vector<KernelCheck> check_row_kernels(int index) {
  std::string device;
  if (const int error = select_device(index, device); error != 0) return {{"CUDA kernels of the losses", false, device + ": " + cudaGetErrorString(static_cast<cudaError_t>(error))}};
  Checker checker(device);
  check_divergences<float>(checker);
  check_divergences<Bf16>(checker);
  check_cross_entropy<float>(checker);
  check_cross_entropy<Bf16>(checker);
  return std::move(checker.checks);
}

}  // namespace cuda
}  // namespace kompakt
