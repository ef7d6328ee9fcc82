// Records of delimited text files: CSV by RFC 4180, TSV, and plain lines, each with the line it begins on.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace kompakt {

struct Record {
  std::int64_t line = 0;  // from 1
  std::vector<std::string> cells;
};

// The file's text without a byte order mark. Error with file:line when it is not valid UTF-8.
std::string read_utf8_text(const std::filesystem::path& file);
// Lines without their ends ("\n" or "\r\n"); empty lines are kept out.
std::vector<Record> read_lines(std::string_view text);
// Quoted cells may hold separators, line breaks and doubled quotes. Errors: a quote that never closes, text behind a closing quote.
std::vector<Record> read_csv(std::string_view text, char separator, const std::string& place);
std::vector<Record> read_tsv(std::string_view text);  // no quoting

}  // namespace kompakt
