// The allocation of bytes: equal to trying everything, monotone in the budget, the same for the same input.
#include "quantize/knapsack.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

#include "core/random.h"

namespace kompakt {
namespace {

std::vector<KnapsackItem> random_items(std::size_t items, std::size_t options, std::int64_t step, std::uint64_t seed) {
  const CounterRandom random(seed, "knapsack");
  std::uint64_t draw = 0;
  std::vector<KnapsackItem> out(items);
  for (KnapsackItem& item : out)
    for (std::size_t o = 0; o < options; ++o) {
      const std::int64_t bytes = step * static_cast<std::int64_t>(1 + random.below(draw++, 60));
      // Mostly falling with bytes, sometimes not: dominated options are part of life.
      item.push_back({bytes, std::exp(-0.02 * static_cast<double>(bytes / step) + 0.7 * random.normal(draw++))});
    }
  return out;
}

KnapsackChoice try_all(const std::vector<KnapsackItem>& items, std::int64_t budget) {
  KnapsackChoice best;
  best.cost = std::numeric_limits<double>::infinity();
  std::vector<std::size_t> option(items.size(), 0);
  for (;;) {
    std::int64_t bytes = 0;
    double cost = 0;
    for (std::size_t i = 0; i < items.size(); ++i) bytes += items[i][option[i]].bytes, cost += items[i][option[i]].cost;
    if (bytes <= budget && cost < best.cost) best = {option, bytes, cost};
    std::size_t i = 0;
    while (i < items.size() && ++option[i] == items[i].size()) option[i++] = 0;
    if (i == items.size()) return best;
  }
}

}  // namespace

TEST_CASE("the knapsack equals brute force over 8 tensors of 3 formats", "[quantize][knapsack]") {
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    const std::int64_t step = seed % 3 == 0 ? 1 : seed % 3 == 1 ? 32 : 93312;  // bytes of no common measure, blocks, matrices
    const auto items = random_items(8, 3, step, seed);
    const Knapsack knapsack(items, std::numeric_limits<std::int64_t>::max());
    CHECK(knapsack.unit() % step == 0);
    for (int part = 0; part <= 10; ++part) {
      const std::int64_t budget = knapsack.smallest_bytes() + (knapsack.largest_bytes() - knapsack.smallest_bytes()) * part / 10;
      const KnapsackChoice found = knapsack.solve(budget), best = try_all(items, budget);
      CAPTURE(seed, budget);
      CHECK(found.bytes <= budget);
      CHECK(found.cost == Approx(best.cost).epsilon(1e-12));
    }
    CHECK(knapsack.solve(knapsack.smallest_bytes() - 1).option.empty());
    CHECK_FALSE(knapsack.solve(knapsack.smallest_bytes()).option.empty());
  }
}

TEST_CASE("a larger budget never costs more, and a table made for it gives the same choice", "[quantize][knapsack]") {
  const auto items = random_items(40, 6, 18, 5);
  const Knapsack knapsack(items, std::numeric_limits<std::int64_t>::max());
  double last = std::numeric_limits<double>::infinity();
  for (std::int64_t budget = knapsack.smallest_bytes(); budget <= knapsack.largest_bytes(); budget += 997) {
    const KnapsackChoice choice = knapsack.solve(budget);
    CHECK(choice.cost <= last);
    last = choice.cost;
    if (budget % 7 == 0) CHECK(Knapsack(items, budget).solve(budget).option == choice.option);
  }
}

TEST_CASE("with larger units a choice still fits and comes close", "[quantize][knapsack]") {
  const auto items = random_items(40, 6, 1009, 9);
  const Knapsack exact(items, std::numeric_limits<std::int64_t>::max()), coarse(items, std::numeric_limits<std::int64_t>::max(), 500);
  CHECK(coarse.unit() > exact.unit());
  for (int part = 1; part < 10; ++part) {
    const std::int64_t budget = exact.smallest_bytes() + (exact.largest_bytes() - exact.smallest_bytes()) * part / 10;
    const KnapsackChoice choice = coarse.solve(budget);
    CHECK(choice.bytes <= budget);
    CHECK(choice.cost >= exact.solve(budget).cost - 1e-12);
    CHECK(choice.cost <= exact.solve(budget - 40 * coarse.unit()).cost + 1e-12);  // what rounding up can lose at most
  }
}

TEST_CASE("edges: one item, one option, options of equal size, no items", "[quantize][knapsack]") {
  CHECK(Knapsack({}, 10).solve(10).option.empty());
  CHECK(Knapsack({{{7, 1.0}}}, 10).solve(7).option == std::vector<std::size_t>{0});
  CHECK(Knapsack({{{7, 1.0}}}, 10).solve(6).option.empty());
  CHECK(Knapsack({{{7, 2.0}, {7, 1.0}, {7, 1.0}}}, 10).solve(9).option == std::vector<std::size_t>{1});
  CHECK_THROWS_AS(Knapsack({{}}, 10), std::logic_error);
  CHECK_THROWS_AS(Knapsack({{{1, std::nan("")}}}, 10), std::logic_error);
  // A negative cost is a cost: a format may happen to be better than float.
  CHECK(Knapsack({{{1, 0.0}, {2, -1.0}}}, 10).solve(2).option == std::vector<std::size_t>{1});
}

}  // namespace kompakt
