// Norm, gate, rotation and products of a block against ATen's own, by hand, by finite differences, and on any number of threads.
#include "../catch_torch.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>

#include "../distill/tensors.h"
#include "model/pointwise.h"
#include "model/products.h"

using namespace kompakt;
using kompakt::testing::gradient_error;
using kompakt::testing::largest_difference;
using kompakt::testing::random_tensor;

namespace {

std::vector<at::Tensor> pointwise_gradients(const at::Tensor& out, std::vector<at::Tensor> leaves) { return torch::autograd::grad({(out * random_tensor(out.sizes().vec(), 77).to(out.scalar_type())).sum()}, leaves); }

at::Tensor rotation_reference(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const std::int64_t half = x.size(-1) / 2;
  return x * cos + at::cat({x.narrow(-1, half, half).neg(), x.narrow(-1, 0, half)}, -1) * sin;
}

void check_pair(const at::Tensor& ours, const at::Tensor& theirs, const std::vector<at::Tensor>& leaves, double bound) {
  CHECK(largest_difference(ours, theirs) < bound);
  const auto a = pointwise_gradients(ours, leaves), b = pointwise_gradients(theirs, leaves);
  for (std::size_t i = 0; i < a.size(); ++i) CHECK(largest_difference(a[i], b[i]) < bound * 10);
}

}  // namespace

TEST_CASE("norm, gate and rotation by hand", "[model][pointwise]") {
  const at::Tensor x = at::tensor({3.0, 4.0}, at::kDouble).reshape({1, 2});
  CHECK(largest_difference(rms_norm_rows(x, at::tensor({1.0, 2.0}, at::kDouble), 0, 0), at::tensor({3.0, 8.0}, at::kDouble) / std::sqrt(12.5)) < 1e-15);
  CHECK(largest_difference(rms_norm_rows(x, at::tensor({0.0, 1.0}, at::kDouble), 1, 0), at::tensor({3.0, 8.0}, at::kDouble) / std::sqrt(12.5)) < 1e-15);
  CHECK(gated_silu(at::zeros({1, 1}), at::ones({1, 1})).item<double>() == 0);
  CHECK(gated_silu(at::full({1, 1}, std::log(3.0), at::kDouble), at::full({1, 1}, 4.0, at::kDouble)).item<double>() == Approx(3 * std::log(3.0)));  // sigmoid(ln 3) = 3/4
  const at::Tensor quarter = rotate_halves(at::tensor({1.0, 2.0}, at::kDouble).reshape({1, 1, 1, 2}), at::zeros({1, 2}, at::kDouble), at::ones({1, 2}, at::kDouble));
  CHECK(largest_difference(quarter.flatten(), at::tensor({-2.0, 1.0}, at::kDouble)) == 0);
}

TEST_CASE("norm, gate and rotation and their gradients equal ATen's", "[model][pointwise]") {
  const auto [batch, tokens, heads, size] = GENERATE(table<std::int64_t, std::int64_t, std::int64_t, std::int64_t>({{1, 1, 1, 2}, {2, 5, 3, 8}, {1, 70, 2, 6}, {3, 130, 1, 12}}));
  const auto type = GENERATE(at::kFloat, at::kDouble);
  CAPTURE(batch, tokens, heads, size, std::string(c10::toString(type)));
  const double bound = type == at::kFloat ? 3e-5 : 1e-12;
  const auto make = [&](std::vector<std::int64_t> shape, std::uint64_t seed) { return random_tensor(std::move(shape), seed, 2).to(type).requires_grad_(); };
  const std::int64_t width = heads * size;
  {
    const at::Tensor x = make({batch, tokens, width}, 1), w = make({width}, 2);
    check_pair(rms_norm_rows(x, w, 0, 1e-5), at::rms_norm(x, w.sizes(), w, 1e-5), {x, w}, bound);
    check_pair(rms_norm_rows(x, w, 1, 1e-5), at::rms_norm(x, w.sizes(), w + 1, 1e-5), {x, w}, bound);
    const at::Tensor h = make({batch, tokens, heads, size}, 3), small = make({size}, 4);  // as queries lie
    check_pair(rms_norm_rows(h.transpose(1, 2), small, 0, 1e-5), at::rms_norm(h.transpose(1, 2), small.sizes(), small, 1e-5), {h, small}, bound);
  }
  {
    const at::Tensor gate = make({batch, tokens, width}, 5), up = make({batch, tokens, width}, 6);
    check_pair(gated_silu(gate, up), at::silu(gate) * up, {gate, up}, bound);
    CHECK(at::equal(gated_silu(gate.detach(), up.detach()), gated_silu(gate, up).detach()));
  }
  for (const bool by_text : {false, true}) {
    const at::Tensor x = make({batch, tokens, heads, size}, 7), cos = random_tensor(by_text ? std::vector<std::int64_t>{batch, 1, tokens, size} : std::vector<std::int64_t>{tokens, size}, 8).to(type), sin = cos.flip(-1) - 1;
    check_pair(rotate_halves(x.transpose(1, 2), cos, sin), rotation_reference(x.transpose(1, 2), cos, sin), {x}, bound);
  }
}

TEST_CASE("gradients of norm, gate and rotation by finite differences", "[model][pointwise]") {
  const at::Tensor x = random_tensor({2, 3, 2, 6}, 1), other = random_tensor({2, 3, 2, 6}, 2), w = random_tensor({6}, 3), mix = random_tensor({2, 3, 2, 6}, 4), angle = random_tensor({3, 6}, 5);
  CHECK(gradient_error([&](const at::Tensor& v) { return (rms_norm_rows(v, w, 1, 1e-3) * mix).sum(); }, x) < 1e-7);
  CHECK(gradient_error([&](const at::Tensor& v) { return (rms_norm_rows(x, v, 0, 1e-3) * mix).sum(); }, w) < 1e-7);
  CHECK(gradient_error([&](const at::Tensor& v) { return (gated_silu(v, other) * mix).sum(); }, x) < 1e-7);
  CHECK(gradient_error([&](const at::Tensor& v) { return (gated_silu(other, v) * mix).sum(); }, x) < 1e-7);
  CHECK(gradient_error([&](const at::Tensor& v) { return (rotate_halves(v.transpose(1, 2), angle, angle + 1).transpose(1, 2) * mix).sum(); }, x) < 1e-7);
}

TEST_CASE("large gates stay finite", "[model][pointwise]") {
  const at::Tensor gate = at::tensor({-1000.0f, -90.0f, 0.0f, 90.0f, 1000.0f}), up = at::ones({5});
  CHECK(largest_difference(gated_silu(gate, up), at::silu(gate)) < 1e-6);
}

TEST_CASE("products of any shape and stride equal ATen's", "[model][products]") {
  const auto [m, k, n] = GENERATE(table<std::int64_t, std::int64_t, std::int64_t>({{1, 1, 1}, {48, 32, 48}, {53, 33, 50}, {60, 1601, 64}, {170, 96, 1030}, {49, 40, 97}, {0, 64, 64}, {64, 64, 0}}));
  const bool turned_a = GENERATE(false, true), turned_b = GENERATE(false, true), add = GENERATE(false, true);
  CAPTURE(m, k, n, turned_a, turned_b, add);
  const auto make = [](std::int64_t rows, std::int64_t columns, bool turned, std::uint64_t seed) { return turned ? random_tensor({columns, rows}, seed).to(at::kFloat).t() : random_tensor({rows, columns}, seed).to(at::kFloat); };
  const at::Tensor a = make(m, k, turned_a, 1), b = make(k, n, turned_b, 2), before = make(m, n, false, 3);
  at::Tensor c = at::full({m, n + 3}, 7.0f), part = c.narrow(1, 2, n);
  part.copy_(before);
  matrix_product(part, a, b, add);
  const at::Tensor expected = at::mm(a.to(at::kDouble), b.to(at::kDouble)) + (add ? before.to(at::kDouble) : at::zeros({m, n}, at::kDouble));
  CHECK(largest_difference(part, expected) < 1e-5 * std::sqrt(static_cast<double>(k) + 1));
  CHECK(c.select(1, 0).eq(7).all().item<bool>());
  CHECK(c.select(1, n + 2).eq(7).all().item<bool>());
}

TEST_CASE("linear_product and its gradients equal at::linear", "[model][products]") {
  const bool biased = GENERATE(false, true);
  const auto make = [](std::vector<std::int64_t> shape, std::uint64_t seed) { return random_tensor(std::move(shape), seed).to(at::kFloat).requires_grad_(); };
  const at::Tensor x = make({2, 37, 64}, 1), w = make({90, 64}, 2), b = biased ? make({90}, 3) : at::Tensor();
  std::vector<at::Tensor> leaves{x, w};
  if (biased) leaves.push_back(b);
  check_pair(linear_product(x, w, b), at::linear(x, w, biased ? std::optional<at::Tensor>(b) : std::nullopt), leaves, 1e-4);
}

TEST_CASE("gated_linear and its gradients equal the parts", "[model][products]") {
  const auto type = GENERATE(at::kFloat, at::kDouble);
  const auto make = [&](std::vector<std::int64_t> shape, std::uint64_t seed) { return random_tensor(std::move(shape), seed).to(type).requires_grad_(); };
  const at::Tensor gate = make({2, 30, 56}, 1), up = make({2, 30, 56}, 2), w = make({70, 56}, 3), b = make({70}, 4);
  REQUIRE(fits_gated_linear(gate, up, w));
  check_pair(gated_linear(gate, up, w, b), at::linear(at::silu(gate) * up, w, b), {gate, up, w, b}, type == at::kFloat ? 1e-4 : 1e-11);
  CHECK(at::equal(gated_linear(gate.detach(), up.detach(), w.detach(), {}), gated_linear(gate, up, w, {}).detach()));
  const at::Tensor x = random_tensor({1, 3, 4}, 5), y = random_tensor({1, 3, 4}, 6), small = random_tensor({2, 4}, 7), mix = random_tensor({1, 3, 2}, 8);
  CHECK(gradient_error([&](const at::Tensor& v) { return (gated_linear(v, y, small, {}) * mix).sum(); }, x) < 1e-7);
  CHECK(gradient_error([&](const at::Tensor& v) { return (gated_linear(x, v, small, {}) * mix).sum(); }, y) < 1e-7);
  CHECK(gradient_error([&](const at::Tensor& v) { return (gated_linear(x, y, v, {}) * mix).sum(); }, small) < 1e-7);
}

TEST_CASE("the parts of a block on one and two threads give the same bytes", "[model][pointwise]") {
  const int before = at::get_num_threads();
  std::vector<std::vector<at::Tensor>> runs;
  for (const int threads : {1, 2}) {
    at::set_num_threads(threads);
    const auto make = [](std::vector<std::int64_t> shape, std::uint64_t seed) { return random_tensor(std::move(shape), seed).to(at::kFloat).requires_grad_(); };
    const at::Tensor x = make({2, 150, 4, 32}, 1), gain = make({128}, 2), w = make({200, 128}, 3), angle = random_tensor({150, 32}, 4).to(at::kFloat);
    const at::Tensor turned = rotate_halves(x.transpose(1, 2), angle, angle + 1).transpose(1, 2).flatten(2);
    const at::Tensor y = linear_product(rms_norm_rows(turned, gain, 0, 1e-5), w, {});
    const at::Tensor out = gated_silu(y, y * 2);
    runs.push_back(pointwise_gradients(out, {x, gain, w}));
    runs.back().push_back(out.detach());
  }
  at::set_num_threads(before);
  for (std::size_t i = 0; i < runs[0].size(); ++i) CHECK(at::equal(runs[0][i], runs[1][i]));
}
