// Codes stored with as many bits as they are surprising: Huffman codes over one or two codes at a time. A uniform grid without
// clipping whose codes are stored like that needs, at the same error, half a bit to a bit less per weight than codes of equal length
// need (entropy-coded scalar quantization; Gish and Pierce 1968: a quarter of a bit from the rate-distortion bound at high rates).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace kompakt {

// codes int8 [N,K] -> a byte that says how many codes a symbol holds (1 or 2), then a raw DEFLATE stream (formats/deflate.h) of the
// symbols, row after row. One: code + 128. Two: (first + 7) + 16 (second + 7), where 15 in place of a code outside of -7..7 sends the
// reader to the bytes behind the symbols: such codes + 128, in order. The last of an odd number of codes stands beside a zero.
// The smaller of both is taken. With 4 added to the first byte the rows are in another order, and behind it stand the rows' numbers in that
// order, two bytes each, the lower first: rows whose codes spread alike then share a table.
std::vector<std::byte> entropy_encode(const at::Tensor& codes);
// The reverse. Error at `place` when the bytes are damaged, or a code is not between low and high.
at::Tensor entropy_decode(std::span<const std::byte> bytes, std::int64_t rows, std::int64_t columns, int low, int high, const std::string& place);

}  // namespace kompakt
