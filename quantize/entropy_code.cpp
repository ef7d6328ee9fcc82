#include "quantize/entropy_code.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "core/error.h"
#include "core/text.h"
#include "formats/deflate.h"

namespace kompakt {

namespace {

constexpr int entropy_escape = 15, entropy_reach = 7, entropy_ordered = 4;

std::byte entropy_byte(int value) { return static_cast<std::byte>(static_cast<unsigned char>(value)); }

std::vector<std::byte> entropy_singles(std::span<const std::int8_t> codes) {
  std::vector<std::byte> symbols;
  symbols.reserve(codes.size());
  for (const std::int8_t code : codes) symbols.push_back(entropy_byte(code + 128));
  return symbols;
}

std::vector<std::byte> entropy_pairs(std::span<const std::int8_t> codes) {
  std::vector<std::byte> symbols, far;
  symbols.reserve((codes.size() + 1) / 2);
  const auto half = [&](std::int8_t code) {
    if (code >= -entropy_reach && code <= entropy_reach) return code + entropy_reach;
    far.push_back(entropy_byte(code + 128));
    return entropy_escape;
  };
  for (std::size_t i = 0; i < codes.size(); i += 2) {
    const int first = half(codes[i]), second = i + 1 < codes.size() ? half(codes[i + 1]) : entropy_reach;
    symbols.push_back(entropy_byte(first + 16 * second));
  }
  symbols.insert(symbols.end(), far.begin(), far.end());
  return symbols;
}

}  // namespace

std::vector<std::byte> entropy_encode(const at::Tensor& codes) {
  const at::Tensor c = codes.to(at::kCPU, at::kChar).contiguous();
  const auto all = [](const at::Tensor& t) { return std::span<const std::int8_t>(t.const_data_ptr<std::int8_t>(), static_cast<std::size_t>(t.numel())); };
  // Two at a time, frequent codes can cost less than a whole bit each.
  const std::vector<std::byte> one = huffman_compress(entropy_singles(all(c))), two = huffman_compress(entropy_pairs(all(c)));
  const bool pairs = two.size() < one.size();
  std::vector<std::byte> best = pairs ? two : one, order;
  // Rows with equally large codes side by side: a table of Huffman codes serves a stretch of rows.
  if (const std::int64_t rows = c.size(0); rows > 1 && rows <= 65536) {
    const at::Tensor sorted = c.abs().sum(1, false, at::kLong).argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
    const at::Tensor moved = c.index_select(0, sorted);
    std::vector<std::byte> stream = huffman_compress(pairs ? entropy_pairs(all(moved)) : entropy_singles(all(moved)));
    if (stream.size() + 2 * static_cast<std::size_t>(rows) < best.size()) {
      best = std::move(stream);
      for (std::int64_t r = 0; r < rows; ++r) {
        const auto from = static_cast<int>(sorted.const_data_ptr<std::int64_t>()[r]);
        order.push_back(entropy_byte(from & 255)), order.push_back(entropy_byte(from >> 8));
      }
    }
  }
  std::vector<std::byte> out(1 + order.size() + best.size());
  out[0] = entropy_byte((pairs ? 2 : 1) + (order.empty() ? 0 : entropy_ordered));
  std::copy(order.begin(), order.end(), out.begin() + 1);
  std::copy(best.begin(), best.end(), out.begin() + 1 + static_cast<std::ptrdiff_t>(order.size()));
  return out;
}

at::Tensor entropy_decode(std::span<const std::byte> bytes, std::int64_t rows, std::int64_t columns, int low, int high, const std::string& place) {
  const int kind = bytes.empty() ? 0 : std::to_integer<int>(bytes[0]), codes_a_symbol = kind % entropy_ordered;
  if (kind >= 2 * entropy_ordered || codes_a_symbol < 1 || codes_a_symbol > 2) throw Error("the first byte of the codes says how many a symbol holds, and whether rows are ordered").at(place).given(bytes.empty() ? "nothing" : std::to_string(kind)).allowed("1, 2, 5 or 6").hint("the file is damaged or was written by a newer kompakt");
  bytes = bytes.subspan(1);
  std::vector<std::int64_t> order;
  if (kind >= entropy_ordered) {
    if (static_cast<std::int64_t>(bytes.size()) < 2 * rows) throw Error("the order of the rows is not whole").at(place).given(str(bytes.size(), " bytes")).allowed(str("at least ", 2 * rows)).hint("the file is damaged");
    std::vector<bool> seen(static_cast<std::size_t>(rows), false);
    for (std::size_t r = 0; r < seen.size(); ++r) {
      order.push_back(std::to_integer<int>(bytes[2 * r]) + 256 * std::to_integer<int>(bytes[2 * r + 1]));
      if (order.back() >= rows || seen[static_cast<std::size_t>(order.back())]) throw Error("the order of the rows names a row twice, or one that there is not").at(place).given(str(order.back())).hint("the file is damaged");
      seen[static_cast<std::size_t>(order.back())] = true;
    }
    bytes = bytes.subspan(2 * seen.size());
  }
  const std::int64_t count = rows * columns, symbols = (count + codes_a_symbol - 1) / codes_a_symbol;
  // A symbol takes a bit at least: sizes that the file only claims are not allocated.
  if (symbols > 8 * static_cast<std::int64_t>(bytes.size())) throw Error("so few bytes cannot hold the codes").at(place).given(str(bytes.size(), " bytes")).allowed(str("at least ", (symbols + 7) / 8, " for ", rows, " x ", columns, " codes")).hint("the file is damaged");
  const std::vector<std::byte> stream = huffman_decompress(bytes, static_cast<std::size_t>(symbols), static_cast<std::size_t>(codes_a_symbol == 1 ? symbols : symbols + count), place);
  at::Tensor codes = at::empty({rows, columns}, at::kChar);
  auto* to = codes.mutable_data_ptr<std::int8_t>();
  auto far = static_cast<std::size_t>(symbols);
  bool inside = true;
  for (std::int64_t i = 0; i < count; ++i) {
    int code = std::to_integer<int>(stream[static_cast<std::size_t>(i / codes_a_symbol)]);
    if (codes_a_symbol == 2) code = i % 2 == 0 ? code % 16 : code / 16;
    if (codes_a_symbol == 2 && code == entropy_escape) {
      if (far == stream.size()) throw Error("codes are missing behind the symbols").at(place).hint("the file is damaged");
      code = std::to_integer<int>(stream[far++]) - 128;
    } else {
      code -= codes_a_symbol == 1 ? 128 : entropy_reach;
    }
    inside = inside && code >= low && code <= high;
    to[order.empty() ? i : order[static_cast<std::size_t>(i / columns)] * columns + i % columns] = static_cast<std::int8_t>(code);
  }
  if (far != stream.size()) throw Error("there are bytes behind the codes").at(place).given(str(stream.size() - far)).hint("the file is damaged");
  if (!inside) throw Error("the codes hold a value outside of the grid").at(place).allowed(str(low, " to ", high)).hint("the file is damaged or was written with another grid");
  return codes;
}

}  // namespace kompakt
