// A teacher's distribution in short as bytes: the likeliest tokens, the probability of the rest, and draws from the rest.
//
// Per position, before zstd: 2 bytes for the rest, one for each gap between neighbouring log-probabilities, one for each draw's
// log-probability, and ceil(log2 V) bits for each token. With the 64 likeliest of 49,152, and 32 draws: 289 bytes.
// Log-probabilities are coded as differences on a square-root scale (fine where they are small), each from the decoded value before
// it, so that errors do not add up; the largest one follows from the sum, which is exactly 1 after decoding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace kompakt {

// What all rows of a cache have in common.
struct SparseLayout {
  std::int64_t tokens = 0;      // positions of a row
  std::int64_t top = 0;         // likeliest tokens kept
  std::int64_t draws = 0;
  std::int64_t vocabulary = 0;
  int id_bits() const;               // ceil(log2 vocabulary), at least 1
  std::size_t packed_bytes() const;  // of a row, before compression
};

// Row-major [tokens, top], [tokens], [tokens, draws]. log_p falls along a position; draw_log_p: within the rest.
struct SparseRow {
  std::vector<std::int64_t> ids, draws;
  std::vector<float> log_p, log_rest, draw_log_p;
};

// Largest differences that a byte can say: from one kept token to the next, and from the last kept one to a drawn one. A difference x has
// code c = round(255 sqrt(x / largest)): what is decoded is at most largest (c + 1/4) / 255^2 below x, and less above.
constexpr double sparse_largest_gap = 20, sparse_largest_depth = 16;

// One zstd frame.
std::vector<std::byte> encode_sparse_row(const SparseRow& row, const SparseLayout& layout);
// Error at `place` for damaged bytes, and for a token that is not in the vocabulary.
SparseRow decode_sparse_row(std::span<const std::byte> bytes, const SparseLayout& layout, const std::string& place);

// count values of `bits` bits, least significant bit first; the last byte is filled with zeros.
std::vector<std::byte> pack_bits(std::span<const std::int64_t> values, int bits);
std::vector<std::int64_t> unpack_bits(std::span<const std::byte> bytes, std::size_t count, int bits);

}  // namespace kompakt
