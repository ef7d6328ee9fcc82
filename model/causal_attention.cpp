// A block of neighbouring tokens, all query heads of a group above each other, meets the keys up to its last token: one matrix
// product each for scores, outputs and the three gradients. Blocks of one key/value head follow each other, heads run beside.
#include "model/causal_attention.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "model/lanes.h"
#include "model/parallel.h"
#include "model/products.h"

namespace kompakt {
namespace {

constexpr std::int64_t causal_shortest = 96;    // below, one or two blocks leave out next to nothing
constexpr std::int64_t causal_rows = 192;       // query rows of a block over all heads of the group
constexpr std::int64_t causal_alignment = 16;   // rows of scores are whole registers

struct CausalShape {
  std::int64_t batch, heads, kv_heads, tokens, size, group, block, window;
  double scale;
  std::int64_t items() const { return batch * kv_heads; }
};

CausalShape causal_shape(const at::Tensor& q, const at::Tensor& k, double scale, std::int64_t window) {
  CausalShape s{q.size(0), q.size(1), k.size(1), q.size(2), q.size(3), q.size(1) / k.size(1), 0, window, scale};
  s.block = std::clamp<std::int64_t>(causal_rows / s.group / 16 * 16, 16, 128);
  return s;
}

// One block: tokens [from, to), which see keys [begin, to).
struct CausalBlock {
  std::int64_t from, to, begin;
  std::int64_t tokens() const { return to - from; }
  std::int64_t keys() const { return to - begin; }
};

CausalBlock causal_block(const CausalShape& s, std::int64_t index) {
  const std::int64_t from = index * s.block, to = std::min(s.tokens, from + s.block);
  return {from, to, s.window > 0 ? std::max<std::int64_t>(0, from - s.window + 1) : 0};
}

// Working memory of one thread.
struct CausalScratch {
  at::Tensor query, value, scores, row_sums;
  at::Tensor out, to_query, gradients;  // of the backward pass
  CausalScratch(const CausalShape& s, const at::TensorOptions& options, bool backward) {
    const std::int64_t rows = s.group * s.block, width = (s.tokens + causal_alignment - 1) / causal_alignment * causal_alignment;
    query = at::empty({rows, s.size}, options), value = at::empty({rows, s.size}, options), scores = at::empty({rows * width}, options), row_sums = at::empty({rows}, options);
    if (backward) out = at::empty({rows, s.size}, options), to_query = at::empty({rows, s.size}, options), gradients = at::empty({rows * width}, options);
  }
};

// Rows of a block [group * tokens, keys], whole registers apart.
at::Tensor causal_view(const at::Tensor& buffer, std::int64_t rows, std::int64_t keys) {
  const std::int64_t width = (keys + causal_alignment - 1) / causal_alignment * causal_alignment;
  return buffer.narrow(0, 0, rows * width).view({rows, width}).narrow(1, 0, keys);
}

// Heads of one group of `x` [B,H,T,hd] for the tokens of a block, above each other, and back.
template <class R>
void causal_gather(const CausalShape& s, const at::Tensor& x, std::int64_t item, const CausalBlock& b, R* to) {
  const R* from = x.const_data_ptr<R>() + item / s.kv_heads * x.stride(0) + item % s.kv_heads * s.group * x.stride(1) + b.from * x.stride(2);
  for (std::int64_t h = 0; h < s.group; ++h)
    for (std::int64_t t = 0; t < b.tokens(); ++t, to += s.size) std::memcpy(to, from + h * x.stride(1) + t * x.stride(2), static_cast<std::size_t>(s.size) * sizeof(R));
}

template <class R>
void causal_scatter(const CausalShape& s, const R* from, std::int64_t item, const CausalBlock& b, const at::Tensor& x) {
  R* to = x.data_ptr<R>() + item / s.kv_heads * x.stride(0) + item % s.kv_heads * s.group * x.stride(1) + b.from * x.stride(2);
  for (std::int64_t h = 0; h < s.group; ++h)
    for (std::int64_t t = 0; t < b.tokens(); ++t, from += s.size) std::memcpy(to + h * x.stride(1) + t * x.stride(2), from, static_cast<std::size_t>(s.size) * sizeof(R));
}

// What the rows of one block share.
template <class R>
struct CausalRows {
  R* scores;           // rows `width` apart
  std::int64_t rows, tokens, width;
  std::int64_t first, window;  // the first token's number among the keys of the block
  R scale;
  // Keys [from, to) of a row.
  std::int64_t to(std::int64_t row) const { return first + row % tokens + 1; }
  std::int64_t from(std::int64_t row) const { return window > 0 && to(row) > window ? to(row) - window : 0; }
};

// exp(scale x - top) from `from` to `to`, zeros elsewhere. Returns the sum.
template <class R>
KOMPAKT_LANES_INLINE R causal_exponentials(R* row, std::int64_t from, std::int64_t to, std::int64_t width, R scale, R top) {
  using Register = typename Registers<R>::Type;
  constexpr std::int64_t count = Registers<R>::count;
  const std::int64_t begin = from / count * count, end = (to + count - 1) / count * count;
  for (std::int64_t t = begin; t < from; ++t) row[t] = row[from];
  for (std::int64_t t = to; t < end; ++t) row[t] = row[from];
  Register x;
  for (std::int64_t t = begin; t < end; t += count) {
    std::memcpy(&x, row + t, sizeof x);
    x = x * scale - top;
    lanes_exp<R>(x);
    std::memcpy(row + t, &x, sizeof x);
  }
  std::fill(row, row + from, R(0));
  std::fill(row + to, row + width, R(0));
  Register sum = {};
  for (std::int64_t t = begin; t < end; t += count) {
    std::memcpy(&x, row + t, sizeof x);
    sum += x;
  }
  return lanes_sum<R>(sum);
}

// Products of queries and keys to probabilities; the logarithm of the sum of exponentials of every row goes to `sums`.
template <class R>
KOMPAKT_LANES_INLINE void causal_softmax(const CausalRows<R>& b, R* sums) {
  using Register = typename Registers<R>::Type;
  constexpr std::int64_t count = Registers<R>::count;
  for (std::int64_t r = 0; r < b.rows; ++r) {
    R* row = b.scores + r * b.width;
    const std::int64_t from = b.from(r), to = b.to(r), whole = from + (to - from) / count * count;
    R top = row[from];
    Register largest, x;
    for (std::int64_t i = 0; i < count; ++i) largest[i] = top;
    for (std::int64_t t = from; t < whole; t += count) {
      std::memcpy(&x, row + t, sizeof x);
      largest = x > largest ? x : largest;
    }
    for (std::int64_t i = 0; i < count; ++i) top = largest[i] > top ? largest[i] : top;
    for (std::int64_t t = whole; t < to; ++t) top = row[t] > top ? row[t] : top;
    top *= b.scale;
    const R sum = causal_exponentials(row, from, to, b.width, b.scale, top), share = 1 / sum;
    for (std::int64_t t = from / count * count; t < to; t += count) {
      std::memcpy(&x, row + t, sizeof x);
      x *= share;
      std::memcpy(row + t, &x, sizeof x);
    }
    sums[r] = top + std::log(sum);
  }
}

// The same probabilities by their known sums.
template <class R>
KOMPAKT_LANES_INLINE void causal_again(const CausalRows<R>& b, const R* sums) {
  for (std::int64_t r = 0; r < b.rows; ++r) causal_exponentials(b.scores + r * b.width, b.from(r), b.to(r), b.width, b.scale, sums[r]);
}

// dS = scale P (dP - rowsum(dO O)), in place of dP.
template <class R>
KOMPAKT_LANES_INLINE void causal_score_gradient(const CausalRows<R>& b, R* gradients, const R* out, const R* gradient, std::int64_t size) {
  using Register = typename Registers<R>::Type;
  constexpr std::int64_t count = Registers<R>::count;
  for (std::int64_t r = 0; r < b.rows; ++r) {
    Register sum = {}, x, y;
    for (std::int64_t d = 0; d < size; d += count) {
      std::memcpy(&x, out + r * size + d, sizeof x);
      std::memcpy(&y, gradient + r * size + d, sizeof y);
      sum += x * y;
    }
    const R mean = lanes_sum<R>(sum);
    R* row = gradients + r * b.width;
    const R* p = b.scores + r * b.width;
    const std::int64_t from = b.from(r) / count * count, to = (b.to(r) + count - 1) / count * count;
    std::fill(row, row + from, R(0));
    std::fill(row + to, row + b.width, R(0));
    for (std::int64_t t = from; t < to; t += count) {
      std::memcpy(&x, row + t, sizeof x);
      std::memcpy(&y, p + t, sizeof y);
      // Behind the last key lie numbers that nobody wrote: a probability of zero does not make them zero when they are not finite.
      x = y == Register{} ? Register{} : b.scale * y * (x - mean);
      std::memcpy(row + t, &x, sizeof x);
    }
  }
}

KOMPAKT_LANES_CLONES void causal_softmax_rows(const CausalRows<float>& b, float* sums) { causal_softmax(b, sums); }
KOMPAKT_LANES_CLONES void causal_softmax_wide(const CausalRows<double>& b, double* sums) { causal_softmax(b, sums); }
KOMPAKT_LANES_CLONES void causal_again_rows(const CausalRows<float>& b, const float* sums) { causal_again(b, sums); }
KOMPAKT_LANES_CLONES void causal_again_wide(const CausalRows<double>& b, const double* sums) { causal_again(b, sums); }
KOMPAKT_LANES_CLONES void causal_gradient_rows(const CausalRows<float>& b, float* gradients, const float* out, const float* gradient, std::int64_t size) { causal_score_gradient(b, gradients, out, gradient, size); }
KOMPAKT_LANES_CLONES void causal_gradient_wide(const CausalRows<double>& b, double* gradients, const double* out, const double* gradient, std::int64_t size) { causal_score_gradient(b, gradients, out, gradient, size); }
void causal_softmax_of(const CausalRows<float>& b, float* sums) { causal_softmax_rows(b, sums); }
void causal_softmax_of(const CausalRows<double>& b, double* sums) { causal_softmax_wide(b, sums); }
void causal_again_of(const CausalRows<float>& b, const float* sums) { causal_again_rows(b, sums); }
void causal_again_of(const CausalRows<double>& b, const double* sums) { causal_again_wide(b, sums); }
void causal_gradient_of(const CausalRows<float>& b, float* gradients, const float* out, const float* gradient, std::int64_t size) { causal_gradient_rows(b, gradients, out, gradient, size); }
void causal_gradient_of(const CausalRows<double>& b, double* gradients, const double* out, const double* gradient, std::int64_t size) { causal_gradient_wide(b, gradients, out, gradient, size); }

// Keys or values of one head that a block sees, [keys,hd].
at::Tensor causal_keys(const CausalShape& s, const at::Tensor& x, std::int64_t item, const CausalBlock& b) { return x[item / s.kv_heads][item % s.kv_heads].narrow(0, b.begin, b.keys()); }

template <class R>
CausalRows<R> causal_rows_of(const CausalShape& s, const CausalBlock& b, const at::Tensor& scores) {
  return {scores.data_ptr<R>(), scores.size(0), b.tokens(), scores.stride(0), b.from - b.begin, s.window, static_cast<R>(s.scale)};
}

// work(item, scratch) for every key/value head of every text.
template <class Work>
void causal_items(const CausalShape& s, const at::TensorOptions& options, bool backward, const Work& work) {
  at::parallel_for(0, s.items(), 1, [&](std::int64_t begin, std::int64_t end) {
    const at::NoGradGuard no_grad;
    CausalScratch scratch(s, options, backward);
    for (std::int64_t item = begin; item < end; ++item) work(item, scratch);
  });
}

template <class R>
void causal_forward(const CausalShape& s, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, const at::Tensor& sums) {
  const std::int64_t blocks = (s.tokens + s.block - 1) / s.block;
  causal_items(s, q.options(), false, [&](std::int64_t item, CausalScratch& scratch) {
    R* row_sums = scratch.row_sums.data_ptr<R>();
    for (std::int64_t i = 0; i < blocks; ++i) {
      const CausalBlock b = causal_block(s, i);
      const std::int64_t rows = s.group * b.tokens();
      at::Tensor query = scratch.query.narrow(0, 0, rows), value = scratch.value.narrow(0, 0, rows), scores = causal_view(scratch.scores, rows, b.keys());
      causal_gather<R>(s, q, item, b, query.data_ptr<R>());
      matrix_product(scores, query, causal_keys(s, k, item, b).t());
      causal_softmax_of(causal_rows_of<R>(s, b, scores), row_sums);
      matrix_product(value, scores, causal_keys(s, v, item, b));
      causal_scatter<R>(s, value.const_data_ptr<R>(), item, b, out);
      R* to = sums.data_ptr<R>() + item * s.group * s.tokens + b.from;  // [B,H,T]
      for (std::int64_t h = 0; h < s.group; ++h) std::copy_n(row_sums + h * b.tokens(), b.tokens(), to + h * s.tokens);
    }
  });
}

// With P the probabilities: dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(dO O)), dQ = scale dS K, dK = scale dS^T Q.
template <class R>
void causal_backward(const CausalShape& s, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, const at::Tensor& sums, const at::Tensor& gradient, const at::Tensor& dq,
                     const at::Tensor& dk, const at::Tensor& dv) {
  const std::int64_t blocks = (s.tokens + s.block - 1) / s.block;
  causal_items(s, q.options(), true, [&](std::int64_t item, CausalScratch& scratch) {
    R* row_sums = scratch.row_sums.data_ptr<R>();
    for (std::int64_t i = 0; i < blocks; ++i) {
      const CausalBlock b = causal_block(s, i);
      const std::int64_t rows = s.group * b.tokens();
      at::Tensor query = scratch.query.narrow(0, 0, rows), value = scratch.value.narrow(0, 0, rows), result = scratch.out.narrow(0, 0, rows), to_query = scratch.to_query.narrow(0, 0, rows);
      at::Tensor scores = causal_view(scratch.scores, rows, b.keys()), gradients = causal_view(scratch.gradients, rows, b.keys());
      const at::Tensor keys = causal_keys(s, k, item, b), values = causal_keys(s, v, item, b);
      at::Tensor to_keys = causal_keys(s, dk, item, b), to_values = causal_keys(s, dv, item, b);
      causal_gather<R>(s, q, item, b, query.data_ptr<R>());
      causal_gather<R>(s, gradient, item, b, value.data_ptr<R>());
      causal_gather<R>(s, out, item, b, result.data_ptr<R>());
      const R* from = sums.const_data_ptr<R>() + item * s.group * s.tokens + b.from;
      for (std::int64_t h = 0; h < s.group; ++h) std::copy_n(from + h * s.tokens, b.tokens(), row_sums + h * b.tokens());
      const CausalRows<R> shared = causal_rows_of<R>(s, b, scores);
      matrix_product(scores, query, keys.t());
      causal_again_of(shared, row_sums);
      matrix_product(to_values, scores.t(), value, true);
      matrix_product(gradients, value, values.t());
      causal_gradient_of(shared, gradients.data_ptr<R>(), result.const_data_ptr<R>(), value.const_data_ptr<R>(), s.size);
      matrix_product(to_keys, gradients.t(), query, true);
      matrix_product(to_query, gradients, keys);
      causal_scatter<R>(s, to_query.const_data_ptr<R>(), item, b, dq);
    }
  });
}

// [B,H,T,hd] with the heads of a token beside each other in memory.
at::Tensor causal_empty(const at::Tensor& like, std::int64_t heads) { return at::empty({like.size(0), like.size(2), heads, like.size(3)}, like.options()).transpose(1, 2); }

struct CausalAttention : public torch::autograd::Function<CausalAttention> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale, std::int64_t window) {
    const auto [out, sums] = run(q.detach(), k.detach(), v.detach(), scale, window);
    context->save_for_backward({q, k, v, out, sums});
    context->saved_data["scale"] = scale, context->saved_data["window"] = window;
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context, torch::autograd::variable_list gradients) {
    const at::NoGradGuard no_grad;
    const auto saved = context->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2];
    const CausalShape s = causal_shape(q, k, context->saved_data["scale"].toDouble(), context->saved_data["window"].toInt());
    const auto by_head = [&](const at::Tensor& x) { return x.contiguous().view({s.batch, s.tokens, s.heads, s.size}).transpose(1, 2); };
    const at::Tensor dq = causal_empty(q, s.heads), dk = causal_empty(k, s.kv_heads).zero_(), dv = causal_empty(v, s.kv_heads).zero_();
    (q.scalar_type() == at::kFloat ? causal_backward<float> : causal_backward<double>)(s, q, k, v, by_head(saved[3]), saved[4], by_head(gradients[0]), dq, dk, dv);
    return {dq, dk, dv, at::Tensor(), at::Tensor()};
  }

  // [B,T,H*hd] and [B,H,T].
  static std::pair<at::Tensor, at::Tensor> run(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale, std::int64_t window) {
    const CausalShape s = causal_shape(q, k, scale, window);
    const at::Tensor out = at::empty({s.batch, s.tokens, s.heads * s.size}, q.options()), sums = at::empty({s.batch, s.heads, s.tokens}, q.options());
    (q.scalar_type() == at::kFloat ? causal_forward<float> : causal_forward<double>)(s, q, k, v, out.view({s.batch, s.tokens, s.heads, s.size}).transpose(1, 2), sums);
    return {out, sums};
  }
};

}  // namespace

bool fits_causal_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  return has_own_products() && q.is_cpu() && q.scalar_type() == at::kFloat && k.scalar_type() == at::kFloat && v.scalar_type() == at::kFloat && q.size(2) >= causal_shortest && q.size(2) == k.size(2) &&
         q.size(3) % Registers<float>::count == 0 && q.size(0) > 0;
}

at::Tensor causal_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, double scale, std::int64_t window) {
  TORCH_CHECK(query.dim() == 4 && key.sizes() == value.sizes() && query.size(0) == key.size(0) && query.size(2) == key.size(2) && query.size(3) == key.size(3) && query.size(1) % key.size(1) == 0 && window >= 0,
              "causal_attention: shapes do not fit");
  TORCH_CHECK(query.size(3) % (query.scalar_type() == at::kFloat ? Registers<float>::count : Registers<double>::count) == 0, "causal_attention: heads of whole registers");
  const auto plain = [](const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); };
  const at::Tensor q = plain(query), k = plain(key), v = plain(value);
  const bool traced = at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  return traced ? CausalAttention::apply(q, k, v, scale, window) : CausalAttention::run(q, k, v, scale, window).first;
}

}  // namespace kompakt
