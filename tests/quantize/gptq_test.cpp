// GPTQ and polish: identities that hold for any data, and comparisons on correlated inputs.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "tests/catch_torch.h"
#include <cmath>
#include <cstdio>

#include "core/json.h"
#include "core/random.h"
#include "core/system.h"
#include "quantize/grid_math.h"
#include "quantize/methods.h"
#include "tests/support.h"
#include "train/inverse_factor.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;

at::Tensor gptq_normal(std::int64_t rows, std::int64_t columns, const char* stream) {
  const CounterRandom random(21, stream);
  at::Tensor w = at::empty({rows, columns});
  for (std::int64_t i = 0; i < w.numel(); ++i) w.data_ptr<float>()[i] = static_cast<float>(random.normal(static_cast<std::uint64_t>(i)));
  return w;
}

// Inputs with strong correlations and columns of very different energy.
at::Tensor correlated_hessian(std::int64_t columns, std::int64_t tokens, const char* stream) {
  const at::Tensor mix = at::matmul(gptq_normal(columns, columns / 4, stream), gptq_normal(columns / 4, columns, "mix")) / std::sqrt(columns / 4.0) + 0.5 * at::eye(columns);
  const at::Tensor x = at::matmul(gptq_normal(tokens, columns, "tokens"), mix) * gptq_normal(1, columns, "energy").exp();
  return (at::matmul(x.t(), x) / static_cast<double>(tokens)).to(at::kDouble);
}

GridSpec gptq_spec(const char* name, std::int64_t group) { return {find_grid(name), group}; }

bool same(const Quantized& a, const Quantized& b) {
  return at::equal(a.codes, b.codes) && at::equal(a.scales, b.scales) && a.offsets.defined() == b.offsets.defined() && (!a.offsets.defined() || at::equal(a.offsets, b.offsets));
}

double gptq_difference(const at::Tensor& a, const at::Tensor& b) { return ((a - b).norm() / b.norm()).item<double>(); }

}  // namespace

TEST_CASE("with an identity or a diagonal Hessian GPTQ is round to nearest, bit for bit", "[quantize][gptq]") {
  const at::Tensor w = gptq_normal(70, 192, "w");
  const at::Tensor diagonal = at::diag(gptq_normal(1, 192, "diagonal").exp().flatten()).to(at::kDouble);
  for (const char* name : {"ternary", "int4", "int4_asym", "four_level", "int8"})
    for (const std::int64_t group : {std::int64_t(64), std::int64_t(48), std::int64_t(0), std::int64_t(100)})
      for (const bool act_order : {false, true}) {
        const GridSpec spec = gptq_spec(name, group);
        LayerOptions options;
        options.act_order = act_order;
        CAPTURE(name, group, act_order);
        CHECK(same(quantize_gptq({w, at::eye(192, at::kDouble), {}}, spec, options).quantized, encode(spec, w)));
        CHECK(same(quantize_gptq({w, diagonal, {}}, spec, options).quantized, encode(spec, w)));
      }
}

TEST_CASE("the factor of the inverse Hessian is one", "[quantize][gptq]") {
  at::Tensor h = correlated_hessian(96, 400, "factor");
  h.diagonal().add_(0.01 * h.diagonal().mean().item<double>());
  const at::Tensor u = inverse_factor(h);
  REQUIRE(u.defined());
  CHECK(at::equal(u, u.triu()));
  CHECK(gptq_difference(at::matmul(at::matmul(u.t(), u), h), at::eye(96, at::kDouble)) < 1e-9);
  const at::Tensor narrow = inverse_factor(h.to(at::kFloat));
  REQUIRE(narrow.defined());
  CHECK(gptq_difference(narrow.to(at::kDouble), u) < 1e-3);
  CHECK(!inverse_factor(-at::eye(4, at::kDouble)).defined());
}

TEST_CASE("the width of the blocks does not matter, and float64 agrees", "[quantize][gptq]") {
  const at::Tensor w = gptq_normal(40, 160, "blocks"), h = correlated_hessian(160, 800, "blocks-h");
  for (const std::int64_t group : {std::int64_t(32), std::int64_t(0), std::int64_t(96)}) {
    const GridSpec spec = gptq_spec("int4", group);
    LayerOptions options;
    options.float64 = true;
    const at::Tensor reference = decode(spec, quantize_gptq({w, h, {}}, spec, options).quantized);
    for (const std::int64_t block : {1, 16, 50, 160, 1000}) {
      options.block = block;
      CAPTURE(group, block);
      CHECK(gptq_difference(decode(spec, quantize_gptq({w, h, {}}, spec, options).quantized), reference) < 1e-5);
    }
    options = {};
    const LayerResult narrow = quantize_gptq({w, h, {}}, spec, options);
    CHECK(output_error(w, decode(spec, narrow.quantized), h) == Approx(output_error(w, reference, h)).epsilon(0.05));
    CHECK(narrow.path == "cholesky");
  }
}

TEST_CASE("the losses of the sweep add up to the error in the metric of the Hessian", "[quantize][gptq]") {
  const at::Tensor w = gptq_normal(24, 128, "loss"), h = correlated_hessian(128, 900, "loss-h");
  at::Tensor damped = h.clone();
  damped.diagonal().add_(0.01 * h.diagonal().mean().item<double>());
  for (const bool float64 : {true, false}) {
    const GridSpec spec = gptq_spec("int4", 0);
    LayerOptions options;
    options.float64 = float64;
    const LayerResult result = quantize_gptq({w, h, {}}, spec, options);
    const at::Tensor e = (w - decode(spec, result.quantized)).to(at::kDouble);
    const double direct = (at::matmul(e, damped) * e).sum().item<double>();
    CHECK(result.sweep_loss == Approx(direct).epsilon(float64 ? 1e-6 : 1e-3));
  }
}

TEST_CASE("columns come back to their places after ordering by energy", "[quantize][gptq]") {
  at::Tensor w = gptq_normal(8, 64, "places") * 0.01;
  w += at::arange(64).to(at::kFloat).unsqueeze(0);  // column k holds about k
  const at::Tensor h = correlated_hessian(64, 500, "places-h");
  const GridSpec spec = gptq_spec("int8", 0);
  const at::Tensor decoded = decode(spec, quantize_gptq({w, h, {}}, spec, LayerOptions{}).quantized);
  CHECK((decoded - w).abs().max().item<float>() < 3.0f);
}

TEST_CASE("GPTQ beats rounding on correlated inputs, polish beats GPTQ, a shuffled Hessian loses", "[quantize][gptq]") {
  const at::Tensor w = gptq_normal(96, 256, "compare"), h = correlated_hessian(256, 2000, "compare-h");
  const CounterRandom random(1, "shuffle");
  const std::vector<std::int64_t> order = random.permutation(256);
  const at::Tensor p = at::tensor(at::ArrayRef<std::int64_t>(order), at::kLong), shuffled = h.index_select(0, p).index_select(1, p);
  for (const char* name : {"ternary", "four_level", "int4", "int4_asym", "int2_asym", "q4_1", "tq2_0"}) {
    const GridSpec spec = gptq_spec(name, find_grid(name)->default_group);
    LayerOptions options;
    const auto error = [&](const Quantized& q) { return output_error(w, decode(spec, q), h); };
    const double rounded = error(encode(spec, w)), swept = error(quantize_gptq({w, h, {}}, spec, options).quantized);
    options.polish_rounds = 4;
    const LayerResult polished = quantize_trifit({w, h, {}}, spec, options);
    std::printf("%-12s output error: rtn %.5f  gptq %.5f  polished %.5f\n", name, rounded, swept, error(polished.quantized));
    CAPTURE(name);
    CHECK(swept < 0.8 * rounded);
    CHECK(error(polished.quantized) < swept);
    CHECK(error(quantize_gptq({w, shuffled, {}}, spec, {}).quantized) > rounded);
    // No step of the polish raises its objective, but rounding the scales to half may: by their precision.
    const auto& objective = polished.objective;
    REQUIRE(objective.size() == 11);
    for (std::size_t i = 1; i < objective.size(); ++i) {
      CAPTURE(i);
      CHECK(objective[i] <= objective[i - 1] * (i == objective.size() - 2 ? 1.02 : 1 + 1e-5));
    }
    CHECK(at::equal(polished.quantized.scales.to(at::kHalf).to(at::kFloat), polished.quantized.scales));
    CHECK(polished.quantized.codes.min().item<int>() >= spec.grid->code_min);
    CHECK(polished.quantized.codes.max().item<int>() <= spec.grid->code_max);
    if (!spec.grid->signed_scale) CHECK(polished.quantized.scales.min().item<float>() >= 0);
    if (spec.grid->integer_zero) {
      const at::Tensor zero = -polished.quantized.offsets / polished.quantized.scales;
      CHECK(at::equal(zero, zero.round()));
    }
  }
}

TEST_CASE("a refit of planted codes finds the planted scales", "[quantize][trifit]") {
  const GridSpec spec = gptq_spec("ternary", 32);
  at::Tensor h = correlated_hessian(96, 700, "refit-h");
  Quantized planted = encode(spec, gptq_normal(20, 96, "refit"));
  const at::Tensor w = decode(spec, planted);
  Quantized wrong = planted;
  wrong.scales = planted.scales * 1.7;
  std::vector<double> objective;
  polish(w, h, spec, 1, wrong, objective);
  CHECK(at::allclose(wrong.scales, planted.scales, 1e-3, 1e-6));
  CHECK(at::equal(wrong.codes, planted.codes));
  Quantized mirrored = planted;
  mirrored.codes = -planted.codes;  // the refit would want negative scales: the sign moves into the codes
  polish(w, h, spec, 2, mirrored, objective);
  CHECK(output_error(w, decode(spec, mirrored), h) < 1e-6);
  CHECK(mirrored.scales.min().item<float>() > 0);
}

TEST_CASE("the teacher target removes what a linear drift of the inputs adds", "[quantize][trifit]") {
  // Quantized inputs x, teacher inputs A x: the best weight is W A.
  const at::Tensor w = gptq_normal(12, 48, "target"), a = at::eye(48) + 0.05 * gptq_normal(48, 48, "drift"), h = correlated_hessian(48, 5000, "target-h");
  const at::Tensor cross = at::matmul(a.to(at::kDouble), h);
  const at::Tensor target = teacher_target({w, h, cross}, 1.0, 0.0);
  const at::Tensor best = at::matmul(w, a);
  CHECK(output_error(best, target, h) < 0.05 * output_error(best, w, h));
  CHECK(at::equal(teacher_target({w, h, cross}, 0.0, 0.01), w));
  CHECK(gptq_difference(teacher_target({w, h, h}, 1.0, 0.01), w) < 1e-6);
}

TEST_CASE("dead columns, rank-deficient and hopeless Hessians are survived and reported", "[quantize][gptq]") {
  const at::Tensor w = gptq_normal(10, 64, "dead");
  const GridSpec spec = gptq_spec("int4", 32);
  at::Tensor h = correlated_hessian(64, 500, "dead-h");
  h.select(0, 3).fill_(0), h.select(1, 3).fill_(0);
  LayerResult result = quantize_gptq({w, h, {}}, spec, LayerOptions{});
  CHECK(result.dead == 1);
  CHECK(decode(spec, result.quantized).select(1, 3).abs().max().item<float>() == 0.0f);
  // two tokens for 64 columns
  const at::Tensor x = gptq_normal(2, 64, "two");
  result = quantize_gptq({w, at::matmul(x.t(), x).to(at::kDouble), {}}, spec, LayerOptions{});
  CHECK(result.path.find("cholesky") == 0);
  CHECK(decode(spec, result.quantized).isfinite().all().item<bool>());
  // not positive definite at all: only its diagonal is used
  at::Tensor bad = at::eye(64, at::kDouble);
  bad[0][1] = bad[1][0] = 1000;
  result = quantize_gptq({w, bad, {}}, spec, LayerOptions{});
  CHECK(result.path == "diagonal");
  CHECK(same(result.quantized, encode(spec, w)));
  LayerOptions undamped;
  undamped.damping = 0;
  result = quantize_gptq({w, at::matmul(x.t(), x).to(at::kDouble), {}}, spec, undamped);
  CHECK(result.damping > 0);
  CHECK(contains_all(result.path, {"damping raised"}));
  bad[5][5] = INFINITY;
  CHECK(contains_all(error_text([&] { quantize_gptq({w, bad, {}}, spec, LayerOptions{}); }), {"not finite"}));
}

TEST_CASE("one and two threads give the same sweep and polish", "[quantize][gptq]") {
  const at::Tensor w = gptq_normal(200, 256, "threads"), h = correlated_hessian(256, 1500, "threads-h");
  const GridSpec spec = gptq_spec("ternary", 64);
  LayerOptions options;
  options.polish_rounds = 2;
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const Quantized one = quantize_trifit({w, h, {}}, spec, options).quantized;
  at::set_num_threads(2);
  CHECK(same(quantize_trifit({w, h, {}}, spec, options).quantized, one));
  at::set_num_threads(before);
}

TEST_CASE("the sweep gives the codes and scales of an independent implementation", "[quantize][gptq]") {
  const Json golden = read_json(testing::source_folder() / "tests" / "goldens" / "gptq.json");
  for (const Json& item : golden.at("cases")) {
    const std::int64_t rows = item.at("rows"), columns = item.at("columns");
    const auto matrix = [](const Json& values, std::int64_t r, std::int64_t c) {
      std::vector<double> flat = values.get<std::vector<double>>();
      return at::from_blob(flat.data(), {r, c}, at::kDouble).clone();
    };
    const GridSpec spec{find_grid(item.at("grid").get<std::string>()), item.at("group").get<std::int64_t>()};
    REQUIRE(spec.grid);
    LayerOptions options;
    options.float64 = true;
    options.act_order = item.at("act_order").get<bool>();
    options.damping = item.at("damping").get<double>();
    const LayerResult result = quantize_gptq({matrix(item.at("weight"), rows, columns).to(at::kFloat), matrix(item.at("hessian"), columns, columns), {}}, spec, options);
    CAPTURE(item.at("grid").get<std::string>(), options.act_order);
    CHECK(at::equal(result.quantized.codes.to(at::kDouble), matrix(item.at("codes"), rows, columns)));
    CHECK(at::allclose(result.quantized.scales.to(at::kDouble), matrix(item.at("scales"), rows, spec.scale_count(columns)), 0, 0));
    CHECK(result.sweep_loss == Approx(item.at("loss").get<double>()).epsilon(1e-6));
  }
}

TEST_CASE("time of the linears of a block of SmolLM2-135M", "[.speed]") {
  at::set_num_threads(1);
  double total[3] = {0, 0, 0};
  const std::int64_t shapes[][3] = {{576, 576, 2}, {192, 576, 2}, {1536, 576, 2}, {576, 1536, 1}};
  for (const auto& [rows, columns, count] : shapes) {
    const at::Tensor w = gptq_normal(rows, columns, "speed"), h = correlated_hessian(columns, 2 * columns, "speed-h");
    double seconds[3];
    int i = 0;
    for (const std::int64_t rounds : {-1, 0, 4}) {
      LayerOptions options;
      options.polish_rounds = rounds;
      const double start = cpu_seconds();
      if (rounds < 0)
        quantize_rtn({w, h, {}}, gptq_spec("ternary", 64), options);
      else
        quantize_trifit({w, h, {}}, gptq_spec("ternary", 64), options);
      seconds[i] = cpu_seconds() - start;
      total[i] += seconds[i] * static_cast<double>(count);
      ++i;
    }
    std::printf("[%ld,%ld] rtn %.3f  gptq %.3f  gptq + 4 rounds %.3f CPU s\n", static_cast<long>(rows), static_cast<long>(columns), seconds[0], seconds[1], seconds[2]);
  }
  std::printf("30 blocks: rtn %.1f  gptq %.1f  gptq + 4 rounds %.1f CPU s (statistics not included)\n", 30 * total[0], 30 * total[1], 30 * total[2]);
}

}  // namespace kompakt
