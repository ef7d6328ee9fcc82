// The gain of error feedback, foretold from the inputs: against GPTQ itself.
#include "quantize/compensation.h"

#include <ATen/ATen.h>

#include <catch2/catch.hpp>

#include "core/random.h"
#include "quantize/methods.h"

namespace kompakt {
namespace {

at::Tensor compensation_normal(std::int64_t rows, std::int64_t columns, const char* stream) {
  const CounterRandom random(21, stream);
  at::Tensor out = at::empty({rows, columns});
  for (std::int64_t i = 0; i < out.numel(); ++i) out.data_ptr<float>()[i] = static_cast<float>(random.normal(static_cast<std::uint64_t>(i)));
  return out;
}

// tr(E H E^T) of GPTQ over that of rounding, on a fine grid, where errors are as white as theory has them.
double measured_ratio(const at::Tensor& inputs, double damping) {
  const at::Tensor w = compensation_normal(2048, inputs.size(1), "weights"), hessian = at::matmul(inputs.t(), inputs) / static_cast<double>(inputs.size(0));
  const GridSpec spec{find_grid("ecq5"), 0};
  LayerOptions options;
  options.damping = damping, options.act_order = false;
  const auto error = [&](const LayerResult& result) { return output_error(w, decode(spec, result.quantized), hessian); };
  return error(quantize_gptq({w, hessian, {}}, spec, options)) / error(quantize_rtn({w, {}, {}}, spec, options));
}

}  // namespace

TEST_CASE("the ratio of compensation is what GPTQ reaches", "[quantize][compensation]") {
  const std::int64_t columns = 48, rows = 6000;
  const at::Tensor plain = compensation_normal(rows, columns, "plain"), mix = compensation_normal(columns, columns, "mix") / 7 + 0.3;
  const at::Tensor mixed = at::matmul(plain, mix), spread = mixed * (compensation_normal(1, columns, "spread") * 0.7).exp();
  CHECK(compensation_ratio(plain, 0.01) == Approx(1).margin(0.05));  // nothing to feed back
  double before = 1;
  for (const at::Tensor& x : {mixed, spread}) {
    const double expected = compensation_ratio(x, 0.01);
    CHECK(expected < before);
    CHECK(expected == Approx(measured_ratio(x, 0.01)).epsilon(0.1));
    before = expected;
  }
  // More damping, less of it.
  CHECK(compensation_ratio(mixed, 1) > compensation_ratio(mixed, 0.01));
}

TEST_CASE("the ratio of compensation at the edges", "[quantize][compensation]") {
  CHECK(compensation_ratio(compensation_normal(15, 8, "few"), 0.01) == 1);
  CHECK(compensation_ratio(at::zeros({64, 8}), 0.01) == 1);
  CHECK(compensation_ratio(at::zeros({0, 8}), 0.01) == 1);
  const at::Tensor one = compensation_normal(64, 1, "one");
  CHECK(compensation_ratio(one, 0.01) == Approx(1).margin(1e-6));
  // Fewer rows than columns: what the factor has learnt by heart does not count in full.
  const double few = compensation_ratio(compensation_normal(64, 200, "wide"), 0.01);
  CHECK(few > 0);
  CHECK(few <= 1);
}

}  // namespace kompakt
