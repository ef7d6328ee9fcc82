// GPT-2's table: printable Latin-1 bytes stand for themselves, the other 68 bytes for U+0100 and following.
#include "data/byte_level.h"

#include <array>

#include "core/text.h"

namespace kompakt {
namespace {

struct ByteLevelTable {
  std::array<std::string, 256> text;
  std::array<int, 324> value;
  ByteLevelTable() {
    value.fill(-1);
    char32_t next = 256;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
      const char32_t character = printable ? static_cast<char32_t>(byte) : next++;
      append_utf8(text[static_cast<std::size_t>(byte)], character);
      value[character] = byte;
    }
  }
};

const ByteLevelTable& byte_level_table() {
  static const ByteLevelTable table;
  return table;
}

}  // namespace

const std::string& byte_level_character(unsigned char byte) { return byte_level_table().text[byte]; }

int byte_level_value(char32_t character) { return character < 324 ? byte_level_table().value[character] : -1; }

void append_byte_level(std::string& out, std::string_view bytes) {
  const ByteLevelTable& table = byte_level_table();
  for (const char byte : bytes) out += table.text[static_cast<unsigned char>(byte)];
}

}  // namespace kompakt
