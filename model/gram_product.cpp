#include "model/gram_product.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "model/parallel.h"
#include "model/product_tile.h"
#include "model/products.h"

namespace kompakt {
namespace {

using at::Tensor;

constexpr std::int64_t mirror_tile = 32;  // values of a side: rows of the transposed tile stay in the first-level cache

#ifdef KOMPAKT_OWN_PRODUCTS

constexpr std::int64_t gram_depth = 256;  // rows at a time: a panel of them takes 16 KiB, half of the first-level cache
constexpr std::int64_t gram_group = 8;    // panels of a that meet one panel of b, 128 KiB of the second-level cache
constexpr std::int64_t gram_span = 16;    // panels of b in one task

// All columns of `rows` rows -> panels [rows, 16], zeros behind the last column.
void gram_pack(const float* from, std::int64_t stride, std::int64_t rows, std::int64_t columns, float* panels) {
  const std::int64_t count = (columns + product_columns - 1) / product_columns;
  at::parallel_for(0, count, 8, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p) {
      const std::int64_t wide = std::min(product_columns, columns - p * product_columns);
      float* to = panels + p * rows * product_columns;
      const float* row = from + p * product_columns;
      for (std::int64_t r = 0; r < rows; ++r, row += stride, to += product_columns) {
        if (wide == product_columns) {
          std::memcpy(to, row, product_columns * sizeof(float));
          continue;
        }
        for (std::int64_t i = 0; i < product_columns; ++i) to[i] = i < wide ? row[i] : 0.0f;
      }
    }
  });
}

// c [16,16] += a^T b of two panels.
KOMPAKT_PRODUCTS_TARGET void gram_tile(std::int64_t rows, const float* a, const float* b, float* c, std::int64_t c_row) {
  for (std::int64_t r = 0; r < product_columns; ++r) __builtin_prefetch(c + r * c_row, 1);
  product_tile<6>(rows, a, 1, product_columns, b, c, c_row, true);
  product_tile<6>(rows, a + 6, 1, product_columns, b, c + 6 * c_row, c_row, true);
  product_tile<4>(rows, a + 12, 1, product_columns, b, c + 12 * c_row, c_row, true);
}

// What differs between the types that are multiplied: Packed, how many of `rows` rows a panel has room for, pack and tile.
struct GramFloat {
  using Packed = float;
  static constexpr std::int64_t depth = gram_depth;
  static std::int64_t room(std::int64_t rows) { return rows; }
  static void pack(const Tensor& from, std::int64_t first, std::int64_t rows, float* panels) { gram_pack(from.const_data_ptr<float>() + first * from.stride(0), from.stride(0), rows, from.size(1), panels); }
  static void tile(std::int64_t rows, const float* a, const float* b, float* c, std::int64_t c_row) { gram_tile(rows, a, b, c, c_row); }
};

#define KOMPAKT_BF16_TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512bf16")))

typedef std::uint16_t GramRow __attribute__((vector_size(32)));
typedef std::uint32_t GramPairs __attribute__((vector_size(64)));

// Of 16 columns of a row those that are there, zeros behind them.
template <class T>
KOMPAKT_BF16_TARGET __m256i gram_rounded(const T* row, __mmask16 present) {
  if constexpr (std::is_same_v<T, float>) return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(present, row)));
  else return _mm256_maskz_loadu_epi16(present, row);
}

// Rows two by two: [ceil(rows / 2), 16, 2], zeros behind the last row and the last column.
template <class T>
KOMPAKT_BF16_TARGET void gram_pack_panel(const T* row, std::int64_t stride, std::int64_t rows, std::int64_t wide, std::uint16_t* to) {
  const auto present = static_cast<__mmask16>((1u << wide) - 1);
  for (std::int64_t r = 0; r < rows; r += 2, row += 2 * stride, to += 2 * product_columns) {
    const __m256i even = gram_rounded(row, present), odd = gram_rounded(row + (r + 1 < rows ? stride : 0), r + 1 < rows ? present : static_cast<__mmask16>(0));
    const GramPairs pairs = __builtin_convertvector(reinterpret_cast<GramRow>(even), GramPairs) | (__builtin_convertvector(reinterpret_cast<GramRow>(odd), GramPairs) << 16);
    std::memcpy(to, &pairs, sizeof pairs);
  }
}

// c [16,16] += a^T b of two panels of pairs.
KOMPAKT_BF16_TARGET void gram_tile_bf16(std::int64_t pairs, const std::uint16_t* a, const std::uint16_t* b, float* c, std::int64_t c_row) {
  for (std::int64_t r = 0; r < product_columns; ++r) __builtin_prefetch(c + r * c_row, 1);
  __m512 sum[product_columns];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) sum[i] = _mm512_setzero_ps();
  for (std::int64_t d = 0; d < pairs; ++d, a += 2 * product_columns, b += 2 * product_columns) {
    const auto right = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b));
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      std::int32_t pair;
      std::memcpy(&pair, a + 2 * i, sizeof pair);
      sum[i] = _mm512_dpbf16_ps(sum[i], reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)), right);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_ps(c + i * c_row, _mm512_add_ps(_mm512_loadu_ps(c + i * c_row), sum[i]));
}

struct GramBf16 {
  using Packed = std::uint16_t;
  static constexpr std::int64_t depth = 2 * gram_depth;  // panels of as many bytes
  static std::int64_t room(std::int64_t rows) { return (rows + 1) / 2 * 2; }
  static void pack(const Tensor& from, std::int64_t first, std::int64_t rows, std::uint16_t* panels) {
    const std::int64_t columns = from.size(1), stride = from.stride(0), count = (columns + product_columns - 1) / product_columns;
    at::parallel_for(0, count, 8, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t p = begin; p < end; ++p) {
        const std::int64_t at = first * stride + p * product_columns, wide = std::min(product_columns, columns - p * product_columns);
        std::uint16_t* to = panels + p * room(rows) * product_columns;
        if (from.scalar_type() == at::kFloat) gram_pack_panel(from.const_data_ptr<float>() + at, stride, rows, wide, to);
        else gram_pack_panel(reinterpret_cast<const std::uint16_t*>(from.const_data_ptr<at::BFloat16>()) + at, stride, rows, wide, to);
      }
    });
  }
  static void tile(std::int64_t rows, const std::uint16_t* a, const std::uint16_t* b, float* c, std::int64_t c_row) { gram_tile_bf16(rows / 2, a, b, c, c_row); }
};

bool gram_has_bf16() {
  static const bool found = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  return found;
}

// The same where c ends before the tile does.
template <class Type>
void gram_edge_tile(std::int64_t rows, const typename Type::Packed* a, const typename Type::Packed* b, float* c, std::int64_t c_row, std::int64_t high, std::int64_t wide) {
  float whole[product_columns * product_columns] = {};
  Type::tile(rows, a, b, whole, product_columns);
  for (std::int64_t r = 0; r < high; ++r)
    for (std::int64_t s = 0; s < wide; ++s) c[r * c_row + s] += whole[r * product_columns + s];
}

struct GramTask {
  std::int64_t group, first, end;  // panels [8 group, 8 group + 8) of a, [first, end) of b
};

// c += a^T b for packed rows.
template <class Type>
void gram_run(const std::vector<GramTask>& tasks, const typename Type::Packed* a, const typename Type::Packed* b, std::int64_t rows, Tensor& sum, bool symmetric) {
  const std::int64_t k = sum.size(0), m = sum.size(1), a_panels = (k + product_columns - 1) / product_columns;
  float* c = sum.data_ptr<float>();
  at::parallel_for(0, static_cast<std::int64_t>(tasks.size()), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      const GramTask& task = tasks[static_cast<std::size_t>(t)];
      for (std::int64_t q = task.first; q < task.end; ++q) {
        const std::int64_t last = std::min({a_panels, (task.group + 1) * gram_group, symmetric ? q + 1 : a_panels});
        for (std::int64_t p = task.group * gram_group; p < last; ++p) {
          const std::int64_t high = std::min(product_columns, k - p * product_columns), wide = std::min(product_columns, m - q * product_columns);
          float* to = c + p * product_columns * m + q * product_columns;
          const auto *left = a + p * rows * product_columns, *right = b + q * rows * product_columns;
          if (high == product_columns && wide == product_columns) Type::tile(rows, left, right, to, m);
          else gram_edge_tile<Type>(rows, left, right, to, m, high, wide);
        }
      }
    }
  });
}

bool gram_fits(const Tensor& x) { return x.is_cpu() && x.scalar_type() == at::kFloat && x.dim() == 2 && x.stride(1) == 1; }
bool gram_fits_bf16(const Tensor& x) { return x.is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16) && x.dim() == 2 && x.stride(1) == 1; }

template <class Type>
void gram_own(Tensor& sum, const std::vector<Tensor>& a, const std::vector<Tensor>& b, bool symmetric) {
  using Packed = typename Type::Packed;
  const std::int64_t k = sum.size(0), m = sum.size(1), a_panels = (k + product_columns - 1) / product_columns, b_panels = (m + product_columns - 1) / product_columns;
  std::vector<GramTask> tasks;
  for (std::int64_t g = 0; g * gram_group < a_panels; ++g)
    for (std::int64_t q = symmetric ? g * gram_group : 0; q < b_panels; q += gram_span) tasks.push_back({g, q, std::min(b_panels, q + gram_span)});
  const auto buffer = [](std::int64_t panels) { return at::empty({panels * Type::depth * product_columns * static_cast<std::int64_t>(sizeof(Packed))}, at::kByte); };
  const auto data = [](const Tensor& bytes) { return reinterpret_cast<Packed*>(bytes.data_ptr<std::uint8_t>()); };
  const Tensor left = buffer(a_panels);
  Tensor right;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const bool same = a[i].is_same(b[i]);
    if (!same && !right.defined()) right = buffer(b_panels);
    for (std::int64_t r = 0; r < a[i].size(0); r += Type::depth) {
      const std::int64_t rows = std::min(Type::depth, a[i].size(0) - r);
      Type::pack(a[i], r, rows, data(left));
      if (!same) Type::pack(b[i], r, rows, data(right));
      gram_run<Type>(tasks, data(left), data(same ? left : right), Type::room(rows), sum, symmetric);
    }
  }
}

#endif

// Panels of rows are products of their own.
void gram_by_panels(Tensor& sum, const Tensor& a, const Tensor& b, bool symmetric) {
  constexpr std::int64_t width = 128;
  const std::int64_t rows = a.size(1), panels = (rows + width - 1) / width;
  const auto panel = [&](std::int64_t p) {
    const std::int64_t from = p * width, to = std::min(rows, from + width), left = symmetric ? from : 0;
    sum.slice(0, from, to).slice(1, left).addmm_(a.slice(1, from, to).t(), b.slice(1, left));
  };
  // A long panel goes with a short one.
  const auto pair = [&](std::int64_t p) {
    panel(p);
    if (panels - 1 - p != p) panel(panels - 1 - p);
  };
  const std::int64_t pairs = (panels + 1) / 2;
  if (!sum.is_cpu() || pairs < 2) {
    const SingleThread single;  // products that threads share may add in another order
    for (std::int64_t p = 0; p < pairs; ++p) pair(p);
    return;
  }
  at::parallel_for(0, pairs, 1, [&](std::int64_t begin, std::int64_t end) {
    const at::NoGradGuard no_grad;  // a worker thread has its own mode
    for (std::int64_t p = begin; p < end; ++p) pair(p);
  });
}

void gram_check(const Tensor& sum, const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  for (std::size_t i = 0; i < a.size(); ++i)
    TORCH_CHECK(a[i].dim() == 2 && b[i].dim() == 2 && a[i].size(0) == b[i].size(0) && a[i].size(1) == sum.size(0) && b[i].size(1) == sum.size(1), "add_gram: shapes do not fit");
}

}  // namespace

void add_gram(Tensor& sum, const std::vector<Tensor>& a, const std::vector<Tensor>& b, bool symmetric) {
  TORCH_CHECK(!a.empty() && a.size() == b.size(), "add_gram: as many pieces of a as of b, and at least one");
  const at::NoGradGuard no_grad;
  if (!sum.defined()) sum = at::zeros({a[0].size(1), b[0].size(1)}, a[0].options());
  gram_check(sum, a, b);
#ifdef KOMPAKT_OWN_PRODUCTS
  const auto fits = [](const std::vector<Tensor>& all) { return std::all_of(all.begin(), all.end(), gram_fits); };
  if (has_own_products() && gram_fits(sum) && sum.is_contiguous() && fits(a) && fits(b)) return gram_own<GramFloat>(sum, a, b, symmetric);
#endif
  for (std::size_t i = 0; i < a.size(); ++i) gram_by_panels(sum, a[i], b[i], symmetric);
}

void add_gram_bf16(Tensor& sum, const std::vector<Tensor>& a, const std::vector<Tensor>& b, bool symmetric) {
  TORCH_CHECK(!a.empty() && a.size() == b.size(), "add_gram: as many pieces of a as of b, and at least one");
  const at::NoGradGuard no_grad;
  if (!sum.defined()) sum = at::zeros({a[0].size(1), b[0].size(1)}, a[0].options().dtype(at::kFloat));
  gram_check(sum, a, b);
#ifdef KOMPAKT_OWN_PRODUCTS
  const auto fits = [](const std::vector<Tensor>& all) { return std::all_of(all.begin(), all.end(), gram_fits_bf16); };
  if (gram_has_bf16() && gram_fits(sum) && sum.is_contiguous() && fits(a) && fits(b)) return gram_own<GramBf16>(sum, a, b, symmetric);
#endif
  std::vector<Tensor> left, right;
  const auto rounded = [](const Tensor& x) { return x.to(at::kBFloat16).to(at::kFloat); };
  for (std::size_t i = 0; i < a.size(); ++i) {
    left.push_back(rounded(a[i]));
    right.push_back(a[i].is_same(b[i]) ? left.back() : rounded(b[i]));
  }
  add_gram(sum, left, right, symmetric);
}

Tensor mirrored(const Tensor& upper, double factor) {
  TORCH_CHECK(upper.dim() == 2 && upper.size(0) == upper.size(1), "mirrored: not a square");
  const at::NoGradGuard no_grad;
  if (!upper.is_cpu() || !upper.is_contiguous() || (upper.scalar_type() != at::kFloat && upper.scalar_type() != at::kDouble)) return (upper.triu() + upper.triu(1).t()).mul_(factor);
  Tensor out = at::empty_like(upper);
  const std::int64_t n = upper.size(0), tiles = (n + mirror_tile - 1) / mirror_tile;
  AT_DISPATCH_FLOATING_TYPES(upper.scalar_type(), "mirrored", [&] {
    const scalar_t* from = upper.const_data_ptr<scalar_t>();
    scalar_t* to = out.data_ptr<scalar_t>();
    const auto times = static_cast<scalar_t>(factor);
    // A tile of rows and, transposed, the tile of columns that it determines.
    at::parallel_for(0, tiles, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t p = begin; p < end; ++p)
        for (std::int64_t q = p; q < tiles; ++q)
          for (std::int64_t i = p * mirror_tile; i < std::min(n, (p + 1) * mirror_tile); ++i)
            for (std::int64_t j = std::max(i, q * mirror_tile); j < std::min(n, (q + 1) * mirror_tile); ++j) to[j * n + i] = to[i * n + j] = from[i * n + j] * times;
    });
  });
  return out;
}

}  // namespace kompakt
