// One text and one head at a time, in vector registers. All six products of forward and backward are one kernel: lanes run
// along the columns of the second factor, numbers of the first are broadcast, so that only k (or v) must be transposed once.
#include "model/short_attention.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "model/lanes.h"
#include "model/parallel.h"

namespace kompakt {
namespace {

// Beyond, the products are large enough for the BLAS. Forward + backward in float32 on two AVX2 cores, 12 heads of 32, against
// at::scaled_dot_product_attention: 0.6 instead of 4.6 ms at 32 x 16 tokens, 2.7 / 7.7 at 32 x 32, 4.6 / 9.6 at 16 x 64.
constexpr std::int64_t attention_longest = 64;

// One head of one text. Token rows of q, k, v and of their gradients are `stride` apart; rows of `probabilities` are `width`
// apart, zeros behind the last key.
template <class R>
struct AttentionHead {
  const R *q, *k, *v;
  R* probabilities;
  std::int64_t tokens, keys, size, stride, width;
  R scale;
  R* scratch;  // size * width, for the backward pass tokens * width more
};

template <class R, int Rows, int Columns>
KOMPAKT_LANES_INLINE void attention_tile(std::int64_t depth, const R* a, std::int64_t a_row, std::int64_t a_column, const R* b, std::int64_t b_row, R* c, std::int64_t c_row, R scale) {
  using Register = typename Registers<R>::Type;
  constexpr std::int64_t count = Registers<R>::count;
  Register sum[Rows][Columns] = {};
  for (std::int64_t d = 0; d < depth; ++d) {
    Register right[Columns];
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j) __builtin_memcpy(&right[j], b + d * b_row + j * count, sizeof(Register));
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const R left = a[i * a_row + d * a_column];
#pragma GCC unroll 4
      for (int j = 0; j < Columns; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j) {
      const Register value = sum[i][j] * scale;
      __builtin_memcpy(c + i * c_row + j * count, &value, sizeof(Register));
    }
  }
}

template <class R, int Columns>
KOMPAKT_LANES_INLINE void attention_columns(std::int64_t rows, std::int64_t depth, const R* a, std::int64_t a_row, std::int64_t a_column, const R* b, std::int64_t b_row, R* c, std::int64_t c_row, R scale) {
  std::int64_t i = 0;
  for (; i + 4 <= rows; i += 4) attention_tile<R, 4, Columns>(depth, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, scale);
  for (; i < rows; ++i) attention_tile<R, 1, Columns>(depth, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, scale);
}

// c [rows, columns] = scale a [rows, depth] b [depth, columns]; columns fill whole registers.
template <class R>
KOMPAKT_LANES_INLINE void attention_product(std::int64_t rows, std::int64_t columns, std::int64_t depth, const R* a, std::int64_t a_row, std::int64_t a_column, const R* b, std::int64_t b_row, R* c, std::int64_t c_row, R scale) {
  constexpr std::int64_t count = Registers<R>::count;
  std::int64_t j = 0;
  for (; j + 2 * count <= columns; j += 2 * count) attention_columns<R, 2>(rows, depth, a, a_row, a_column, b + j, b_row, c + j, c_row, scale);
  for (; j < columns; j += count) attention_columns<R, 1>(rows, depth, a, a_row, a_column, b + j, b_row, c + j, c_row, scale);
}

// [tokens, size] -> [size, width], zeros behind the last token.
template <class R>
KOMPAKT_LANES_INLINE void attention_transpose(const AttentionHead<R>& head, const R* from, R* to) {
  for (std::int64_t d = 0; d < head.size; ++d) {
    R* row = to + d * head.width;
    for (std::int64_t t = 0; t < head.tokens; ++t) row[t] = from[t * head.stride + d];
    for (std::int64_t t = head.tokens; t < head.width; ++t) row[t] = 0;
  }
}

// Scores to probabilities, in place.
template <class R>
KOMPAKT_LANES_INLINE void attention_softmax(R* row, std::int64_t keys, std::int64_t tokens, std::int64_t width) {
  using Register = typename Registers<R>::Type;
  constexpr std::int64_t count = Registers<R>::count;
  if (keys == 0) {
    for (std::int64_t t = 0; t < tokens; ++t) row[t] = R(1) / static_cast<R>(tokens);
    for (std::int64_t t = tokens; t < width; ++t) row[t] = 0;
    return;
  }
  for (std::int64_t t = keys; t < width; ++t) row[t] = row[0];  // changes no maximum
  Register largest, sum = {}, x;
  __builtin_memcpy(&largest, row, sizeof largest);
  for (std::int64_t t = count; t < width; t += count) {
    __builtin_memcpy(&x, row + t, sizeof x);
    largest = x > largest ? x : largest;
  }
  R top = largest[0], total = 0;
  for (std::int64_t i = 1; i < count; ++i) top = largest[i] > top ? largest[i] : top;
  for (std::int64_t t = 0; t < width; t += count) {
    __builtin_memcpy(&x, row + t, sizeof x);
    x -= top;
    lanes_exp<R>(x);
    __builtin_memcpy(row + t, &x, sizeof x);
  }
  for (std::int64_t t = keys; t < width; ++t) row[t] = 0;
  for (std::int64_t t = 0; t < width; t += count) {
    __builtin_memcpy(&x, row + t, sizeof x);
    sum += x;
  }
  for (std::int64_t i = 0; i < count; ++i) total += sum[i];
  for (std::int64_t t = 0; t < width; t += count) {
    __builtin_memcpy(&x, row + t, sizeof x);
    x *= 1 / total;
    __builtin_memcpy(row + t, &x, sizeof x);
  }
}

template <class R>
KOMPAKT_LANES_INLINE void attention_forward(const AttentionHead<R>& head, R* out) {
  attention_transpose(head, head.k, head.scratch);
  attention_product<R>(head.tokens, head.width, head.size, head.q, head.stride, 1, head.scratch, head.width, head.probabilities, head.width, head.scale);
  for (std::int64_t t = 0; t < head.tokens; ++t) attention_softmax(head.probabilities + t * head.width, head.keys, head.tokens, head.width);
  attention_product<R>(head.tokens, head.size, head.tokens, head.probabilities, head.width, 1, head.v, head.stride, out, head.stride, R(1));
}

// With P the probabilities: dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = scale dS K, dK = scale dS^T Q.
template <class R>
KOMPAKT_LANES_INLINE void attention_backward(const AttentionHead<R>& head, const R* gradient, R* dq, R* dk, R* dv) {
  R* scores = head.scratch + head.size * head.width;
  const R* p = head.probabilities;
  attention_transpose(head, head.v, head.scratch);
  attention_product<R>(head.tokens, head.width, head.size, gradient, head.stride, 1, head.scratch, head.width, scores, head.width, R(1));
  for (std::int64_t t = 0; t < head.tokens; ++t) {
    R* row = scores + t * head.width;
    const R* probability = p + t * head.width;
    R sum = 0;
    for (std::int64_t s = 0; s < head.tokens; ++s) sum += row[s] * probability[s];
    for (std::int64_t s = 0; s < head.width; ++s) row[s] = probability[s] * (row[s] - sum);
  }
  attention_product<R>(head.tokens, head.size, head.tokens, p, 1, head.width, gradient, head.stride, dv, head.stride, R(1));
  attention_product<R>(head.tokens, head.size, head.tokens, scores, head.width, 1, head.k, head.stride, dq, head.stride, head.scale);
  attention_product<R>(head.tokens, head.size, head.tokens, scores, 1, head.width, head.q, head.stride, dk, head.stride, head.scale);
}

KOMPAKT_LANES_CLONES void attention_forward_head(const AttentionHead<float>& head, float* out) { attention_forward(head, out); }
KOMPAKT_LANES_CLONES void attention_forward_wide(const AttentionHead<double>& head, double* out) { attention_forward(head, out); }
KOMPAKT_LANES_CLONES void attention_backward_head(const AttentionHead<float>& head, const float* gradient, float* dq, float* dk, float* dv) { attention_backward(head, gradient, dq, dk, dv); }
KOMPAKT_LANES_CLONES void attention_backward_wide(const AttentionHead<double>& head, const double* gradient, double* dq, double* dk, double* dv) { attention_backward(head, gradient, dq, dk, dv); }

// Calls `work(head, offset of its first number in q, k, v and everything of their shape)` for every head of every text.
template <class R, class Work>
void attention_heads(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& probabilities, const at::Tensor& lengths, double scale, bool backward, const Work& work) {
  const std::int64_t tokens = q.size(1), heads = q.size(2), size = q.size(3), width = probabilities.size(3);
  const std::int64_t* length = lengths.defined() ? lengths.const_data_ptr<std::int64_t>() : nullptr;
  const R *from_q = q.const_data_ptr<R>(), *from_k = k.const_data_ptr<R>(), *from_v = v.const_data_ptr<R>();
  R* p = probabilities.data_ptr<R>();
  const std::int64_t grain = std::max<std::int64_t>(1, 16384 / (tokens * width));
  at::parallel_for(0, q.size(0) * heads, grain, [&](std::int64_t begin, std::int64_t end) {
    std::vector<R> scratch(static_cast<std::size_t>((size + (backward ? tokens : 0)) * width));
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t text = i / heads, offset = text * tokens * heads * size + i % heads * size;
      work(AttentionHead<R>{from_q + offset, from_k + offset, from_v + offset, p + i * tokens * width, tokens, length ? std::min(length[text], tokens) : tokens, size, heads * size, width,
                            static_cast<R>(scale), scratch.data()},
           offset);
    }
  });
}

struct ShortAttention : public torch::autograd::Function<ShortAttention> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& lengths, double scale) {
    const auto [out, probabilities] = run(q, k, v, lengths.value_or(at::Tensor()), scale);
    context->save_for_backward({q, k, v, probabilities});
    context->saved_data["scale"] = scale;
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context, torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const double scale = context->saved_data["scale"].toDouble();
    const at::Tensor q = saved[0].contiguous(), k = saved[1].contiguous(), v = saved[2].contiguous(), gradient = gradients[0].contiguous();
    const at::Tensor dq = at::empty_like(q), dk = at::empty_like(k), dv = at::empty_like(v);
    const auto into = [&](auto zero, const auto& function) {
      using R = decltype(zero);
      const R* from = gradient.const_data_ptr<R>();
      R *to_q = dq.data_ptr<R>(), *to_k = dk.data_ptr<R>(), *to_v = dv.data_ptr<R>();
      attention_heads<R>(q, k, v, saved[3], {}, scale, true, [&](const AttentionHead<R>& head, std::int64_t at) { function(head, from + at, to_q + at, to_k + at, to_v + at); });
    };
    if (q.scalar_type() == at::kFloat)
      into(float{}, attention_backward_head);
    else
      into(double{}, attention_backward_wide);
    return {dq, dk, dv, at::Tensor(), at::Tensor()};
  }

  static std::pair<at::Tensor, at::Tensor> run(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& lengths, double scale) {
    const at::Tensor q = query.contiguous(), k = key.contiguous(), v = value.contiguous();
    const std::int64_t lanes = q.scalar_type() == at::kFloat ? Registers<float>::count : Registers<double>::count;
    const at::Tensor out = at::empty_like(q), probabilities = at::empty({q.size(0), q.size(2), q.size(1), (q.size(1) + lanes - 1) / lanes * lanes}, q.options());
    const at::Tensor whole = lengths.defined() ? lengths.contiguous() : lengths;
    const auto into = [&](auto zero, const auto& function) {
      using R = decltype(zero);
      R* to = out.data_ptr<R>();
      attention_heads<R>(q, k, v, probabilities, whole, scale, false, [&](const AttentionHead<R>& head, std::int64_t at) { function(head, to + at); });
    };
    if (q.scalar_type() == at::kFloat)
      into(float{}, attention_forward_head);
    else
      into(double{}, attention_forward_wide);
    return {out, probabilities};
  }
};

}  // namespace

bool fits_short_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const bool real = q.scalar_type() == at::kFloat || q.scalar_type() == at::kDouble;
  return q.is_cpu() && real && k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() && q.dim() == 4 && q.sizes() == k.sizes() && q.sizes() == v.sizes() &&
         q.size(3) % Registers<float>::count == 0 && q.size(1) <= attention_longest && q.numel() > 0;
}

at::Tensor short_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& lengths, double scale) {
  const bool gradient = at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  return gradient ? ShortAttention::apply(q, k, v, lengths.defined() ? std::optional(lengths) : std::nullopt, scale) : ShortAttention::run(q, k, v, lengths, scale).first;
}

}  // namespace kompakt
