// PCRE2 with UTF, Unicode properties and JIT. Match data and the JIT stack are per thread, so one Regex serves all threads.
#define PCRE2_CODE_UNIT_WIDTH 8
#include "data/regex.h"

#include <pcre2.h>

#include <stdexcept>

#include "core/error.h"
#include "core/text.h"
#include "data/unicode.h"

namespace kompakt {
namespace {

// Long runs (100,000 spaces) need more than the 32 KiB the JIT takes from the machine stack.
struct RegexWorkspace {
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = pcre2_jit_stack_create(64 * 1024, 256 * 1024 * 1024, nullptr);
  RegexWorkspace() {
    pcre2_jit_stack_assign(context, nullptr, stack);
    pcre2_set_match_limit(context, 1u << 31);
    pcre2_set_depth_limit(context, 1u << 31);
    pcre2_set_heap_limit(context, 4u << 20);
  }
  ~RegexWorkspace() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    pcre2_jit_stack_free(stack);
  }
};

RegexWorkspace& regex_workspace() {
  thread_local RegexWorkspace workspace;
  return workspace;
}

Error regex_error(const std::string& pattern, const std::string& why, const std::string& place) {
  return Error(str("the regular expression of the tokenizer cannot be used: ", why)).at(place).given(pattern);
}

}  // namespace

struct Regex::Compiled {
  pcre2_code* code = nullptr;
  ~Compiled() { pcre2_code_free(code); }
};

std::string translate_pattern(const std::string& pattern, const std::string& place) {
  std::string out;
  bool in_class = false;
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\' && i + 1 < pattern.size()) {
      const char next = pattern[++i];
      const std::string word = "\\p{L}\\p{M}\\p{Nd}\\p{Pc}";
      if (next == 's') out += "\\p{White_Space}";
      else if (next == 'S') out += "\\P{White_Space}";
      else if (next == 'd') out += "\\p{Nd}";
      else if (next == 'D') out += "\\P{Nd}";
      else if (next == 'w') out += in_class ? word : "[" + word + "]";
      else if (next == 'W' && !in_class) out += "[^" + word + "]";
      else if (next == 'W' || next == 'h' || next == 'H' || next == 'R' || next == 'X' || next == 'Z' || next == 'G' || next == 'K')
        throw regex_error(pattern, str("\\", next, in_class ? " inside a character class" : "", " is not supported"), place);
      else if ((next == 'p' || next == 'P') && pattern.compare(i + 1, 2, "{^") == 0) {
        out += next == 'p' ? "\\P{" : "\\p{";
        i += 2;
      } else {
        out += '\\';
        out += next;
      }
      continue;
    }
    if (in_class) {
      if (c == '[') {
        if (pattern.compare(i, 2, "[:") != 0) throw regex_error(pattern, "a character class inside another is not supported", place);
        const std::size_t end = pattern.find(":]", i + 2);
        if (end == std::string::npos) throw regex_error(pattern, "a class name without its end", place);
        out += pattern.substr(i, end + 2 - i);
        i = end + 1;
        continue;
      }
      if (c == '&' && pattern.compare(i, 2, "&&") == 0) throw regex_error(pattern, "the intersection && of character classes is not supported", place);
      if (c == ']') in_class = false;
    } else if (c == '[') {
      in_class = true;
      out += c;
      if (i + 1 < pattern.size() && pattern[i + 1] == '^') out += pattern[++i];
      if (i + 1 < pattern.size() && pattern[i + 1] == ']') {  // a bracket right after the opening is a character
        out += "\\]";
        ++i;
      }
      continue;
    }
    out += c;
  }
  return out;
}

Regex::Regex(const std::string& pattern, const std::string& place) : pattern_(pattern), compiled_(std::make_unique<Compiled>()) {
  const std::string text = translate_pattern(pattern, place);
  int code = 0;
  PCRE2_SIZE offset = 0;
  compiled_->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), PCRE2_UTF | PCRE2_UCP, &code, &offset, nullptr);
  if (!compiled_->code) {
    char message[256] = {};
    pcre2_get_error_message(code, reinterpret_cast<PCRE2_UCHAR*>(message), sizeof message);
    throw regex_error(pattern, str(message, " (at byte ", offset, " of ", text, ")"), place);
  }
  // Where the machine allows no JIT the interpreter gives the same matches.
  pcre2_jit_compile(compiled_->code, PCRE2_JIT_COMPLETE);
}

Regex::~Regex() = default;
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;

void Regex::find_all(std::string_view text, std::vector<std::pair<std::size_t, std::size_t>>& matches) const {
  matches.clear();
  RegexWorkspace& workspace = regex_workspace();
  const PCRE2_SIZE* found = pcre2_get_ovector_pointer(workspace.data);
  std::size_t start = 0;
  bool after_empty = false;
  while (start <= text.size()) {
    const std::uint32_t options = PCRE2_NO_UTF_CHECK | (after_empty ? PCRE2_NOTEMPTY_ATSTART : 0);
    const int code = pcre2_match(compiled_->code, reinterpret_cast<PCRE2_SPTR>(text.data() ? text.data() : ""), text.size(), start, options, workspace.data, workspace.context);
    if (code == PCRE2_ERROR_NOMATCH) return;
    if (code < 0) throw std::runtime_error(str("pcre2_match failed with code ", code, " for pattern ", pattern_));
    matches.emplace_back(found[0], found[1]);
    after_empty = found[0] == found[1];
    start = found[1];
  }
}

}  // namespace kompakt
