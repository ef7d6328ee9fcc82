// A strict reader: what RFC 4180 does not allow is an Error with its line, never a guess.
#include "data/records.h"

#include <algorithm>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"

namespace kompakt {

std::string read_utf8_text(const std::filesystem::path& file) {
  std::string text = read_text(file);
  if (const auto bad = invalid_utf8(text)) {
    const auto line = std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(*bad), '\n') + 1;
    const auto byte = static_cast<unsigned>(static_cast<unsigned char>(text[*bad]));
    throw Error("the text is not valid UTF-8").at(str(file.string(), ":", line)).given(str("byte value ", byte)).hint("convert it first, for example: iconv -f LATIN1 -t UTF-8 FILE");
  }
  if (starts_with(text, "\xEF\xBB\xBF")) text.erase(0, 3);
  return text;
}

std::vector<Record> read_lines(std::string_view text) {
  std::vector<Record> records;
  std::int64_t line = 0;
  for (std::size_t start = 0; start < text.size();) {
    ++line;
    const std::size_t end = std::min(text.find('\n', start), text.size());
    std::string_view content = text.substr(start, end - start);
    if (!content.empty() && content.back() == '\r') content.remove_suffix(1);
    if (!content.empty()) records.push_back({line, {std::string(content)}});
    start = end + 1;
  }
  return records;
}

std::vector<Record> read_tsv(std::string_view text) {
  std::vector<Record> records = read_lines(text);
  for (Record& record : records) record.cells = split(std::string(record.cells[0]), '\t');
  return records;
}

std::vector<Record> read_csv(std::string_view text, char separator, const std::string& place) {
  std::vector<Record> records;
  std::int64_t line = 1;
  std::size_t at = 0;
  const auto at_end_of_line = [&] { return text[at] == '\n' || (text[at] == '\r' && at + 1 < text.size() && text[at + 1] == '\n'); };
  while (at < text.size()) {
    Record record{line, {}};
    bool more = true, quoted_cell = false;
    while (more) {
      std::string cell;
      if (at < text.size() && text[at] == '"') {
        quoted_cell = true;
        const std::int64_t opened = line;
        for (++at;; ++at) {
          if (at >= text.size()) throw Error("a quoted cell never ends").at(str(place, ":", opened)).hint("double every quote inside a quoted cell");
          if (text[at] == '"') {
            if (at + 1 >= text.size() || text[at + 1] != '"') break;
            ++at;
          }
          if (text[at] == '\n') ++line;
          cell += text[at];
        }
        ++at;
        if (at < text.size() && text[at] != separator && !at_end_of_line())
          throw Error("text stands behind the closing quote of a cell").at(str(place, ":", line)).given(std::string(text.substr(at, 20))).hint("double every quote inside a quoted cell");
      } else {
        while (at < text.size() && text[at] != separator && !at_end_of_line()) cell += text[at++];
      }
      record.cells.push_back(std::move(cell));
      more = at < text.size() && text[at] == separator;
      if (more) ++at;
    }
    if (at < text.size()) {
      at += text[at] == '\r' ? 2 : 1;
      ++line;
    }
    if (record.cells.size() > 1 || quoted_cell || !record.cells[0].empty()) records.push_back(std::move(record));
  }
  return records;
}

}  // namespace kompakt
