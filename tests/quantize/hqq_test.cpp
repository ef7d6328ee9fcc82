// HQQ: zero points without data.
#include <ATen/ATen.h>

#include "tests/catch_torch.h"

#include <cmath>

#include "core/files.h"
#include "core/random.h"
#include "core/text.h"
#include "quantize/methods.h"
#include "quantize/stage.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

namespace kompakt {
namespace {

at::Tensor hqq_weights(std::int64_t rows, std::int64_t columns, double outliers) {
  const CounterRandom random(11, "hqq");
  at::Tensor w = at::empty({rows, columns}, at::kFloat);
  for (std::int64_t i = 0; i < w.numel(); ++i) {
    const auto k = static_cast<std::uint64_t>(i);
    w.data_ptr<float>()[i] = static_cast<float>(random.normal(2 * k) * (random.uniform(2 * k + 1) < outliers ? 6 : 1) + 0.3);
  }
  return w;
}

double hqq_loss(const GridSpec& spec, const at::Tensor& w, const Quantized& q) { return (w - decode(spec, q)).abs().to(at::kDouble).pow(0.7).sum().item<double>(); }

}  // namespace

TEST_CASE("HQQ lowers the loss that forgives outliers, on every asymmetric grid", "[quantize][hqq]") {
  const at::Tensor w = hqq_weights(48, 256, 0.03);
  std::int64_t seen = 0;
  for (const Grid& grid : grids()) {
    if (!grid.asymmetric || grid.kquant) continue;
    ++seen;
    INFO(grid.name);
    const GridSpec spec{&grid, grid.default_group};
    const LayerResult rounded = quantize_rtn({w, {}, {}}, spec, {}), result = quantize_hqq({w, {}, {}}, spec, {});
    CHECK(result.path == "hqq");
    CHECK(hqq_loss(spec, w, result.quantized) < hqq_loss(spec, w, rounded.quantized));
    // What is stored is what was judged: scales are halves, offsets halves or multiples of the scale, codes the nearest.
    CHECK(at::equal(result.quantized.scales.to(at::kHalf).to(at::kFloat), result.quantized.scales));
    CHECK(at::equal(grid.codes_for(w, result.quantized.scales, result.quantized.offsets, spec.group), result.quantized.codes));
    if (!grid.integer_zero) CHECK(at::equal(result.quantized.offsets.to(at::kHalf).to(at::kFloat), result.quantized.offsets));
  }
  CHECK(seen >= 3);
}

TEST_CASE("HQQ keeps what is exact: constant, empty and grid groups", "[quantize][hqq]") {
  const GridSpec spec{find_grid("int4_asym"), 4};
  const at::Tensor w = at::tensor({0.0f, 0.0f, 0.0f, 0.0f, -1.0f, 0.0f, 6.5f, 14.0f, 0.0f, 1.0f, 2.0f, 15.0f}).reshape({1, 12});
  const LayerResult result = quantize_hqq({w, {}, {}}, spec, {});
  const at::Tensor decoded = decode(spec, result.quantized);
  CHECK(at::equal(decoded.slice(1, 0, 4), w.slice(1, 0, 4)));
  CHECK(at::equal(decoded.slice(1, 8, 12), w.slice(1, 8, 12)));
  CHECK((decoded - w).abs().max().item<float>() <= 0.5f);
  CHECK(quantize_hqq({at::empty({0, 8}), {}, {}}, spec, {}).quantized.codes.size(0) == 0);
  const GridSpec symmetric{find_grid("int4"), 4};
  CHECK(quantize_hqq({w, {}, {}}, symmetric, {}).path == "rtn");
}

TEST_CASE("method hqq in the stage", "[quantize][hqq][stage]") {
  auto model = testing::tiny_decoder(3);
  QuantizeOptions options;
  options.weights = "int4_asym", options.group = 8, options.method = "hqq", options.embedding = "none";
  Json details = Json::object();
  StageContext context;
  context.details = &details;
  const QuantizedModel quantized = quantize(*model, options, {}, context);
  CHECK(quantized.tensors.size() == 21);
  const auto folder = std::filesystem::temp_directory_path() / "kompakt-hqq-test";
  std::filesystem::remove_all(folder);
  make_folder(folder);
  save_quantized(quantized, folder);
  const QuantizedModel read = load_quantized(folder);
  for (const auto& [name, values] : quantized.tensors) CHECK(at::equal(decode(read.plan.tensors.at(name), read.tensors.at(name)), decode(quantized.plan.tensors.at(name), values)));
  std::filesystem::remove_all(folder);
  options.weights = "ternary";
  CHECK(testing::contains_all(testing::error_text([&] { plan_quantization(model->config(), options); }), {"hqq", "ternary", "int4_asym", "rtn"}));
}

}  // namespace kompakt
