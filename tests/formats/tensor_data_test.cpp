// Conversions of single numbers, exhaustively where 16 bits allow it.
#include "formats/tensor_data.h"

#include <bit>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "core/random.h"
#include "tests/support.h"

namespace kompakt {

TEST_CASE("every half and bfloat16 survives float32 and back") {
  bool halves = true, brains = true;
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float a = half_to_float(half), b = bfloat16_to_float(half);
    halves = halves && (std::isnan(a) ? std::isnan(half_to_float(float_to_half(a))) : float_to_half(a) == half);
    brains = brains && (std::isnan(b) ? std::isnan(bfloat16_to_float(float_to_bfloat16(b))) : float_to_bfloat16(b) == half);
  }
  CHECK(halves);
  CHECK(brains);
}

TEST_CASE("halves round to nearest even") {
  struct Case {
    float value;
    std::uint16_t half;
  };
  const Case cases[] = {{0.0f, 0}, {-0.0f, 0x8000}, {1.0f, 0x3C00}, {-2.0f, 0xC000}, {65504.0f, 0x7BFF}, {65519.99f, 0x7BFF}, {65520.0f, 0x7C00}, {1e30f, 0x7C00}, {-1e30f, 0xFC00},
                        {0x1p-24f, 1}, {0x1p-25f, 0}, {0x1.8p-24f, 2}, {0x1.000002p-25f, 1}, {0x1p-14f, 0x400}, {0x1.ff8p-15f, 0x3FF}, {0x1.ffcp-15f, 0x400}, {1e-30f, 0},
                        {1.0f + 0x1p-11f, 0x3C00}, {1.0f + 0x1.8p-10f, 0x3C02}, {std::numeric_limits<float>::infinity(), 0x7C00}};
  for (const Case& one : cases) {
    CAPTURE(one.value);
    CHECK(float_to_half(one.value) == one.half);
  }
  CHECK(std::isnan(half_to_float(float_to_half(std::nanf("")))));
  // Against the definition: no other half is nearer.
  const CounterRandom random(3, "halves");
  for (std::uint64_t i = 0; i < 20000; ++i) {
    const float value = std::bit_cast<float>(static_cast<std::uint32_t>(random.bits(i)));
    if (!(std::fabs(value) < 65504.0f)) continue;
    const std::uint16_t half = float_to_half(value);
    const double error = std::fabs(static_cast<double>(half_to_float(half)) - value);
    for (const int step : {-1, 1}) {
      const auto other = static_cast<std::uint16_t>(half + step);
      const double distance = std::fabs(static_cast<double>(half_to_float(other)) - value);
      if (std::isfinite(distance)) REQUIRE((distance > error || (distance == error && half % 2 == 0) || (half & 0x7FFF) == 0));
    }
  }
}

TEST_CASE("bfloat16 rounds to nearest even") {
  CHECK(float_to_bfloat16(1.0f) == 0x3F80);
  CHECK(float_to_bfloat16(1.0f + 0x1p-8f) == 0x3F80);
  CHECK(float_to_bfloat16(1.0f + 0x1.8p-7f) == 0x3F82);
  CHECK(float_to_bfloat16(3.4e38f) == 0x7F80);
}

TEST_CASE("products of shapes are checked") {
  const auto product = [](std::vector<std::int64_t> shape) { return checked_product(shape); };
  CHECK(product({}) == 1);
  CHECK(product({2, 3}) == 6);
  CHECK(product({0, INT64_MAX, INT64_MAX}) == 0);
  CHECK(product({INT64_MAX, INT64_MAX, 0}) == 0);
  CHECK(product({INT64_MAX, 1}) == INT64_MAX);
  CHECK_FALSE(product({INT64_MAX, 2}));
  CHECK_FALSE(product({-1, 2}));
  CHECK_FALSE(product({1LL << 32, 1LL << 31}));
  CHECK_THROWS_AS((TensorData{"x", DType::f32, {INT64_MAX, 2}, {}, nullptr}.elements()), std::logic_error);
}

TEST_CASE("NaN is refused only when asked") {
  const auto tensor = make_tensor("w", {2}, {1.0f, std::nanf("")});
  CHECK(std::isnan(to_float32(tensor)[1]));
  CHECK(testing::contains_all(testing::error_text([&] { to_float32(tensor, true); }), {"\"w\"", "element 1", "NaN"}));
  CHECK_THROWS_AS(make_tensor("w", {3}, {1.0f}), std::logic_error);
  CHECK_THROWS_AS(make_tensor("w", DType::i16, {3}, std::vector<std::byte>(5)), std::logic_error);
}

TEST_CASE("names of element types are the inverse of each other") {
  for (int i = 0; i <= static_cast<int>(DType::boolean); ++i) {
    const auto dtype = static_cast<DType>(i);
    CHECK(dtype_from_name(name_of(dtype)) == dtype);
    CHECK(size_of(dtype) > 0);
  }
  CHECK_FALSE(dtype_from_name("f32"));
}

}  // namespace kompakt
