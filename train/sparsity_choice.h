// Which weights of a sweep in the metric of the inputs go: those whose loss costs the outputs least once the columns to come have made
// up for it, w^2 / U_jj^2 with U the factor of the inverse second moment (SparseGPT, Frantar and Alistarh 2023, sections 3.3 and 3.5).
// Raw pointers, one thread; of equal costs the higher column goes first, and what is zero before all others.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "train/sparsity.h"

namespace kompakt {

template <class Real>
Real removal_cost(Real w, Real diagonal) {
  const Real root = w / diagonal;
  return w == 0 ? Real(-1) : root * root;
}

// Marks the cheapest share of the columns [from, to) of all rows together. w, gone [rows, columns] (1 = goes; what is marked already
// counts), diagonal [columns] of U.
template <class Real>
void choose_share(const Real* w, const Real* diagonal, std::int64_t rows, std::int64_t columns, std::int64_t from, std::int64_t to, double sparsity, std::uint8_t* gone) {
  const std::int64_t width = to - from, count = rows * width;
  const auto wanted = static_cast<std::int64_t>(std::floor(sparsity * static_cast<double>(count)));
  if (wanted < 1) return;
  std::vector<std::pair<Real, std::int64_t>> costs;  // and minus the place
  costs.reserve(static_cast<std::size_t>(count));
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t j = from; j < to; ++j) costs.emplace_back(gone[r * columns + j] ? Real(-1) : removal_cost(w[r * columns + j], diagonal[j]), -(r * width + j - from));
  std::nth_element(costs.begin(), costs.begin() + wanted - 1, costs.end());
  for (std::int64_t i = 0; i < wanted; ++i) {
    const std::int64_t at = -costs[static_cast<std::size_t>(i)].second;
    gone[at / width * columns + from + at % width] = 1;
  }
}

// Marks m - n of the m weights of one row that begin at `w`.
template <class Real>
void choose_in_group(const Real* w, const Real* diagonal, const SparsityPattern& pattern, std::uint8_t* gone) {
  std::int64_t left = pattern.m - pattern.n;
  for (std::int64_t i = 0; i < pattern.m; ++i) left -= gone[i];
  for (; left > 0; --left) {
    std::int64_t lowest = -1;
    Real lowest_cost = 0;
    for (std::int64_t i = 0; i < pattern.m; ++i) {
      if (gone[i]) continue;
      const Real cost = removal_cost(w[i], diagonal[i]);
      if (lowest < 0 || cost <= lowest_cost) lowest = i, lowest_cost = cost;
    }
    gone[lowest] = 1;
  }
}

}  // namespace kompakt
