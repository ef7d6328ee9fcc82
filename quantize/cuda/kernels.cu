// CUDA kernels of the quantization grids. The arithmetic of a weight, a scale and a byte is that of grid_math.h.
#include "quantize/cuda/kernels.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "quantize/grid_math.h"

namespace kompakt::cuda {
namespace {

constexpr int threads = 256;

__host__ __device__ inline std::int64_t row_bytes(int packing, int bits, std::int64_t columns) { return packing == 1 ? (columns + 4) / 5 : (columns * bits + 7) / 8; }

unsigned blocks_for(std::int64_t items) {
  const std::int64_t blocks = (items + threads - 1) / threads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > 65535 * 16 ? 65535 * 16 : blocks);
}

int launched() { return static_cast<int>(cudaGetLastError()); }

// One thread writes one byte, so no two threads share a word.
__global__ void pack_kernel(int packing, int bits, int code_min, const std::int8_t* codes, std::int64_t rows, std::int64_t columns, std::uint8_t* bytes) {
  const std::int64_t stride = row_bytes(packing, bits, columns);
  for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x; i < rows * stride; i += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    const std::int64_t r = i / stride, at = i % stride;
    const std::int8_t* row = codes + r * columns;
    if (packing == 1) {
      unsigned t[5];
      for (int n = 0; n < 5; ++n) t[n] = at * 5 + n < columns ? static_cast<unsigned>(row[at * 5 + n] - code_min) : 0u;
      bytes[i] = grid::pack_trits(t[0], t[1], t[2], t[3], t[4]);
      continue;
    }
    unsigned byte = 0;
    const std::int64_t first = at * 8 / bits;
    for (std::int64_t k = first; k < columns && k * bits < at * 8 + 8; ++k) {
      const int shift = static_cast<int>(k * bits - at * 8);
      const unsigned value = static_cast<unsigned>(row[k] - code_min);
      byte |= shift >= 0 ? value << shift : value >> -shift;
    }
    bytes[i] = static_cast<std::uint8_t>(byte);
  }
}

__device__ inline int code_at(int packing, int bits, int code_min, const std::uint8_t* row, std::int64_t k) {
  const unsigned value = packing == 1 ? grid::unpack_trit(row[k / 5], static_cast<int>(k % 5)) : grid::unpack_bits(row, k, bits);
  return static_cast<int>(value) + code_min;
}

__global__ void unpack_kernel(int packing, int bits, int code_min, const std::uint8_t* bytes, std::int64_t rows, std::int64_t columns, std::int8_t* codes) {
  const std::int64_t stride = row_bytes(packing, bits, columns);
  for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x; i < rows * columns; i += static_cast<std::int64_t>(gridDim.x) * blockDim.x)
    codes[i] = static_cast<std::int8_t>(code_at(packing, bits, code_min, bytes + i / columns * stride, i % columns));
}

// One block per group.
__global__ void fit_absmax_kernel(const float* w, std::int64_t columns, std::int64_t group, std::int64_t groups, float code_max, float smallest, float* scales) {
  __shared__ float largest[threads];
  const std::int64_t r = blockIdx.x / groups, g = blockIdx.x % groups, first = g * group, end = first + group < columns ? first + group : columns;
  float m = 0;
  for (std::int64_t k = first + threadIdx.x; k < end; k += blockDim.x) m = fmaxf(m, fabsf(w[r * columns + k]));
  largest[threadIdx.x] = m;
  __syncthreads();
  for (int half = threads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) largest[threadIdx.x] = fmaxf(largest[threadIdx.x], largest[threadIdx.x + half]);
    __syncthreads();
  }
  if (threadIdx.x == 0) scales[blockIdx.x] = grid::stored_scale(grid::divide_rounded(largest[0], code_max), smallest);
}

// One block per group: bitonic sort of the magnitudes, then one thread scans the prefix sums in double.
__global__ void fit_ternary_kernel(const float* w, std::int64_t columns, std::int64_t group, std::int64_t groups, int padded, float smallest, float* scales) {
  extern __shared__ float magnitudes[];
  const std::int64_t r = blockIdx.x / groups, g = blockIdx.x % groups, first = g * group;
  const int n = static_cast<int>(first + group < columns ? group : columns - first);
  for (int i = threadIdx.x; i < padded; i += blockDim.x) magnitudes[i] = i < n ? fabsf(w[r * columns + first + i]) : 0.0f;
  __syncthreads();
  for (int size = 2; size <= padded; size *= 2)
    for (int step = size / 2; step > 0; step /= 2) {
      for (int i = threadIdx.x; i < padded; i += blockDim.x) {
        const int other = i ^ step;
        if (other > i) {
          const bool descending = (i & size) == 0;
          const float a = magnitudes[i], b = magnitudes[other];
          if (descending ? a < b : a > b) magnitudes[i] = b, magnitudes[other] = a;
        }
      }
      __syncthreads();
    }
  if (threadIdx.x != 0) return;
  double sum = 0, best = -1, alpha = 0;
  for (int k = 0; k < n && magnitudes[k] > 0; ++k) {
    sum += magnitudes[k];
    const double value = sum * sum / (k + 1);
    if (value > best) best = value, alpha = sum / (k + 1);
  }
  scales[blockIdx.x] = grid::stored_scale(static_cast<float>(alpha), smallest);
}

__global__ void fake_quantize_kernel(const float* w, const float* scales, const float* offsets, std::int64_t rows, std::int64_t columns, std::int64_t group, std::int64_t groups,
                                     float low, float high, float* out) {
  for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x; i < rows * columns; i += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    const std::int64_t g = i / columns * groups + i % columns / group;
    const float scale = scales[g], offset = offsets ? offsets[g] : 0.0f;
    out[i] = grid::decode_value(grid::nearest_code(w[i], grid::inverse_scale(scale), offset, low, high), scale, offset);
  }
}

__device__ inline float input_at(const float* x, std::int64_t k) { return x[k]; }
__device__ inline float input_at(const __nv_bfloat16* x, std::int64_t k) { return __bfloat162float(x[k]); }

// One warp per row and batch entry; lanes stride over columns, the scale is applied per weight's group.
template <class Input>
__global__ void packed_matvec_kernel(int packing, int bits, int code_min, const std::uint8_t* codes, const std::uint16_t* scales, const float* offsets, std::int64_t rows,
                                     std::int64_t columns, std::int64_t group, std::int64_t groups, const Input* x, std::int64_t batch, float* y) {
  const std::int64_t warp = (blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (warp >= rows * batch) return;
  const std::int64_t r = warp % rows, b = warp / rows;
  const std::uint8_t* row = codes + r * row_bytes(packing, bits, columns);
  const Input* input = x + b * columns;
  float total = 0;
  for (std::int64_t g = 0; g < groups; ++g) {
    float products = 0, inputs = 0;
    const std::int64_t end = (g + 1) * group < columns ? (g + 1) * group : columns;
    for (std::int64_t k = g * group + lane; k < end; k += 32) {
      const float value = input_at(input, k);
      products += static_cast<float>(code_at(packing, bits, code_min, row, k)) * value;
      inputs += value;
    }
    total += grid::half_value(scales[r * groups + g]) * products;
    if (offsets) total += offsets[r * groups + g] * inputs;
  }
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_down_sync(0xffffffffu, total, offset);
  if (lane == 0) y[b * rows + r] = total;
}

}  // namespace

int pack(int packing, int bits, int code_min, const std::int8_t* codes, std::int64_t rows, std::int64_t columns, std::uint8_t* bytes, Stream stream) {
  if (rows * columns == 0) return 0;
  pack_kernel<<<blocks_for(rows * row_bytes(packing, bits, columns)), threads, 0, stream>>>(packing, bits, code_min, codes, rows, columns, bytes);
  return launched();
}

int unpack(int packing, int bits, int code_min, const std::uint8_t* bytes, std::int64_t rows, std::int64_t columns, std::int8_t* codes, Stream stream) {
  if (rows * columns == 0) return 0;
  unpack_kernel<<<blocks_for(rows * columns), threads, 0, stream>>>(packing, bits, code_min, bytes, rows, columns, codes);
  return launched();
}

int fit_absmax(const float* w, std::int64_t rows, std::int64_t columns, std::int64_t group, int code_max, float smallest, float* scales, Stream stream) {
  if (rows * columns == 0) return 0;
  const std::int64_t groups = (columns + group - 1) / group;
  fit_absmax_kernel<<<static_cast<unsigned>(rows * groups), threads, 0, stream>>>(w, columns, group, groups, static_cast<float>(code_max), smallest, scales);
  return launched();
}

int fit_ternary(const float* w, std::int64_t rows, std::int64_t columns, std::int64_t group, float smallest, float* scales, Stream stream) {
  if (rows * columns == 0) return 0;
  if (group > 1024) return static_cast<int>(cudaErrorInvalidValue);
  int padded = 2;
  while (padded < group) padded *= 2;
  const std::int64_t groups = (columns + group - 1) / group;
  fit_ternary_kernel<<<static_cast<unsigned>(rows * groups), padded < threads ? padded : threads, padded * sizeof(float), stream>>>(w, columns, group, groups, padded, smallest, scales);
  return launched();
}

int fake_quantize(const float* w, const float* scales, const float* offsets, std::int64_t rows, std::int64_t columns, std::int64_t group, int code_min, int code_max, float* out,
                  Stream stream) {
  if (rows * columns == 0) return 0;
  fake_quantize_kernel<<<blocks_for(rows * columns), threads, 0, stream>>>(w, scales, offsets, rows, columns, group, (columns + group - 1) / group, static_cast<float>(code_min),
                                                                           static_cast<float>(code_max), out);
  return launched();
}

int packed_matvec(int packing, int bits, int code_min, const std::uint8_t* codes, const std::uint16_t* scales, const float* offsets, std::int64_t rows, std::int64_t columns,
                  std::int64_t group, const void* x, int bf16, std::int64_t batch, float* y, Stream stream) {
  if (rows * batch == 0) return 0;
  const std::int64_t groups = (columns + group - 1) / group;
  const unsigned grid = static_cast<unsigned>((rows * batch * 32 + threads - 1) / threads);
  if (bf16)
    packed_matvec_kernel<<<grid, threads, 0, stream>>>(packing, bits, code_min, codes, scales, offsets, rows, columns, group, groups, static_cast<const __nv_bfloat16*>(x), batch, y);
  else
    packed_matvec_kernel<<<grid, threads, 0, stream>>>(packing, bits, code_min, codes, scales, offsets, rows, columns, group, groups, static_cast<const float*>(x), batch, y);
  return launched();
}

}  // namespace kompakt::cuda
