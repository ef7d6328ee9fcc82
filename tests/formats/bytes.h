// Building damaged files byte by byte.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>

#include "core/error.h"
#include "core/files.h"
#include "core/random.h"

namespace kompakt::testing {

// Appends little-endian numbers and GGUF strings.
struct ByteBuilder {
  std::string bytes;
  template <class T>
  ByteBuilder& number(T value) {
    bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
  }
  ByteBuilder& u32(std::uint32_t value) { return number(value); }
  ByteBuilder& u64(std::uint64_t value) { return number(value); }
  ByteBuilder& raw(const std::string& text) {
    bytes += text;
    return *this;
  }
  ByteBuilder& text(const std::string& value) { return u64(value.size()).raw(value); }
  ByteBuilder& zeros(std::size_t count) {
    bytes.append(count, '\0');
    return *this;
  }
  ByteBuilder& pad(std::size_t alignment) {
    while (bytes.size() % alignment) bytes += '\0';
    return *this;
  }
};

inline std::filesystem::path put_file(const TemporaryFolder& folder, const std::string& bytes, const char* name) {
  const auto path = folder.path() / name;
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return path;
}

// Mutates `good` in a fixed pseudo-random way (bytes flipped, numbers made huge, text cut or doubled) and calls `open` on each
// result. Anything but success or kompakt::Error escapes and fails the test. Returns how many were refused.
template <class Open>
int fuzz(const std::string& good, int rounds, std::uint64_t seed, const char* name, const Open& open) {
  const TemporaryFolder folder;
  const CounterRandom random(seed, "fuzz");
  int refused = 0;
  std::uint64_t draw = 0;
  for (int round = 0; round < rounds; ++round) {
    std::string bytes = good;
    const auto changes = 1 + random.below(draw++, 4);
    for (std::uint64_t change = 0; change < changes && !bytes.empty(); ++change) {
      const auto at = static_cast<std::size_t>(random.below(draw++, bytes.size()));
      const std::uint64_t kind = random.below(draw++, 6), value = random.bits(draw++);
      if (kind < 3) bytes[at] = static_cast<char>(value);
      else if (kind == 3) bytes.resize(at);
      else if (kind == 4) bytes.insert(at, bytes.substr(at / 2, value % 32));
      else if (at + 8 <= bytes.size()) std::memset(bytes.data() + at, value % 2 ? 0xFF : 0x7F, 8);
    }
    try {
      open(put_file(folder, bytes, name));
    } catch (const Error&) {
      ++refused;
    }
  }
  return refused;
}

}  // namespace kompakt::testing
