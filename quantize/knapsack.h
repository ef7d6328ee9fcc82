// Which option each item takes so that the sum of costs is least and the sum of bytes stays within a budget: the multiple-choice
// knapsack, solved exactly by dynamic programming over byte units. Knows nothing of tensors.
#pragma once

#include <cstdint>
#include <vector>

namespace kompakt {

struct KnapsackOption {
  std::int64_t bytes = 0;
  double cost = 0;
};
using KnapsackItem = std::vector<KnapsackOption>;  // at least one option; exactly one is taken

struct KnapsackChoice {
  std::vector<std::size_t> option;  // per item; empty when even the smallest options exceed the budget
  std::int64_t bytes = 0;
  double cost = 0;
};

// One solution for every budget up to a largest one, from one table.
class Knapsack {
 public:
  // Bytes are counted in units of the greatest common divisor of the options' differences; when that would need more than
  // `most_units`, in larger units with every option rounded up: then a choice still fits, but may miss the optimum by at most one
  // unit an item. Of equal costs the smaller bytes win, then the earlier option: the same input gives the same choice.
  // std::logic_error for an item without options, negative bytes or a cost that is not finite.
  Knapsack(std::vector<KnapsackItem> items, std::int64_t largest_budget, std::int64_t most_units = std::int64_t{1} << 17);

  KnapsackChoice solve(std::int64_t budget) const;  // budget <= largest_budget
  std::int64_t smallest_bytes() const { return smallest_; }
  std::int64_t largest_bytes() const { return largest_; }  // every item at its largest option
  std::int64_t unit() const { return unit_; }

 private:
  std::int64_t units_of(std::size_t item, std::size_t option) const;
  std::vector<KnapsackItem> items_;
  std::vector<std::int64_t> floor_;                // smallest bytes of each item
  std::int64_t smallest_ = 0, largest_ = 0, unit_ = 1, units_ = 0;
  std::vector<std::vector<std::uint8_t>> chosen_;  // [item][units spent on items 0..item] -> option
  std::vector<double> cost_;                       // [units] least cost of all items
};

}  // namespace kompakt
