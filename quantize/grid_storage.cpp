// What matrices on a grid take in files, and their codes as files hold them.
#include <ATen/ATen.h>

#include <cmath>

#include "core/error.h"
#include "core/text.h"
#include "quantize/entropy_code.h"
#include "quantize/grids.h"
#include "quantize/kquant.h"

namespace kompakt {

std::string grid_span_name(const GridSpec& spec) { return spec.grid->kquant ? str("super-blocks of ", kquant_span) : str("groups of ", spec.group); }

std::int64_t GridSpec::scale_count(std::int64_t columns) const {
  const std::int64_t width = std::max<std::int64_t>(1, group_for(columns));
  return (columns + width - 1) / width;
}

namespace {
// What Huffman codes may take beyond code_bits: tables of a small matrix, the numbers of rows that stand in another order, half a percent.
constexpr std::int64_t grid_entropy_tables = 128, grid_entropy_order = 2;
constexpr double grid_entropy_waste = 1.005;
}

std::int64_t GridSpec::packed_bytes(std::int64_t rows, std::int64_t columns) const {
  if (grid->kquant) return rows * ((columns + kquant_span - 1) / kquant_span) * grid->kquant->bytes;
  const std::int64_t side = 2 + (grid->asymmetric ? (grid->integer_zero ? 1 : 2) : 0);
  if (grid->entropy_coded()) return static_cast<std::int64_t>(std::ceil(static_cast<double>(rows) * static_cast<double>(columns) * grid->code_bits * grid_entropy_waste / 8)) + grid_entropy_tables + rows * (grid_entropy_order + side * scale_count(columns));
  return rows * (grid->layout.row_bytes(columns) + side * scale_count(columns));
}

std::vector<std::byte> stored_codes(const Grid& grid, const at::Tensor& codes) { return grid.entropy_coded() ? entropy_encode(codes) : grid.pack(codes); }

at::Tensor read_codes(const Grid& grid, std::span<const std::byte> bytes, std::int64_t rows, std::int64_t columns, const std::string& place) {
  if (grid.entropy_coded()) return entropy_decode(bytes, rows, columns, grid.code_min, grid.code_max, place);
  // Rows are packed to whole bytes, so one row tells the size of all.
  const std::size_t expected = grid.pack(at::zeros({1, columns}, at::kChar)).size() * static_cast<std::size_t>(rows);
  if (bytes.size() != expected) throw Error("the packed codes have the wrong size").at(place).given(str(bytes.size(), " bytes")).allowed(str(expected, " bytes"));
  return grid.unpack(bytes, rows, columns);
}

std::int64_t stored_bytes(const GridSpec& spec, const Quantized& values) {
  const std::int64_t rows = values.codes.size(0), columns = values.codes.size(1);
  if (!spec.grid->entropy_coded()) return spec.packed_bytes(rows, columns);
  return static_cast<std::int64_t>(stored_codes(*spec.grid, values.codes).size()) + 2 * rows * spec.scale_count(columns);
}

double GridSpec::bits_per_weight(std::int64_t columns) const {
  if (columns > 0 && grid->entropy_coded()) return grid->code_bits + 16.0 * static_cast<double>(scale_count(columns)) / static_cast<double>(columns);
  return columns > 0 ? 8.0 * static_cast<double>(packed_bytes(1, columns)) / static_cast<double>(columns) : 0;
}

}  // namespace kompakt
