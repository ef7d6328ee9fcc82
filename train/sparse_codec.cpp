// Bit packing and companded log-probabilities of the teacher's cache.
#include "train/sparse_codec.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>

#include "core/error.h"
#include "core/text.h"
#include "formats/tensor_data.h"
#include "formats/zstd.h"

namespace kompakt {
namespace {

// The rest's log-probability is not kept below this: nothing is learned from less, and log 0 would be no number.
constexpr double codec_smallest_rest = -17;

// x in [0, largest] on 256 levels whose distance grows with the root of x.
std::uint8_t codec_code(double x, double largest) { return static_cast<std::uint8_t>(std::lround(255 * std::sqrt(std::clamp(x / largest, 0.0, 1.0)))); }
double codec_value(std::uint8_t code, double largest) {
  const double root = code / 255.0;
  return root * root * largest;
}

std::size_t codec_packed(std::int64_t count, int bits) { return (static_cast<std::size_t>(count) * static_cast<std::size_t>(bits) + 7) / 8; }

}  // namespace

int SparseLayout::id_bits() const { return std::max(1, static_cast<int>(std::bit_width(static_cast<std::uint64_t>(std::max<std::int64_t>(vocabulary, 1) - 1)))); }

std::size_t SparseLayout::packed_bytes() const {
  return static_cast<std::size_t>(tokens * (2 + (top - 1) + draws)) + codec_packed(tokens * top, id_bits()) + codec_packed(tokens * draws, id_bits());
}

std::vector<std::byte> pack_bits(std::span<const std::int64_t> values, int bits) {
  std::vector<std::byte> out(codec_packed(static_cast<std::int64_t>(values.size()), bits));
  std::uint64_t buffer = 0;
  int held = 0;
  std::size_t at = 0;
  for (const std::int64_t value : values) {
    buffer |= static_cast<std::uint64_t>(value) << held;
    for (held += bits; held >= 8; held -= 8, buffer >>= 8) out[at++] = static_cast<std::byte>(buffer & 0xff);
  }
  if (held > 0) out[at] = static_cast<std::byte>(buffer & 0xff);
  return out;
}

std::vector<std::int64_t> unpack_bits(std::span<const std::byte> bytes, std::size_t count, int bits) {
  if (bytes.size() < codec_packed(static_cast<std::int64_t>(count), bits)) throw std::logic_error("unpack_bits: too few bytes");
  std::vector<std::int64_t> out(count);
  const std::uint64_t mask = (std::uint64_t{1} << bits) - 1;
  std::uint64_t buffer = 0;
  int held = 0;
  std::size_t at = 0;
  for (std::int64_t& value : out) {
    for (; held < bits; held += 8) buffer |= static_cast<std::uint64_t>(bytes[at++]) << held;
    value = static_cast<std::int64_t>(buffer & mask);
    buffer >>= bits;
    held -= bits;
  }
  return out;
}

std::vector<std::byte> encode_sparse_row(const SparseRow& row, const SparseLayout& layout) {
  const auto tokens = static_cast<std::size_t>(layout.tokens), top = static_cast<std::size_t>(layout.top), draws = static_cast<std::size_t>(layout.draws);
  if (row.ids.size() != tokens * top || row.log_p.size() != row.ids.size() || row.log_rest.size() != tokens || row.draws.size() != tokens * draws || row.draw_log_p.size() != row.draws.size())
    throw std::logic_error("encode_sparse_row: the row does not have the shape of the layout");
  std::vector<std::byte> bytes;
  bytes.reserve(layout.packed_bytes());
  // Kinds of values in streams of their own: zstd finds more in them than side by side.
  std::vector<std::byte> gaps, depths;
  for (std::size_t t = 0; t < tokens; ++t) {
    const std::uint16_t rest = float_to_half(std::clamp(row.log_rest[t], static_cast<float>(codec_smallest_rest), 0.0f));
    bytes.push_back(static_cast<std::byte>(rest & 0xff));
    bytes.push_back(static_cast<std::byte>(rest >> 8));
    const float* log_p = row.log_p.data() + t * top;
    double below = 0;  // decoded distance from the likeliest
    for (std::size_t i = 1; i < top; ++i) {
      const std::uint8_t code = codec_code(log_p[0] - log_p[i] - below, sparse_largest_gap);
      below += codec_value(code, sparse_largest_gap);
      gaps.push_back(static_cast<std::byte>(code));
    }
    for (std::size_t i = 0; i < draws; ++i)
      depths.push_back(static_cast<std::byte>(codec_code(log_p[0] - below - row.log_rest[t] - row.draw_log_p[t * draws + i], sparse_largest_depth)));
  }
  for (const std::vector<std::byte>& part : {gaps, depths, pack_bits(row.ids, layout.id_bits()), pack_bits(row.draws, layout.id_bits())}) bytes.insert(bytes.end(), part.begin(), part.end());
  return zstd_compress(bytes);
}

SparseRow decode_sparse_row(std::span<const std::byte> frame, const SparseLayout& layout, const std::string& place) {
  const std::vector<std::byte> bytes = zstd_decompress(frame, layout.packed_bytes(), place);
  const auto tokens = static_cast<std::size_t>(layout.tokens), top = static_cast<std::size_t>(layout.top), draws = static_cast<std::size_t>(layout.draws);
  const std::byte* rest = bytes.data();
  const std::byte* gap = rest + 2 * tokens;
  const std::byte* depth = gap + tokens * (top - 1);
  const std::span<const std::byte> packed(depth + tokens * draws, bytes.data() + bytes.size());
  SparseRow row;
  row.ids = unpack_bits(packed, tokens * top, layout.id_bits());
  row.draws = unpack_bits(packed.subspan(codec_packed(layout.tokens * layout.top, layout.id_bits())), tokens * draws, layout.id_bits());
  for (const auto* list : {&row.ids, &row.draws})
    for (const std::int64_t id : *list)
      if (id >= layout.vocabulary) throw Error(str("token ", id, " is not in the vocabulary")).at(place).allowed(str("0 to ", layout.vocabulary - 1));
  row.log_p.resize(tokens * top);
  row.draw_log_p.resize(tokens * draws);
  std::vector<double> below(top);
  for (std::size_t t = 0; t < tokens; ++t) {
    const double log_rest = half_to_float(static_cast<std::uint16_t>(static_cast<unsigned>(rest[2 * t]) | static_cast<unsigned>(rest[2 * t + 1]) << 8));
    double sum = 1;
    for (std::size_t i = 1; i < top; ++i) {
      below[i] = below[i - 1] + codec_value(static_cast<std::uint8_t>(*gap++), sparse_largest_gap);
      sum += std::exp(-below[i]);
    }
    // All known tokens together have 1 - rest.
    const double first = std::log(-std::expm1(std::min(log_rest, -1e-6))) - std::log(sum);
    for (std::size_t i = 0; i < top; ++i) row.log_p[t * top + i] = static_cast<float>(first - below[i]);
    row.log_rest.push_back(static_cast<float>(log_rest));
    for (std::size_t i = 0; i < draws; ++i) row.draw_log_p[t * draws + i] = static_cast<float>(std::min(0.0, first - below[top - 1] - codec_value(static_cast<std::uint8_t>(*depth++), sparse_largest_depth) - log_rest));
  }
  return row;
}

}  // namespace kompakt
