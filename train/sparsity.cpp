#include "train/sparsity.h"

#include <c10/core/Device.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/text.h"
#include "train/optimizer.h"

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

SparsityPattern chosen_pattern(const SparsityOptions& options, const std::string& key) {
  if (options.pattern.empty() == (options.sparsity == 0))
    throw Error(options.pattern.empty() ? "pruning single weights needs a sparsity or a pattern" : "sparsity and pattern say two different things").at(key).hint("write sparsity: 0.5, or pattern: \"2:4\"");
  if (options.pattern.empty()) return {options.sparsity};
  const std::optional<SparsityPattern> pattern = parse_pattern(options.pattern);
  if (!pattern || pattern->n < 1 || pattern->n >= pattern->m)
    throw Error("the pattern is not of the form N:M with N below M").at(key + ".pattern").given(options.pattern).allowed("such as 2:4 or 4:8").hint("of every M weights in a row N stay");
  return *pattern;
}

std::set<std::string> dense_linears(Transformer& model, const SparsityOptions& options, const std::string& key) {
  std::set<std::string> dense;
  std::vector<std::string> names;
  for (const Linear* linear : model.linears()) names.push_back(linear->name);
  for (const std::string& pattern : options.skip) {
    const std::size_t before = dense.size();
    for (const std::string& name : names)
      if (matches_pattern(name, pattern)) dense.insert(name);
    if (dense.size() == before) throw Error(str("no linear of the blocks matches the pattern \"", pattern, "\"", did_you_mean(pattern, names))).at(key + ".skip").given(pattern).allowed(str("names such as ", names.front(), "; * stands for anything"));
  }
  if (dense.size() == names.size()) throw Error("every matrix is skipped: nothing is left to prune").at(key + ".skip").given(join(options.skip, ", "));
  return dense;
}

void check_sparsity(const ModelConfig& config, const SparsityOptions& options, const std::string& key) {
  const SparsityPattern pattern = chosen_pattern(options, key);
  Transformer shapes(config, 0, c10::Device(c10::kMeta));
  for (const Linear* linear : shapes.linears()) {
    if (std::any_of(options.skip.begin(), options.skip.end(), [&](const std::string& skip) { return matches_pattern(linear->name, skip); })) continue;
    try {
      check_pattern(pattern, linear->in_features());
    } catch (Error& error) {
      throw error.at(linear->name);
    }
  }
}

}  // namespace kompakt
