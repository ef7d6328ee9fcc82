// CPU twins of the device kernels against the grids and plain tensor arithmetic.
#include "quantize/kernels.h"

#include <ATen/ATen.h>

#include "tests/catch_torch.h"

#include "core/random.h"
#include "quantize/grid_math.h"
#include "quantize/grids.h"

namespace kompakt {
namespace {

at::Tensor kernel_normal(std::int64_t rows, std::int64_t columns, const char* stream) {
  const CounterRandom random(31, stream);
  at::Tensor w = at::empty({rows, columns});
  for (std::int64_t i = 0; i < w.numel(); ++i) w.data_ptr<float>()[i] = static_cast<float>(random.normal(static_cast<std::uint64_t>(i)));
  return w;
}

}  // namespace

TEST_CASE("matrix-vector products on packed weights equal those of the decoded matrix", "[quantize][kernels]") {
  for (const char* name : {"ternary", "four_level", "int4", "int4_asym", "int8", "q4_1", "int3"})
    for (const std::int64_t columns : {std::int64_t(128), std::int64_t(100)}) {
      const Grid& grid = *find_grid(name);
      if (grid.group_fixed && columns % grid.default_group != 0) continue;
      const std::int64_t group = grid.group_fixed ? grid.default_group : 32;
      const GridSpec spec{&grid, group};
      const at::Tensor w = kernel_normal(9, columns, name), x = kernel_normal(3, columns, "x");
      const Quantized q = encode(spec, w);
      const auto bytes = grid.pack(q.codes);
      std::vector<std::uint16_t> scales;
      for (std::int64_t i = 0; i < q.scales.numel(); ++i) scales.push_back(grid::half_bits(q.scales.data_ptr<float>()[i]));
      PackedMatrix packed{reinterpret_cast<const std::uint8_t*>(bytes.data()), scales.data(), q.offsets.defined() ? q.offsets.data_ptr<float>() : nullptr, 9, columns, group, grid.layout};
      at::Tensor y = at::empty({3, 9});
      cpu::packed_matvec(packed, x.data_ptr<float>(), 3, y.data_ptr<float>());
      CAPTURE(name, columns);
      CHECK(at::allclose(y, at::matmul(x, decode(spec, q).t()), 1e-4, 1e-4));
    }
}

TEST_CASE("kernel fits and fake quantization give what the grid gives", "[quantize][kernels]") {
  const at::Tensor w = kernel_normal(7, 150, "fit");
  for (const std::int64_t group : {64, 150, 1}) {
    const GridSpec spec{find_grid("ternary"), group};
    const Quantized q = encode(spec, w);
    at::Tensor scales = at::empty_like(q.scales), out = at::empty_like(w);
    cpu::fit_ternary(w.data_ptr<float>(), 7, 150, group, grid::smallest_normal_half, scales.data_ptr<float>());
    CHECK(at::equal(scales, q.scales));
    cpu::fake_quantize(w.data_ptr<float>(), scales.data_ptr<float>(), nullptr, 7, 150, group, -1, 1, out.data_ptr<float>());
    CHECK(at::equal(out, round_to_grid(spec, w)));
    const GridSpec bytes{find_grid("int8"), group};
    cpu::fit_absmax(w.data_ptr<float>(), 7, 150, group, 127, grid::smallest_half, scales.data_ptr<float>());
    CHECK(at::equal(scales, encode(bytes, w).scales));
  }
}

}  // namespace kompakt
