// The table of grids: what values a weight may take, and how they are stored. Training, post-training quantization and the
// exporter use the same encode/decode pair of one row; export is a lossless repack.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "quantize/group_fit.h"
#include "quantize/packing.h"

namespace kompakt {

// A quantized matrix. Codes are the integers of the grid; scales (and offsets) are float32 tensors whose values are already
// rounded to the stored type, so that decode(pack(unpack)) is exact.
struct Quantized {
  at::Tensor codes;    // int8 [N,K]
  at::Tensor scales;   // float32 [N,G], G = ceil(K / group)
  at::Tensor offsets;  // float32 [N,G] or undefined: w = scale * code + offset
};

struct GridSpec;
struct KQuant;
class LevelTable;

struct Grid {
  std::string_view name;      // "ternary", "int8", "int4", "q2_0", ...
  std::string_view summary;
  double code_bits;           // stored bits per code (1.6 for five trits a byte)
  int code_min, code_max;
  bool asymmetric;            // has offsets
  std::int64_t default_group; // 0 = one scale per row
  bool group_fixed;           // the format dictates the group
  std::string_view scale_type;// "f16", "power of two", "e4m3"
  std::string_view ggml_type; // GGUF type that holds it exactly, or ""
  bool for_embeddings;
  double gaussian_error;      // largest relative squared error on N(0,1) that a test may see at the default group
  // w float32 [N,K]; importance float32 [K] (diagonal of the input second moment) or undefined.
  Quantized (*encode)(const at::Tensor& w, std::int64_t group, const at::Tensor& importance);
  // Nearest codes for scales that are fixed already (inside GPTQ and training).
  at::Tensor (*codes_for)(const at::Tensor& w, const at::Tensor& scales, const at::Tensor& offsets, std::int64_t group);
  // Bytes of N rows: codes packed row by row (rows padded to whole bytes), without scales.
  std::vector<std::byte> (*pack)(const at::Tensor& codes);
  at::Tensor (*unpack)(std::span<const std::byte> bytes, std::int64_t rows, std::int64_t columns);
  // decode(encode(w)) in one pass, for training.
  at::Tensor (*round)(const at::Tensor& w, std::int64_t group, const at::Tensor& importance);
  CodeLayout layout;          // how pack and unpack store the codes
  // Scale and offset of one loaded group (group_fit.h), as encode finds them: for methods that work row by row.
  GroupScale (*fit)(FitScratch& group);
  bool signed_scale;          // a negative scale is part of the grid
  const LevelTable* levels;   // what codes stand for where that is not the code itself (levels.h); null on even grids
  float (*store_scale)(float);// a scale as it is stored
  bool coarse_scale;          // stored scales are far apart: a refit must be judged after rounding
  bool integer_zero;          // asymmetric: offset = -scale * z with an integer z in code_min..code_max (else a half-precision minimum)
  // Super-blocks of 256 whose scales are found together and are products of a half and an integer (kquant.h); null on other grids.
  const KQuant* kquant = nullptr;
  // Above zero: steps of this share of a row's root mean square, and exporters that can do so store the codes with as many bits as they
  // are surprising (entropy_code.h). code_bits is then what normally distributed weights need; the real size is known once there are codes.
  double entropy_step = 0;
  bool entropy_coded() const { return entropy_step > 0; }
};

std::span<const Grid> grids();
const Grid* find_grid(std::string_view name);
std::vector<std::string> grid_names();

// A grid with its group, as a recipe names it: {weights: ternary, group: 64}.
struct GridSpec {
  const Grid* grid = nullptr;
  std::int64_t group = 0;  // 0 = whole row
  std::int64_t group_for(std::int64_t columns) const { return group > 0 ? group : columns; }
  // Weights whose scales are found together: a group, or a super-block. A row is a multiple of it where the grid fixes its groups.
  std::int64_t span_for(std::int64_t columns) const { return grid->kquant ? 256 : group_for(columns); }
  double bits_per_weight(std::int64_t columns) const;  // with scales
  std::int64_t scale_count(std::int64_t columns) const;  // G, scales a row
  // Bytes of codes, scales (two each) and offsets (two each, or one for an integer zero) as quantization.safetensors holds them;
  // of ggml's blocks where the grid is one of super-blocks; of an entropy-coded grid what is expected in a packed file.
  std::int64_t packed_bytes(std::int64_t rows, std::int64_t columns) const;
};

// Codes as packed files hold them: grid.pack, or by their entropy where the grid is of that kind. Reading throws Error at `place` when the bytes
// do not fit.
std::vector<std::byte> stored_codes(const Grid& grid, const at::Tensor& codes);
at::Tensor read_codes(const Grid& grid, std::span<const std::byte> bytes, std::int64_t rows, std::int64_t columns, const std::string& place);
// packed_bytes of the shape; of an entropy-coded grid what these codes really take.
std::int64_t stored_bytes(const GridSpec& spec, const Quantized& values);

// "groups of 64", or "super-blocks of 256": what a row must divide into.
std::string grid_span_name(const GridSpec& spec);

// w float32 [N,K]. Throws Error when the group does not divide K and the grid does not allow a short last group.
Quantized encode(const GridSpec& spec, const at::Tensor& w, const at::Tensor& importance = {});
at::Tensor decode(const GridSpec& spec, const Quantized& q);  // float32 [N,K]
// decode(encode(w)): value only, no gradient.
at::Tensor round_to_grid(const GridSpec& spec, const at::Tensor& w, const at::Tensor& importance = {});

// Matrices of super-blocks (grid.kquant) as ggml's blocks, [rows, columns / 256 * bytes of one]: what files hold of them.
// std::logic_error when scales or offsets are not those of super-blocks.
std::vector<std::byte> kquant_blocks(const Grid& grid, const Quantized& values);
// decode() of the result equals decode() of what was packed, bit for bit. Error when the bytes do not fit the shape, or hold a
// factor that is not finite.
Quantized kquant_values(const Grid& grid, std::span<const std::byte> bytes, std::int64_t rows, std::int64_t columns);

// A quantized tensor with its grid, by the name of its Linear or Embedding: what exporters take.
struct QuantizedTensor {
  GridSpec spec;
  Quantized values;
};
using QuantizedTensors = std::map<std::string, QuantizedTensor>;

}  // namespace kompakt
