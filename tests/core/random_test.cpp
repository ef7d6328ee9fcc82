// Counter-based random numbers: published vectors, independence of order, distributions.
#include "core/random.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <set>

namespace kompakt {

TEST_CASE("Philox4x32-10 gives the published vectors of Random123") {
  using Four = std::array<std::uint32_t, 4>;
  CHECK(philox4x32({0, 0, 0, 0}, {0, 0}) == Four{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}) == Four{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) == Four{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("a draw depends on seed, stream and index alone") {
  const CounterRandom a(1, "order"), again(1, "order"), other_seed(2, "order"), other_stream(1, "init");
  CHECK(a.bits(7) == again.bits(7));
  CHECK(a.bits(7) != a.bits(8));
  CHECK(a.bits(7) != other_seed.bits(7));
  CHECK(a.bits(7) != other_stream.bits(7));
  CHECK(a.bits(std::uint64_t{1} << 32) != a.bits(0));
}

TEST_CASE("uniform, normal and bounded draws have their moments") {
  const CounterRandom random(5, "moments");
  const int n = 20000;
  double mean = 0, square = 0, uniform = 0;
  int counts[7] = {};
  for (std::uint64_t i = 0; i < n; ++i) {
    const double z = random.normal(i), u = random.uniform(i);
    REQUIRE((u >= 0 && u < 1));
    mean += z / n;
    square += z * z / n;
    uniform += u / n;
    ++counts[random.below(i, 7)];
  }
  CHECK(std::fabs(mean) < 0.03);
  CHECK(std::fabs(square - 1) < 0.04);
  CHECK(std::fabs(uniform - 0.5) < 0.01);
  for (const int count : counts) CHECK(std::abs(count - n / 7) < 250);
  CHECK(random.below(3, 1) == 0);
}

TEST_CASE("a permutation holds every index once") {
  const CounterRandom random(9, "shuffle");
  const auto order = random.permutation(1000);
  CHECK(std::set<std::int64_t>(order.begin(), order.end()).size() == 1000);
  CHECK((*std::min_element(order.begin(), order.end()) == 0 && *std::max_element(order.begin(), order.end()) == 999));
  CHECK_FALSE(std::is_sorted(order.begin(), order.end()));
  CHECK(order == CounterRandom(9, "shuffle").permutation(1000));
  CHECK(random.permutation(0).empty());
  CHECK(random.permutation(1) == std::vector<std::int64_t>{0});
}

}  // namespace kompakt
