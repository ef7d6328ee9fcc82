// Huffman codes alone: what goes in comes out, sizes near the entropy, and damaged streams are refused.
#include "formats/deflate.h"

#include <catch2/catch.hpp>

#include <cmath>

#include "core/random.h"
#include "tests/support.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

// Symbols 0..7 with probabilities 1/2, 1/4, ... : Huffman codes reach their entropy of 2 - 2^-6 bits exactly.
std::vector<std::byte> geometric_symbols(std::size_t count) {
  const CounterRandom random(3, "deflate");
  std::vector<std::byte> out(count);
  for (std::size_t i = 0; i < count; ++i) {
    const double u = random.uniform(i);
    int symbol = 0;
    while (symbol < 7 && u < std::ldexp(1.0, -symbol - 1)) ++symbol;
    out[i] = static_cast<std::byte>(static_cast<unsigned char>(symbol));
  }
  return out;
}

}  // namespace

TEST_CASE("Huffman streams give their symbols back", "[deflate]") {
  for (const std::size_t count : {std::size_t(0), std::size_t(1), std::size_t(2), std::size_t(1000), std::size_t(300001)}) {
    const std::vector<std::byte> symbols = geometric_symbols(count), stream = huffman_compress(symbols);
    CHECK(huffman_decompress(stream, count, count, "here") == symbols);
    CHECK(huffman_decompress(stream, 0, 2 * count + 10, "here") == symbols);
  }
  const std::vector<std::byte> same(100000, std::byte{9});
  CHECK(huffman_decompress(huffman_compress(same), same.size(), same.size(), "here") == same);
}

TEST_CASE("the size of a Huffman stream is that of ideal codes and a percent", "[deflate]") {
  const std::size_t count = 400000;
  const double bits = 8.0 * static_cast<double>(huffman_compress(geometric_symbols(count)).size()) / static_cast<double>(count), entropy = 2 - std::ldexp(1.0, -6);
  CHECK(bits > entropy);
  CHECK(bits < entropy * 1.01);
  // Repeats are not looked for: a stream that repeats itself is as long as one that does not.
  std::vector<std::byte> twice = geometric_symbols(count / 2);
  twice.insert(twice.end(), twice.begin(), twice.begin() + static_cast<std::ptrdiff_t>(count / 2));
  CHECK(8.0 * static_cast<double>(huffman_compress(twice).size()) / static_cast<double>(count) > entropy * 0.99);
}

TEST_CASE("damaged Huffman streams are refused with their place", "[deflate]") {
  const std::vector<std::byte> symbols = geometric_symbols(5000), stream = huffman_compress(symbols);
  const auto refusal = [&](const std::vector<std::byte>& bytes, std::size_t least, std::size_t most) { return error_text([&] { huffman_decompress(bytes, least, most, "file: tensor"); }); };
  CHECK(contains_all(refusal(stream, 4000, 4999), {"more than the 4999", "file: tensor"}));
  CHECK(contains_all(refusal(stream, 5001, 6000), {"5000 symbols of at least 5001"}));
  CHECK(contains_all(refusal({stream.begin(), stream.end() - 5}, 5000, 5000), {"damaged"}));
  CHECK(contains_all(refusal({}, 1, 1), {"ends too early"}));
  std::vector<std::byte> longer = stream;
  longer.push_back(std::byte{0});
  CHECK(contains_all(refusal(longer, 5000, 5000), {"behind the stream"}));
  CHECK(contains_all(refusal(std::vector<std::byte>(100, std::byte{0xff}), 5000, 5000), {"damaged"}));
}
