// Small text helpers: joining, splitting, nearest match, human units, UTF-8 checks.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace kompakt {

// str("a", 1, 2.5) == "a12.5": for messages.
template <class... Parts>
std::string str(const Parts&... parts) {
  std::ostringstream out;
  ((out << parts), ...);
  return out.str();
}

std::string join(std::span<const std::string> parts, std::string_view separator);
std::vector<std::string> split(std::string_view text, char separator);
std::string trim(std::string_view text);
bool starts_with(std::string_view text, std::string_view prefix);
bool ends_with(std::string_view text, std::string_view suffix);
std::string replace_all(std::string text, std::string_view from, std::string_view to);

// The closest candidate by edit distance with transpositions; nothing when none is near enough to be a typo.
std::optional<std::string> nearest(std::string_view given, std::span<const std::string> candidates);
// " did you mean \"x\"?" or "".
std::string did_you_mean(std::string_view given, std::span<const std::string> candidates);

// Strict number parsing: the whole text must be the number.
std::optional<std::int64_t> parse_int(std::string_view text);
std::optional<double> parse_double(std::string_view text);  // finite only
// "60MB", "2.9 MiB", "1024" -> bytes. MB = 10^6, MiB = 2^20.
std::optional<std::int64_t> parse_bytes(std::string_view text);

std::string human_bytes(double bytes);      // 2867297 -> "2.87 MB" (decimal units, as file managers and rivals print)
std::string human_seconds(double seconds);  // 75.2 -> "1 min 15 s"
std::string human_count(double count);      // 22713216 -> "22.7M"
std::string fixed(double value, int digits);
// Shortest text that reads back to the same double; never locale dependent.
std::string shortest(double value);

// Byte offset of the first invalid UTF-8 sequence (overlong, surrogate, truncated included), or nothing.
std::optional<std::size_t> invalid_utf8(std::string_view text);
// Decodes one code point at `offset` and advances it; invalid bytes give U+FFFD and advance by one.
char32_t next_code_point(std::string_view text, std::size_t& offset);
void append_utf8(std::string& out, char32_t code_point);

}  // namespace kompakt
