// Bytes of the reference encoders against checksums from compiled ggml, for two fixed inputs.
#include <catch2/catch.hpp>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "formats/ggml_blocks.h"

namespace kompakt {
namespace {

std::uint32_t crc32(const std::vector<std::byte>& bytes) {
  std::uint32_t crc = 0xFFFFFFFFu;
  for (const std::byte byte : bytes) {
    crc ^= std::to_integer<std::uint32_t>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0xEDB88320u : 0);
  }
  return ~crc;
}

std::vector<float> input_a() {
  std::vector<float> x(256);
  for (int i = 0; i < 256; ++i) x[i] = 0.5f * static_cast<float>((i * 37 + 11) % 7 % 3 - 1);
  return x;
}

std::vector<float> input_b() {
  std::vector<float> x(256);
  for (int i = 0; i < 256; ++i) x[i] = static_cast<float>((i * 29 + 7) % 101 - 50) / 50.0f;
  return x;
}

std::vector<std::byte> encoded(const char* name, const std::vector<float>& x) {
  const GgmlType* type = find_ggml_type(std::string_view(name));
  REQUIRE(type);
  REQUIRE(type->encode);
  std::vector<std::byte> bytes(256 / type->block * type->bytes);
  for (int i = 0; i < 256 / type->block; ++i) type->encode(x.data() + i * type->block, bytes.data() + i * type->bytes);
  return bytes;
}

std::string hex(const std::vector<std::byte>& bytes, std::size_t from, std::size_t count) {
  std::string text;
  char digits[4];
  for (std::size_t i = from; i < from + count; ++i) {
    std::snprintf(digits, sizeof digits, i == from ? "%02x" : " %02x", std::to_integer<unsigned>(bytes[i]));
    text += digits;
  }
  return text;
}

}  // namespace

TEST_CASE("the reference encoders give ggml's bytes") {
  struct Golden {
    const char* type;
    bool ternary;
    std::size_t size;
    std::uint32_t crc;
  };
  const auto golden = GENERATE(values<Golden>({
      {"TQ1_0", true, 54, 0xba49fa9e},   {"TQ2_0", true, 66, 0xbe65d18e},   {"Q2_0", true, 72, 0xb394366c},   {"Q8_0", false, 272, 0x21a52a97},
      {"Q4_0", false, 144, 0xf1cc21bc},  {"Q6_K", false, 210, 0xf8b189bb},  {"Q5_0", false, 176, 0xf2da4a65}, {"IQ4_NL", false, 144, 0x6abe880f},
      {"Q5_K", false, 176, 0xfec08080},  {"Q3_K", false, 110, 0x600775ea},  {"Q2_K", false, 84, 0xcf9d1f26},  {"Q4_K", false, 144, 0x22ec6bfa},
  }));
  CAPTURE(golden.type);
  const auto bytes = encoded(golden.type, golden.ternary ? input_a() : input_b());
  CHECK(bytes.size() == golden.size);
  CHECK(crc32(bytes) == golden.crc);
}

TEST_CASE("the first and last bytes of the golden blocks are the documented ones") {
  CHECK(hex(encoded("TQ1_0", input_a()), 28, 26) == "90 10 94 30 ac 8c 05 a2 0f e4 2f ac 8c 05 a2 0f e4 2f ac 8c 92 30 ae 30 00 38");
  CHECK(hex(encoded("TQ2_0", input_a()), 0, 8) == "09 90 49 24 42 24 92 09");
  CHECK(hex(encoded("Q2_0", input_a()), 0, 18) == "00 38 11 62 84 18 21 46 88 11 62 84 18 21 46 88 11 62");
  CHECK(hex(encoded("Q4_0", input_b()), 0, 18) == "ae af 5f 0a c6 81 3d f8 a3 5f 0a c5 70 2d f8 a3 5f 0a");
  CHECK(hex(encoded("Q6_K", input_b()), 192, 18) == "90 85 84 7c 77 70 92 8b 86 80 7c 72 71 8e 89 80 25 0c");
  CHECK(hex(encoded("Q4_K", input_b()), 0, 16) == "a9 18 30 24 f3 ff f3 f2 f2 fd fa f2 ef 93 53 ff");
}

}  // namespace kompakt
