// Logit losses: goldens, closed-form gradients against finite differences, bounds, invariances, masks and edges.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include "tests/catch_torch.h"
#include <cmath>

#include "core/json.h"
#include "distill/losses.h"
#include "tests/distill/tensors.h"
#include "tests/support.h"

using namespace kompakt;
using kompakt::testing::gradient_of;
using kompakt::testing::largest_difference;
using kompakt::testing::random_tensor;
using kompakt::testing::tensor_of;

namespace {

LogitLossOptions at_temperature(double temperature) {
  LogitLossOptions options;
  options.temperature = temperature;
  return options;
}

double value_of(const LogitLoss& row, const at::Tensor& student, const at::Tensor& teacher, const LogitLossOptions& options = {}) {
  return logit_loss(row, student, teacher, options).item<double>();
}

}  // namespace

TEST_CASE("logit losses equal the goldens in value and gradient") {
  const Json goldens = read_json(testing::source_folder() / "tests/goldens/distill.json");
  for (const Json& item : goldens.at("logits")) {
    const std::int64_t n = item.at("n"), v = item.at("v");
    const at::Tensor student = tensor_of(item.at("student"), {n, v}), teacher = tensor_of(item.at("teacher"), {n, v});
    LogitLossOptions options = at_temperature(item.at("options").at("temperature"));
    options.beta = item.at("options").at("beta");
    options.lambda = item.at("options").at("lambda");
    options.top = item.at("options").at("top");
    options.margin = item.at("options").at("margin");
    options.mask = tensor_of(item.at("mask"), {n}).to(at::kBool);
    for (const LogitLoss& row : logit_losses()) {
      INFO(row.name);
      const Json& expected = item.at("results").at(std::string(row.name));
      const auto [value, gradient] = gradient_of([&](const at::Tensor& s) { return logit_loss(row, s, teacher, options); }, student);
      CHECK(value == Approx(expected.at("value").get<double>()).epsilon(1e-10));
      CHECK(largest_difference(gradient, tensor_of(expected.at("gradient"), {n, v})) < 1e-10);
    }
  }
}

TEST_CASE("logit losses: gradients agree with finite differences") {
  const at::Tensor student = random_tensor({3, 6}, 1, 2), teacher = random_tensor({3, 6}, 2, 2);
  for (const LogitLoss& row : logit_losses()) {
    if (row.name == "adaptive_kl") continue;  // its weights are constants of the step: the golden checks it
    for (const double beta : {0.0, 0.3, 1.0}) {
      for (const double temperature : {1.0, 0.7, 3.0}) {
        LogitLossOptions options = at_temperature(temperature);
        options.beta = beta;
        options.lambda = beta == 1.0 ? 0.9 : beta;
        options.scale_gradient = temperature != 3.0;
        INFO(row.name << " beta " << beta << " T " << temperature);
        CHECK(testing::gradient_error([&](const at::Tensor& s) { return logit_loss(row, s, teacher, options); }, student) < 1e-6);
      }
    }
  }
}

TEST_CASE("logit losses: zero with zero gradient at equality, also in float32") {
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    const at::Tensor z = random_tensor({4, 9}, 3, 3).to(type);
    for (const LogitLoss& row : logit_losses()) {
      INFO(row.name);
      const auto [value, gradient] = gradient_of([&](const at::Tensor& s) { return logit_loss(row, s, z.clone(), at_temperature(2)); }, z);
      const double bound = type == at::kFloat ? 2e-6 : 1e-14;
      CHECK(std::abs(value) < bound);
      CHECK(gradient.abs().max().item<double>() < bound);
      CHECK(gradient.scalar_type() == type);
    }
  }
}

TEST_CASE("logit losses: adding a constant to all logits of a position changes nothing") {
  const at::Tensor student = random_tensor({3, 6}, 4, 2), teacher = random_tensor({3, 6}, 5, 2), shift = random_tensor({3, 1}, 6, 10);
  for (const LogitLoss& row : logit_losses()) {
    INFO(row.name);
    const double plain = value_of(row, student, teacher);
    const bool same = std::abs(value_of(row, student + shift, teacher) - plain) < 1e-10 && std::abs(value_of(row, student, teacher + shift) - plain) < 1e-10;
    CHECK(same == row.shift_invariant);
    CHECK(plain >= 0);
  }
}

TEST_CASE("logit losses: bounds hold on far apart distributions") {
  const at::Tensor student = random_tensor({64, 12}, 7, 8), teacher = random_tensor({64, 12}, 8, 8);
  LogitLossOptions options;
  for (std::int64_t i = 0; i < student.size(0); ++i) {
    const at::Tensor s = student[i].unsqueeze(0), t = teacher[i].unsqueeze(0);
    for (const double beta : {0.1, 0.5, 0.8}) {
      options.beta = beta;
      CHECK(generalized_jsd(s, t, options).item<double>() <= -beta * std::log(beta) - (1 - beta) * std::log(1 - beta) + 1e-12);
    }
    options.lambda = 0.1;
    CHECK(skew_forward_kl(s, t, options).item<double>() <= -std::log(0.1) + 1e-12);
    CHECK(skew_reverse_kl(s, t, options).item<double>() <= -std::log(0.1) + 1e-12);
    const double tv = total_variation(s, t).item<double>();
    CHECK(tv >= 0);
    CHECK(tv <= 1 + 1e-12);
    CHECK(tv <= std::sqrt(forward_kl(s, t).item<double>() / 2) + 1e-12);  // Pinsker
  }
}

TEST_CASE("logit losses: two classes by hand") {
  // softmax((a, 0)) is a Bernoulli with p = sigmoid(a).
  const double a = 0.4, b = -1.1;
  const auto pair = [](double x) { return at::tensor({x, 0.0}, at::kDouble).unsqueeze(0); };
  const double q = 1 / (1 + std::exp(-a)), p = 1 / (1 + std::exp(-b));
  CHECK(forward_kl(pair(a), pair(b)).item<double>() == Approx(p * std::log(p / q) + (1 - p) * std::log((1 - p) / (1 - q))).epsilon(1e-12));
  CHECK(reverse_kl(pair(a), pair(b)).item<double>() == Approx(q * std::log(q / p) + (1 - q) * std::log((1 - q) / (1 - p))).epsilon(1e-12));
  CHECK(total_variation(pair(a), pair(b)).item<double>() == Approx(std::abs(p - q)).epsilon(1e-12));
  CHECK(logits_mse(pair(a), pair(b)).item<double>() == Approx((a - b) * (a - b) / 2).epsilon(1e-12));
}

TEST_CASE("ranking: by hand, and what it leaves alone") {
  const auto row = [](std::vector<double> values) { return at::tensor(values, at::kDouble).unsqueeze(0); };
  const at::Tensor teacher = row({3, 1, 0.5, -9});
  LogitLossOptions options;
  options.top = 3;
  // Pairs (0,1), (0,2), (1,2) ask for gaps 1 (the margin), 1 and 0.5; the student has 0.25, -0.5 and -0.75.
  CHECK(ranking_hinge(row({1, 0.75, 1.5, 40}), teacher, options).item<double>() == Approx((0.75 + 1.5 + 1.25) / 3).epsilon(1e-12));
  CHECK(ranking_hinge(row({30, 20, 10, 40}), teacher, options).item<double>() == 0);  // the order holds, the fourth is not among the first three
  options.top = 2;
  options.margin = 10;
  CHECK(ranking_hinge(row({0, 0, 0, 0}), teacher, options).item<double>() == Approx(2));
  options.top = 100;  // more than there are
  CHECK(ranking_hinge(teacher, teacher, options).item<double>() == 0);
}

TEST_CASE("several logit losses at once: the sum of each alone, and both KLs beside them") {
  const at::Tensor student = random_tensor({5, 6}, 31, 2), teacher = random_tensor({5, 6}, 32, 2);
  LogitLossOptions frame;
  frame.mask = at::tensor({1, 1, 0, 1, 1}, at::kLong).to(at::kBool);
  std::vector<LogitTerm> terms;
  double weight = 0.5;
  for (const LogitLoss& row : logit_losses()) {
    terms.push_back({&row, at_temperature(terms.size() % 2 == 0 ? 1 : 2), weight});
    weight += 0.25;
  }
  const at::Tensor leaf = student.clone().requires_grad_();
  const LogitMeans means = logit_terms(terms, leaf, teacher, frame);
  const at::Tensor gradient = torch::autograd::grad({means.total}, {leaf})[0];
  at::Tensor expected = at::zeros_like(student);
  double total = 0;
  for (std::size_t i = 0; i < terms.size(); ++i) {
    LogitLossOptions options = terms[i].options;
    options.mask = frame.mask;
    const auto [value, alone] = gradient_of([&](const at::Tensor& s) { return logit_loss(*terms[i].loss, s, teacher, options); }, student);
    INFO(terms[i].loss->name);
    CHECK(means.values[static_cast<std::int64_t>(i)].item<double>() == Approx(value).epsilon(1e-12));
    total += terms[i].weight * value;
    expected += alone * terms[i].weight;
  }
  CHECK(means.total.item<double>() == Approx(total).epsilon(1e-12));
  CHECK(largest_difference(gradient, expected) < 1e-12);
  CHECK(!means.values.requires_grad());
  const auto count = static_cast<std::int64_t>(terms.size());
  REQUIRE(means.values.numel() == count + 2);
  CHECK(means.values[count].item<double>() == Approx(forward_kl(student, teacher, frame).item<double>()).epsilon(1e-12));
  CHECK(means.values[count + 1].item<double>() == Approx(reverse_kl(student, teacher, frame).item<double>()).epsilon(1e-12));
  terms.assign(1, {find_logit_loss("reverse_kl"), {}, 0});  // weight 0: only looked at
  CHECK(gradient_of([&](const at::Tensor& s) { return logit_terms(terms, s, teacher).total; }, student).second.abs().max().item<double>() == 0);
}

TEST_CASE("logit losses: a large temperature turns forward KL into centred logit matching") {
  const at::Tensor student = random_tensor({5, 8}, 9, 2), teacher = random_tensor({5, 8}, 10, 2);
  const at::Tensor gap = (teacher - teacher.mean(-1, true)) - (student - student.mean(-1, true));
  const double limit = (gap.square().sum(-1) / 16).mean().item<double>();
  CHECK(forward_kl(student, teacher, at_temperature(1e3)).item<double>() == Approx(limit).epsilon(1e-3));
}

TEST_CASE("logit losses: symmetry and special cases of beta and lambda") {
  const at::Tensor student = random_tensor({3, 6}, 11, 2), teacher = random_tensor({3, 6}, 12, 2);
  LogitLossOptions options;
  CHECK(generalized_jsd(student, teacher, options).item<double>() == Approx(generalized_jsd(teacher, student, options).item<double>()).epsilon(1e-12));
  options.beta = 0;
  CHECK(generalized_jsd(student, teacher, options).item<double>() == forward_kl(student, teacher).item<double>());
  options.beta = 1;
  CHECK(generalized_jsd(student, teacher, options).item<double>() == reverse_kl(student, teacher).item<double>());
  options.lambda = 0;
  CHECK(skew_forward_kl(student, teacher, options).item<double>() == forward_kl(student, teacher).item<double>());
  CHECK(skew_reverse_kl(student, teacher, options).item<double>() == reverse_kl(student, teacher).item<double>());
}

TEST_CASE("logit losses: padded and removed columns change nothing") {
  const at::Tensor student = random_tensor({4, 6}, 13, 2).to(at::kFloat), teacher = random_tensor({4, 6}, 14, 2).to(at::kFloat);
  const at::Tensor infinite = at::full({4, 3}, -std::numeric_limits<float>::infinity()), junk = random_tensor({4, 3}, 15, 9).to(at::kFloat);
  LogitLossOptions narrow;
  narrow.vocabulary = 6;
  for (const LogitLoss& row : logit_losses()) {
    INFO(row.name);
    const auto [plain, gradient] = gradient_of([&](const at::Tensor& s) { return logit_loss(row, s, teacher); }, student);
    const auto check = [&, &plain = plain, &gradient = gradient](const at::Tensor& s_pad, const at::Tensor& t_pad, const LogitLossOptions& options) {
      const auto [value, padded] = gradient_of([&](const at::Tensor& s) { return logit_loss(row, s, at::cat({teacher, t_pad}, 1), options); }, at::cat({student, s_pad}, 1));
      CHECK(value == Approx(plain).epsilon(1e-6));
      CHECK(largest_difference(padded.narrow(1, 0, 6), gradient) < 1e-6);
      CHECK(padded.narrow(1, 6, 3).abs().max().item<double>() == 0);
    };
    check(infinite, infinite, {});
    check(junk, infinite, {});   // removed in one: removed in both
    check(infinite, junk, {});
    check(junk, junk * 2, narrow);
  }
  // Different paddings of the two sides need the number of real columns.
  CHECK(value_of(*find_logit_loss("forward_kl"), at::cat({student, junk}, 1), teacher, narrow) == Approx(forward_kl(student, teacher).item<double>()));
  CHECK_THROWS_AS(forward_kl(at::cat({student, junk}, 1), teacher), std::logic_error);
}

TEST_CASE("logit losses: mean over valid positions, and none at all") {
  const at::Tensor student = random_tensor({2, 3, 5}, 16, 2), teacher = random_tensor({2, 3, 5}, 17, 2);
  LogitLossOptions options;
  options.mask = at::tensor({1, 1, 0, 1, 0, 0}, at::kLong).to(at::kBool).reshape({2, 3});
  const at::Tensor rows = at::stack({student[0][0], student[0][1], student[1][0]}), targets = at::stack({teacher[0][0], teacher[0][1], teacher[1][0]});
  for (const LogitLoss& row : logit_losses()) {
    INFO(row.name);
    CHECK(value_of(row, student, teacher, options) == Approx(value_of(row, rows, targets)).epsilon(1e-12));
    LogitLossOptions counted = options;
    counted.count = 12;
    CHECK(value_of(row, student, teacher, counted) == Approx(value_of(row, rows, targets) * 3 / 12).epsilon(1e-12));
    LogitLossOptions none;
    none.mask = at::zeros({2, 3}, at::kBool);
    const auto [value, gradient] = gradient_of([&](const at::Tensor& s) { return logit_loss(row, s, teacher, none); }, student);
    CHECK(value == 0);
    CHECK(gradient.abs().max().item<double>() == 0);
    const auto [single, zero] = gradient_of([&](const at::Tensor& s) { return logit_loss(row, s, teacher.narrow(2, 0, 1)); }, student.narrow(2, 0, 1));
    if (row.shift_invariant) {  // one class: nothing to learn
      CHECK(std::abs(single) < 1e-14);
      CHECK(zero.abs().max().item<double>() < 1e-14);
    }
  }
}

TEST_CASE("logit losses: huge logits stay finite") {
  const at::Tensor student = random_tensor({3, 6}, 18, 1e4).to(at::kFloat), teacher = random_tensor({3, 6}, 19, 1e4).to(at::kFloat);
  for (const LogitLoss& row : logit_losses()) {
    INFO(row.name);
    const auto [value, gradient] = gradient_of([&](const at::Tensor& s) { return logit_loss(row, s, teacher); }, student);
    CHECK(std::isfinite(value));
    CHECK(gradient.isfinite().all().item<bool>());
  }
}

TEST_CASE("the table of logit losses finds its rows") {
  CHECK(logit_losses().size() == logit_loss_names().size());
  for (const LogitLoss& row : logit_losses()) {
    CHECK(find_logit_loss(row.name) == &row);
    CHECK(!row.summary.empty());
  }
  CHECK(find_logit_loss("kl") == nullptr);
}
