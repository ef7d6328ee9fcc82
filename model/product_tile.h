// The inner loop of the program's own matrix products: rows of one operand meet a panel of 16 columns of the other in registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "model/lanes.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define KOMPAKT_OWN_PRODUCTS 1
#define KOMPAKT_PRODUCTS_TARGET __attribute__((target("avx2,fma")))
#endif

#ifdef KOMPAKT_OWN_PRODUCTS

namespace kompakt {

constexpr std::int64_t product_columns = 16, product_rows = 6;

// c [Rows, 16] (+)= a [Rows, depth] panel [depth, 16].
template <int Rows>
KOMPAKT_LANES_INLINE void product_tile(std::int64_t depth, const float* a, std::int64_t a_row, std::int64_t a_column, const float* panel, float* c, std::int64_t c_row, bool add) {
  using Register = Registers<float>::Type;
  Register sum[Rows][2] = {}, left, right;
  for (std::int64_t d = 0; d < depth; ++d, a += a_column, panel += product_columns) {
    std::memcpy(&left, panel, sizeof left);
    std::memcpy(&right, panel + 8, sizeof right);
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) {
      const float factor = a[i * a_row];
      sum[i][0] += factor * left;
      sum[i][1] += factor * right;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i) {
    float* to = c + i * c_row;
    if (add) {
      std::memcpy(&left, to, sizeof left);
      std::memcpy(&right, to + 8, sizeof right);
      sum[i][0] += left, sum[i][1] += right;
    }
    std::memcpy(to, &sum[i][0], sizeof left);
    std::memcpy(to + 8, &sum[i][1], sizeof right);
  }
}

}  // namespace kompakt

#endif
