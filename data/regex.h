// Regular expressions of pre-tokenizers with the meaning they have in Oniguruma's Ruby syntax. The door to PCRE2.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kompakt {

class Regex {
 public:
  // Throws Error with `place` for a pattern that does not compile or whose meaning differs between the two libraries.
  Regex(const std::string& pattern, const std::string& place);
  ~Regex();
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;
  // All matches, left to right, without overlap, as [begin, end) byte offsets. `text` must be valid UTF-8.
  void find_all(std::string_view text, std::vector<std::pair<std::size_t, std::size_t>>& matches) const;
  const std::string& pattern() const { return pattern_; }

 private:
  struct Compiled;
  std::string pattern_;
  std::unique_ptr<Compiled> compiled_;
};

// \s, \w and \d as Oniguruma defines them for Unicode, written so that PCRE2 agrees (used by Regex; here for its test).
std::string translate_pattern(const std::string& pattern, const std::string& place);

}  // namespace kompakt
