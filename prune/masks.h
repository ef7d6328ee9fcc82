// Unstructured and n:m sparsity: which weights of a matrix go. What keeps them at zero afterwards is train/mask.h.
#pragma once

#include <ATen/core/Tensor.h>

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

// true = the weight stays. weight [N,K].
at::Tensor magnitude_mask(const at::Tensor& weight, const SparsityPattern& pattern);
// Wanda (Sun et al. 2024): |w| times the root mean square of its input, compared inside a row. input_square [K]: mean x^2.
at::Tensor wanda_mask(const at::Tensor& weight, const at::Tensor& input_square, const SparsityPattern& pattern);

}  // namespace kompakt
