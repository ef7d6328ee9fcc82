#include "export/gguf_blocks.h"

#include <ATen/ATen.h>

#include <array>
#include <cmath>
#include <stdexcept>

#include "core/text.h"
#include "formats/ggml_pack.h"
#include "formats/tensor_data.h"

namespace kompakt {
namespace {

// One row per type that stores plain codes with one scale (and minimum) a block, smallest first.
struct BlockPacker {
  std::string_view type;
  int code_min, code_max;
  bool asymmetric;
  void (*pack)(const std::int8_t* codes, std::uint16_t d, std::uint16_t m, std::byte* out);
  bool levels = false;  // codes are not numbers: only for the grid that names the type
};

template <void (*pack)(const std::int8_t*, std::uint16_t, std::byte*)>
void symmetric_block(const std::int8_t* codes, std::uint16_t d, std::uint16_t, std::byte* out) {
  pack(codes, d, out);
}

// Signed codes of E2M1 to its bits (sign and three others), the power of two to E8M0; mxfp4_values are doubled.
void mxfp4_block(const std::int8_t* codes, std::uint16_t d, std::uint16_t, std::byte* out) {
  std::int8_t bits[32];
  for (int i = 0; i < 32; ++i) bits[i] = static_cast<std::int8_t>(codes[i] < 0 ? 8 - codes[i] : codes[i]);
  const float scale = half_to_float(d);
  pack_mxfp4(bits, static_cast<std::uint8_t>(scale > 0 ? std::ilogb(scale) + 128 : 0), out);
}

constexpr std::array<BlockPacker, 10> block_packers = {{
    {"TQ1_0", -1, 1, false, symmetric_block<pack_tq1_0>},
    {"TQ2_0", -1, 2, false, symmetric_block<pack_tq2_0>},
    {"Q2_0", -1, 2, false, symmetric_block<pack_q2_0>},
    {"MXFP4", -7, 7, false, mxfp4_block, true},
    {"Q4_0", -8, 7, false, symmetric_block<pack_q4_0>},
    {"IQ4_NL", 0, 15, false, symmetric_block<pack_iq4_nl>, true},
    {"Q4_1", 0, 15, true, pack_q4_1},
    {"Q5_0", -16, 15, false, symmetric_block<pack_q5_0>},
    {"Q5_1", 0, 31, true, pack_q5_1},
    {"Q8_0", -128, 127, false, symmetric_block<pack_q8_0>},
}};

const BlockPacker* find_packer(std::string_view type) {
  for (const BlockPacker& row : block_packers)
    if (row.type == type) return &row;
  return nullptr;
}

}  // namespace

const GgmlType* exact_ggml_type(const GridSpec& spec, std::int64_t columns, std::string& why) {
  const std::int64_t group = spec.group_for(columns);
  std::string named;
  if (spec.grid->kquant) {
    const GgmlType* type = find_ggml_type(spec.grid->ggml_type);
    if (columns % type->block == 0) return type;
    why = str("rows of ", columns, " do not divide into the ", grid_span_name(spec), " of ", type->name);
    return nullptr;
  }
  if (spec.grid->integer_zero) {  // scale * zero point is no half in general
    why = str("grid \"", spec.grid->name, "\" has an integer zero point, GGUF stores a minimum in half precision: take q4_1 or q5_1");
    return nullptr;
  }
  for (const BlockPacker& row : block_packers) {
    const GgmlType* type = find_ggml_type(row.type);
    // A grid that names its type gets that one and no other.
    if (spec.grid->group_fixed && spec.grid->ggml_type != row.type) continue;
    if (row.levels != (spec.grid->levels != nullptr)) continue;
    if (row.asymmetric != spec.grid->asymmetric || row.code_min > spec.grid->code_min || row.code_max < spec.grid->code_max) continue;
    if (columns % type->block == 0 && group % type->block == 0) return type;
    named += str(named.empty() ? "" : ", ", row.type, " (blocks of ", type->block, ")");
  }
  why = named.empty() ? str("no GGUF type holds the codes of grid \"", spec.grid->name, "\"") : str("rows of ", columns, " with groups of ", group, " do not divide into the blocks of ", named);
  return nullptr;
}

std::vector<std::byte> to_ggml_blocks(const GgmlType& type, const GridSpec& spec, const Quantized& values) {
  if (spec.grid->kquant) return kquant_blocks(*spec.grid, values);
  const BlockPacker* packer = find_packer(type.name);
  if (!packer) throw std::logic_error("to_ggml_blocks: no packer for this type");
  const std::int64_t rows = values.codes.size(0), columns = values.codes.size(1), group = spec.group_for(columns), blocks = columns / type.block;
  const at::Tensor codes = values.codes.to(at::kCPU).contiguous();
  const at::Tensor scales = values.scales.to(at::kCPU, at::kFloat).contiguous();
  const at::Tensor offsets = values.offsets.defined() ? values.offsets.to(at::kCPU, at::kFloat).contiguous() : at::Tensor();
  std::vector<std::byte> out(static_cast<std::size_t>(rows * blocks * type.bytes));
  const std::int64_t groups = scales.size(1);
  const std::int8_t* code = codes.const_data_ptr<std::int8_t>();
  const float* ds = scales.const_data_ptr<float>();
  const float* ms = offsets.defined() ? offsets.const_data_ptr<float>() : nullptr;
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::int64_t scale = row * groups + block * type.block / group;
      const float d = ds[scale], m = ms ? ms[scale] : 0.0f;
      const std::uint16_t half_d = float_to_half(d), half_m = float_to_half(m);
      if (half_to_float(half_d) != d || half_to_float(half_m) != m) throw std::logic_error("to_ggml_blocks: a scale is not a half");
      packer->pack(code + row * columns + block * type.block, half_d, half_m, out.data() + static_cast<std::size_t>((row * blocks + block) * type.bytes));
    }
  }
  return out;
}

}  // namespace kompakt
