// Unicode properties and normal forms that tokenizers need. The door to utf8proc.
// Text is UTF-8; invalid bytes must have been replaced before (valid_utf8_copy).
#pragma once

#include <string>
#include <string_view>

namespace kompakt {

enum class NormalForm { nfc, nfd, nfkc, nfkd };
std::string normal_form(std::string_view text, NormalForm form);

// Full lower case of single characters, without context rules (U+0130 becomes two characters), as Rust's char::to_lowercase.
void append_lower(std::string& out, char32_t c);

bool is_white_space(char32_t c);      // property White_Space
bool is_numeric(char32_t c);          // categories Nd, Nl, No
bool is_nonspacing_mark(char32_t c);  // Mn
bool is_mark(char32_t c);             // Mn, Mc, Me
bool is_other_category(char32_t c);   // Cc, Cf, Co
bool is_bert_punctuation(char32_t c); // ASCII punctuation and symbols, and categories P*
bool is_word_character(char32_t c);   // letters, marks, decimal digits, connector punctuation

// Invalid sequences become U+FFFD, one for each maximal ill-formed part (as Rust's from_utf8_lossy and Python's "replace").
std::string valid_utf8_copy(std::string_view bytes);

// Number of code points of valid UTF-8.
std::size_t count_code_points(std::string_view text);
// Bytes of the code point that starts with this byte (valid UTF-8).
inline std::size_t utf8_length(char first) {
  const auto byte = static_cast<unsigned char>(first);
  return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

}  // namespace kompakt
