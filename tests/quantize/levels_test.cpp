// Grids of uneven levels: the nearest level, small floats as the tensor library rounds them, blocks as ggml reads them.
#include "quantize/levels.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/random.h"
#include "formats/ggml_blocks.h"
#include "formats/ggml_pack.h"
#include "quantize/code_rule.h"
#include "quantize/methods.h"
#include "tests/catch_torch.h"

namespace kompakt {
namespace {

at::Tensor levels_normal(std::int64_t rows, std::int64_t columns, const char* stream) {
  const CounterRandom random(23, stream);
  at::Tensor w = at::empty({rows, columns});
  for (std::int64_t i = 0; i < w.numel(); ++i) w.data_ptr<float>()[i] = static_cast<float>(random.normal(static_cast<std::uint64_t>(i)));
  return w;
}

double levels_error(const at::Tensor& w, const at::Tensor& v) { return (w - v).square().sum(at::kDouble).item<double>(); }

}  // namespace

TEST_CASE("the nearest level is that of a search over all", "[quantize][levels]") {
  const CounterRandom random(1, "levels");
  for (const LevelTable* table : {&iq4_levels(), &e2m1_levels(), &e4m3_levels()}) {
    const float top = table->value(table->high());
    for (std::uint64_t i = 0; i < 20000; ++i) {
      const float x = static_cast<float>((2.4 * random.uniform(i) - 1.2) * top * (i % 3 == 0 ? 0.02 : 1));
      double best = std::numeric_limits<double>::infinity();
      for (int code = table->low(); code <= table->high(); ++code) best = std::min(best, std::fabs(static_cast<double>(x) - table->value(code)));
      if (std::fabs(static_cast<double>(x) - table->value(table->nearest(x))) > best) FAIL(x << " is not at its nearest level");
    }
    for (int code = table->low(); code <= table->high(); ++code) {
      CHECK(table->nearest(table->value(code)) == code);
      if (code > table->low()) CHECK(table->value(code) > table->value(code - 1));
    }
    CHECK(table->nearest(std::numeric_limits<float>::infinity()) == table->high());
    CHECK(table->nearest(-1e30f) == table->low());
    CHECK(table->nearest(std::nanf("")) == table->low());
  }
}

TEST_CASE("E4M3 rounds as the tensor library does, ties and subnormals included", "[quantize][levels]") {
  const LevelTable& table = e4m3_levels();
  std::vector<float> values;
  for (int code = -126; code < 126; ++code) {
    const float a = table.value(code), b = table.value(code + 1), middle = 0.5f * (a + b);
    for (const float v : {a, middle, std::nextafter(middle, -1e9f), std::nextafter(middle, 1e9f), 0.3f * a + 0.7f * b}) values.push_back(v);
  }
  const at::Tensor expected = at::tensor(at::ArrayRef<float>(values)).to(at::kFloat8_e4m3fn).to(at::kFloat);
  for (std::size_t i = 0; i < values.size(); ++i) {
    CAPTURE(values[i]);
    CHECK(table.value(table.nearest(values[i])) == expected[static_cast<std::int64_t>(i)].item<float>());
  }
  CHECK(table.value(126) == 448.0f);
  CHECK(table.value(1) == std::ldexp(1.0f, -9));
}

TEST_CASE("the tables are those of ggml", "[quantize][levels]") {
  for (int code = 0; code < 16; ++code) CHECK(iq4_levels().value(code) == iq4_values[code]);
  for (int code = -7; code <= 7; ++code) CHECK(e2m1_levels().value(code) == mxfp4_values[code < 0 ? 8 - code : code]);
  CHECK(iq4_levels().nearest(7.0f) == 9);  // half way between 1 and 13: ggml takes the larger
}

TEST_CASE("scales are rounded to the form in which they are stored", "[quantize][levels]") {
  CHECK(store_power(0.0f) == 0.0f);
  CHECK(store_power(1.0f) == 1.0f);
  CHECK(store_power(1.4f) == 1.0f);
  CHECK(store_power(1.5f) == 2.0f);  // nearest by ratio
  CHECK(store_power(-0.3f) == -0.25f);
  CHECK(store_power(1e-30f) == std::ldexp(1.0f, -24));
  CHECK(store_e4m3(1.0f) == 1.0f);
  CHECK(store_e4m3(1.06f) == 1.0f);
  CHECK(store_e4m3(1.07f) == 1.125f);
  CHECK(store_e4m3(1.99f) == 2.0f);
  CHECK(store_e4m3(-0.0108f) == -0.0107421875f);  // 1.375 * 2^-7
  for (const Grid& grid : grids())
    for (const float scale : {0.0f, 0.0137f, 3.3e-5f, 17.0f}) {
      CAPTURE(std::string(grid.name), scale);
      CHECK(grid.store_scale(grid.store_scale(scale)) == grid.store_scale(scale));
    }
}

TEST_CASE("fitted IQ4_NL and MXFP4 blocks are no worse than ggml's own encoders", "[quantize][levels]") {
  const at::Tensor w = levels_normal(64, 512, "fit");
  for (const char* name : {"iq4_nl", "mxfp4"}) {
    const GridSpec spec{find_grid(name), 32};
    const GgmlType& type = *find_ggml_type(spec.grid->ggml_type);
    at::Tensor reference = at::empty_like(w);
    std::vector<std::byte> bytes(static_cast<std::size_t>(type.bytes));
    for (std::int64_t i = 0; i < w.numel(); i += 32) {
      type.encode(w.data_ptr<float>() + i, bytes.data());
      type.decode(bytes.data(), reference.data_ptr<float>() + i);
    }
    CAPTURE(name);
    CHECK(levels_error(w, round_to_grid(spec, w)) < levels_error(w, reference));
  }
}

TEST_CASE("the sweep and the polish work on uneven levels", "[quantize][levels]") {
  const at::Tensor w = levels_normal(24, 128, "weights"), mix = levels_normal(128, 128, "mix") * 0.3f + at::eye(128);
  const at::Tensor x = at::matmul(levels_normal(600, 128, "inputs"), mix), h = at::matmul(x.t(), x) / 600;
  for (const char* name : {"iq4_nl", "mxfp4", "nvfp4", "fp8_e4m3"}) {
    CAPTURE(name);
    const GridSpec spec{find_grid(name), find_grid(name)->default_group};
    LayerOptions options;
    const auto error = [&](const LayerResult& r) { return output_error(w, decode(spec, r.quantized), h); };
    const double rounded = error(quantize_rtn({w, {}, {}}, spec, options));
    const LayerResult swept = quantize_gptq({w, h, {}}, spec, options);
    options.polish_rounds = 3;
    const LayerResult polished = quantize_trifit({w, h, {}}, spec, options);
    CHECK(error(swept) < 0.9 * rounded);
    CHECK(error(polished) <= error(swept) * 1.0001);
    for (std::size_t i = 1; i < polished.objective.size(); ++i) CHECK(polished.objective[i] <= polished.objective[i - 1] * (1 + 1e-5));
    // Scales are those of the stored form, codes those of the grid.
    const at::Tensor scales = polished.quantized.scales.contiguous();
    for (std::int64_t i = 0; i < scales.numel(); ++i) CHECK(spec.grid->store_scale(scales.data_ptr<float>()[i]) == scales.data_ptr<float>()[i]);
    CHECK(polished.quantized.codes.min().item<int>() >= spec.grid->code_min);
    CHECK(polished.quantized.codes.max().item<int>() <= spec.grid->code_max);
  }
}

}  // namespace kompakt
