// RMSNorm, gated activation and rotation as autograd functions. Sums have a fixed order, whatever the number of threads.
#include "model/pointwise.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "model/lanes.h"
#include "model/parallel.h"

namespace kompakt {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr std::int64_t pointwise_rows = 64;       // of a block whose share of a weight's gradient is summed in one go
constexpr std::int64_t pointwise_grain = 1 << 14;  // numbers that are worth a thread

// Calls work(R{}) with R the type of x.
template <class Work>
void pointwise_typed(const Tensor& x, const Work& work) {
  if (x.scalar_type() == at::kDouble) work(double{});
  else work(float{});
}

// sum over j of a_j b_j c_j; c null: of a_j b_j.
template <class R>
KOMPAKT_LANES_INLINE R pointwise_dot(const R* a, const R* b, const R* c, std::int64_t size) {
  using Register = typename Registers<R>::Type;
  constexpr std::int64_t count = Registers<R>::count;
  Register sum[2] = {}, x, y, z;
  std::int64_t j = 0;
  for (int turn = 0; j + count <= size; j += count, turn ^= 1) {
    std::memcpy(&x, a + j, sizeof x);
    std::memcpy(&y, b + j, sizeof y);
    x *= y;
    if (c) {
      std::memcpy(&z, c + j, sizeof z);
      x *= z;
    }
    sum[turn] += x;
  }
  R total = lanes_sum<R>(sum[0] + sum[1]);
  for (; j < size; ++j) total += a[j] * b[j] * (c ? c[j] : R(1));
  return total;
}

// `scales` [rows]: 1 / sqrt(mean(x^2) + eps).
template <class R>
KOMPAKT_LANES_INLINE void pointwise_norm(const R* __restrict x, const R* __restrict weight, R* __restrict y, R* __restrict scales, std::int64_t rows, std::int64_t size, R eps) {
  for (std::int64_t i = 0; i < rows; ++i, x += size, y += size) {
    const R scale = R(1) / std::sqrt(pointwise_dot<R>(x, x, nullptr, size) / static_cast<R>(size) + eps);
    for (std::int64_t j = 0; j < size; ++j) y[j] = x[j] * scale * weight[j];
    scales[i] = scale;
  }
}

// With r the scale of a row: dx = r g w - x r^3 mean(g w x), dw = sum over rows of g x r. `share` [size] is added to.
template <class R>
KOMPAKT_LANES_INLINE void pointwise_norm_back(const R* __restrict x, const R* __restrict weight, const R* __restrict scales, const R* __restrict g, R* __restrict dx, R* __restrict share, std::int64_t rows, std::int64_t size) {
  for (std::int64_t i = 0; i < rows; ++i, x += size, g += size, dx += size) {
    const R scale = scales[i], pull = scale * scale * scale * pointwise_dot<R>(g, weight, x, size) / static_cast<R>(size);
    for (std::int64_t j = 0; j < size; ++j) dx[j] = g[j] * weight[j] * scale - x[j] * pull;
    if (share)
      for (std::int64_t j = 0; j < size; ++j) share[j] += g[j] * x[j] * scale;
  }
}

// sigmoid of a register; by reference, because a vector that is returned has another calling convention without AVX.
template <class R>
KOMPAKT_LANES_INLINE void pointwise_sigmoid(const typename Registers<R>::Type& x, typename Registers<R>::Type& s) {
  using Register = typename Registers<R>::Type;
  const Register zero = {}, one = zero + R(1);
  Register e = x > zero ? -x : x;
  lanes_exp<R>(e);
  s = (x > zero ? one : e) / (one + e);
}

// `size` numbers in whole registers; work(register index) sees zeros behind the last number.
template <class R, int Inputs, int Outputs, class Work>
KOMPAKT_LANES_INLINE void pointwise_lanes(const R* const (&in)[Inputs], R* const (&out)[Outputs], std::int64_t size, const Work& work) {
  using Register = typename Registers<R>::Type;
  constexpr std::int64_t count = Registers<R>::count;
  Register a[Inputs] = {}, b[Outputs];
  std::int64_t j = 0;
  for (; j + count <= size; j += count) {
    for (int i = 0; i < Inputs; ++i) std::memcpy(&a[i], in[i] + j, sizeof a[i]);
    work(a, b);
    for (int i = 0; i < Outputs; ++i) std::memcpy(out[i] + j, &b[i], sizeof b[i]);
  }
  if (j == size) return;
  const auto rest = static_cast<std::size_t>(size - j) * sizeof(R);
  for (int i = 0; i < Inputs; ++i) a[i] = Register{}, std::memcpy(&a[i], in[i] + j, rest);
  work(a, b);
  for (int i = 0; i < Outputs; ++i) std::memcpy(out[i] + j, &b[i], rest);
}

template <class R>
KOMPAKT_LANES_INLINE void pointwise_gate(const R* gate, const R* up, R* out, std::int64_t size) {
  using Register = typename Registers<R>::Type;
  pointwise_lanes<R, 2, 1>({gate, up}, {out}, size, [](const Register(&a)[2], Register(&b)[1]) __attribute__((always_inline)) {
    Register s;
    pointwise_sigmoid<R>(a[0], s);
    b[0] = a[0] * s * a[1];
  });
}

// With s = sigmoid(gate): d gate = g up s (1 + gate (1 - s)), d up = g gate s.
template <class R>
KOMPAKT_LANES_INLINE void pointwise_gate_back(const R* gate, const R* up, const R* g, R* to_gate, R* to_up, std::int64_t size) {
  using Register = typename Registers<R>::Type;
  pointwise_lanes<R, 3, 2>({gate, up, g}, {to_gate, to_up}, size, [](const Register(&a)[3], Register(&b)[2]) __attribute__((always_inline)) {
    Register s;
    pointwise_sigmoid<R>(a[0], s);
    const Register slope = a[2] * s;
    b[0] = slope * a[1] * (R(1) + a[0] * (R(1) - s));
    b[1] = slope * a[0];
  });
}

// One head of one token: the pair (i, i + half) turns by its angle. `back`: the transposed rotation, for gradients.
template <class R>
KOMPAKT_LANES_INLINE void pointwise_turn(const R* __restrict x, const R* __restrict cos, const R* __restrict sin, R* __restrict y, std::int64_t half, bool back) {
  if (back) {
    for (std::int64_t i = 0; i < half; ++i) {
      y[i] = x[i] * cos[i] + x[i + half] * sin[i + half];
      y[i + half] = x[i + half] * cos[i + half] - x[i] * sin[i];
    }
    return;
  }
  for (std::int64_t i = 0; i < half; ++i) {
    y[i] = x[i] * cos[i] - x[i + half] * sin[i];
    y[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half];
  }
}
template <class R>
KOMPAKT_LANES_INLINE void pointwise_turns(const R* x, const R* cos, const R* sin, R* y, std::int64_t heads, std::int64_t size, bool back) {
  for (std::int64_t h = 0; h < heads; ++h) pointwise_turn<R>(x + h * size, cos, sin, y + h * size, size / 2, back);
}

// Compiled for both types and for processors with and without fused multiply-add.
KOMPAKT_LANES_CLONES void pointwise_run_norm(const float* x, const float* w, float* y, float* s, std::int64_t rows, std::int64_t size, double eps) { pointwise_norm<float>(x, w, y, s, rows, size, static_cast<float>(eps)); }
KOMPAKT_LANES_CLONES void pointwise_run_norm_wide(const double* x, const double* w, double* y, double* s, std::int64_t rows, std::int64_t size, double eps) { pointwise_norm<double>(x, w, y, s, rows, size, eps); }
KOMPAKT_LANES_CLONES void pointwise_run_norm_back(const float* x, const float* w, const float* s, const float* g, float* dx, float* share, std::int64_t rows, std::int64_t size) { pointwise_norm_back<float>(x, w, s, g, dx, share, rows, size); }
KOMPAKT_LANES_CLONES void pointwise_run_norm_back_wide(const double* x, const double* w, const double* s, const double* g, double* dx, double* share, std::int64_t rows, std::int64_t size) { pointwise_norm_back<double>(x, w, s, g, dx, share, rows, size); }
KOMPAKT_LANES_CLONES void pointwise_run_gate(const float* gate, const float* up, float* out, std::int64_t size) { pointwise_gate<float>(gate, up, out, size); }
KOMPAKT_LANES_CLONES void pointwise_run_gate_wide(const double* gate, const double* up, double* out, std::int64_t size) { pointwise_gate<double>(gate, up, out, size); }
KOMPAKT_LANES_CLONES void pointwise_run_gate_back(const float* gate, const float* up, const float* g, float* a, float* b, std::int64_t size) { pointwise_gate_back<float>(gate, up, g, a, b, size); }
KOMPAKT_LANES_CLONES void pointwise_run_gate_back_wide(const double* gate, const double* up, const double* g, double* a, double* b, std::int64_t size) { pointwise_gate_back<double>(gate, up, g, a, b, size); }
KOMPAKT_LANES_CLONES void pointwise_run_turns(const float* x, const float* c, const float* s, float* y, std::int64_t heads, std::int64_t size, bool back) { pointwise_turns<float>(x, c, s, y, heads, size, back); }
KOMPAKT_LANES_CLONES void pointwise_run_turns_wide(const double* x, const double* c, const double* s, double* y, std::int64_t heads, std::int64_t size, bool back) { pointwise_turns<double>(x, c, s, y, heads, size, back); }

// One name for both types.
void pointwise_call_norm(const float* x, const float* w, float* y, float* s, std::int64_t rows, std::int64_t size, double eps) { pointwise_run_norm(x, w, y, s, rows, size, eps); }
void pointwise_call_norm(const double* x, const double* w, double* y, double* s, std::int64_t rows, std::int64_t size, double eps) { pointwise_run_norm_wide(x, w, y, s, rows, size, eps); }
void pointwise_call_norm_back(const float* x, const float* w, const float* s, const float* g, float* dx, float* share, std::int64_t rows, std::int64_t size) { pointwise_run_norm_back(x, w, s, g, dx, share, rows, size); }
void pointwise_call_norm_back(const double* x, const double* w, const double* s, const double* g, double* dx, double* share, std::int64_t rows, std::int64_t size) { pointwise_run_norm_back_wide(x, w, s, g, dx, share, rows, size); }
void pointwise_call_gate(const float* gate, const float* up, float* out, std::int64_t size) { pointwise_run_gate(gate, up, out, size); }
void pointwise_call_gate(const double* gate, const double* up, double* out, std::int64_t size) { pointwise_run_gate_wide(gate, up, out, size); }
void pointwise_call_gate_back(const float* gate, const float* up, const float* g, float* a, float* b, std::int64_t size) { pointwise_run_gate_back(gate, up, g, a, b, size); }
void pointwise_call_gate_back(const double* gate, const double* up, const double* g, double* a, double* b, std::int64_t size) { pointwise_run_gate_back_wide(gate, up, g, a, b, size); }
void pointwise_call_turns(const float* x, const float* c, const float* s, float* y, std::int64_t heads, std::int64_t size, bool back) { pointwise_run_turns(x, c, s, y, heads, size, back); }
void pointwise_call_turns(const double* x, const double* c, const double* s, double* y, std::int64_t heads, std::int64_t size, bool back) { pointwise_run_turns_wide(x, c, s, y, heads, size, back); }

// weight plus offset, contiguous.
Tensor pointwise_gain(const Tensor& weight, double offset) { return offset == 0 ? weight.detach().contiguous() : weight.detach() + offset; }

struct NormRows : torch::autograd::Function<NormRows> {
  // [y, scales]
  static std::pair<Tensor, Tensor> run(const Tensor& in, const Tensor& weight, double offset, double eps) {
    const Tensor x = in.contiguous(), gain = pointwise_gain(weight, offset);
    const std::int64_t size = x.size(-1), rows = size > 0 ? x.numel() / size : 0;
    Tensor y = at::empty_like(x), scales = at::empty({rows}, x.options());
    pointwise_typed(x, [&](auto zero) {
      using R = decltype(zero);
      const R *from = x.const_data_ptr<R>(), *w = gain.const_data_ptr<R>();
      R *to = y.data_ptr<R>(), *s = scales.data_ptr<R>();
      at::parallel_for(0, rows, std::max<std::int64_t>(1, pointwise_grain / std::max<std::int64_t>(1, size)),
                       [&](std::int64_t begin, std::int64_t end) { pointwise_call_norm(from + begin * size, w, to + begin * size, s + begin, end - begin, size, eps); });
    });
    return {y, scales};
  }
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, double offset, double eps) {
    const auto [y, scales] = run(x, weight, offset, eps);
    context->save_for_backward({x, weight, scales});
    context->saved_data["offset"] = offset;
    context->saved_data["to_weight"] = weight.requires_grad();
    return y;
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const Tensor x = saved[0].contiguous(), gain = pointwise_gain(saved[1], context->saved_data["offset"].toDouble()), g = gradients[0].contiguous();
    const Tensor& scales = saved[2];
    const bool to_weight = context->saved_data["to_weight"].toBool();
    const std::int64_t size = x.size(-1), rows = scales.numel(), blocks = (rows + pointwise_rows - 1) / pointwise_rows;
    Tensor dx = at::empty_like(x), shares = to_weight ? at::zeros({blocks, size}, x.options()) : Tensor();
    pointwise_typed(x, [&](auto zero) {
      using R = decltype(zero);
      const R *from = x.const_data_ptr<R>(), *w = gain.const_data_ptr<R>(), *s = scales.const_data_ptr<R>(), *slope = g.const_data_ptr<R>();
      R *to = dx.data_ptr<R>(), *share = to_weight ? shares.data_ptr<R>() : nullptr;
      at::parallel_for(0, blocks, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t b = begin; b < end; ++b) {
          const std::int64_t at = b * pointwise_rows * size, count = std::min(pointwise_rows, rows - b * pointwise_rows);
          pointwise_call_norm_back(from + at, w, s + b * pointwise_rows, slope + at, to + at, share ? share + b * size : nullptr, count, size);
        }
      });
    });
    return {dx, to_weight ? shares.sum(0) : Tensor(), Tensor(), Tensor()};
  }
};

struct GatedSilu : torch::autograd::Function<GatedSilu> {
  static Tensor run(const Tensor& gate, const Tensor& up) {
    const Tensor a = gate.contiguous(), b = up.contiguous();
    Tensor out = at::empty_like(a);
    pointwise_typed(a, [&](auto zero) {
      using R = decltype(zero);
      const R *x = a.const_data_ptr<R>(), *y = b.const_data_ptr<R>();
      R* to = out.data_ptr<R>();
      // Whole registers in every part: the last lanes of a part are computed like those of any other.
      at::parallel_for(0, (a.numel() + 7) / 8, pointwise_grain / 8, [&](std::int64_t begin, std::int64_t end) { pointwise_call_gate(x + begin * 8, y + begin * 8, to + begin * 8, std::min(end * 8, a.numel()) - begin * 8); });
    });
    return out;
  }
  static Tensor forward(AutogradContext* context, const Tensor& gate, const Tensor& up) {
    context->save_for_backward({gate, up});
    return run(gate, up);
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const auto [to_gate, to_up] = gated_silu_backward(saved[0], saved[1], gradients[0]);
    return {to_gate, to_up};
  }
};

struct RotateHalves : torch::autograd::Function<RotateHalves> {
  static Tensor run(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back) {
    const Tensor from = x.transpose(1, 2).contiguous(), c = cos.contiguous(), s = sin.contiguous();  // [B,T,H,hd]
    const std::int64_t tokens = from.size(1), heads = from.size(2), size = from.size(3);
    const bool by_text = c.dim() == 4 && c.size(0) > 1;
    Tensor out = at::empty_like(from);
    pointwise_typed(from, [&](auto zero) {
      using R = decltype(zero);
      const R *in = from.const_data_ptr<R>(), *to_cos = c.const_data_ptr<R>(), *to_sin = s.const_data_ptr<R>();
      R* to = out.data_ptr<R>();
      at::parallel_for(0, from.size(0) * tokens, std::max<std::int64_t>(1, pointwise_grain / std::max<std::int64_t>(1, heads * size)), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
          const std::int64_t angle = (by_text ? i : i % tokens) * size;
          pointwise_call_turns(in + i * heads * size, to_cos + angle, to_sin + angle, to + i * heads * size, heads, size, back);
        }
      });
    });
    return out.transpose(1, 2);
  }
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& cos, const Tensor& sin) {
    context->save_for_backward({cos, sin});
    return run(x, cos, sin, false);
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    return {run(gradients[0], saved[0], saved[1], true), Tensor(), Tensor()};
  }
};

bool pointwise_traced(const Tensor& x) { return at::GradMode::is_enabled() && x.requires_grad(); }

}  // namespace

bool fits_pointwise(const Tensor& x) { return x.is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble); }

Tensor rms_norm_rows(const Tensor& x, const Tensor& weight, double offset, double eps) {
  // Heads behind tokens: rows are whole there too, and the layout stays.
  if (x.dim() == 4 && !x.is_contiguous() && x.transpose(1, 2).is_contiguous()) return rms_norm_rows(x.transpose(1, 2), weight, offset, eps).transpose(1, 2);
  return pointwise_traced(x) || pointwise_traced(weight) ? NormRows::apply(x, weight, offset, eps) : NormRows::run(x, weight, offset, eps).first;
}

Tensor gated_silu(const Tensor& gate, const Tensor& up) { return pointwise_traced(gate) || pointwise_traced(up) ? GatedSilu::apply(gate, up) : GatedSilu::run(gate, up); }

std::pair<Tensor, Tensor> gated_silu_backward(const Tensor& gate, const Tensor& up, const Tensor& gradient) {
  const Tensor a = gate.contiguous(), b = up.contiguous(), g = gradient.contiguous();
  Tensor to_gate = at::empty_like(a), to_up = at::empty_like(a);
  pointwise_typed(a, [&](auto zero) {
    using R = decltype(zero);
    const R *x = a.const_data_ptr<R>(), *y = b.const_data_ptr<R>(), *slope = g.const_data_ptr<R>();
    R *p = to_gate.data_ptr<R>(), *q = to_up.data_ptr<R>();
    at::parallel_for(0, (a.numel() + 7) / 8, pointwise_grain / 8, [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t at = begin * 8;
      pointwise_call_gate_back(x + at, y + at, slope + at, p + at, q + at, std::min(end * 8, a.numel()) - at);
    });
  });
  return {to_gate, to_up};
}

Tensor rotate_halves(const Tensor& x, const Tensor& cos, const Tensor& sin) { return pointwise_traced(x) ? RotateHalves::apply(x, cos, sin) : RotateHalves::run(x, cos, sin, false); }

}  // namespace kompakt
