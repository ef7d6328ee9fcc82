// CPU twins of the kernels of the losses: by hand, against ATen, against finite differences; softmax in one pass; bfloat16 by its bits.
#include "train/row_losses.h"

#include <ATen/ATen.h>
#include <c10/util/BFloat16.h>

#include "tests/catch_torch.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "core/random.h"
#include "train/logit_chunk.h"

namespace kompakt {
namespace {

constexpr double row_infinity = std::numeric_limits<double>::infinity();

at::Tensor row_normal(std::int64_t rows, std::int64_t columns, const char* stream, double scale = 3) {
  const CounterRandom random(41, stream);
  at::Tensor out = at::empty({rows, columns}, at::kDouble);
  for (std::int64_t i = 0; i < out.numel(); ++i) out.data_ptr<double>()[i] = scale * random.normal(static_cast<std::uint64_t>(i));
  return out;
}

double row_distance(const at::Tensor& a, const at::Tensor& b) { return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>(); }

rows::RowTerms row_alone(rows::RowLoss loss, double parameter = 0) {
  rows::RowTerms terms;
  terms.count = 1;
  terms.terms[0] = {loss, 0, parameter, 1, 1};
  return terms;
}

}  // namespace

TEST_CASE("divergences by rows by hand: p = (3/4, 1/4), q = (1/2, 1/2)", "[train][row_losses]") {
  using rows::RowLoss;
  struct Case {
    RowLoss loss;
    double parameter, value, slope;  // slope: dL/ds of the first column
  };
  const double forward = 0.75 * std::log(1.5) + 0.25 * std::log(0.5), reverse = 0.5 * std::log(2.0 / 3) + 0.5 * std::log(2.0);
  // m = (p + q) / 2 = (5/8, 3/8). dL/ds_0 of a Bernoulli: q_0 q_1 (g_0 - g_1).
  const double jsd = 0.5 * (0.75 * std::log(0.75 / 0.625) + 0.25 * std::log(0.25 / 0.375)) + 0.5 * (0.5 * std::log(0.5 / 0.625) + 0.5 * std::log(0.5 / 0.375));
  const Case cases[] = {
      {RowLoss::forward_kl, 0, forward, -0.25},
      {RowLoss::reverse_kl, 0, reverse, 0.25 * (std::log(2.0 / 3) - std::log(2.0))},
      {RowLoss::generalized_jsd, 0.5, jsd, 0.25 * 0.5 * (std::log(0.5 / 0.625) - std::log(0.5 / 0.375))},
      {RowLoss::skew_forward_kl, 0.5, 0.75 * std::log(0.75 / 0.625) + 0.25 * std::log(0.25 / 0.375), 0.25 * -0.5 * (0.75 / 0.625 - 0.25 / 0.375)},
      {RowLoss::skew_reverse_kl, 0.5, 0.5 * std::log(0.5 / 0.625) + 0.5 * std::log(0.5 / 0.375), 0.25 * (std::log(0.5 / 0.625) - 0.5 * 0.8 - std::log(0.5 / 0.375) + 0.5 / 0.75)},
      {RowLoss::total_variation, 0, 0.25, 0.25 * -1},
      {RowLoss::logits_mse, 0, std::log(3.0) * std::log(3.0) / 2, -std::log(3.0)},
  };
  const at::Tensor teacher = at::tensor({std::log(3.0) + 50, 50.0, -row_infinity}, at::kDouble).reshape({1, 3});
  for (const Case& c : cases) {
    CAPTURE(static_cast<int>(c.loss));
    at::Tensor student = at::tensor({50.0, 50.0, 7.0}, at::kDouble).reshape({1, 3});  // the third column is the teacher's -inf: removed
    const at::Tensor values = divergence_rows(row_alone(c.loss, c.parameter), student, teacher, 3, true);
    CHECK(values[0][0].item<double>() == Approx(c.value).epsilon(1e-12));
    CHECK(values[0][1].item<double>() == Approx(forward).epsilon(1e-12));
    CHECK(values[0][2].item<double>() == Approx(reverse).epsilon(1e-12));
    CHECK(student[0][0].item<double>() == Approx(c.slope).epsilon(1e-12));
    const double second = c.loss == RowLoss::logits_mse ? 0 : -c.slope;  // the logits of the second column are equal
    CHECK(student[0][1].item<double>() == Approx(second).epsilon(1e-12).margin(1e-15));
    CHECK(student[0][2].item<double>() == 0);
  }
}

TEST_CASE("gradients of divergences by rows agree with finite differences", "[train][row_losses]") {
  using rows::RowLoss;
  const at::Tensor student = row_normal(2, 7, "student", 2), teacher = row_normal(2, 7, "teacher", 2);
  rows::RowTerms sum;  // two temperatures besides 1
  sum.count = 3, sum.slots = 3;
  sum.inverse_temperature[1] = 0.5, sum.inverse_temperature[2] = 1.25;
  sum.terms[0] = {RowLoss::reverse_kl, 1, 0, 1, 0.5}, sum.terms[1] = {RowLoss::skew_reverse_kl, 2, 0.2, 1, 1.25}, sum.terms[2] = {RowLoss::forward_kl, 0, 0, 1, 1};
  std::vector<rows::RowTerms> cases{sum};
  for (const auto loss : {RowLoss::forward_kl, RowLoss::reverse_kl, RowLoss::total_variation, RowLoss::logits_mse}) cases.push_back(row_alone(loss));
  for (const auto loss : {RowLoss::generalized_jsd, RowLoss::skew_forward_kl, RowLoss::skew_reverse_kl}) cases.push_back(row_alone(loss, 0.3));
  for (const rows::RowTerms& terms : cases) {
    CAPTURE(static_cast<int>(terms.terms[0].loss), terms.count);
    const auto total = [&](at::Tensor s) { return divergence_rows(terms, s, teacher, 7, false).narrow(1, 0, terms.count).sum().item<double>(); };
    at::Tensor gradient = student.clone();
    divergence_rows(terms, gradient, teacher, 7, true);
    for (std::int64_t i = 0; i < student.numel(); ++i) {
      at::Tensor up = student.clone(), down = student.clone();
      up.view({-1})[i] += 1e-6;
      down.view({-1})[i] -= 1e-6;
      CHECK(gradient.view({-1})[i].item<double>() == Approx((total(up) - total(down)) / 2e-6).epsilon(1e-6).margin(1e-8));
    }
  }
}

TEST_CASE("softmax in one pass does not depend on the order of the columns, and large logits cost nothing", "[train][row_losses]") {
  const at::Tensor rising = at::arange(0, 1037, at::kDouble).reshape({1, -1}), falling = rising.flip({1}).contiguous();
  const at::Tensor teacher = row_normal(1, 1037, "order");
  const rows::RowTerms terms = row_alone(rows::RowLoss::reverse_kl);
  at::Tensor a = rising.clone(), b = falling.clone();
  const at::Tensor one = divergence_rows(terms, a, teacher, 1037, true), two = divergence_rows(terms, b, teacher.flip({1}).contiguous(), 1037, true);
  CHECK(row_distance(one, two) < 1e-11 * one.abs().max().item<double>());
  CHECK(row_distance(a, b.flip({1})) < 1e-12);
  const at::Tensor expected = (at::softmax(rising, 1) * (at::log_softmax(rising, 1) - at::log_softmax(teacher, 1))).sum();
  CHECK(one[0][0].item<double>() == Approx(expected.item<double>()).epsilon(1e-12));
  at::Tensor shifted = (rising + 1e5).to(at::kFloat);  // exactly representable
  CHECK(divergence_rows(terms, shifted, teacher.to(at::kFloat), 1037, false)[0][0].item<double>() == Approx(expected.item<double>()).epsilon(1e-5));
}

TEST_CASE("rows that are removed count nothing, NaN comes through, and no row is no work", "[train][row_losses]") {
  const rows::RowTerms terms = row_alone(rows::RowLoss::reverse_kl);
  for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16}) {
    at::Tensor student = row_normal(2, 5, "a").to(type), teacher = row_normal(2, 5, "b").to(type);
    student[0].fill_(-row_infinity);
    at::Tensor broken = student.clone();
    const at::Tensor values = divergence_rows(terms, student, teacher, 5, true);
    CHECK(values[0].abs().max().item<double>() == 0);
    CHECK(student[0].abs().max().item<double>() == 0);
    CHECK(values[1][0].item<double>() > 0);
    broken[1][4] = std::numeric_limits<double>::quiet_NaN();
    CHECK(std::isnan(divergence_rows(terms, broken, teacher, 5, true)[1][0].item<double>()));
    CHECK(broken[1].isnan().any().item<bool>());
    at::Tensor none = at::empty({0, 5}, type);
    CHECK(divergence_rows(terms, none, at::empty({0, 5}, type), 5, true).size(0) == 0);
  }
  at::Tensor student = row_normal(2, 5, "a"), other = row_normal(2, 4, "b");
  CHECK_THROWS_AS(divergence_rows(terms, student, other, 5, false), std::logic_error);
}

TEST_CASE("cross entropy by rows equals ATen's, with smoothing, odd widths and removed columns", "[train][row_losses]") {
  const auto width = GENERATE(std::int64_t(1), std::int64_t(2), std::int64_t(255), std::int64_t(256), std::int64_t(257), std::int64_t(1031));
  const auto type = GENERATE(at::kFloat, at::kDouble, at::kBFloat16);
  const double smoothing = GENERATE(0.0, 0.1);
  CAPTURE(width, std::string(c10::toString(type)), smoothing);
  at::Tensor logits = row_normal(3, width, "logits").to(type);
  if (smoothing == 0 && width > 2) logits[1][1] = -row_infinity;
  const at::Tensor targets = at::tensor({std::int64_t(0), width - 1, width / 2}, at::kLong);
  const at::Tensor leaf = logits.to(at::kDouble).requires_grad_();
  const at::Tensor expected = at::cross_entropy_loss(leaf, targets, {}, at::Reduction::None, -100, smoothing);
  expected.sum().backward();
  const at::Tensor values = cross_entropy_rows(logits, targets, smoothing, 0.5, true);
  // float32 sums of a thousand exponentials; a gradient in bfloat16 has eight bits.
  CHECK(row_distance(values, expected.detach()) < (type == at::kDouble ? 1e-12 : 1e-5));
  CHECK(row_distance(logits, leaf.grad() * 0.5) < (type == at::kDouble ? 1e-13 : type == at::kFloat ? 1e-6 : std::ldexp(0.5, -8)));
}

TEST_CASE("cross entropy by rows: a target outside of the row is no number, and the value alone leaves the logits", "[train][row_losses]") {
  at::Tensor logits = row_normal(1, 9, "outside");
  const at::Tensor before = logits.clone();
  CHECK(std::isnan(cross_entropy_rows(logits, at::tensor({std::int64_t(9)}, at::kLong), 0, 1, false)[0].item<double>()));
  CHECK(std::isnan(cross_entropy_rows(logits, at::tensor({std::int64_t(-1)}, at::kLong), 0, 1, false)[0].item<double>()));
  CHECK(at::equal(before, logits));
}

TEST_CASE("bfloat16 by its bits is torch's", "[train][row_losses]") {
  int wrong = 0;
  const auto same = [](float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b)); };
  for (unsigned bits = 0; bits <= 0xffffu; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    wrong += !same(rows::row_load(rows::Bf16{half}), static_cast<float>(c10::BFloat16(half, c10::BFloat16::from_bits())));
    for (const unsigned low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {  // below, at and above a tie
      const std::uint32_t whole = bits << 16 | low;
      float value;
      std::memcpy(&value, &whole, sizeof value);
      rows::Bf16 ours;
      rows::row_store(value, ours);
      wrong += !same(rows::row_load(ours), static_cast<float>(c10::BFloat16(value)));
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("the number of tokens whose logits exist at once is a function of the device", "[train][row_losses]") {
  CHECK(logit_chunk(c10::DeviceType::CPU, 49152, 2) == 170);
  CHECK(logit_chunk(c10::DeviceType::CPU, 49152, 1) == 341);
  CHECK(logit_chunk(c10::DeviceType::CPU, 10, 2) == 1024);
  CHECK(logit_chunk(c10::DeviceType::CPU, 10000000, 2) == 32);
  CHECK(logit_chunk(c10::DeviceType::CPU, 0, 1) > 0);
  CHECK(logit_chunk(c10::DeviceType::CUDA, 49152, 2) == 1365);
  CHECK(logit_chunk(c10::DeviceType::CUDA, 151936, 2) == 441);
  CHECK(logit_chunk(c10::DeviceType::CUDA, 151936, 1) == 883);
  CHECK(logit_chunk(c10::DeviceType::CUDA, 10, 2) == 16384);
  CHECK_THROWS_AS(logit_chunk(c10::DeviceType::XPU, 10, 2), std::logic_error);
  CHECK_FALSE(has_row_kernels(c10::Device(c10::kCPU), at::kFloat));
}

}  // namespace kompakt
