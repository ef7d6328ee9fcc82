// Sums of logit losses by rows (the CPU twins of the kernels) against the goldens and against the losses from log-probabilities.
#include "distill/row_terms.h"

#include "tests/catch_torch.h"

#include <ATen/Parallel.h>

#include <limits>

#include "core/json.h"
#include "tests/distill/tensors.h"
#include "tests/support.h"

using namespace kompakt;
using kompakt::testing::largest_difference;
using kompakt::testing::random_tensor;
using kompakt::testing::tensor_of;

namespace {

std::vector<LogitTerm> row_cases() {
  std::vector<LogitTerm> out;
  for (const LogitLoss& loss : logit_losses()) {
    if (loss.row == rows::RowLoss::none) continue;
    for (const double part : {0.0, 0.3, 1.0}) {
      if (part != 0.3 && !loss.uses_beta && !(loss.uses_lambda && part == 0)) continue;
      LogitTerm term{&loss, {}, 0.7};
      term.options.beta = term.options.lambda = part;
      term.options.temperature = part == 0.3 ? 2 : 1;
      out.push_back(term);
    }
  }
  return out;
}

}  // namespace

TEST_CASE("losses by rows equal the goldens in value and gradient", "[distill][row_terms]") {
  const Json goldens = read_json(testing::source_folder() / "tests/goldens/distill.json");
  int compared = 0;
  for (const Json& item : goldens.at("logits")) {
    const std::int64_t n = item.at("n"), v = item.at("v");
    const at::Tensor valid = tensor_of(item.at("mask"), {n}).nonzero().squeeze(1);
    const at::Tensor student = tensor_of(item.at("student"), {n, v}).index_select(0, valid), teacher = tensor_of(item.at("teacher"), {n, v}).index_select(0, valid);
    for (const LogitLoss& row : logit_losses()) {
      LogitTerm term{&row, {}, 1};
      term.options.temperature = item.at("options").at("temperature");
      term.options.beta = item.at("options").at("beta");
      term.options.lambda = item.at("options").at("lambda");
      const auto terms = row_terms({&term, 1}, 1 / static_cast<double>(valid.numel()));
      if (!terms) continue;
      INFO(row.name);
      const Json& expected = item.at("results").at(std::string(row.name));
      const LogitSums sums = evaluate_row_terms(*terms, student.clone(), teacher, 0, true);
      CHECK(sums.values[0].item<double>() / static_cast<double>(valid.numel()) == Approx(expected.at("value").get<double>()).epsilon(1e-10));
      CHECK(largest_difference(sums.gradient, tensor_of(expected.at("gradient"), {n, v}).index_select(0, valid)) < 1e-10);
      ++compared;
    }
  }
  CHECK(compared >= 7);
}

TEST_CASE("losses by rows equal the losses from log-probabilities", "[distill][row_terms]") {
  const auto [columns, vocabulary] = GENERATE(table<std::int64_t, std::int64_t>({{1, 0}, {2, 0}, {257, 0}, {1033, 0}, {1033, 1029}}));
  const auto type = GENERATE(at::kFloat, at::kDouble);
  const bool removed = GENERATE(false, true);
  at::Tensor student = random_tensor({4, columns}, 1, 3).to(type), teacher = random_tensor({4, columns}, 2, 3).to(type);
  if (removed && columns > 2) {
    student[1][1] = -std::numeric_limits<double>::infinity();
    teacher[3][0] = -std::numeric_limits<double>::infinity();
    teacher[3][2] = -std::numeric_limits<double>::infinity();
  }
  std::vector<std::vector<LogitTerm>> sums;
  for (const LogitTerm& term : row_cases()) sums.push_back({term});
  sums.push_back({sums[2][0], sums[0][0], sums[5][0]});
  sums.push_back({});
  for (const std::vector<LogitTerm>& terms : sums) {
    CAPTURE(columns, vocabulary, removed, std::string(c10::toString(type)), terms.size());
    if (terms.size() == 1) INFO(terms[0].loss->name);
    const auto call = row_terms(terms, 0.25);
    REQUIRE(call);
    const LogitSums expected = evaluate_terms(terms, student, teacher, vocabulary, true), ours = evaluate_row_terms(*call, student.clone(), teacher, vocabulary, true);
    // Float32: both are some thousand roundings from the truth, at values of up to 30 a row.
    const double bound = type == at::kFloat ? 2e-5 : 1e-12;
    CHECK(largest_difference(ours.values, expected.values) < bound * (1 + expected.values.abs().max().item<double>()));
    CHECK(largest_difference(ours.gradient, expected.gradient * 0.25) < bound);
    const LogitSums value = evaluate_row_terms(*call, student.clone(), teacher, vocabulary, false);
    CHECK(at::equal(value.values, ours.values));
    CHECK(!value.gradient.defined());
  }
}

TEST_CASE("losses by rows from bfloat16 logits are those of the same numbers in float64", "[distill][row_terms]") {
  const at::Tensor student = random_tensor({3, 515}, 3, 3).to(at::kBFloat16), teacher = random_tensor({3, 515}, 4, 3).to(at::kBFloat16);
  for (const LogitTerm& term : row_cases()) {
    INFO(term.loss->name << " beta " << term.options.beta);
    const LogitSums expected = evaluate_terms({&term, 1}, student.to(at::kDouble), teacher.to(at::kDouble), 0, true);
    const LogitSums ours = evaluate_row_terms(*row_terms({&term, 1}, 1), student.clone(), teacher, 0, true);
    CHECK(ours.values[0].item<double>() == Approx(expected.values[0].item<double>()).epsilon(1e-5));
    CHECK(ours.gradient.scalar_type() == at::kBFloat16);
    // Half a unit in the eighth bit of each number, and what float32 leaves of sums that cancel.
    const at::Tensor allowed = expected.gradient.abs() * std::ldexp(1.0, -8) + 1e-6;
    CHECK(((ours.gradient.to(at::kDouble) - expected.gradient).abs() <= allowed).all().item<bool>());
  }
}

TEST_CASE("losses by rows: zero at equality, the same bytes on two threads, and what has no such form", "[distill][row_terms]") {
  const at::Tensor z = random_tensor({4, 300}, 5, 3).to(at::kFloat), other = random_tensor({4, 300}, 6, 3).to(at::kFloat);
  const int before = at::get_num_threads();
  for (const LogitTerm& term : row_cases()) {
    INFO(term.loss->name);
    const auto call = *row_terms({&term, 1}, 1);
    const LogitSums same = evaluate_row_terms(call, z.clone(), z, 0, true);
    CHECK(same.values.abs().max().item<double>() < 1e-5);
    CHECK(same.gradient.abs().max().item<double>() < 2e-6);
    at::set_num_threads(1);
    const LogitSums one = evaluate_row_terms(call, z.clone(), other, 0, true);
    at::set_num_threads(2);
    const LogitSums two = evaluate_row_terms(call, z.clone(), other, 0, true);
    at::set_num_threads(before);
    CHECK(at::equal(one.values, two.values));
    CHECK(at::equal(one.gradient, two.gradient));
  }
  for (const char* name : {"adaptive_kl", "ranking"}) {
    const LogitTerm term{find_logit_loss(name), {}, 1};
    CHECK_FALSE(row_terms({&term, 1}, 1));
  }
  const LogitTerm forward{find_logit_loss("forward_kl"), {}, 1};
  CHECK_THROWS_AS(evaluate_row_terms(*row_terms({&forward, 1}, 1), z.clone(), random_tensor({4, 301}, 7).to(at::kFloat), 0, true), std::logic_error);
  const std::vector<LogitTerm> many(5, LogitTerm{find_logit_loss("forward_kl"), {}, 1});
  CHECK_FALSE(row_terms(many, 1));
}
