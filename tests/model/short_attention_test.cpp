// Attention of short texts against ATen's own, by hand, by finite differences, and on any number of threads.
#include "../catch_torch.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>

#include "../distill/tensors.h"
#include "model/short_attention.h"

using namespace kompakt;
using kompakt::testing::gradient_error;
using kompakt::testing::largest_difference;
using kompakt::testing::random_tensor;

namespace {

at::Tensor attention_reference(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& lengths, double scale) {
  at::Tensor scores = at::matmul(q.transpose(1, 2), k.permute({0, 2, 3, 1})) * scale;  // [B,H,T,T]
  if (lengths.defined()) scores = scores.masked_fill(at::arange(q.size(1)).unsqueeze(0).ge(lengths.unsqueeze(1)).unsqueeze(1).unsqueeze(1), -1e30);
  return at::matmul(scores.softmax(-1), v.transpose(1, 2)).transpose(1, 2);
}

std::vector<at::Tensor> attention_gradients(const at::Tensor& out, const at::Tensor& weights, std::vector<at::Tensor> leaves) { return torch::autograd::grad({(out * weights).sum()}, leaves); }

}  // namespace

TEST_CASE("attention of equal keys is the mean of the values of real tokens", "[model][attention]") {
  const at::Tensor q = random_tensor({1, 3, 1, 8}, 1), k = at::ones({1, 3, 1, 8}, at::kDouble);
  const at::Tensor v = at::arange(24, at::kDouble).reshape({1, 3, 1, 8});
  CHECK(short_attention(q, k, v, {}, 1).select(1, 2).flatten()[0].item<double>() == Approx(8));                          // (0 + 8 + 16) / 3
  CHECK(short_attention(q, k, v, at::tensor({2}, at::kLong), 1).select(1, 2).flatten()[7].item<double>() == Approx(11));  // (7 + 15) / 2
}

TEST_CASE("short attention and its gradients equal the plain formula", "[model][attention]") {
  const auto [tokens, heads, size] = GENERATE(table<std::int64_t, std::int64_t, std::int64_t>({{1, 1, 8}, {2, 3, 8}, {5, 2, 16}, {8, 12, 32}, {17, 2, 24}, {33, 4, 64}, {64, 2, 32}}));
  const auto type = GENERATE(at::kFloat, at::kDouble);
  const bool padded = GENERATE(false, true);
  CAPTURE(tokens, heads, size, padded, std::string(c10::toString(type)));
  const auto make = [&](std::uint64_t seed) { return random_tensor({4, tokens, heads, size}, seed, 2).to(type).requires_grad_(); };
  const at::Tensor q = make(1), k = make(2), v = make(3), weights = random_tensor({4, tokens, heads, size}, 4).to(type);
  const at::Tensor lengths = padded ? at::tensor({tokens, std::int64_t(1), tokens / 2, (tokens + 3) / 4}, at::kLong) : at::Tensor();  // tokens / 2 is 0 for one token
  REQUIRE(fits_short_attention(q, k, v));
  const at::Tensor out = short_attention(q, k, v, lengths, 0.3), expected = attention_reference(q, k, v, lengths, 0.3);
  const double bound = type == at::kFloat ? 2e-5 : 1e-12;
  CHECK(largest_difference(out, expected) < bound);
  CHECK(largest_difference(short_attention(q.detach(), k.detach(), v.detach(), lengths, 0.3), expected) < bound);
  const auto ours = attention_gradients(out, weights, {q, k, v}), theirs = attention_gradients(expected, weights, {q, k, v});
  for (std::size_t i = 0; i < 3; ++i) CHECK(largest_difference(ours[i], theirs[i]) < bound * 5);
}

TEST_CASE("short attention reads the views that linear layers leave", "[model][attention]") {
  const at::Tensor x = random_tensor({3, 2, 7, 8}, 5);  // [B,H,T,hd]: not contiguous after the transposition
  const at::Tensor q = x.transpose(1, 2), k = q * 2, v = q + 1;
  CHECK(largest_difference(short_attention(q, k, v, {}, 0.5), attention_reference(q, k, v, {}, 0.5)) < 1e-12);
}

TEST_CASE("gradients of short attention by finite differences", "[model][attention]") {
  const at::Tensor q = random_tensor({2, 5, 2, 8}, 1), k = random_tensor({2, 5, 2, 8}, 2), v = random_tensor({2, 5, 2, 8}, 3), weights = random_tensor({2, 5, 2, 8}, 4);
  const at::Tensor lengths = at::tensor({5, 3}, at::kLong);
  const auto loss = [&](const at::Tensor& a, const at::Tensor& b, const at::Tensor& c) { return (short_attention(a, b, c, lengths, 0.4) * weights).sum(); };
  CHECK(gradient_error([&](const at::Tensor& x) { return loss(x, k, v); }, q) < 1e-7);
  CHECK(gradient_error([&](const at::Tensor& x) { return loss(q, x, v); }, k) < 1e-7);
  CHECK(gradient_error([&](const at::Tensor& x) { return loss(q, k, x); }, v) < 1e-7);
}

TEST_CASE("scores of any size give finite probabilities", "[model][attention]") {
  const at::Tensor q = random_tensor({2, 11, 2, 8}, 1, 100).to(at::kFloat), k = random_tensor({2, 11, 2, 8}, 2, 100).to(at::kFloat), v = random_tensor({2, 11, 2, 8}, 3).to(at::kFloat);
  const at::Tensor lengths = at::tensor({11, 4}, at::kLong), out = short_attention(q, k, v, lengths, 1);
  CHECK(out.isfinite().all().item<bool>());
  CHECK(largest_difference(out, attention_reference(q.to(at::kDouble), k.to(at::kDouble), v.to(at::kDouble), lengths, 1)) < 1e-2);  // scores near 1e5 have steps of 0.008 in float32
}

TEST_CASE("a score of short attention that is no number shows in the result", "[model][attention]") {
  const at::Tensor q = random_tensor({1, 12, 1, 8}, 1).to(at::kFloat), k = random_tensor({1, 12, 1, 8}, 2).to(at::kFloat), v = random_tensor({1, 12, 1, 8}, 3).to(at::kFloat);
  q[0][5][0][3] = NAN;
  const at::Tensor out = short_attention(q, k, v, {}, 1);
  CHECK(out[0][5].isnan().all().item<bool>());
  CHECK(out[0][4].isfinite().all().item<bool>());
}

TEST_CASE("short attention on one and two threads gives the same bytes", "[model][attention]") {
  const int before = at::get_num_threads();
  std::vector<std::vector<at::Tensor>> runs;
  for (const int threads : {1, 2}) {
    at::set_num_threads(threads);
    const auto make = [&](std::uint64_t seed) { return random_tensor({16, 19, 4, 32}, seed).to(at::kFloat).requires_grad_(); };
    const at::Tensor q = make(1), k = make(2), v = make(3), out = short_attention(q, k, v, at::arange(3, 19), 0.2);
    runs.push_back(attention_gradients(out, random_tensor({16, 19, 4, 32}, 4).to(at::kFloat), {q, k, v}));
    runs.back().push_back(out.detach());
  }
  at::set_num_threads(before);
  for (std::size_t i = 0; i < runs[0].size(); ++i) CHECK(at::equal(runs[0][i], runs[1][i]));
}

TEST_CASE("what short attention leaves to others", "[model][attention]") {
  const at::Tensor fits = at::zeros({1, 4, 2, 8}), odd = at::zeros({1, 4, 2, 12}), half = fits.to(at::kHalf), grouped = at::zeros({1, 4, 1, 8}), cached = at::zeros({1, 5, 2, 8}), long_text = at::zeros({1, 65, 2, 8});
  CHECK(fits_short_attention(fits, fits, fits));
  CHECK_FALSE(fits_short_attention(odd, odd, odd));
  CHECK_FALSE(fits_short_attention(half, half, half));
  CHECK_FALSE(fits_short_attention(fits, grouped, grouped));
  CHECK_FALSE(fits_short_attention(fits, cached, cached));
  CHECK_FALSE(fits_short_attention(long_text, long_text, long_text));
}
