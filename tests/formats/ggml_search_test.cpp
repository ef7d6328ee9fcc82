// The searches in lanes give the bits of the same searches written one value after the other, edges included.
#include "formats/ggml_search.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "core/random.h"
#include "tests/formats/ggml_scalar_search.h"

namespace kompakt {
namespace {

constexpr int search_trials = 4000;

// Group `trial`: normal numbers of many sizes, and every tenth of the hard kinds.
void search_group(int trial, std::vector<float>& x, std::vector<float>& weights) {
  const CounterRandom random(7, "ggml-search");
  const float size = std::pow(10.0f, static_cast<float>(trial / 10 % 12) - 7);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const auto at = static_cast<std::uint64_t>(trial) * 1024 + 2 * i;
    float v = size * static_cast<float>(random.normal(at)), w = std::exp(static_cast<float>(random.normal(at + 1)));
    switch (trial % 10) {
      case 0: v = i % 3 == 1 ? -0.0f : 0.0f; break;
      case 1: v = trial % 20 == 1 ? size : -size; break;
      case 2: v = i == 5 ? v : 0; break;
      case 3: v = std::round(2 * v / size) * size; break;  // ties
      case 4: v = std::fabs(v); break;
      case 5: v = -std::fabs(v); break;
      case 6: v *= 1e-30f; break;
      case 7: w = 0; break;
      case 8: w = i % 4 == 0 ? w : 0; break;
      default: break;
    }
    x[i] = v, weights[i] = w;
  }
}

bool same_bits(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0; }

}  // namespace

TEST_CASE("the searches in lanes give the bits of the scalar ones") {
  const ggml_search::AffineGrid grids[] = {{-0.9f, 0.05f, 36, false}, {-0.5f, 0.1f, 15, true}, {-1.0f, 0.1f, 20, false}};
  int compared = 0, moved = 0;
  for (int trial = 0; trial < search_trials; ++trial) {
    const int n = trial % 3 == 0 ? 32 : 16;
    std::vector<float> x(static_cast<std::size_t>(n)), weights(x.size());
    search_group(trial, x, weights);
    CAPTURE(trial, n);
    std::vector<std::int8_t> ours(x.size()), theirs(x.size());
    for (const int half : {4, 8, 16, 32})
      for (const float* given : {static_cast<const float*>(weights.data()), static_cast<const float*>(nullptr)}) {
        const float a = ggml_search::symmetric_search(n, half, x.data(), given, ours.data());
        const float b = ggml_search::scalar::scalar_symmetric_search(n, half, x.data(), given, theirs.data());
        REQUIRE(same_bits(a, b));
        REQUIRE(ours == theirs);
        ++compared;
      }
    for (const auto& grid : grids)
      for (const int largest : {3, 15, 31}) {
        float low = 0, expected = 0;
        const float a = ggml_search::affine_search(n, largest, x.data(), weights.data(), grid, ours.data(), &low);
        const float b = ggml_search::scalar::scalar_affine_search(n, largest, x.data(), weights.data(), grid, theirs.data(), &expected);
        REQUIRE(same_bits(a, b));
        REQUIRE(same_bits(low, expected));
        REQUIRE(ours == theirs);
        moved += b != 0 && expected != -*std::min_element(x.begin(), x.end());
      }
    std::vector<std::uint8_t> mine(x.size()), other(x.size());
    for (float& v : x) v = std::fabs(v);
    for (const int groups : {8, 16})
      for (const int most : {15, 63}) {
        REQUIRE(same_bits(ggml_search::positive_search(groups, most, x.data(), weights.data(), mine.data()), ggml_search::scalar::scalar_positive_search(groups, most, x.data(), weights.data(), other.data())));
        REQUIRE(std::equal(mine.begin(), mine.begin() + groups, other.begin()));
      }
  }
  CHECK(compared > 0);
  CHECK(moved > search_trials);  // the minimum did change on the way: later steps were measured from another
}

TEST_CASE("the descent of a super-block in lanes gives the bits of the scalar one") {
  for (int trial = 0; trial < 2000; ++trial) {
    std::vector<float> x(256), weights(256);
    search_group(trial, x, weights);
    if (trial % 7 == 0) std::fill(x.begin() + 32, x.begin() + 48, 0.0f);  // one empty group among others
    CAPTURE(trial);
    std::vector<std::int8_t> ours(256), theirs(256);
    float scales[16];
    ggml_search::symmetric_descent(4, x.data(), ours.data(), scales);
    for (int g = 0; g < 16; ++g) REQUIRE(same_bits(scales[g], ggml_search::scalar::scalar_symmetric_descent(16, 4, x.data() + 16 * g, theirs.data() + 16 * g)));
    REQUIRE(ours == theirs);
  }
}

}  // namespace kompakt
