#include "model/gram_product.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "model/parallel.h"
#include "model/product_tile.h"
#include "model/products.h"

namespace kompakt {
namespace {

using at::Tensor;

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

// The same where c ends before the tile does.
void gram_edge_tile(std::int64_t rows, const float* a, const float* b, float* c, std::int64_t c_row, std::int64_t high, std::int64_t wide) {
  float whole[product_columns * product_columns] = {};
  gram_tile(rows, a, b, whole, product_columns);
  for (std::int64_t r = 0; r < high; ++r)
    for (std::int64_t s = 0; s < wide; ++s) c[r * c_row + s] += whole[r * product_columns + s];
}

struct GramTask {
  std::int64_t group, first, end;  // panels [8 group, 8 group + 8) of a, [first, end) of b
};

// c += a^T b for packed rows.
void gram_run(const std::vector<GramTask>& tasks, const float* a, const float* b, std::int64_t rows, Tensor& sum, bool symmetric) {
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
          const float *left = a + p * rows * product_columns, *right = b + q * rows * product_columns;
          if (high == product_columns && wide == product_columns) gram_tile(rows, left, right, to, m);
          else gram_edge_tile(rows, left, right, to, m, high, wide);
        }
      }
    }
  });
}

bool gram_fits(const Tensor& x) { return x.is_cpu() && x.scalar_type() == at::kFloat && x.dim() == 2 && x.stride(1) == 1; }

void gram_own(Tensor& sum, const std::vector<Tensor>& a, const std::vector<Tensor>& b, bool symmetric) {
  const std::int64_t k = sum.size(0), m = sum.size(1), a_panels = (k + product_columns - 1) / product_columns, b_panels = (m + product_columns - 1) / product_columns;
  std::vector<GramTask> tasks;
  for (std::int64_t g = 0; g * gram_group < a_panels; ++g)
    for (std::int64_t q = symmetric ? g * gram_group : 0; q < b_panels; q += gram_span) tasks.push_back({g, q, std::min(b_panels, q + gram_span)});
  const auto buffer = [](std::int64_t panels) { return at::empty({panels * gram_depth * product_columns}, at::kFloat); };
  const Tensor left = buffer(a_panels);
  Tensor right;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const bool same = a[i].is_same(b[i]);
    if (!same && !right.defined()) right = buffer(b_panels);
    for (std::int64_t r = 0; r < a[i].size(0); r += gram_depth) {
      const std::int64_t rows = std::min(gram_depth, a[i].size(0) - r);
      gram_pack(a[i].const_data_ptr<float>() + r * a[i].stride(0), a[i].stride(0), rows, k, left.data_ptr<float>());
      if (!same) gram_pack(b[i].const_data_ptr<float>() + r * b[i].stride(0), b[i].stride(0), rows, m, right.data_ptr<float>());
      gram_run(tasks, left.const_data_ptr<float>(), same ? left.const_data_ptr<float>() : right.const_data_ptr<float>(), rows, sum, symmetric);
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

}  // namespace

void add_gram(Tensor& sum, const std::vector<Tensor>& a, const std::vector<Tensor>& b, bool symmetric) {
  TORCH_CHECK(!a.empty() && a.size() == b.size(), "add_gram: as many pieces of a as of b, and at least one");
  const at::NoGradGuard no_grad;
  if (!sum.defined()) sum = at::zeros({a[0].size(1), b[0].size(1)}, a[0].options());
  for (std::size_t i = 0; i < a.size(); ++i)
    TORCH_CHECK(a[i].dim() == 2 && b[i].dim() == 2 && a[i].size(0) == b[i].size(0) && a[i].size(1) == sum.size(0) && b[i].size(1) == sum.size(1), "add_gram: shapes do not fit");
#ifdef KOMPAKT_OWN_PRODUCTS
  const auto fits = [](const std::vector<Tensor>& all) { return std::all_of(all.begin(), all.end(), gram_fits); };
  if (has_own_products() && gram_fits(sum) && sum.is_contiguous() && fits(a) && fits(b)) return gram_own(sum, a, b, symmetric);
#endif
  for (std::size_t i = 0; i < a.size(); ++i) gram_by_panels(sum, a[i], b[i], symmetric);
}

}  // namespace kompakt
