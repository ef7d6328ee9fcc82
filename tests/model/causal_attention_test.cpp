// Attention of a decoder against the plain formula, by hand, by finite differences, and on any number of threads.
#include "../catch_torch.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>

#include "../distill/tensors.h"
#include "model/causal_attention.h"

using namespace kompakt;
using kompakt::testing::gradient_error;
using kompakt::testing::largest_difference;
using kompakt::testing::random_tensor;

namespace {

at::Tensor causal_reference(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale, std::int64_t window) {
  const std::int64_t tokens = q.size(2), group = q.size(1) / k.size(1);
  const at::Tensor distance = at::arange(tokens).unsqueeze(1) - at::arange(tokens);
  at::Tensor hidden = distance.lt(0);
  if (window > 0) hidden = hidden.logical_or(distance.ge(window));
  const at::Tensor keys = k.repeat_interleave(group, 1), values = v.repeat_interleave(group, 1);
  const at::Tensor scores = (at::matmul(q, keys.transpose(2, 3)) * scale).masked_fill(hidden, -INFINITY);
  return at::matmul(scores.softmax(-1), values).transpose(1, 2).flatten(2);
}

}  // namespace

TEST_CASE("causal attention of equal keys is the mean of the values so far", "[model][attention]") {
  const at::Tensor q = random_tensor({1, 1, 3, 8}, 1), k = at::ones({1, 1, 3, 8}, at::kDouble);
  const at::Tensor v = at::arange(24, at::kDouble).reshape({1, 1, 3, 8});
  const at::Tensor all = causal_attention(q, k, v, 1), near = causal_attention(q, k, v, 1, 2);
  for (std::int64_t t = 0; t < 3; ++t) {
    CHECK(all[0][t][5].item<double>() == Approx(5 + 8 * static_cast<double>(t) / 2));
    CHECK(near[0][t][5].item<double>() == Approx(t == 0 ? 5 : 5 + 8 * static_cast<double>(t) - 4));
  }
}

TEST_CASE("causal attention and its gradients equal the plain formula", "[model][attention]") {
  const auto [tokens, heads, kv_heads, size, window] = GENERATE(table<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>(
      {{1, 1, 1, 8, 0}, {2, 2, 1, 8, 0}, {17, 3, 3, 16, 0}, {64, 3, 1, 64, 0}, {65, 9, 3, 64, 0}, {130, 4, 2, 32, 0}, {300, 3, 1, 64, 0}, {259, 1, 1, 8, 0}, {64, 3, 1, 16, 1}, {150, 4, 2, 32, 40}, {300, 3, 1, 64, 64}, {200, 2, 2, 8, 500}, {96, 48, 1, 8, 7}}));
  const auto type = GENERATE(at::kFloat, at::kDouble);
  CAPTURE(tokens, heads, kv_heads, size, window, std::string(c10::toString(type)));
  const auto make = [&, tokens = tokens, size = size, type = type](std::int64_t count, std::uint64_t seed) { return random_tensor({2, count, tokens, size}, seed, 2).to(type).requires_grad_(); };
  const at::Tensor q = make(heads, 1), k = make(kv_heads, 2), v = make(kv_heads, 3), weights = random_tensor({2, tokens, heads * size}, 4).to(type);
  const at::Tensor out = causal_attention(q, k, v, 0.3, window), expected = causal_reference(q, k, v, 0.3, window);
  const double bound = type == at::kFloat ? 4e-5 : 1e-12;
  CHECK(largest_difference(out, expected) < bound);
  CHECK(at::equal(causal_attention(q.detach(), k.detach(), v.detach(), 0.3, window), out.detach()));
  const auto ours = torch::autograd::grad({(out * weights).sum()}, {q, k, v}), theirs = torch::autograd::grad({(expected * weights).sum()}, {q, k, v});
  // Gradients of keys and values are sums over all tokens and heads behind them.
  for (std::size_t i = 0; i < 3; ++i) CHECK(largest_difference(ours[i], theirs[i]) < bound * 10);
}

TEST_CASE("causal attention reads the views that linear layers leave", "[model][attention]") {
  const at::Tensor x = random_tensor({2, 70, 4, 8}, 5).transpose(1, 2), k = random_tensor({2, 70, 2, 8}, 6).transpose(1, 2), v = random_tensor({2, 2, 8, 70}, 7).transpose(2, 3);
  CHECK(largest_difference(causal_attention(x, k, v, 0.5), causal_reference(x, k, v, 0.5, 0)) < 1e-12);
}

TEST_CASE("gradients of causal attention by finite differences", "[model][attention]") {
  const std::int64_t window = GENERATE(0, 3);
  const at::Tensor q = random_tensor({1, 4, 19, 8}, 1), k = random_tensor({1, 2, 19, 8}, 2), v = random_tensor({1, 2, 19, 8}, 3), weights = random_tensor({1, 19, 32}, 4);
  const auto loss = [&](const at::Tensor& a, const at::Tensor& b, const at::Tensor& c) { return (causal_attention(a, b, c, 0.4, window) * weights).sum(); };
  CHECK(gradient_error([&](const at::Tensor& x) { return loss(x, k, v); }, q) < 1e-7);
  CHECK(gradient_error([&](const at::Tensor& x) { return loss(q, x, v); }, k) < 1e-7);
  CHECK(gradient_error([&](const at::Tensor& x) { return loss(q, k, x); }, v) < 1e-7);
}

TEST_CASE("causal scores of any size give finite results", "[model][attention]") {
  const auto make = [](std::uint64_t seed, double scale) { return random_tensor({1, 2, 140, 8}, seed, scale).to(at::kFloat).requires_grad_(); };
  const at::Tensor q = make(1, 100), k = make(2, 100), v = make(3, 1), out = causal_attention(q, k, v, 1);
  CHECK(out.isfinite().all().item<bool>());
  for (const at::Tensor& gradient : torch::autograd::grad({out.sum()}, {q, k, v})) CHECK(gradient.isfinite().all().item<bool>());
}

TEST_CASE("a score that is no number shows in the result", "[model][attention]") {
  const auto make = [](std::uint64_t seed) { return random_tensor({1, 2, 140, 8}, seed).to(at::kFloat); };
  const at::Tensor q = make(1), k = make(2), v = make(3);
  for (const float broken : {NAN, INFINITY}) {
    at::Tensor other = q.clone();
    other[0][0][100][3] = broken;
    const at::Tensor out = causal_attention(other, k, v, 1);
    CHECK(out[0].slice(1, 0, 8)[100].isnan().all().item<bool>());
    CHECK(out[0].slice(0, 0, 100).isfinite().all().item<bool>());
  }
}

TEST_CASE("causal attention on one and two threads gives the same bytes", "[model][attention]") {
  const int before = at::get_num_threads();
  std::vector<std::vector<at::Tensor>> runs;
  for (const int threads : {1, 2}) {
    at::set_num_threads(threads);
    const auto make = [&](std::int64_t heads, std::uint64_t seed) { return random_tensor({1, heads, 300, 32}, seed).to(at::kFloat).requires_grad_(); };
    const at::Tensor q = make(6, 1), k = make(3, 2), v = make(3, 3), out = causal_attention(q, k, v, 0.2);
    runs.push_back(torch::autograd::grad({(out * random_tensor({1, 300, 192}, 4).to(at::kFloat)).sum()}, {q, k, v}));
    runs.back().push_back(out.detach());
  }
  at::set_num_threads(before);
  for (std::size_t i = 0; i < runs[0].size(); ++i) CHECK(at::equal(runs[0][i], runs[1][i]));
}

TEST_CASE("what causal attention leaves to others", "[model][attention]") {
  const at::Tensor fits = at::zeros({1, 4, 128, 8}), odd = at::zeros({1, 4, 128, 12}), half = fits.to(at::kHalf), grouped = at::zeros({1, 2, 128, 8}), cached = at::zeros({1, 4, 130, 8}), short_text = at::zeros({1, 4, 64, 8});
  CHECK_FALSE(fits_causal_attention(odd, odd, odd));
  CHECK_FALSE(fits_causal_attention(half, half, half));
  CHECK_FALSE(fits_causal_attention(fits, cached, cached));
  CHECK_FALSE(fits_causal_attention(short_text, short_text, short_text));
  CHECK(fits_causal_attention(fits, grouped, grouped) == fits_causal_attention(fits, fits, fits));
}
