// Which share of single weights becomes zero, or which N:M pattern.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "model/transformer.h"

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

// What a recipe says of it. In the functions below `key` is the place of these options in the recipe, for errors.
struct SparsityOptions {
  double sparsity = 0;            // share of the weights that goes; 0 = `pattern` says it
  std::string pattern;            // "2:4"
  std::vector<std::string> skip;  // patterns of linear names that stay dense
};
// Error when neither or both of sparsity and pattern are given.
SparsityPattern chosen_pattern(const SparsityOptions& options, const std::string& key);
// Linears of the blocks that `skip` keeps dense. Error for a pattern that matches none, and when all would be.
std::set<std::string> dense_linears(Transformer& model, const SparsityOptions& options, const std::string& key);
// Error when rows of the model do not divide into groups, or as above.
void check_sparsity(const ModelConfig& config, const SparsityOptions& options, const std::string& key);

}  // namespace kompakt
