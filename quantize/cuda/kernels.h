// Launchers of the CUDA kernels: device pointers and a stream, no torch. Each has a twin in quantize/kernels.h with the same
// layouts; kernels that round or pack give the same bits, sums may differ in the last places (order of addition).
// All return a cudaError_t as int, 0 = launched.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace kompakt::cuda {

using Stream = CUstream_st*;

// packing: 0 = `bits` per code, little-endian; 1 = five trits a byte. Rows start at whole bytes.
int pack(int packing, int bits, int code_min, const std::int8_t* codes, std::int64_t rows, std::int64_t columns, std::uint8_t* bytes, Stream stream);
int unpack(int packing, int bits, int code_min, const std::uint8_t* bytes, std::int64_t rows, std::int64_t columns, std::int8_t* codes, Stream stream);

// scales [rows, ceil(columns/group)] float, of stored precision.
int fit_absmax(const float* w, std::int64_t rows, std::int64_t columns, std::int64_t group, int code_max, float smallest, float* scales, Stream stream);
// Exact least squares by a sort in shared memory; group <= 1024.
int fit_ternary(const float* w, std::int64_t rows, std::int64_t columns, std::int64_t group, float smallest, float* scales, Stream stream);

int fake_quantize(const float* w, const float* scales, const float* offsets, std::int64_t rows, std::int64_t columns, std::int64_t group, int code_min, int code_max, float* out,
                  Stream stream);

// y[b, r] = sum_k decode(W[r, k]) x[b, k] for small batches; x is float or bfloat16 (bf16 != 0), y float.
int packed_matvec(int packing, int bits, int code_min, const std::uint8_t* codes, const std::uint16_t* scales, const float* offsets, std::int64_t rows, std::int64_t columns,
                  std::int64_t group, const void* x, int bf16, std::int64_t batch, float* y, Stream stream);

}  // namespace kompakt::cuda
