// The printable stand-ins of bytes in byte-level BPE (GPT-2's bytes_to_unicode).
#pragma once

#include <string>
#include <string_view>

namespace kompakt {

// UTF-8 of the stand-in of a byte.
const std::string& byte_level_character(unsigned char byte);
// Byte of a stand-in, or -1.
int byte_level_value(char32_t character);
void append_byte_level(std::string& out, std::string_view bytes);

}  // namespace kompakt
