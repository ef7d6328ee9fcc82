#include "quantize/knapsack.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace kompakt {

Knapsack::Knapsack(std::vector<KnapsackItem> items, std::int64_t largest_budget, std::int64_t most_units) : items_(std::move(items)) {
  std::int64_t divisor = 0;
  for (const KnapsackItem& item : items_) {
    if (item.empty() || item.size() > 255) throw std::logic_error("Knapsack: an item needs 1 to 255 options");
    std::int64_t low = std::numeric_limits<std::int64_t>::max(), high = 0;
    for (const KnapsackOption& option : item) {
      if (option.bytes < 0 || !std::isfinite(option.cost)) throw std::logic_error("Knapsack: an option needs bytes and a finite cost");
      low = std::min(low, option.bytes), high = std::max(high, option.bytes);
    }
    for (const KnapsackOption& option : item) divisor = std::gcd(divisor, option.bytes - low);
    floor_.push_back(low);
    smallest_ += low, largest_ += high;
  }
  const std::int64_t room = std::max<std::int64_t>(0, std::min(largest_budget, largest_) - smallest_);
  unit_ = std::max<std::int64_t>(1, divisor);
  if (room / unit_ > most_units) unit_ = (room + most_units - 1) / most_units;
  units_ = room / unit_;
  // cost_[u]: least cost of the items so far when exactly u units above their floors are spent (by options rounded up).
  constexpr double impossible = std::numeric_limits<double>::infinity();
  cost_.assign(static_cast<std::size_t>(units_ + 1), impossible);
  cost_[0] = 0;
  std::vector<double> next(cost_.size());
  for (std::size_t i = 0; i < items_.size(); ++i) {
    std::fill(next.begin(), next.end(), impossible);
    chosen_.emplace_back(cost_.size(), std::uint8_t{255});
    for (std::size_t o = 0; o < items_[i].size(); ++o) {
      const std::int64_t units = units_of(i, o);
      for (std::int64_t u = units; u <= units_; ++u) {
        const double cost = cost_[static_cast<std::size_t>(u - units)] + items_[i][o].cost;
        if (cost < next[static_cast<std::size_t>(u)]) next[static_cast<std::size_t>(u)] = cost, chosen_[i][static_cast<std::size_t>(u)] = static_cast<std::uint8_t>(o);
      }
    }
    cost_.swap(next);
  }
}

std::int64_t Knapsack::units_of(std::size_t item, std::size_t option) const { return (items_[item][option].bytes - floor_[item] + unit_ - 1) / unit_; }

KnapsackChoice Knapsack::solve(std::int64_t budget) const {
  KnapsackChoice choice;
  if (budget < smallest_) return choice;
  const std::int64_t room = std::min(units_, (budget - smallest_) / unit_);
  std::int64_t best = 0;
  for (std::int64_t u = 1; u <= room; ++u)
    if (cost_[static_cast<std::size_t>(u)] < cost_[static_cast<std::size_t>(best)]) best = u;
  choice.option.resize(items_.size());
  std::int64_t left = best;
  for (std::size_t i = items_.size(); i-- > 0;) {
    const std::size_t option = chosen_[i][static_cast<std::size_t>(left)];
    choice.option[i] = option;
    choice.bytes += items_[i][option].bytes, choice.cost += items_[i][option].cost;
    left -= units_of(i, option);
  }
  return choice;
}

}  // namespace kompakt
