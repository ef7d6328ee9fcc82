// Raw DEFLATE streams (RFC 1951) of Huffman codes alone, without searching for repeats: for symbols that are independent of each other, such as
// the codes of weights, where a match would cost more than it saves. The only door to zlib.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace kompakt {

// A table of codes for every 32,768 symbols or so: within .01 bits a symbol of one table's ideal when the symbols keep their frequencies.
std::vector<std::byte> huffman_compress(std::span<const std::byte> symbols);
// The symbols of one stream that must hold `least` to `most` of them and nothing behind. Error at `place` when it is damaged or of another size.
std::vector<std::byte> huffman_decompress(std::span<const std::byte> stream, std::size_t least, std::size_t most, const std::string& place);

}  // namespace kompakt
