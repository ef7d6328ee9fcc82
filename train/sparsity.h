// Which share of single weights becomes zero, or which N:M pattern.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace kompakt {

// n:m keeps n of every m consecutive weights of a row (columns must divide by m); else the share `sparsity` of every row goes
// (rounded down). Ties: the lower column stays.
struct SparsityPattern {
  double sparsity = 0.5;
  std::int64_t n = 0, m = 0;  // both 0: unstructured
  bool grouped() const { return m > 0; }
  std::string text() const;   // "2:4" or "0.5"
};
std::optional<SparsityPattern> parse_pattern(std::string_view text);  // "2:4"; nothing when it is no such text
// Error when the pattern keeps or removes nothing, or when rows of `columns` weights do not divide into its groups.
void check_pattern(const SparsityPattern& pattern, std::int64_t columns);

}  // namespace kompakt
