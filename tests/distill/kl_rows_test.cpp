// Forward KL by rows against the same loss from log-probabilities.
#include "../catch_torch.h"

#include <ATen/Parallel.h>

#include <limits>

#include "distill/kl_rows.h"
#include "tensors.h"

using namespace kompakt;
using kompakt::testing::largest_difference;
using kompakt::testing::random_tensor;

TEST_CASE("forward KL by rows by hand, and zero for equal rows", "[distill][kl_rows]") {
  const LogitTerm term{find_logit_loss("forward_kl"), {}, 1};
  const at::Tensor teacher = at::tensor({std::log(3.0), 0.0}, at::kDouble).reshape({1, 2}), student = at::zeros({1, 2}, at::kDouble);
  const LogitSums sums = evaluate_kl_rows(term, student.clone(), teacher.clone(), 0, true, 2);
  CHECK(sums.values[0].item<double>() == Approx(0.75 * std::log(1.5) + 0.25 * std::log(0.5)));
  CHECK(sums.values[2].item<double>() == Approx(0.5 * std::log(0.5 / 0.75) + 0.5 * std::log(0.5 / 0.25)));
  CHECK(largest_difference(sums.gradient, at::tensor({-0.5, 0.5}, at::kDouble)) < 1e-15);
  const at::Tensor row = random_tensor({3, 1037}, 5, 4).to(at::kFloat);
  const LogitSums same = evaluate_kl_rows(term, row.clone(), row.clone(), 0, true, 1);
  CHECK(same.values.abs().max().item<double>() == 0);
  CHECK(same.gradient.abs().max().item<double>() == 0);
}

TEST_CASE("forward KL by rows equals the loss from log-probabilities", "[distill][kl_rows]") {
  const auto [columns, vocabulary] = GENERATE(table<std::int64_t, std::int64_t>({{1, 0}, {2, 0}, {7, 0}, {8, 0}, {1024, 0}, {1033, 0}, {2600, 0}, {1033, 1029}, {2600, 2048}}));
  const auto type = GENERATE(at::kFloat, at::kDouble);
  const bool removed = GENERATE(false, true);
  CAPTURE(columns, vocabulary, removed, std::string(c10::toString(type)));
  at::Tensor student = random_tensor({5, columns}, 1, 3).to(type), teacher = random_tensor({5, columns}, 2, 3).to(type);
  if (removed && columns > 2) {
    student[1][1] = -std::numeric_limits<double>::infinity();
    teacher[3][0] = -std::numeric_limits<double>::infinity();
    teacher[3][2] = -std::numeric_limits<double>::infinity();
  }
  const LogitTerm term{find_logit_loss("forward_kl"), {}, 0.7};
  REQUIRE(fits_kl_rows({&term, 1}, student));
  const LogitSums expected = evaluate_terms({&term, 1}, student, teacher, vocabulary, true);
  const LogitSums ours = evaluate_kl_rows(term, student.clone(), teacher.clone(), vocabulary, true, 0.25);
  const double bound = type == at::kFloat ? 2e-5 : 1e-12;
  CHECK(largest_difference(ours.values, expected.values) < bound * (1 + expected.values.abs().max().item<double>()));
  CHECK(largest_difference(ours.gradient, expected.gradient * 0.25) < bound);
  const LogitSums value = evaluate_kl_rows(term, student.clone(), teacher.clone(), vocabulary, false, 0.25);
  CHECK(at::equal(value.values, ours.values));
  CHECK(!value.gradient.defined());
}

TEST_CASE("forward KL by rows passes NaN on, and gives the same bytes on two threads", "[distill][kl_rows]") {
  const LogitTerm term{find_logit_loss("forward_kl"), {}, 1};
  at::Tensor broken = random_tensor({2, 50}, 1).to(at::kFloat);
  const at::Tensor teacher = random_tensor({2, 50}, 2).to(at::kFloat);
  for (const std::int64_t column : {0, 17, 49}) {
    at::Tensor bad = broken.clone();
    bad[1][column] = std::numeric_limits<float>::quiet_NaN();
    CHECK(std::isnan(evaluate_kl_rows(term, bad.clone(), teacher.clone(), 0, true, 1).values[0].item<double>()));
    CHECK(std::isnan(evaluate_kl_rows(term, teacher.clone(), bad.clone(), 0, true, 1).values[0].item<double>()));
  }
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const LogitSums one = evaluate_kl_rows(term, broken.clone(), teacher.clone(), 0, true, 1);
  at::set_num_threads(2);
  const LogitSums two = evaluate_kl_rows(term, broken.clone(), teacher.clone(), 0, true, 1);
  at::set_num_threads(before);
  CHECK(at::equal(one.values, two.values));
  CHECK(at::equal(one.gradient, two.gradient));
}
