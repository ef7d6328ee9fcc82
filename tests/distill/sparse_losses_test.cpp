// Losses against the likeliest tokens and draws of the rest: goldens, exact means over the draws, bounds, edges.
#include <ATen/ATen.h>

#include "tests/catch_torch.h"
#include <cmath>

#include "core/json.h"
#include "distill/fused_linear.h"
#include "distill/sparse_losses.h"
#include "tests/distill/tensors.h"
#include "tests/support.h"

using namespace kompakt;
using kompakt::testing::largest_difference;
using kompakt::testing::random_tensor;
using kompakt::testing::tensor_of;

namespace {

// The k likeliest tokens of every row of logits; `draws` [n, N] or undefined.
SparseTargets sparse_of(const at::Tensor& teacher, std::int64_t k, const at::Tensor& draws = {}) {
  const at::Tensor log_p = at::log_softmax(teacher, -1);
  SparseTargets out;
  std::tie(out.log_p, out.ids) = log_p.topk(k, -1);
  out.log_rest = at::log1p(-out.log_p.exp().sum(-1).clamp_max(1 - 1e-15));
  out.draws = draws.defined() ? draws : at::empty({teacher.size(0), 0}, at::kLong);
  out.draw_log_p = log_p.gather(1, out.draws) - out.log_rest.unsqueeze(1);
  out.vocabulary = teacher.size(1);
  return out;
}

LogitSums evaluate_one(const char* name, const at::Tensor& student, const SparseTargets& teacher, double lambda = 0.1) {
  LogitLossOptions options;
  options.lambda = lambda;
  const LogitTerm term{find_logit_loss(name), options, 1};
  return evaluate_sparse_terms({&term, 1}, student, teacher, 0, true);
}

}  // namespace

TEST_CASE("losses on the likeliest tokens and the rest equal the goldens") {
  const Json item = read_json(testing::source_folder() / "tests/goldens/distill.json").at("sparse");
  const at::Tensor student = tensor_of(item.at("student"), {1, 7}), teacher = tensor_of(item.at("teacher"), {1, 7});
  const SparseTargets known = sparse_of(teacher, 3);
  for (const auto& [golden, row] : {std::pair{"partition", "forward_kl"}, std::pair{"reverse_kl", "reverse_kl"}, std::pair{"skew_forward_kl", "skew_forward_kl"}, std::pair{"total_variation", "total_variation"}}) {
    INFO(golden);
    const LogitSums sums = evaluate_one(row, student, known, item.at("lambda"));
    CHECK(sums.values[0].item<double>() == Approx(item.at(golden).at("value").get<double>()).epsilon(1e-9));
    CHECK(largest_difference(sums.gradient, tensor_of(item.at(golden).at("gradient"), {1, 7})) < 1e-9);
  }
}

TEST_CASE("forward KL with draws: the mean over all draws is value and gradient of the whole vocabulary") {
  const Json item = read_json(testing::source_folder() / "tests/goldens/distill.json").at("sparse");
  const at::Tensor student = tensor_of(item.at("student"), {1, 7}), teacher = tensor_of(item.at("teacher"), {1, 7});
  const at::Tensor p = at::softmax(teacher, -1);
  const std::vector<std::int64_t> rest = item.at("rest").get<std::vector<std::int64_t>>();
  double mass = 0;
  for (const std::int64_t token : rest) mass += p[0][token].item<double>();
  double value = 0, probability = 0;
  at::Tensor gradient = at::zeros({1, 7}, at::kDouble);
  for (const std::int64_t a : rest) {
    for (const std::int64_t b : rest) {
      const double weight = p[0][a].item<double>() * p[0][b].item<double>() / (mass * mass);
      const LogitSums sums = evaluate_one("forward_kl", student, sparse_of(teacher, 3, at::tensor({a, b}, at::kLong).unsqueeze(0)));
      value += weight * sums.values[0].item<double>();
      gradient += sums.gradient * weight;
      probability += weight;
      CHECK(sums.values[1].item<double>() == Approx(sums.values[0].item<double>()));  // the logged forward KL is the same estimate
      CHECK(std::abs(sums.gradient.sum().item<double>()) < 1e-12);                    // no push along the constant
    }
  }
  CHECK(probability == Approx(1).epsilon(1e-12));
  CHECK(value == Approx(item.at("full").at("value").get<double>()).epsilon(1e-9));
  CHECK(largest_difference(gradient, tensor_of(item.at("full").at("gradient"), {1, 7})) < 1e-9);
}

TEST_CASE("losses on likeliest tokens: zero at equality whatever is drawn, bounds, all tokens known") {
  const at::Tensor student = random_tensor({6, 12}, 41, 2), teacher = random_tensor({6, 12}, 42, 2);
  const at::Tensor least = std::get<1>(teacher.topk(4, -1, /*largest=*/false));
  for (const LogitLoss& row : logit_losses()) {
    if (!row.partition) {
      CHECK_THROWS_AS(evaluate_one(row.name.data(), student, sparse_of(teacher, 5)), std::logic_error);
      continue;
    }
    INFO(row.name);
    const LogitSums equal = evaluate_one(row.name.data(), teacher + 3, sparse_of(teacher, 5, least));
    CHECK(std::abs(equal.values[0].item<double>()) < 1e-12);
    if (row.name != "total_variation") CHECK(equal.gradient.abs().max().item<double>() < 1e-12);  // not smooth there: rounding decides its sign
    const double whole = logit_loss(row, student, teacher).item<double>() * 6;
    CHECK(evaluate_one(row.name.data(), student, sparse_of(teacher, 12)).values[0].item<double>() == Approx(whole).epsilon(1e-9));
    if (row.name != "adaptive_kl") CHECK(evaluate_one(row.name.data(), student, sparse_of(teacher, 5)).values[0].item<double>() <= whole + 1e-12);  // its weights are of the partition
  }
}

TEST_CASE("losses on likeliest tokens: far apart and nearly certain stay finite in float32") {
  const at::Tensor student = random_tensor({4, 30}, 43, 300).to(at::kFloat);
  at::Tensor teacher = random_tensor({4, 30}, 44, 1);
  teacher.select(1, 3).add_(60);  // the rest has probability e^-57
  SparseTargets known = sparse_of(teacher, 4, at::tensor({7, 8}, at::kLong).unsqueeze(0).expand({4, 2}));
  known.log_rest.clamp_(-20);
  known.draw_log_p.clamp_(-30, 0);
  for (const char* name : {"forward_kl", "reverse_kl", "adaptive_kl"}) {
    const LogitSums sums = evaluate_one(name, student, known);
    CHECK(sums.values.isfinite().all().item<bool>());
    CHECK(sums.gradient.isfinite().all().item<bool>());
  }
}

TEST_CASE("the fused loss takes likeliest tokens, chunk by chunk, with a padded vocabulary of the student") {
  const at::Tensor hidden = random_tensor({7, 4}, 45), weight = random_tensor({14, 4}, 46), teacher = random_tensor({7, 12}, 47, 2);
  const at::Tensor draws = std::get<1>(teacher.topk(2, -1, false));
  const SparseTargets known = sparse_of(teacher, 5, draws);
  LogitLossOptions frame;
  frame.vocabulary = 12;
  frame.mask = at::tensor({1, 0, 1, 1, 1, 0, 1}, at::kLong).to(at::kBool);
  const at::Tensor valid = frame.mask.nonzero().squeeze(-1);
  const std::vector<LogitTerm> terms{{find_logit_loss("forward_kl"), {}, 1}, {find_logit_loss("reverse_kl"), {}, 0.5}};
  const auto pick = [&](const at::Tensor& x) { return x.index_select(0, valid); };
  const SparseTargets rows{pick(known.ids), pick(known.log_p), pick(known.log_rest), pick(known.draws), pick(known.draw_log_p), 12};
  const at::Tensor logits = at::mm(pick(hidden), weight.t());
  const LogitSums sums = evaluate_sparse_terms(terms, logits, rows, 12, true);
  for (const std::int64_t chunk : {1, 3, 0}) {
    const at::Tensor leaf = hidden.clone().requires_grad_();
    const LogitMeans means = fused_linear_terms(terms, leaf, weight, {}, {{}, {}, {}, {}, &known}, frame, chunk);
    CHECK(largest_difference(means.values, sums.values / 5) < 1e-12);
    const at::Tensor gradient = torch::autograd::grad({means.total}, {leaf})[0];
    CHECK(largest_difference(pick(gradient), at::mm(sums.gradient, weight) / 5) < 1e-12);
    CHECK(gradient[1].abs().max().item<double>() == 0);
  }
}
