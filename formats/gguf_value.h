// GGUF's value types: one row each (width, name, reading, writing). Shared by the reader and the writer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "formats/gguf.h"

namespace kompakt {

inline constexpr std::uint32_t gguf_default_alignment = 32;
inline constexpr std::uint64_t gguf_max_rank = 4;

// Position in the bytes of a file; every read is checked, and the Error names file and what was being read.
class GgufCursor {
 public:
  GgufCursor(std::span<const std::byte> bytes, std::string place) : bytes_(bytes), place_(std::move(place)) {}
  void place(std::string place) { place_ = std::move(place); }
  const std::string& place() const { return place_; }
  std::size_t position() const { return position_; }
  std::size_t left() const { return bytes_.size() - position_; }
  std::span<const std::byte> take(std::uint64_t count, const char* what);
  std::uint32_t u32(const char* what);
  std::uint64_t u64(const char* what);
  std::string text(const char* what);  // u64 length, then bytes

 private:
  std::span<const std::byte> bytes_;
  std::string place_;
  std::size_t position_ = 0;
};

// Reads type and value. Booleans other than 0 and 1, unknown types, nested arrays and counts past the end are Errors.
GgufValue read_gguf_value(GgufCursor& cursor);
// Appends type and value; the inverse of read_gguf_value. std::logic_error when `data` does not fit `type`.
void append_gguf_value(std::string& out, const GgufValue& value);
void append_gguf_text(std::string& out, const std::string& text);

template <class T>
void append_little_endian(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);  // the hosts we build for are little-endian
}

}  // namespace kompakt
