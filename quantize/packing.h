// Codes of a row to bytes and back: little-endian strings of 1..8 bits, and five trits a byte. Raw pointers, CPU.
// A row starts at a whole byte; unused bits and trits are those of code_min.
#pragma once

#include <cstdint>

namespace kompakt {

enum class Packing { bits, trits };

struct CodeLayout {
  Packing packing = Packing::bits;
  int bits = 8;       // per code; ignored for trits
  int code_min = 0;   // stored value = code - code_min
  int code_max = 0;

  std::int64_t row_bytes(std::int64_t columns) const;
};

// codes [rows, columns] -> bytes [rows, row_bytes].
void pack_codes(const CodeLayout& layout, const std::int8_t* codes, std::int64_t rows, std::int64_t columns, std::uint8_t* bytes);
// Values above code_max (bytes that pack_codes never writes) give false; the codes are then not to be used.
bool unpack_codes(const CodeLayout& layout, const std::uint8_t* bytes, std::int64_t rows, std::int64_t columns, std::int8_t* codes);

}  // namespace kompakt
