// Steps by row importance: the same bits, the smallest weighted error; and the importances themselves, against noise in the rows.
#include "quantize/entropy_steps.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <catch2/catch.hpp>

#include <cmath>

#include "core/random.h"
#include "quantize/methods.h"
#include "quantize/sensitivity.h"
#include "quantize/tensors.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

namespace kompakt {
namespace {

at::Tensor steps_normal(std::int64_t rows, std::int64_t columns, const char* stream) {
  const CounterRandom random(9, stream);
  at::Tensor out = at::empty({rows, columns});
  for (std::int64_t i = 0; i < out.numel(); ++i) out.data_ptr<float>()[i] = static_cast<float>(random.normal(static_cast<std::uint64_t>(i)));
  return out;
}

// Bits a weight of rows that are coded each by its own frequencies.
double row_bits(const at::Tensor& codes) {
  double bits = 0;
  for (std::int64_t r = 0; r < codes.size(0); ++r) {
    const at::Tensor p = at::bincount(codes[r].to(at::kLong) + 128).to(at::kDouble) / static_cast<double>(codes.size(1));
    bits -= (p * p.clamp_min(1e-300).log2()).sum().item<double>();
  }
  return bits / static_cast<double>(codes.size(0));
}

}  // namespace

TEST_CASE("entropy of a rounded normal variable", "[quantize][entropy]") {
  CHECK(normal_entropy(0.001) == Approx(std::log2(std::sqrt(2 * M_PI * M_E) / 0.001)).epsilon(1e-6));
  CHECK(normal_entropy(0.2499) == Approx(normal_entropy(0.2501)).margin(1.3e-3));
  // Steps of two: P(0) = erf(1/sqrt 2) = .682689, P(+-1) = .157305, P(+-2) = .001350.
  CHECK(normal_entropy(2) == Approx(1.24119).margin(1e-4));
  CHECK(normal_entropy(0.2) == Approx(std::log2(std::sqrt(2 * M_PI * M_E) / 0.2) + 0.04 / 24 / std::log(2.0)).epsilon(1e-9));
  CHECK(normal_entropy(100) == Approx(0).margin(1e-9));
}

TEST_CASE("row steps spend the same bits and lower the weighted error", "[quantize][entropy]") {
  const std::int64_t rows = 96, columns = 2048;
  const at::Tensor spread = (steps_normal(1, rows, "spread") * 0.3).exp().flatten(), importance = (steps_normal(1, rows, "importance") * 1.2).exp().flatten();
  const at::Tensor w = steps_normal(rows, columns, "w") * spread.unsqueeze(1);
  for (const char* name : {"ecq2", "ecq3", "ecq5"}) {
    CAPTURE(name);
    const GridSpec spec{find_grid(name), 0};
    const LayerResult plain = quantize_rtn({w, {}, {}}, spec, {}), shared = quantize_rtn({w, {}, {}, {}, {}, importance}, spec, {});
    const auto error = [&](const LayerResult& r) { return ((decode(spec, r.quantized) - w).square().sum(1) * importance).sum().item<double>(); };
    CHECK(row_bits(shared.quantized.codes) == Approx(row_bits(plain.quantized.codes)).margin(0.03));
    CHECK(error(shared) < 0.75 * error(plain));
    CHECK(error(shared) / error(plain) == Approx(entropy_row_gain(spec, w, importance)).epsilon(0.08));
    // The order of rows keeps the file as small as the rows allow.
    const double bits = 8.0 * static_cast<double>(stored_bytes(spec, shared.quantized) - 2 * rows) / static_cast<double>(w.numel());
    // (.15: rows of a stretch that shares a table still differ, there being 96 of them over a factor of thirty).
    CHECK(bits < row_bits(shared.quantized.codes) + 0.15);
    // Steps fall with the root of the importance where no bound holds them.
    const at::Tensor steps = shared.quantized.scales.flatten(), own = w.square().mean(1).sqrt() * spec.grid->entropy_step;
    const at::Tensor free = (steps / own).log().abs().lt(std::log(7.9)).logical_and(steps.gt(w.abs().amax(1) / 126)).logical_and(importance.gt(importance.mean() / 99));
    const at::Tensor product = (steps * importance.sqrt()).masked_select(free);
    CHECK(product.numel() > rows / 2);
    CHECK((product.max() / product.min()).item<double>() < 1.01);
  }
}

TEST_CASE("row steps at the edges", "[quantize][entropy]") {
  const GridSpec spec{find_grid("ecq3"), 0};
  const at::Tensor w = steps_normal(4, 64, "edges");
  CHECK_FALSE(entropy_row_steps(spec, w, {}).defined());
  CHECK_FALSE(entropy_row_steps({find_grid("int4"), 0}, w, at::ones({4})).defined());
  CHECK_FALSE(entropy_row_steps({find_grid("ecq3"), 32}, w, at::ones({4})).defined());
  CHECK_FALSE(entropy_row_steps(spec, w, at::zeros({4})).defined());  // nothing measured: the grid's own rule
  CHECK(entropy_row_gain(spec, w, {}) == 1);
  // One row against all others: never further than eight times from its own rule; zero rows take no part.
  at::Tensor far = at::ones({4}), zeros = w.clone();
  far[0] = 1e12;
  zeros[2] = 0;
  const at::Tensor own = encode(spec, zeros).scales.flatten(), steps = entropy_row_steps(spec, zeros, far);
  CHECK(steps[0].item<float>() == Approx(own[0].item<float>() / 8).epsilon(0.01));
  CHECK(steps[2].item<float>() == 0);
  CHECK((steps <= own * 8.01).all().item<bool>());
  CHECK(quantize_rtn({zeros, {}, {}, {}, {}, far}, spec, {}).quantized.codes.to(at::kInt).abs().max().item<int>() <= 127);
}

TEST_CASE("rows that cannot be stored are named under row steps too", "[quantize][entropy]") {
  const GridSpec spec{find_grid("ecq3"), 0};
  at::Tensor wide = steps_normal(3, 64, "wide"), broken = wide.clone();
  wide[1] = wide[1] * 1e7;
  broken[2][5] = NAN;
  const at::Tensor importance = at::arange(1, 4, at::kFloat);
  CHECK(testing::contains_all(testing::error_text([&] { quantize_rtn({wide, {}, {}, {}, {}, importance}, spec, {}); }), {"row 1", "half"}));
  CHECK(testing::contains_all(testing::error_text([&] { quantize_rtn({broken, {}, {}, {}, {}, importance}, spec, {}); }), {"row 2", "not finite"}));
}

// Noise of its own strength in every row: the divergence that it costs is the sum of strength^2 times importance, on average.
TEST_CASE("row importance is what noise in a row costs", "[quantize][entropy][sensitivity]") {
  const auto model = testing::tiny_decoder(5, true);
  CalibrationSet set;
  at::Tensor ids = at::empty({6, 20}, at::kLong);
  const CounterRandom random(11, "tokens");
  for (std::int64_t i = 0; i < ids.numel(); ++i) ids.data_ptr<std::int64_t>()[i] = static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(i), 50));
  set.inputs.push_back({ids, {}, {}, {}});
  set.valid.emplace_back();
  set.sequences = 6, set.tokens = 120;
  constexpr std::int64_t draws = 400;
  SensitivityRequest request;
  std::vector<GridSpec> many;
  for (std::int64_t i = 1; i <= draws; ++i) many.push_back({find_grid("int8"), i});  // the group tells the draws apart
  const std::string names[] = {model->blocks[1].attention.query.name, model->blocks[0].mlp.up.name, model->blocks[2].mlp.down.name};
  for (const std::string& name : names) request.formats[name] = many;
  const auto strength = [](std::int64_t rows) { return (at::arange(rows, at::kFloat) * 0.7).sin().abs() * 1e-3; };
  request.error = [&](const at::Tensor& weight, const GridSpec& spec, const at::Tensor&) {
    const CounterRandom signs(static_cast<std::uint64_t>(spec.group), "signs");
    at::Tensor e = at::empty(weight.sizes());
    for (std::int64_t i = 0; i < e.numel(); ++i) e.data_ptr<float>()[i] = signs.uniform(static_cast<std::uint64_t>(i)) < 0.5 ? -1.0f : 1.0f;
    return at::Tensor(e * strength(weight.size(0)).unsqueeze(1));
  };
  const auto measured = measure_sensitivities(*model, set, request);
  for (const std::string& name : names) {
    CAPTURE(name);
    const TensorSensitivity& s = measured.at(name);
    REQUIRE(s.row_importance.defined());
    double mean = 0;
    for (const double value : s.divergence) mean += value / draws;
    const double predicted = 0.5 * (s.row_importance * strength(s.row_importance.numel()).to(at::kDouble).square()).sum().item<double>();
    CHECK(mean == Approx(predicted).epsilon(0.1));  // 400 draws of a sum of squares: a deviation of 3 to 5 percent
  }
}

}  // namespace kompakt
