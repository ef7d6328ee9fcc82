// Unicode properties and normal forms through utf8proc; pure ASCII text takes the short way.
#include "data/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "core/text.h"
#include "data/unicode_reference.h"

namespace kompakt {
namespace {

bool unicode_all_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

utf8proc_category_t unicode_category(char32_t c) { return utf8proc_category(static_cast<utf8proc_int32_t>(c)); }

}  // namespace

std::string normal_form(std::string_view text, NormalForm form) {
  if (unicode_all_ascii(text)) return std::string(text);
  int options = UTF8PROC_STABLE;
  if (form == NormalForm::nfc || form == NormalForm::nfkc) options |= UTF8PROC_COMPOSE;
  else options |= UTF8PROC_DECOMPOSE;
  if (form == NormalForm::nfkc || form == NormalForm::nfkd) options |= UTF8PROC_COMPAT;
  utf8proc_uint8_t* result = nullptr;
  const utf8proc_ssize_t length = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()), &result,
                                               static_cast<utf8proc_option_t>(options));
  if (length < 0) throw std::logic_error(std::string("utf8proc: ") + utf8proc_errmsg(length));
  std::string out(reinterpret_cast<const char*>(result), static_cast<std::size_t>(length));
  std::free(result);
  return out;
}

void append_lower(std::string& out, char32_t c) {
  if (c < 0x80) {
    out += static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c);
  } else if (c == 0x130) {
    out += "i\xCC\x87";
  } else {
    append_utf8(out, reference_lower_case(c));
  }
}

bool is_white_space(char32_t c) {
  return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

bool is_numeric(char32_t c) {
  if (c < 0x80) return c >= '0' && c <= '9';
  const auto category = unicode_category(c);
  return category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_NL || category == UTF8PROC_CATEGORY_NO;
}

bool is_nonspacing_mark(char32_t c) { return reference_is_mark(c); }

bool is_mark(char32_t c) {
  if (c < 0x300) return false;
  const auto category = unicode_category(c);
  return category == UTF8PROC_CATEGORY_MN || category == UTF8PROC_CATEGORY_MC || category == UTF8PROC_CATEGORY_ME;
}

bool is_other_category(char32_t c) { return reference_is_other(c); }

bool is_bert_punctuation(char32_t c) {
  if (c < 0x80) return (c >= 33 && c <= 47) || (c >= 58 && c <= 64) || (c >= 91 && c <= 96) || (c >= 123 && c <= 126);
  return reference_is_punctuation(c);
}

bool is_word_character(char32_t c) {
  const auto category = unicode_category(c);
  return (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_ME) || category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_PC;
}

std::string valid_utf8_copy(std::string_view bytes) {
  if (!invalid_utf8(bytes)) return std::string(bytes);
  std::string out;
  out.reserve(bytes.size() + 16);
  const auto at = [&](std::size_t i) { return i < bytes.size() ? static_cast<unsigned>(static_cast<unsigned char>(bytes[i])) : 0u; };
  for (std::size_t i = 0; i < bytes.size();) {
    const unsigned first = at(i);
    std::size_t length = 1;
    bool good = first < 0x80;
    if (first >= 0xC2 && first <= 0xF4) {
      // The second byte has a narrower range after E0, ED, F0 and F4 (no overlong forms, no surrogates, nothing above U+10FFFF).
      const unsigned low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80, high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
      const std::size_t needed = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
      if (at(i + 1) >= low && at(i + 1) <= high) {
        length = 2;
        while (length < needed && (at(i + length) & 0xC0) == 0x80) ++length;
        good = length == needed;
      }
    }
    if (good) out.append(bytes.substr(i, length));
    else out += "\xEF\xBF\xBD";
    i += length;
  }
  return out;
}

std::size_t count_code_points(std::string_view text) {
  return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

}  // namespace kompakt
