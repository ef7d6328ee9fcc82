// Kernels on packed weights, CPU twins of quantize/cuda/kernels.cu: the same inline functions (grid_math.h), the same layouts.
// They are the reference that `kompakt doctor` holds the device kernels against, and what a reader of packed weights can
// multiply with, without ever decoding a whole matrix.
//
// Layouts, row-major: codes as pack_codes writes them (row_bytes per row), scales [rows, groups] in half precision bits.
#pragma once

#include <cstdint>

#include "quantize/packing.h"

namespace kompakt {

struct PackedMatrix {
  const std::uint8_t* codes = nullptr;    // [rows, layout.row_bytes(columns)]
  const std::uint16_t* scales = nullptr;  // [rows, groups]
  const float* offsets = nullptr;         // [rows, groups] or null
  std::int64_t rows = 0, columns = 0, group = 0;  // group: weights per scale
  CodeLayout layout;
  std::int64_t groups() const { return (columns + group - 1) / group; }
};

namespace cpu {

// y[b, r] = sum_k decode(W[r, k]) x[b, k]; x [batch, columns], y [batch, rows]. Float accumulation per group, then float
// across groups in order; the codes of a group are summed before its scale is applied.
void packed_matvec(const PackedMatrix& w, const float* x, std::int64_t batch, float* y);

// out[r, k] = scale * nearest(w) + offset for given scales (float, already of stored precision).
void fake_quantize(const float* w, const float* scales, const float* offsets, std::int64_t rows, std::int64_t columns, std::int64_t group, int code_min, int code_max,
                   float* out);

// Scales of all groups: largest magnitude / code_max, or the exact ternary fit (group <= 1024).
void fit_absmax(const float* w, std::int64_t rows, std::int64_t columns, std::int64_t group, int code_max, float smallest, float* scales);
void fit_ternary(const float* w, std::int64_t rows, std::int64_t columns, std::int64_t group, float smallest, float* scales);

void pack(const CodeLayout& layout, const std::int8_t* codes, std::int64_t rows, std::int64_t columns, std::uint8_t* bytes);
void unpack(const CodeLayout& layout, const std::uint8_t* bytes, std::int64_t rows, std::int64_t columns, std::int8_t* codes);

}  // namespace cpu
}  // namespace kompakt
