// SparseGPT and the refit: goldens of a plain NumPy implementation, identities that hold for any data, edges.
#include "prune/sparsegpt.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "tests/catch_torch.h"
#include <algorithm>
#include <cmath>

#include "core/files.h"
#include "core/json.h"
#include "core/random.h"
#include "tests/support.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

at::Tensor sparse_normal(std::int64_t rows, std::int64_t columns, const std::string& stream) {
  const CounterRandom random(31, stream);
  at::Tensor w = at::empty({rows, columns});
  for (std::int64_t i = 0; i < w.numel(); ++i) w.data_ptr<float>()[i] = static_cast<float>(random.normal(static_cast<std::uint64_t>(i)));
  return w;
}

at::Tensor sparse_inputs(std::int64_t tokens, std::int64_t columns, const std::string& stream) {
  return at::matmul(sparse_normal(tokens, columns, stream + "/x"), sparse_normal(columns, columns, stream + "/mix") / std::sqrt(static_cast<double>(columns)) + 0.5 * at::eye(columns)) * (0.5 * sparse_normal(1, columns, stream + "/energy")).exp();
}

at::Tensor sparse_hessian(const at::Tensor& x) { return at::matmul(x.t(), x) / static_cast<double>(x.size(0)); }

at::Tensor tensor_of(const Json& list, std::int64_t rows, std::int64_t columns) {
  const auto values = list.get<std::vector<double>>();
  return at::tensor(at::ArrayRef<double>(values), at::kDouble).reshape({rows, columns});
}

at::Tensor mask_of(const Json& rows) {
  std::vector<std::int64_t> bits;
  for (const Json& row : rows)
    for (const char c : row.get<std::string>()) bits.push_back(c == '1');
  return at::tensor(at::ArrayRef<std::int64_t>(bits), at::kLong).to(at::kBool).reshape({static_cast<std::int64_t>(rows.size()), -1});
}

double energy(const at::Tensor& e, const at::Tensor& h) { return (at::matmul(e, h) * e).sum().item<double>(); }

double largest(const at::Tensor& t) { return t.abs().max().item<double>(); }

}  // namespace

TEST_CASE("SparseGPT, Wanda and the refit agree with NumPy", "[prune][golden]") {
  const Json golden = read_json(source_folder() / "tests/goldens/prune.json");  // scripts/make_goldens_prune.py
  int runs = 0;
  for (const Json& data : golden.at("cases")) {
    const auto rows = data.at("rows").get<std::int64_t>(), columns = data.at("columns").get<std::int64_t>();
    const at::Tensor weight = tensor_of(data.at("weight"), rows, columns).to(at::kFloat), hessian = tensor_of(data.at("hessian"), rows == 0 ? 0 : columns, columns);
    for (const Json& run : data.at("runs")) {
      ++runs;
      CAPTURE(rows, runs);
      const SparsityPattern pattern{run.at("sparsity"), run.at("n"), run.at("m")};
      const double damping = run.at("damping");
      const SparseMatrix result = sparsegpt(weight, input_metric(hessian, damping), pattern, run.at("block"));
      const at::Tensor expected = tensor_of(run.at("pruned"), rows, columns);
      CHECK(at::equal(result.weight.ne(0), expected.ne(0)));
      CHECK(largest(result.weight - expected) < 2e-5 * largest(expected));  // float32 against float64
      CHECK(std::abs(result.sweep_loss - run.at("loss").get<double>()) < 1e-4 * run.at("loss").get<double>());
      const at::Tensor wanda = wanda_mask(weight, hessian.diagonal(), pattern);
      CHECK(at::equal(wanda, mask_of(run.at("wanda"))));
      const at::Tensor refit = tensor_of(run.at("refit"), rows, columns);
      CHECK(largest(refit_support(weight, wanda, hessian, damping) - refit) < 1e-4 * largest(refit));  // the golden works on the inputs, rounded to float32 moments here
    }
  }
  CHECK(runs == 12);
}

TEST_CASE("with an identity for second moments SparseGPT is magnitude inside a block, and nothing else moves", "[prune]") {
  const at::Tensor w = sparse_normal(70, 96, "identity");
  const InputMetric metric = input_metric(at::eye(96), 0.01);
  const SparseMatrix grouped = sparsegpt(w, metric, {0, 2, 4}, 32);
  CHECK(at::equal(grouped.mask, magnitude_mask(w, {0, 2, 4})));
  CHECK(at::equal(grouped.weight, w.masked_fill(grouped.mask.logical_not(), 0)));
  const SparseMatrix whole = sparsegpt(w, metric, {0.5}, 32);
  CHECK(at::equal(whole.weight, w.masked_fill(whole.mask.logical_not(), 0)));
  for (std::int64_t from = 0; from < 96; from += 32) {
    const at::Tensor mask = whole.mask.slice(1, from, from + 32), block = w.slice(1, from, from + 32).abs();
    CHECK(mask.sum().item<std::int64_t>() == 70 * 16);
    CHECK(block.masked_select(mask).min().item<float>() >= block.masked_select(mask.logical_not()).max().item<float>());
  }
}

TEST_CASE("two equal inputs: what one weight loses the other takes over", "[prune]") {
  // x = (a, a): the output is (w0 + w1) a. Pruning one weight costs nothing when the other becomes the sum.
  const at::Tensor w = at::tensor({1.0f, 3.0f}).reshape({1, 2}), h = at::ones({2, 2});
  const SparseMatrix result = sparsegpt(w, input_metric(h, 1e-4), {0, 1, 2}, 2);
  CHECK(result.mask[0][1].item<bool>() != result.mask[0][0].item<bool>());
  CHECK(std::abs(result.weight.sum().item<double>() - 4) < 1e-3);
  CHECK(std::abs(refit_support(w, at::tensor({0, 1}).to(at::kBool).reshape({1, 2}), h, 1e-6)[0][1].item<double>() - 4) < 1e-4);
}

TEST_CASE("compensation pays on correlated inputs, and the refit is never worse than the sweep", "[prune]") {
  int better = 0;
  for (int seed = 0; seed < 20; ++seed) {
    const std::string name = "correlated/" + std::to_string(seed);
    const at::Tensor h = sparse_hessian(sparse_inputs(256, 64, name)), w = sparse_normal(16, 64, name);
    const InputMetric metric = input_metric(h, 0.01);
    for (const SparsityPattern& pattern : {SparsityPattern{0.5}, SparsityPattern{0, 2, 4}}) {
      const SparseMatrix sparse = sparsegpt(w, metric, pattern, 32);
      const double swept = energy(w - sparse.weight, h), plain = energy(w.masked_fill(magnitude_mask(w, pattern), 0), h);
      better += swept < plain;
      const at::Tensor damped = h + 0.01 * h.diagonal().mean() * at::eye(64);
      const at::Tensor refit = refit_support(w, sparse.mask, h, 0.01);
      CHECK(energy(w - refit, damped) <= energy(w - sparse.weight, damped) * 1.0001);
      CHECK(refit.masked_select(sparse.mask.logical_not()).ne(0).sum().item<std::int64_t>() == 0);
    }
  }
  CHECK(better >= 38);  // of 40
}

TEST_CASE("half of six weights: among the better of all twenty masks", "[prune]") {
  // The places are chosen at once, for columns in their order: no bound against the best mask exists, the worst seed has 3.4 times
  // its error. Chance would be in the better half in half of the cases.
  int better_half = 0, best_quarter = 0;
  for (int seed = 0; seed < 40; ++seed) {
    const std::string name = "enumerated/" + std::to_string(seed);
    const at::Tensor h = sparse_hessian(sparse_inputs(64, 6, name)), w = sparse_normal(1, 6, name);
    std::vector<double> all;
    for (int code = 0; code < 64; ++code) {
      if (__builtin_popcount(static_cast<unsigned>(code)) != 3) continue;
      at::Tensor mask = at::zeros({1, 6}, at::kBool);
      for (int i = 0; i < 6; ++i) mask[0][i] = (code >> i & 1) != 0;
      all.push_back(energy(w - refit_support(w, mask, h, 0), h));
    }
    std::sort(all.begin(), all.end());
    REQUIRE(all.size() == 20);
    const SparseMatrix sparse = sparsegpt(w, input_metric(h, 0), {0.5}, 6);
    const double found = energy(w - refit_support(w, sparse.mask, h, 0), h);
    CHECK(found >= all[0] * 0.999 - 1e-9);
    better_half += found <= all[9] * 1.001, best_quarter += found <= all[4] * 1.001;
  }
  CAPTURE(better_half, best_quarter);
  CHECK(better_half >= 36);
  CHECK(best_quarter >= 28);
}

TEST_CASE("zeros stay zero, rows that are sparse enough stay as they are", "[prune]") {
  const at::Tensor h = sparse_hessian(sparse_inputs(128, 32, "zeros"));
  at::Tensor w = sparse_normal(3, 32, "zeros");
  w.masked_fill_(magnitude_mask(w, {0, 2, 4}).logical_not(), 0);
  const SparseMatrix result = sparsegpt(w, input_metric(h, 0.01), {0, 2, 4}, 16);
  CHECK(at::equal(result.weight, w));
  CHECK(result.sweep_loss == 0);
  CHECK(at::equal(sparsegpt(at::zeros({2, 32}), input_metric(h, 0.01), {0.5}, 16).weight, at::zeros({2, 32})));
}

TEST_CASE("inputs that never fire, a singular second moment, one column", "[prune]") {
  at::Tensor x = sparse_inputs(8, 32, "singular");  // fewer tokens than inputs
  x.select(1, 5).zero_();
  const at::Tensor w = sparse_normal(4, 32, "singular");
  const InputMetric metric = input_metric(sparse_hessian(x), 0.01);
  CHECK(metric.dead_count == 1);
  const SparseMatrix result = sparsegpt(w, metric, {0, 2, 4}, 32);
  CHECK(result.weight.isfinite().all().item<bool>());
  CHECK(result.weight.select(1, 5).ne(0).sum().item<std::int64_t>() == 0);
  CHECK(result.mask.sum().item<std::int64_t>() == 4 * 16);
  CHECK(sparsegpt(at::ones({1, 1}), input_metric(at::ones({1, 1}), 0.01), {0.5}, 128).weight.item<float>() == 1);  // half of one, rounded down
  CHECK(contains_all(error_text([] { input_metric(at::full({2, 2}, std::nan("")), 0.01); }), {"not finite"}));
  CHECK(contains_all(error_text([&] { sparsegpt(w, metric, {0, 3, 6}, 32); }), {"32 weights", "groups of 6", "nearest: 2:4"}));
}

TEST_CASE("the same bytes for one and two threads", "[prune]") {
  const at::Tensor h = sparse_hessian(sparse_inputs(300, 200, "threads")), w = sparse_normal(150, 200, "threads");
  const int before = at::get_num_threads();
  std::vector<at::Tensor> runs;
  for (const int threads : {1, 2}) {
    at::set_num_threads(threads);
    const InputMetric metric = input_metric(h, 0.01);
    const SparseMatrix result = sparsegpt(w, metric, {0.5}, 64);
    runs.push_back(result.weight);
    runs.push_back(refit_support(w, result.mask, h, 0.01));
  }
  at::set_num_threads(before);
  CHECK(at::equal(runs[0], runs[2]));
  CHECK(at::equal(runs[1], runs[3]));
}
