#!/usr/bin/env python3
"""Writes data/unicode_reference.cpp: the character classes that the package `tokenizers` itself uses in its BERT parts.

usage: make_unicode_reference.py OUTPUT

Its tables are of an older Unicode version than the system's library, so ids would differ for characters assigned since.
Every code point is asked; the result does not depend on Python's own tables.
"""
import sys

from tokenizers.normalizers import BertNormalizer, Lowercase
from tokenizers.pre_tokenizers import BertPreTokenizer


def ranges(numbers):
    out = []
    for number in numbers:
        if out and out[-1][1] == number - 1:
            out[-1][1] = number
        else:
            out.append([number, number])
    return out


def table(name, rows, comment):
    cells, line = [], "   "
    for row in rows:
        cell = " {" + ", ".join(f"0x{v:X}" if i < 2 else str(v) for i, v in enumerate(row)) + "},"
        if len(line) + len(cell) > 158:
            cells.append(line)
            line = "   "
        line += cell
    cells.append(line)
    kind = "LowerRange" if len(rows[0]) == 3 else "CodeRange"
    return f"// {comment}\nconst {kind} {name}[] = {{\n" + "\n".join(cells) + "\n};\n"


def main():
    strip = BertNormalizer(clean_text=False, handle_chinese_chars=False, strip_accents=True, lowercase=False)
    clean = BertNormalizer(clean_text=True, handle_chinese_chars=False, strip_accents=False, lowercase=False)
    words, lower = BertPreTokenizer(), Lowercase()
    marks, others, punctuation, lowered = [], [], [], []
    for code in range(0x110000):
        if 0xD800 <= code <= 0xDFFF:
            continue
        c = chr(code)
        if strip.normalize_str(c) == "":
            marks.append(code)
        if clean.normalize_str(c) == "" and code not in (0, 0xFFFD):
            others.append(code)
        if len(words.pre_tokenize_str("a" + c + "b")) == 3:
            punctuation.append(code)
        small = lower.normalize_str(c)
        if small != c and len(small) == 1:
            lowered.append((code, ord(small) - code))
    rows = []
    for code, shift in lowered:
        if rows and rows[-1][1] == code - 1 and rows[-1][2] == shift:
            rows[-1][1] = code
        else:
            rows.append([code, code, shift])
    with open(sys.argv[1], "w") as out:
        out.write("// Character classes as the reference tokenizers have them. Made by scripts/make_unicode_reference.py; not to be edited.\n")
        out.write('#include "data/unicode_reference.h"\n\n#include <algorithm>\n#include <iterator>\n\nnamespace kompakt {\nnamespace {\n\n')
        out.write("struct CodeRange {\n  char32_t first, last;\n};\nstruct LowerRange {\n  char32_t first, last;\n  int shift;\n};\n\n")
        out.write(table("reference_marks", ranges(marks), "Removed by strip_accents.") + "\n")
        out.write(table("reference_others", ranges(others), "Removed by clean_text.") + "\n")
        out.write(table("reference_punctuation", ranges(punctuation), "Punctuation of the BERT pre-tokenizer.") + "\n")
        out.write(table("reference_lower", rows, "Lower case: characters of a range move by the third number.") + "\n")
        out.write(
            """template <class Range, std::size_t count>
const Range* reference_find(const Range (&table)[count], char32_t c) {
  const Range* found = std::upper_bound(std::begin(table), std::end(table), c, [](char32_t value, const Range& range) { return value < range.first; });
  return found != std::begin(table) && c <= (found - 1)->last ? found - 1 : nullptr;
}

}  // namespace

bool reference_is_mark(char32_t c) { return c >= 0x300 && reference_find(reference_marks, c); }
bool reference_is_other(char32_t c) { return reference_find(reference_others, c); }
bool reference_is_punctuation(char32_t c) { return reference_find(reference_punctuation, c); }

char32_t reference_lower_case(char32_t c) {
  const LowerRange* range = reference_find(reference_lower, c);
  return range ? static_cast<char32_t>(static_cast<int>(c) + range->shift) : c;
}

}  // namespace kompakt
"""
        )


if __name__ == "__main__":
    main()
