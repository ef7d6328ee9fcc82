// Which weights of a row go while the GPTQ sweep passes over it: the joint mode of SparseGPT (Frantar and Alistarh 2023). A weight
// that goes is rounded to zero, and the rest of the row makes up for it as for any rounding, so both errors are chosen in one sweep.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "quantize/factors.h"
#include "train/sparsity.h"

namespace kompakt {

// Positions are processed ones. Scores are w^2 / U_jj^2 on the compensated weights; what is zero, or gone already, goes first and
// counts; of equal scores the later row, then the later position goes.
template <class Real>
class JointMask {
 public:
  JointMask(const SparsityPattern& pattern, const ColumnOrder& order, const Real* diagonal) : pattern_(pattern), order_(order), diagonal_(diagonal), place_(order.column.size()) {
    for (std::size_t p = 0; p < order.column.size(); ++p) place_[static_cast<std::size_t>(order.column[p])] = static_cast<std::int64_t>(p);
  }

  bool grouped() const { return pattern_.grouped(); }

  // Unstructured: the lowest share (rounded down) of the positions [from, to) of all rows together. w, keeps [rows, columns].
  void choose(const Real* w, std::int64_t rows, std::int64_t from, std::int64_t to, bool* keeps) {
    const auto columns = static_cast<std::int64_t>(place_.size());
    entries_.clear();
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t p = from; p < to; ++p) entries_.emplace_back(score(w + r * columns, keeps + r * columns, p), -(r * columns + p));
    drop(static_cast<std::int64_t>(pattern_.sparsity * static_cast<double>(rows * (to - from))), keeps);
  }

  // n:m: the group of the column at position p, when p is the first of its columns that is processed.
  void choose_group(const Real* row, std::int64_t p, bool* keeps) {
    const std::int64_t first = order_.column[static_cast<std::size_t>(p)] / pattern_.m * pattern_.m;
    entries_.clear();
    for (std::int64_t i = 0; i < pattern_.m; ++i) {
      const std::int64_t place = place_[static_cast<std::size_t>(first + i)];
      if (place < p) return;  // chosen before
      entries_.emplace_back(score(row, keeps, place), -place);
    }
    drop(pattern_.m - pattern_.n, keeps);
  }

  // What a scale over the positions [from, to) should expect of those that are not chosen yet: `open` and behind.
  void expect(const Real* row, std::int64_t from, std::int64_t open, std::int64_t to, bool* keeps) {
    if (grouped())
      for (std::int64_t p = from; p < to; ++p) choose_group(row, p, keeps);
    else if (open < to)
      choose(row, 1, std::max(from, open), to, keeps);
  }

 private:
  Real score(const Real* row, const bool* keeps, std::int64_t p) const {
    if (!keeps[p] || row[p] == 0) return -1;
    const Real root = row[p] / diagonal_[p];
    return root * root;
  }
  void drop(std::int64_t count, bool* keeps) {
    if (count < 1) return;
    std::nth_element(entries_.begin(), entries_.begin() + (count - 1), entries_.end());
    for (std::int64_t i = 0; i < count; ++i) keeps[-entries_[static_cast<std::size_t>(i)].second] = false;
  }

  const SparsityPattern& pattern_;
  const ColumnOrder& order_;
  const Real* diagonal_;
  std::vector<std::int64_t> place_;  // column -> position
  std::vector<std::pair<Real, std::int64_t>> entries_;
};

}  // namespace kompakt
