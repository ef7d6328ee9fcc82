// Grids: exactness of the fits, error bounds of every row, packing, edges.
#include "quantize/grids.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include "tests/catch_torch.h"
#include <cmath>
#include <cstdio>
#include <cstring>
#include <set>

#include "core/random.h"
#include "core/system.h"
#include "quantize/grid_math.h"
#include "quantize/group_fit.h"
#include "tests/support.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;

at::Tensor normal_matrix(std::int64_t rows, std::int64_t columns, const char* stream) {
  const CounterRandom random(7, stream);
  at::Tensor w = at::empty({rows, columns});
  float* values = w.data_ptr<float>();
  for (std::int64_t i = 0; i < w.numel(); ++i) values[i] = static_cast<float>(random.normal(static_cast<std::uint64_t>(i)));
  return w;
}

double relative_error(const at::Tensor& w, const at::Tensor& rounded) { return ((w - rounded).to(at::kDouble).square().sum() / w.to(at::kDouble).square().sum()).item<double>(); }

double ternary_gain(const std::vector<float>& w, const std::vector<float>& d, float alpha) {
  // sum d w^2 - min over t of sum d (w - alpha' t)^2 with the support of alpha and its own best scale
  double product = 0, weight = 0;
  for (std::size_t i = 0; i < w.size(); ++i)
    if (std::fabs(w[i]) > alpha / 2) product += static_cast<double>(d[i]) * std::fabs(w[i]), weight += d[i];
  return weight > 0 ? product * product / weight : 0;
}

double brute_force_gain(const std::vector<float>& w, const std::vector<float>& d) {
  const std::size_t n = w.size();
  std::size_t total = 1;
  for (std::size_t i = 0; i < n; ++i) total *= 3;
  double best = 0;
  for (std::size_t code = 0; code < total; ++code) {
    double product = 0, weight = 0;
    for (std::size_t i = 0, c = code; i < n; ++i, c /= 3) {
      const int t = static_cast<int>(c % 3) - 1;
      product += static_cast<double>(d[i]) * t * w[i], weight += d[i] * t * t;
    }
    if (weight > 0) best = std::max(best, product * product / weight);
  }
  return best;
}

GridSpec spec_of(const char* name, std::int64_t group = -1) {
  const Grid* grid = find_grid(name);
  REQUIRE(grid != nullptr);
  return {grid, group < 0 ? grid->default_group : group};
}

bool equal(const Quantized& a, const Quantized& b) {
  return at::equal(a.codes, b.codes) && at::equal(a.scales, b.scales) && a.offsets.defined() == b.offsets.defined() && (!a.offsets.defined() || at::equal(a.offsets, b.offsets));
}

}  // namespace

TEST_CASE("the ternary fit equals brute force over all 3^n codes", "[quantize][grids]") {
  const CounterRandom random(11, "brute");
  std::uint64_t draw = 0;
  for (int n = 1; n <= 9; ++n)
    for (int trial = 0; trial < 12; ++trial) {
      std::vector<float> w(static_cast<std::size_t>(n)), d(w.size(), 1.0f);
      for (auto& v : w) {
        const double z = random.normal(draw++), spread = random.normal(draw++);
        v = static_cast<float>(trial % 3 == 0 ? z * std::exp(2 * spread) : z);
      }
      if (trial % 2)
        for (auto& v : d) v = static_cast<float>(random.uniform(draw++) + 0.01);
      FitScratch scratch;
      REQUIRE(scratch.load(w.data(), trial % 2 ? d.data() : nullptr, n));
      const float alpha = fit_ternary(scratch);
      const double best = brute_force_gain(w, d);
      CHECK(ternary_gain(w, d, alpha) == Approx(best).epsilon(1e-12));
    }
}

TEST_CASE("the bracketed ternary fit equals the full prefix-sum scan on long rows", "[quantize][grids]") {
  const CounterRandom random(13, "long");
  std::uint64_t draw = 0;
  for (const int n : {17, 64, 100, 384, 1536, 5000})
    for (int kind = 0; kind < 6; ++kind) {
      std::vector<float> w(static_cast<std::size_t>(n)), d(w.size(), 1.0f);
      for (auto& v : w) {
        const double z = random.normal(draw++), u = random.uniform(draw++);
        // normal, heavy tails, two well separated clusters (several fixed points), mostly zero, already ternary, uniform
        v = static_cast<float>(kind == 0 ? z : kind == 1 ? z * std::exp(z) : kind == 2 ? (u < 0.1 ? 100 + z : 1 + 0.1 * z) : kind == 3 ? (u < 0.9 ? 0.0 : z) : kind == 4 ? 0.25 * std::round(z) : u);
      }
      if (kind % 2)
        for (auto& v : d) v = static_cast<float>(std::exp(random.normal(draw++)));
      std::vector<std::pair<double, double>> sorted;
      for (std::size_t i = 0; i < w.size(); ++i) sorted.emplace_back(std::fabs(w[i]), d[i]);
      std::sort(sorted.begin(), sorted.end(), std::greater<>());
      double product = 0, weight = 0, best = 0;
      for (const auto& [m, dd] : sorted) product += m * dd, weight += dd, best = std::max(best, product * product / weight);
      FitScratch scratch;
      REQUIRE(scratch.load(w.data(), kind % 2 ? d.data() : nullptr, n));
      CAPTURE(n, kind);
      CHECK(ternary_gain(w, d, fit_ternary(scratch)) == Approx(best).epsilon(1e-9));
    }
}

TEST_CASE("planted ternary and four-level weights are recovered without error, through packing too", "[quantize][grids]") {
  for (const char* name : {"ternary", "tq1_0", "four_level", "q2_0", "int4", "int8", "q4_1", "int4_asym"}) {
    const GridSpec spec = spec_of(name);
    const CounterRandom random(5, name);
    const std::int64_t rows = 6, columns = 512, groups = spec.scale_count(columns);
    Quantized planted;
    planted.codes = at::empty({rows, columns}, at::kChar), planted.scales = at::empty({rows, groups});
    const int low = spec.grid->code_min, high = spec.grid->code_max;
    for (std::int64_t i = 0; i < planted.codes.numel(); ++i)
      planted.codes.data_ptr<std::int8_t>()[i] = static_cast<std::int8_t>(low + static_cast<int>(random.below(static_cast<std::uint64_t>(i), static_cast<std::uint64_t>(high - low + 1))));
    for (std::int64_t i = 0; i < planted.scales.numel(); ++i) planted.scales.data_ptr<float>()[i] = grid::round_to_half(static_cast<float>(0.01 + 0.1 * random.uniform(static_cast<std::uint64_t>(i + 100000))));
    planted.codes.select(1, 0).fill_(high), planted.codes.select(1, 1).fill_(low);
    for (std::int64_t g = 0; g < groups; ++g) planted.codes.select(1, g * spec.group).fill_(high), planted.codes.select(1, g * spec.group + 1).fill_(low);
    if (spec.grid->asymmetric) planted.offsets = planted.scales * -2;  // a half as well
    const at::Tensor w = decode(spec, planted);
    const Quantized found = encode(spec, w);
    CAPTURE(name);
    CHECK(relative_error(w, decode(spec, found)) < 1e-12);
    const auto bytes = spec.grid->pack(found.codes);
    CHECK(at::equal(spec.grid->unpack(bytes, rows, columns), found.codes));
  }
}

TEST_CASE("every grid keeps its error bound, is idempotent and rounds as it encodes", "[quantize][grids]") {
  const at::Tensor w = normal_matrix(96, 512, "rows");
  std::set<std::string> names;
  for (const Grid& grid : grids()) {
    CAPTURE(std::string(grid.name));
    CHECK(names.insert(std::string(grid.name)).second);
    CHECK(!grid.summary.empty());
    const GridSpec spec{&grid, grid.default_group};
    const Quantized q = encode(spec, w);
    CHECK(q.codes.min().item<int>() >= grid.code_min);
    CHECK(q.codes.max().item<int>() <= grid.code_max);
    CHECK(q.offsets.defined() == grid.asymmetric);
    const at::Tensor decoded = decode(spec, q);
    const double error = relative_error(w, decoded);
    std::printf("%-16s group %4ld  error %.6f  bound %.6f\n", std::string(grid.name).c_str(), static_cast<long>(spec.group), error, grid.gaussian_error);
    CHECK(error < grid.gaussian_error);
    CHECK(error > grid.gaussian_error * 0.5);  // a bound that says something
    CHECK(at::equal(decoded, round_to_grid(spec, w)));
    CHECK(at::equal(spec.grid->codes_for(w, q.scales, q.offsets, spec.group), q.codes));
    CHECK(at::equal(spec.grid->codes_for(decoded, q.scales, q.offsets, spec.group), q.codes));
    if (!grid.kquant) CHECK(at::equal(q.scales.to(at::kHalf).to(at::kFloat), q.scales));
    if (grid.asymmetric && !grid.integer_zero && !grid.kquant) CHECK(at::equal(q.offsets.to(at::kHalf).to(at::kFloat), q.offsets));
    if (grid.integer_zero) {
      const at::Tensor zero = -q.offsets / q.scales;
      CHECK(at::equal(zero, zero.round()));
      CHECK(zero.min().item<float>() >= grid.code_min);
      CHECK(zero.max().item<float>() <= grid.code_max);
    }
  }
}

TEST_CASE("errors on normal weights are those of the table of exact fits", "[quantize][grids]") {
  const at::Tensor w = normal_matrix(400, 512, "table");
  CHECK(relative_error(w, round_to_grid(spec_of("ternary", 32), w)) == Approx(0.179).margin(0.002));
  CHECK(relative_error(w, round_to_grid(spec_of("ternary", 64), w)) == Approx(0.184).margin(0.002));
  CHECK(relative_error(w, round_to_grid(spec_of("ternary", 128), w)) == Approx(0.187).margin(0.002));
  CHECK(relative_error(w, round_to_grid(spec_of("ternary", 256), w)) == Approx(0.188).margin(0.002));
  CHECK(relative_error(w, round_to_grid(spec_of("ternary_absmean", 64), w)) == Approx(0.259).margin(0.003));
  CHECK(relative_error(w, round_to_grid(spec_of("four_level", 64), w)) == Approx(0.124).margin(0.002));
  CHECK(relative_error(w, round_to_grid(spec_of("four_level", 128), w)) == Approx(0.132).margin(0.002));
}

TEST_CASE("packing is the identity for random codes of every grid and odd row lengths", "[quantize][grids]") {
  for (const Grid& grid : grids())
    for (const std::int64_t columns : {1, 2, 3, 5, 7, 8, 64, 333}) {
      const CounterRandom random(3, grid.name);
      at::Tensor codes = at::empty({37, columns}, at::kChar);
      for (std::int64_t i = 0; i < codes.numel(); ++i)
        codes.data_ptr<std::int8_t>()[i] = static_cast<std::int8_t>(grid.code_min + static_cast<int>(random.below(static_cast<std::uint64_t>(i), static_cast<std::uint64_t>(grid.code_max - grid.code_min + 1))));
      const auto bytes = grid.pack(codes);
      CHECK(static_cast<std::int64_t>(bytes.size()) == 37 * grid.layout.row_bytes(columns));
      CHECK(at::equal(grid.unpack(bytes, 37, columns), codes));
      CHECK(contains_all(error_text([&] { grid.unpack(std::span(bytes).first(bytes.size() - 1), 37, columns); }), {"bytes", "allowed"}));
    }
}

TEST_CASE("all 243 groups of five trits survive a byte, and ggml's digits come out", "[quantize][grids]") {
  for (unsigned q = 0; q < 243; ++q) {
    const unsigned t[5] = {q / 81, q / 27 % 3, q / 9 % 3, q / 3 % 3, q % 3};
    const std::uint8_t byte = grid::pack_trits(t[0], t[1], t[2], t[3], t[4]);
    for (int n = 0; n < 5; ++n) CHECK(grid::unpack_trit(byte, n) == t[n]);
  }
  CHECK(grid::pack_trits(1, 2, 0, 0, 0) == 0x90 - 0x90 + (81 + 54) * 256 / 243 + 1);  // ceil
}

TEST_CASE("four-bit codes lie in a word as compressed-tensors packs them", "[quantize][grids]") {
  const std::int8_t row[] = {-8, -7, 0, 1, 7, -1, 2, 3};
  const at::Tensor codes = at::from_blob(const_cast<std::int8_t*>(row), {1, 8}, at::kChar).clone();
  const auto bytes = find_grid("int4")->pack(codes);
  std::uint32_t word = 0;
  REQUIRE(bytes.size() == 4);
  std::memcpy(&word, bytes.data(), 4);
  CHECK(word == 0xBA7F9810u);
  at::Tensor two = at::zeros({1, 16}, at::kChar);
  const std::int8_t head[] = {-1, 0, 1, -2};
  std::memcpy(two.data_ptr<std::int8_t>(), head, 4);
  const auto bytes2 = find_grid("int2")->pack(two);
  REQUIRE(bytes2.size() == 4);
  std::memcpy(&word, bytes2.data(), 4);
  CHECK(word == 0xAAAAAA39u);
}

TEST_CASE("half rounding is that of the tensor library for all magnitudes", "[quantize][grids]") {
  const CounterRandom random(2, "half");
  std::vector<float> values = {0.0f, -0.0f, 1.0f, 65503.0f, 6.1e-5f, 6.0975e-5f, 2.9e-8f, 3.0e-8f, 8.9e-8f, 0.1f, 2049.0f, 2051.0f};
  for (std::uint64_t i = 0; i < 20000; ++i) values.push_back(static_cast<float>(random.normal(i) * std::exp2(static_cast<double>(random.below(i + 50000, 40)) - 26)));
  for (const float v : values) {
    if (std::fabs(v) > 65000) continue;
    const float expected = at::scalar_tensor(v).to(at::kHalf).to(at::kFloat).item<float>();
    const float got = grid::round_to_half(v);
    if (got != expected) FAIL("half of " << v << ": " << got << " instead of " << expected);
    if (grid::half_value(grid::half_bits(got)) != got) FAIL("half bits of " << got);
    if (values.size() > 200 && &v - values.data() > 500) continue;
    CHECK(grid::round_to_bfloat16(v) == at::scalar_tensor(v).to(at::kBFloat16).to(at::kFloat).item<float>());
  }
  CHECK(grid::round_to_half(1e9f) == 65504.0f);
  CHECK(grid::round_to_half(65519.0f) == 65504.0f);
}

TEST_CASE("edges: zeros, one element, a short last group, tiny and hostile values", "[quantize][grids]") {
  for (const Grid& grid : grids()) {
    CAPTURE(std::string(grid.name));
    const GridSpec spec{&grid, grid.default_group};
    const std::int64_t columns = grid.group_fixed ? spec.span_for(0) : 64;
    const at::Tensor zeros = at::zeros({3, columns});
    const Quantized q = encode(spec, zeros);
    CHECK(at::equal(decode(spec, q), zeros));
    CHECK(q.scales.abs().max().item<float>() == 0.0f);
    CHECK(encode(spec, at::zeros({0, columns})).codes.size(0) == 0);
    at::Tensor bad = normal_matrix(3, columns, "bad");
    bad[1][5] = NAN;
    CHECK(contains_all(error_text([&] { encode(spec, bad); }), {"row 1", "not finite"}));
    bad[1][5] = INFINITY;
    CHECK(contains_all(error_text([&] { round_to_grid(spec, bad); }), {"row 1", "not finite"}));
    bad[1].fill_(grid.kquant ? 1e13f : 1e9f), bad[1][5] = -3e8f;
    if (!grid.asymmetric) CHECK(contains_all(error_text([&] { encode(spec, bad); }), {"row 1", "half"}));
    const at::Tensor tiny = normal_matrix(2, columns, "tiny") * 1e-12;
    CHECK(at::isfinite(decode(spec, encode(spec, tiny))).all().item<bool>());
    CHECK(decode(spec, encode(spec, tiny)).abs().max().item<float>() <= 1e-4f);
    if (grid.group_fixed) {
      CHECK(contains_all(error_text([&] { encode(spec, at::zeros({2, columns + 1})); }), {"divide", "allowed", "take a grid"}));
      continue;
    }
    const at::Tensor one = at::full({1, 1}, 0.37f);
    if (!grid.entropy_coded()) CHECK(decode(spec, encode(spec, one)).item<float>() == Approx(0.37f).epsilon(0.002));
    const at::Tensor odd = normal_matrix(5, 150, "odd");  // last group of 22
    const GridSpec by_64{&grid, 64};
    const Quantized tail = encode(by_64, odd);
    CHECK(tail.scales.size(1) == 3);
    CHECK(at::equal(decode(by_64, tail).slice(1, 128), decode(by_64, encode(by_64, odd.slice(1, 128).contiguous()))));
    if (!grid.entropy_coded()) CHECK(by_64.packed_bytes(5, 150) == static_cast<std::int64_t>(grid.pack(tail.codes).size()) + 5 * 3 * (2 + (grid.asymmetric ? (grid.integer_zero ? 1 : 2) : 0)));
  }
}

TEST_CASE("importance moves the fit towards the columns that matter", "[quantize][grids]") {
  const at::Tensor w = normal_matrix(16, 256, "important");
  at::Tensor d = at::full({256}, 0.01f);
  for (int k = 0; k < 256; k += 4) d[k] = 10.0f;
  for (const Grid& grid : grids()) {
    if (grid.name == "int8" || grid.name == "q8_0" || grid.name == "fp8_e4m3" || grid.name == "ternary_absmean" || grid.entropy_coded()) continue;  // their scale is a rule
    const GridSpec spec{&grid, grid.default_group};
    const auto weighted = [&](const at::Tensor& r) { return ((w - r).square() * d).sum().item<double>(); };
    CAPTURE(std::string(grid.name));
    CHECK(weighted(round_to_grid(spec, w, d)) < weighted(round_to_grid(spec, w)));
    CHECK(equal(encode(spec, w, at::zeros({256})), encode(spec, w)));  // no importance at all: every column counts
  }
}

TEST_CASE("one and two threads give the same bytes", "[quantize][grids]") {
  const at::Tensor w = normal_matrix(700, 768, "threads");
  const int before = at::get_num_threads();
  for (const char* name : {"ternary", "int4", "int8", "four_level", "int4_asym", "iq4_nl", "q4_k", "q6_k"}) {
    at::set_num_threads(1);
    const Quantized one = encode(spec_of(name), w);
    at::set_num_threads(2);
    CHECK(equal(encode(spec_of(name), w), one));
    CHECK(at::equal(round_to_grid(spec_of(name), w), decode(spec_of(name), one)));
  }
  at::set_num_threads(before);
}

TEST_CASE("encode of the layers of a small model takes milliseconds", "[.speed]") {
  at::set_num_threads(1);
  for (const char* name : {"ternary", "int4", "int8", "four_level", "ternary_absmean", "int4_asym", "int2_asym", "q4_1", "int3"})
    for (const std::int64_t group : {std::int64_t(0), std::int64_t(64)}) {
      const GridSpec spec = spec_of(name, find_grid(name)->group_fixed ? find_grid(name)->default_group : group);
      const at::Tensor w = normal_matrix(3 * (4 * 384 + 2 * 768), 384, "speed");  // 3 layers, half the feed-forward: 3.5M weights
      round_to_grid(spec, w);
      const double start = cpu_seconds();
      for (int i = 0; i < 3; ++i) round_to_grid(spec, w);
      const double ms = (cpu_seconds() - start) * 1000 / 3;
      std::printf("%-16s group %3ld: %.1f ms for %.2fM weights, %.2f ns a weight, one thread\n", name, static_cast<long>(spec.group), ms, w.numel() * 1e-6, ms * 1e6 / w.numel());
    }
}

}  // namespace kompakt
