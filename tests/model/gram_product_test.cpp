// Sums of outer products against float64, for every shape of the edges, and the same bits for any number of threads.
#include "../catch_torch.h"

#include <ATen/Parallel.h>

#include "../distill/tensors.h"
#include "model/gram_product.h"

using namespace kompakt;
using kompakt::testing::random_tensor;

namespace {

std::vector<at::Tensor> pieces(std::int64_t columns, std::uint64_t seed) {
  std::vector<at::Tensor> out;
  for (const std::int64_t rows : {300, 1, 0, 77}) out.push_back(random_tensor({rows, columns}, seed++).to(at::kFloat));
  return out;
}

double relative(const at::Tensor& found, const at::Tensor& expected) { return ((found.to(at::kDouble) - expected).norm() / expected.norm()).item<double>(); }

at::Tensor expected_product(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) { return at::matmul(at::cat(a).to(at::kDouble).t(), at::cat(b).to(at::kDouble)); }

}  // namespace

TEST_CASE("sums of outer products by hand", "[model][products]") {
  const auto matrix = [](std::vector<float> values, std::int64_t columns) { return at::tensor(values).reshape({-1, columns}); };
  at::Tensor sum;
  add_gram(sum, {matrix({1, 2, 3, 4}, 2)}, {matrix({5, 6}, 1)}, false);
  CHECK(at::equal(sum, matrix({23, 34}, 1)));
  add_gram(sum, {matrix({1, 0}, 2)}, {matrix({7}, 1)}, false);
  CHECK(at::equal(sum, matrix({30, 34}, 1)));
}

TEST_CASE("sums of outer products of any shape equal float64's", "[model][products]") {
  const auto [k, m] = GENERATE(table<std::int64_t, std::int64_t>({{1, 1}, {16, 16}, {15, 17}, {130, 270}, {288, 31}}));
  CAPTURE(k, m);
  const std::vector<at::Tensor> a = pieces(k, 1), b = pieces(m, 11);
  const at::Tensor before = random_tensor({k, m}, 21).to(at::kFloat);
  at::Tensor sum = before.clone();
  add_gram(sum, a, b, false);
  CHECK(relative(sum, expected_product(a, b) + before.to(at::kDouble)) < 1e-6);
  // Columns of a wider matrix.
  const at::Tensor wide = random_tensor({90, k + 5}, 31).to(at::kFloat);
  at::Tensor part;
  add_gram(part, {wide.narrow(1, 2, k)}, {wide.narrow(1, 2, k)}, false);
  CHECK(relative(part, expected_product({wide.narrow(1, 2, k)}, {wide.narrow(1, 2, k)})) < 1e-6);
}

TEST_CASE("symmetric sums of outer products: above the diagonal, weighted rows, float64, threads", "[model][products]") {
  const std::int64_t k = GENERATE(1, 16, 50, 130, 401);
  CAPTURE(k);
  const int threads_before = at::get_num_threads();
  const std::vector<at::Tensor> x = pieces(k, 1);
  std::vector<at::Tensor> weighted, wide;
  for (const at::Tensor& some : x) weighted.push_back(some * at::arange(some.size(0)).unsqueeze(1).to(at::kFloat)), wide.push_back(some.to(at::kDouble));
  std::vector<at::Tensor> runs;
  for (const int threads : {1, 2}) {
    at::set_num_threads(threads);
    at::Tensor sum, weights, exact;
    add_gram(sum, x, x, true);
    add_gram(weights, weighted, x, true);
    add_gram(exact, wide, wide, true);
    CHECK(relative(sum.triu(), expected_product(x, x).triu()) < 1e-6);
    CHECK(relative(weights.triu(), expected_product(weighted, x).triu()) < 1e-6);
    CHECK(relative(exact.triu(), expected_product(x, x).triu()) < 1e-13);
    runs.push_back(at::cat({sum.triu(), weights.triu()}));
  }
  at::set_num_threads(threads_before);
  CHECK(at::equal(runs[0], runs[1]));
}

TEST_CASE("sums of outer products in bfloat16: inputs are rounded, products and sums are not", "[model][products]") {
  const std::int64_t k = GENERATE(1, 16, 50, 130, 401);
  CAPTURE(k);
  const int threads_before = at::get_num_threads();
  const std::vector<at::Tensor> x = pieces(k, 1), y = pieces(37, 11);
  const auto rounded = [](const std::vector<at::Tensor>& rows, at::ScalarType type) {
    std::vector<at::Tensor> out;
    for (const at::Tensor& some : rows) out.push_back(some.to(at::kBFloat16).to(type));
    return out;
  };
  const std::vector<at::Tensor> low = rounded(x, at::kBFloat16), exact = rounded(x, at::kFloat);
  std::vector<at::Tensor> runs;
  for (const int threads : {1, 2}) {
    at::set_num_threads(threads);
    at::Tensor sum, from_low, cross;
    add_gram_bf16(sum, x, x, true);
    add_gram_bf16(from_low, low, low, true);
    add_gram_bf16(cross, low, y, false);
    CHECK(sum.scalar_type() == at::kFloat);
    CHECK(from_low.scalar_type() == at::kFloat);
    CHECK(at::equal(sum.triu(), from_low.triu()));
    CHECK(relative(sum.triu(), expected_product(exact, exact).triu()) < 1e-6);
    CHECK(relative(cross, expected_product(exact, rounded(y, at::kFloat))) < 1e-6);
    add_gram_bf16(cross, {low[0].slice(0, 0, 0)}, {y[0].slice(0, 0, 0)}, false);  // nothing to add
    CHECK(relative(cross, expected_product(exact, rounded(y, at::kFloat))) < 1e-6);
    runs.push_back(at::cat({sum.triu(), cross}, 1));
  }
  at::set_num_threads(threads_before);
  CHECK(at::equal(runs[0], runs[1]));
  // Two roundings of 2^-9 each at most; none would be a thousand times closer.
  const double error = relative(runs[0].slice(1, 0, k), expected_product(x, x).triu());
  CHECK(error < 4e-3);
  CHECK(error > 1e-6);
}

TEST_CASE("a triangle on both sides of the diagonal", "[model][products]") {
  for (const at::ScalarType type : {at::kFloat, at::kDouble})
    for (const std::int64_t k : {0, 1, 31, 32, 33, 100}) {
      const at::Tensor x = random_tensor({k, k}, 3).to(type), found = mirrored(x, 0.25);
      CHECK(at::equal(found, (x.triu() + x.triu(1).t()) * 0.25));
      CHECK(at::equal(mirrored(x.t(), 0.25), (x.t().triu() + x.t().triu(1).t()) * 0.25));  // not contiguous
    }
}
