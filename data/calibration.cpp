// Windows are cut from one stream of tokens; overlap is found through hashes of spans and confirmed on the tokens.
#include "data/calibration.h"

#include <algorithm>
#include <unordered_map>

#include "core/error.h"
#include "core/hash.h"
#include "core/text.h"
#include "data/dataset.h"
#include "data/tokenizer.h"

namespace kompakt {
namespace {

std::uint64_t span_hash(const std::int64_t* tokens, std::int64_t span) {
  std::uint64_t hash = 0xCBF29CE484222325ull;  // FNV-1a over whole ids
  for (std::int64_t i = 0; i < span; ++i) hash = (hash ^ static_cast<std::uint64_t>(tokens[i])) * 0x100000001B3ull;
  return hash;
}

std::vector<std::int64_t> joined_windows(const TokenWindows& windows) {
  std::vector<std::int64_t> all;
  for (const auto& window : windows.windows) all.insert(all.end(), window.begin(), window.end());
  return all;
}

}  // namespace

TokenWindows token_windows(const TextSet& text, const Tokenizer& tokenizer, std::int64_t length, std::int64_t count) {
  if (length < 1) throw Error("the window length must be positive").given(std::to_string(length)).allowed("1 or more");
  if (count < 0) throw Error("the number of windows is negative").given(std::to_string(count)).allowed("0 (all) or more");
  std::vector<std::int64_t> tokens;
  for (const std::string& document : text.documents) {
    if (count > 0 && static_cast<std::int64_t>(tokens.size()) >= count * length) break;
    if (!tokens.empty() && tokenizer.special().eos >= 0) tokens.push_back(tokenizer.special().eos);
    const auto ids = tokenizer.encode(document, false, false);
    tokens.insert(tokens.end(), ids.begin(), ids.end());
  }
  const std::int64_t available = static_cast<std::int64_t>(tokens.size()) / length;
  if (available == 0 || available < count)
    throw Error(str("the text gives ", tokens.size(), " tokens, which is too short")).given(str(std::max<std::int64_t>(count, 1), " windows of ", length, " tokens")).hint("give more text, or fewer or shorter windows");
  TokenWindows out;
  out.length = length;
  Sha256 hash;
  hash.update(str(length, "\n"));
  for (std::int64_t i = 0; i < (count > 0 ? count : available); ++i) {
    out.windows.emplace_back(tokens.begin() + i * length, tokens.begin() + (i + 1) * length);
    for (const std::int64_t id : out.windows.back()) hash.update(str(id, " "));
  }
  out.hash = hash.hex();
  return out;
}

std::int64_t shared_spans(const TokenWindows& calibration, const TokenWindows& evaluation, std::int64_t span) {
  if (span < 1) throw Error("the span must be positive").given(std::to_string(span)).allowed("1 or more");
  const auto known = joined_windows(calibration), asked = joined_windows(evaluation);
  // The aligned spans of the evaluation text are fewer than all shifts of the calibration text: index those.
  std::unordered_multimap<std::uint64_t, std::int64_t> index;
  for (std::int64_t at = 0; at + span <= static_cast<std::int64_t>(asked.size()); at += span) index.emplace(span_hash(asked.data() + at, span), at);
  std::vector<bool> shared(asked.size(), false);
  std::int64_t count = 0;
  for (std::int64_t at = 0; at + span <= static_cast<std::int64_t>(known.size()); ++at) {
    const auto [first, last] = index.equal_range(span_hash(known.data() + at, span));
    for (auto entry = first; entry != last; ++entry) {
      if (shared[static_cast<std::size_t>(entry->second)] || !std::equal(known.begin() + at, known.begin() + at + span, asked.begin() + entry->second)) continue;
      shared[static_cast<std::size_t>(entry->second)] = true;
      ++count;
    }
  }
  return count;
}

void check_no_overlap(const TokenWindows& calibration, const TokenWindows& evaluation, const std::string& calibration_name, const std::string& evaluation_name) {
  constexpr std::int64_t span = 32;
  const std::int64_t shared = shared_spans(calibration, evaluation, span);
  if (shared == 0) return;
  const std::int64_t all = static_cast<std::int64_t>(evaluation.windows.size()) * evaluation.length / span;
  throw Error(str(shared, " of ", all, " spans of ", span, " tokens of the evaluation text also stand in the calibration text")).at(evaluation_name).given(calibration_name).hint("take other text for one of the two");
}

}  // namespace kompakt
