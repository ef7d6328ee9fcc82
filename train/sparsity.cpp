#include "train/sparsity.h"

#include <cmath>

#include "core/error.h"
#include "core/text.h"

namespace kompakt {

std::string SparsityPattern::text() const { return grouped() ? str(n, ":", m) : shortest(sparsity); }

std::optional<SparsityPattern> parse_pattern(std::string_view text) {
  const std::vector<std::string> parts = split(text, ':');
  if (parts.size() != 2) return std::nullopt;
  const std::optional<std::int64_t> n = parse_int(parts[0]), m = parse_int(parts[1]);
  if (!n || !m || *m < 1) return std::nullopt;
  return SparsityPattern{0, *n, *m};
}

void check_pattern(const SparsityPattern& pattern, std::int64_t columns) {
  if (!pattern.grouped()) {
    if (!(pattern.sparsity >= 0 && pattern.sparsity < 1)) throw Error("the sparsity leaves nothing").given(shortest(pattern.sparsity)).allowed("0 to less than 1");
    return;
  }
  if (pattern.n < 1 || pattern.n > pattern.m) throw Error(str("the pattern ", pattern.text(), " keeps no valid number of weights")).given(pattern.text()).allowed(str("1:", pattern.m, " to ", pattern.m, ":", pattern.m));
  if (columns % pattern.m == 0) return;
  // The nearest group size that divides, with the nearest share of weights kept.
  std::int64_t nearest = 0;
  for (std::int64_t m = 2; m <= 2 * pattern.m; ++m)
    if (columns % m == 0 && (nearest == 0 || std::abs(m - pattern.m) < std::abs(nearest - pattern.m))) nearest = m;
  Error error(str("a row of ", columns, " weights does not divide into groups of ", pattern.m));
  error.given(pattern.text()).hint("leave this matrix dense with skip, or choose another pattern");
  if (nearest > 0) {
    const double kept = static_cast<double>(pattern.n) / static_cast<double>(pattern.m) * static_cast<double>(nearest);
    error.allowed(str("nearest: ", std::max<std::int64_t>(1, std::llround(kept)), ":", nearest));
  }
  throw error;
}

}  // namespace kompakt
