// Bit strings and trits; the byte arithmetic itself is in grid_math.h, shared with the CUDA kernels.
#include "quantize/packing.h"

#include <cstring>

#include "quantize/grid_math.h"

namespace kompakt {
namespace {

void pack_row_bits(const CodeLayout& layout, const std::int8_t* codes, std::int64_t columns, std::uint8_t* bytes) {
  std::uint32_t word = 0;
  int filled = 0;
  for (std::int64_t k = 0; k < columns; ++k) {
    word |= static_cast<std::uint32_t>(codes[k] - layout.code_min) << filled;
    filled += layout.bits;
    while (filled >= 8) {
      *bytes++ = static_cast<std::uint8_t>(word);
      word >>= 8, filled -= 8;
    }
  }
  if (filled > 0) *bytes = static_cast<std::uint8_t>(word);
}

void pack_row_trits(const CodeLayout& layout, const std::int8_t* codes, std::int64_t columns, std::uint8_t* bytes) {
  for (std::int64_t k = 0; k < columns; k += 5) {
    unsigned trits[5] = {0, 0, 0, 0, 0};
    for (std::int64_t i = 0; i < 5 && k + i < columns; ++i) trits[i] = static_cast<unsigned>(codes[k + i] - layout.code_min);
    *bytes++ = grid::pack_trits(trits[0], trits[1], trits[2], trits[3], trits[4]);
  }
}

}  // namespace

std::int64_t CodeLayout::row_bytes(std::int64_t columns) const { return packing == Packing::trits ? (columns + 4) / 5 : (columns * bits + 7) / 8; }

void pack_codes(const CodeLayout& layout, const std::int8_t* codes, std::int64_t rows, std::int64_t columns, std::uint8_t* bytes) {
  const std::int64_t stride = layout.row_bytes(columns);
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto pack = layout.packing == Packing::trits ? pack_row_trits : pack_row_bits;
    pack(layout, codes + r * columns, columns, bytes + r * stride);
  }
}

bool unpack_codes(const CodeLayout& layout, const std::uint8_t* bytes, std::int64_t rows, std::int64_t columns, std::int8_t* codes) {
  const std::int64_t stride = layout.row_bytes(columns);
  const unsigned top = static_cast<unsigned>(layout.code_max - layout.code_min);
  bool valid = true;
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::uint8_t* row = bytes + r * stride;
    std::int8_t* out = codes + r * columns;
    if (layout.packing == Packing::trits) {
      for (std::int64_t k = 0; k < columns; ++k) out[k] = static_cast<std::int8_t>(static_cast<int>(grid::unpack_trit(row[k / 5], static_cast<int>(k % 5))) + layout.code_min);
      continue;
    }
    for (std::int64_t k = 0; k < columns; ++k) {
      const unsigned value = grid::unpack_bits(row, k, layout.bits);
      valid &= value <= top;
      out[k] = static_cast<std::int8_t>(static_cast<int>(value) + layout.code_min);
    }
  }
  return valid;
}

}  // namespace kompakt
