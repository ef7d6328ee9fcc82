// A block of b is packed into panels of 16 columns that stay in the second-level cache; 6 rows of a meet one panel in registers.
#include "model/products.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "model/parallel.h"
#include "model/pointwise.h"
#include "model/product_tile.h"

namespace kompakt {
namespace {

using at::Tensor;

#ifdef KOMPAKT_OWN_PRODUCTS

constexpr std::int64_t product_depth = 768;      // of a panel: 6 rows of a take 18 KiB of the first-level cache
constexpr std::int64_t product_packed = 1 << 16;  // floats of b that are packed at a time, 256 KiB

struct ProductTask {
  const float *a, *b;
  float* c;
  std::int64_t m, n, k;
  std::int64_t a_row, a_column, b_row, b_column, c_row;
  bool add;
};

KOMPAKT_PRODUCTS_TARGET void product_rows_of(std::int64_t rows, std::int64_t depth, const float* a, std::int64_t a_row, std::int64_t a_column, const float* panel, float* c, std::int64_t c_row, bool add) {
  // Strides that the compiler knows: rows of a as they lie, or packed.
  if (rows == product_rows && a_column == 1) return product_tile<6>(depth, a, a_row, 1, panel, c, c_row, add);
  if (rows == product_rows && a_row == 1 && a_column == product_rows) return product_tile<6>(depth, a, 1, product_rows, panel, c, c_row, add);
  for (std::int64_t i = 0; i < rows; ++i) product_tile<1>(depth, a + i * a_row, a_row, a_column, panel, c + i * c_row, c_row, add);
}

// 16 columns of b, whose rows lie behind each other -> panel [depth, 16]: 8 x 8 numbers are transposed in registers.
KOMPAKT_PRODUCTS_TARGET void product_pack_transposed(const float* b, std::int64_t stride, std::int64_t depth, float* panel) {
  for (std::int64_t d = 0; d < depth; d += 8) {
    for (int half = 0; half < 2; ++half) {
      __m256 r[8];
      for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(b + (half * 8 + i) * stride + d);
      const __m256 a0 = _mm256_unpacklo_ps(r[0], r[1]), a1 = _mm256_unpackhi_ps(r[0], r[1]), a2 = _mm256_unpacklo_ps(r[2], r[3]), a3 = _mm256_unpackhi_ps(r[2], r[3]);
      const __m256 a4 = _mm256_unpacklo_ps(r[4], r[5]), a5 = _mm256_unpackhi_ps(r[4], r[5]), a6 = _mm256_unpacklo_ps(r[6], r[7]), a7 = _mm256_unpackhi_ps(r[6], r[7]);
      const __m256 low[4] = {_mm256_shuffle_ps(a0, a2, 0x44), _mm256_shuffle_ps(a0, a2, 0xee), _mm256_shuffle_ps(a1, a3, 0x44), _mm256_shuffle_ps(a1, a3, 0xee)};
      const __m256 high[4] = {_mm256_shuffle_ps(a4, a6, 0x44), _mm256_shuffle_ps(a4, a6, 0xee), _mm256_shuffle_ps(a5, a7, 0x44), _mm256_shuffle_ps(a5, a7, 0xee)};
      for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(panel + (d + i) * product_columns + half * 8, _mm256_permute2f128_ps(low[i], high[i], 0x20));
        _mm256_storeu_ps(panel + (d + i + 4) * product_columns + half * 8, _mm256_permute2f128_ps(low[i], high[i], 0x31));
      }
    }
  }
}

// b [depth, columns] from row `d0` and column `j0` on -> panels, zeros behind the last column.
void product_pack(const ProductTask& t, std::int64_t d0, std::int64_t depth, std::int64_t j0, std::int64_t columns, float* panels) {
  for (std::int64_t j = 0; j < columns; j += product_columns, panels += depth * product_columns) {
    const std::int64_t count = std::min(product_columns, columns - j);
    const float* b = t.b + d0 * t.b_row + (j0 + j) * t.b_column;
    std::int64_t d = 0;
    if (count == product_columns && t.b_column == 1) {
      for (; d < depth; ++d) std::memcpy(panels + d * product_columns, b + d * t.b_row, product_columns * sizeof(float));
    } else if (count == product_columns && t.b_row == 1) {
      d = depth / 8 * 8;
      product_pack_transposed(b, t.b_column, d, panels);
    }
    for (; d < depth; ++d)
      for (std::int64_t i = 0; i < product_columns; ++i) panels[d * product_columns + i] = i < count ? b[d * t.b_row + i * t.b_column] : 0.0f;
  }
}

// Rows [i0, i1) and columns [j0, j0 + columns) of c.
void product_block(const ProductTask& t, std::int64_t i0, std::int64_t i1, std::int64_t j0, std::int64_t columns, std::vector<float>& panels) {
  const std::int64_t parts = (t.k + product_depth - 1) / product_depth, step = (t.k + parts - 1) / parts;
  float rows[product_rows * product_depth], edge[product_rows * product_columns];
  for (std::int64_t d = 0; d < t.k; d += step) {
    const std::int64_t depth = std::min(step, t.k - d);
    panels.resize(static_cast<std::size_t>(depth * ((columns + product_columns - 1) / product_columns * product_columns)));
    product_pack(t, d, depth, j0, columns, panels.data());
    const bool add = t.add || d > 0;
    for (std::int64_t i = i0; i < i1; i += product_rows) {
      const std::int64_t count = std::min(product_rows, i1 - i);
      const float* a = t.a + i * t.a_row + d * t.a_column;
      std::int64_t a_row = t.a_row, a_column = t.a_column;
      if (a_column != 1) {  // columns of a are far apart: 6 numbers of each, once for all panels
        for (std::int64_t e = 0; e < depth; ++e)
          for (std::int64_t r = 0; r < product_rows; ++r) rows[e * product_rows + r] = r < count ? a[e * a_column + r * a_row] : 0.0f;
        a = rows, a_row = 1, a_column = product_rows;
      }
      const float* panel = panels.data();
      for (std::int64_t j = 0; j < columns; j += product_columns, panel += depth * product_columns) {
        float* c = t.c + i * t.c_row + j0 + j;
        const std::int64_t wide = std::min(product_columns, columns - j);
        if (wide == product_columns) {
          product_rows_of(count, depth, a, a_row, a_column, panel, c, t.c_row, add);
          continue;
        }
        product_rows_of(count, depth, a, a_row, a_column, panel, edge, product_columns, false);
        for (std::int64_t r = 0; r < count; ++r)
          for (std::int64_t s = 0; s < wide; ++s) c[r * t.c_row + s] = add ? c[r * t.c_row + s] + edge[r * product_columns + s] : edge[r * product_columns + s];
      }
    }
  }
}

void product_run(const ProductTask& t) {
  const std::int64_t depth = std::min(t.k, product_depth), most = std::max<std::int64_t>(product_columns, product_packed / depth / product_columns * product_columns);
  const std::int64_t blocks = (t.n + most - 1) / most, columns = ((t.n + blocks - 1) / blocks + product_columns - 1) / product_columns * product_columns;
  const std::int64_t panels_of_rows = (t.m + product_rows - 1) / product_rows, parts = at::in_parallel_region() ? 1 : std::clamp<std::int64_t>(at::get_num_threads(), 1, panels_of_rows);
  at::parallel_for(0, blocks * parts, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> panels;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t j = i / parts * columns, part = i % parts;
      if (j < t.n) product_block(t, panels_of_rows * part / parts * product_rows, std::min(panels_of_rows * (part + 1) / parts * product_rows, t.m), j, std::min(columns, t.n - j), panels);
    }
  });
}

// One of the two strides must be 1.
bool product_plain(const Tensor& x) { return x.is_cpu() && x.scalar_type() == at::kFloat && x.dim() == 2 && (x.stride(0) == 1 || x.stride(1) == 1); }

bool product_fits(const Tensor& c, const Tensor& a, const Tensor& b) {
  // Below, packing is most of the work.
  return has_own_products() && product_plain(a) && product_plain(b) && product_plain(c) && c.stride(1) == 1 && a.size(0) >= 48 && a.size(1) >= 32 && b.size(1) >= 48;
}

#endif

struct LinearProduct : torch::autograd::Function<LinearProduct> {
  static Tensor run(const Tensor& x, const Tensor& weight, const Tensor& bias) {
    auto shape = x.sizes().vec();
    shape.back() = weight.size(0);
    const Tensor rows = x.detach().reshape({-1, x.size(-1)}), w = weight.detach();
    Tensor y = at::empty({rows.size(0), w.size(0)}, rows.options());
    if (bias.defined()) y.copy_(bias.detach().expand_as(y));
    matrix_product(y, rows, w.t(), bias.defined());
    return y.view(shape);
  }
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    context->save_for_backward({x, weight});
    context->saved_data["to"] = std::vector<bool>{x.requires_grad(), weight.requires_grad(), bias && bias->requires_grad()};
    return run(x, weight, bias.value_or(Tensor()));
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context, torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const auto to = context->saved_data["to"].toBoolList();
    const Tensor &x = saved[0], &weight = saved[1], g = gradients[0].reshape({-1, weight.size(0)});
    Tensor dx, dw;
    if (to[0]) {
      dx = at::empty({g.size(0), weight.size(1)}, x.options());
      matrix_product(dx, g, weight);
      dx = dx.view(x.sizes());
    }
    if (to[1]) {
      dw = at::empty(weight.sizes(), weight.options());
      matrix_product(dw, g.t(), x.reshape({-1, x.size(-1)}));
    }
    return {dx, dw, to[2] ? g.sum(0) : Tensor()};
  }
};

struct GatedLinear : torch::autograd::Function<GatedLinear> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& gate, const Tensor& up, const Tensor& weight, const std::optional<Tensor>& bias) {
    context->save_for_backward({gate, up, weight});
    context->saved_data["to"] = std::vector<bool>{weight.requires_grad(), bias && bias->requires_grad()};
    return LinearProduct::run(gated_silu(gate.detach(), up.detach()), weight, bias.value_or(Tensor()));
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context, torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const auto to = context->saved_data["to"].toBoolList();
    const Tensor &gate = saved[0], &up = saved[1], &weight = saved[2], g = gradients[0].reshape({-1, weight.size(0)});
    Tensor dw;
    if (to[0]) {
      dw = at::empty(weight.sizes(), weight.options());
      matrix_product(dw, g.t(), gated_silu(gate, up).reshape({-1, gate.size(-1)}));
    }
    Tensor inner = at::empty({g.size(0), weight.size(1)}, gate.options());
    matrix_product(inner, g, weight);
    const auto [to_gate, to_up] = gated_silu_backward(gate, up, inner.view(gate.sizes()));
    return {to_gate, to_up, dw, to[1] ? g.sum(0) : Tensor()};
  }
};

}  // namespace

bool has_own_products() {
#ifdef KOMPAKT_OWN_PRODUCTS
  static const bool found = __builtin_cpu_is("amd") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return found;
#else
  return false;
#endif
}

void matrix_product(Tensor& c, const Tensor& a, const Tensor& b, bool add) {
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && c.dim() == 2 && a.size(1) == b.size(0) && c.size(0) == a.size(0) && c.size(1) == b.size(1), "matrix_product: shapes do not fit");
  const at::NoGradGuard no_grad;
#ifdef KOMPAKT_OWN_PRODUCTS
  if (product_fits(c, a, b)) {
    return product_run({a.const_data_ptr<float>(), b.const_data_ptr<float>(), c.data_ptr<float>(), a.size(0), b.size(1), a.size(1), a.stride(0), a.stride(1), b.stride(0), b.stride(1), c.stride(0), add});
  }
#endif
  if (add) c.addmm_(a, b);
  else at::mm_out(c, a, b);
}

bool fits_gated_linear(const Tensor& gate, const Tensor& up, const Tensor& weight) {
  return fits_pointwise(gate) && gate.scalar_type() == up.scalar_type() && gate.scalar_type() == weight.scalar_type() && gate.is_contiguous() && up.is_contiguous() && weight.is_contiguous() &&
         !at::autocast::is_autocast_enabled(at::kCPU);
}

Tensor gated_linear(const Tensor& gate, const Tensor& up, const Tensor& weight, const Tensor& bias) {
  const bool traced = at::GradMode::is_enabled() && (gate.requires_grad() || up.requires_grad() || weight.requires_grad() || (bias.defined() && bias.requires_grad()));
  return traced ? GatedLinear::apply(gate, up, weight, bias.defined() ? std::optional<Tensor>(bias) : std::nullopt) : LinearProduct::run(gated_silu(gate, up), weight, bias);
}

Tensor linear_product(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const bool plain = x.is_cpu() && x.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat && weight.dim() == 2 && weight.is_contiguous() && (!bias.defined() || bias.scalar_type() == at::kFloat);
  if (!plain || !has_own_products() || at::autocast::is_autocast_enabled(at::kCPU) || weight.size(0) < 48 || weight.size(1) < 48 || x.numel() / std::max<std::int64_t>(1, x.size(-1)) < 48)
    return at::linear(x, weight, bias.defined() ? std::optional<Tensor>(bias) : std::nullopt);
  const bool traced = at::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad() || (bias.defined() && bias.requires_grad()));
  return traced ? LinearProduct::apply(x, weight, bias.defined() ? std::optional<Tensor>(bias) : std::nullopt) : LinearProduct::run(x, weight, bias);
}

}  // namespace kompakt
