// The forward pass. One code path for encoders and decoders; what differs comes from the Family row and the config.
// Masks and rotary tables are made once a pass (Context) and not at all where nothing is masked.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <memory>
#include <stdexcept>

#include "core/text.h"
#include "model/causal_attention.h"
#include "model/families.h"
#include "model/pointwise.h"
#include "model/products.h"
#include "model/recompute.h"
#include "model/rope.h"
#include "model/short_attention.h"
#include "model/transformer.h"

namespace kompakt {

struct Transformer::Context {
  // Additive masks [1 or B,1,1 or T,S], undefined where nothing is masked or where `causal` alone says it.
  at::Tensor mask, mask_local;
  bool causal = false, causal_local = false;
  bool windowed = false;  // mask_local says nothing but order and distance
  bool plain = false;     // nothing is masked but padding behind the first `lengths` tokens (undefined: no padding)
  at::Tensor lengths;     // [B]
  std::int64_t window = 0;  // of mask_local
  RopeTables rope, rope_local;
};

namespace {

// Finite, so that a row without any allowed key gives a mean of values instead of NaN.
constexpr double kForwardMasked = -1e30;

at::Tensor forward_additive_mask(const at::Tensor& allowed, const at::Tensor& like) {
  return at::zeros(allowed.sizes(), like.options()).masked_fill_(allowed.eq(0), kForwardMasked);
}

void forward_offer(TapSink* taps, std::int64_t layer, const char* what, const at::Tensor& value) {
  if (!taps) return;
  const std::string name = str("layer.", layer, ".", what);
  if (taps->wants(name)) taps->put(name, value);
}

void forward_offer(TapSink* taps, const char* name, const at::Tensor& value) {
  if (taps && taps->wants(name)) taps->put(name, value);
}

at::Tensor forward_activate(std::string_view name, const at::Tensor& x) {
  if (name == "silu") return at::silu(x);
  if (name == "gelu") return at::gelu(x);
  if (name == "gelu_tanh") return at::gelu(x, "tanh");
  throw std::logic_error("unknown activation " + std::string(name));
}

at::Tensor forward_gated(std::string_view name, const at::Tensor& gate, const at::Tensor& up) {
  if (name == "silu" && fits_pointwise(gate) && gate.scalar_type() == up.scalar_type()) return gated_silu(gate, up);
  return forward_activate(name, gate) * up;
}

// softmax(q k^T scale + mask) v; q [B,H,T,hd], k and v [B,H,S,hd] -> [B,T,H*hd]. `lengths` says the same as the mask where only
// padding is masked; `plain` promises that.
// The fused kernel for what short_attention does not take: against matmul + softmax + matmul in float32 on one AVX2 core
// (12 heads of 32, padding mask) it takes 62 instead of 85 ms forward + backward at 8 x 256 tokens, forward alone 18.5 instead of 39.8.
at::Tensor forward_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& mask, bool causal, bool plain, const at::Tensor& lengths, double scale) {
  if (plain) {
    // Heads behind tokens, as the linear layers have left them: views, nothing is copied.
    const at::Tensor a = q.transpose(1, 2), b = k.transpose(1, 2), c = v.transpose(1, 2);
    if (fits_short_attention(a, b, c)) return short_attention(a, b, c, lengths, scale).flatten(2);
  }
  const at::Tensor mixed = q.is_meta() ? at::matmul(at::softmax(at::matmul(q, k.transpose(-1, -2)), -1), v)  // shapes alone: the fused kernel has none
                                       : at::scaled_dot_product_attention(q, k, v, mask.defined() ? std::optional<at::Tensor>(mask) : std::nullopt, 0.0, causal, scale);
  return mixed.transpose(1, 2).flatten(2);
}

// True when a sink asks for a value between the input and the output of a block: such a block cannot be thrown away.
bool forward_taps_inside(const Block& block, std::int64_t layer, const TapSink* taps) {
  if (!taps) return false;
  for (const char* what : {"query", "key", "value", "cached_key", "context", "ffn"})
    if (taps->wants(str("layer.", layer, ".", what))) return true;
  const Attention& a = block.attention;
  for (const Linear* linear : {&a.query, &a.key, &a.value, &a.output, &block.mlp.gate, &block.mlp.up, &block.mlp.down})
    if (linear->weight.defined() && (taps->wants("input:" + linear->name) || taps->wants("output:" + linear->name))) return true;
  return false;
}

// The residual stream h with what the down projection gave.
at::Tensor forward_join(const Family& family, const Block& block, const at::Tensor& h, const at::Tensor& out) {
  const at::Tensor m = family.sandwich_norms ? block.post_mlp_norm.forward(out) : out;
  return family.post_norm ? block.mlp_norm.forward(h + m) : h + m;
}

// True when somebody looks at what the down projection reads or gives.
bool forward_wants_inner(const Mlp& mlp, std::int64_t layer, const TapSink* taps) {
  return taps && (taps->wants(str("layer.", layer, ".ffn")) || taps->wants("input:" + mlp.down.name) || taps->wants("output:" + mlp.down.name));
}

// Grouped queries: every key/value head serves heads/kv_heads query heads. [B,Hkv,S,hd] -> [B,H,S,hd].
at::Tensor forward_repeat_heads(const at::Tensor& x, std::int64_t times) {
  if (times == 1) return x;
  return x.unsqueeze(2).expand({x.size(0), x.size(1), times, x.size(2), x.size(3)}).reshape({x.size(0), x.size(1) * times, x.size(2), x.size(3)});
}

}  // namespace

at::Tensor Norm::forward(const at::Tensor& x) const {
  const at::IntArrayRef shape = weight.sizes();
  if (!rms && x.is_meta()) return x * weight + bias;  // shapes alone: layer_norm has no meta kernel outside of Python
  if (!rms) return at::layer_norm(x, shape, weight, bias, eps);
  const auto type = x.scalar_type();
  const bool low = type == at::kHalf || type == at::kBFloat16;
  const at::Tensor wide = low ? x.to(at::kFloat) : x;
  const bool ours = fits_pointwise(wide) && weight.scalar_type() == wide.scalar_type() && wide.size(-1) == weight.numel();
  const at::Tensor y = ours ? rms_norm_rows(wide, weight, plus_one ? 1 : 0, eps) : at::rms_norm(wide, shape, plus_one ? weight + 1 : weight, eps);
  return low ? y.to(type) : y;
}

at::Tensor Transformer::embed(const ModelInput& input, TapSink* taps) const {
  const Family& family = *config_.family;
  at::Tensor x = tokens.forward(input.ids);
  if (config_.embedding_scale != 1) x = x * config_.embedding_scale;
  if (positions.defined()) {
    const std::int64_t length = input.ids.size(1);
    if (!input.positions.defined()) TORCH_CHECK(length <= positions.size(0), "a text of ", length, " tokens exceeds the ", positions.size(0), " positions of the model");
    x = x + (input.positions.defined() ? at::embedding(positions, input.positions) : positions.narrow(0, 0, length));
  }
  if (token_types.defined()) x = x + token_types.select(0, 0);
  if (family.post_norm) x = embedding_norm.forward(x);
  forward_offer(taps, "embedding", x);
  return x;
}

Transformer::Context Transformer::make_context(const ModelInput& input, const at::Tensor& x, std::int64_t past) const {
  const Family& family = *config_.family;
  Context context;
  const std::int64_t length = x.size(1), keys = past + length;
  const auto index = at::TensorOptions().dtype(at::kLong).device(x.device());
  for (std::int64_t window : config_.sliding_window) {
    if (window > 0) context.window = window;
  }
  if (!family.learned_positions) {
    const at::Tensor at_positions = input.positions.defined() ? input.positions : at::arange(past, keys, index);
    context.rope = rope_tables(config_.rope, config_.head_dim, at_positions, x);
    if (config_.rope.local_theta > 0) context.rope_local = rope_tables(config_.rope, config_.head_dim, at_positions, x, true);
  }
  if (input.documents.defined() && past > 0) throw std::logic_error("packed documents and a key/value cache do not go together");

  at::Tensor allowed;  // [B or 1,1,T or 1,S]
  if (input.documents.defined()) allowed = input.documents.unsqueeze(2).eq(input.documents.unsqueeze(1)).unsqueeze(1);
  if (family.encoder) {
    // A decoder needs no padding mask: padding stands behind the tokens, where causal attention never looks.
    context.plain = !input.documents.defined() && x.device().is_cpu();
    if (input.lengths.defined()) {
      const bool padded = input.lengths.device().is_meta() || input.lengths.min().item<std::int64_t>() < length;
      if (padded) {
        const at::Tensor real = at::arange(length, index).unsqueeze(0).lt(input.lengths.to(x.device()).unsqueeze(1)).unsqueeze(1).unsqueeze(1);
        allowed = allowed.defined() ? allowed.bitwise_and(real) : real;
        context.lengths = input.lengths;
      }
    }
    if (allowed.defined()) context.mask = forward_additive_mask(allowed, x);
    return context;
  }

  const at::Tensor distance = length > 1 || (context.window > 0 && keys > context.window)
                                  ? at::arange(past, keys, index).unsqueeze(1) - at::arange(keys, index).unsqueeze(0)
                                  : at::Tensor();  // [T,S]
  const at::Tensor backward_only = distance.defined() ? distance.ge(0) : at::Tensor();
  if (allowed.defined()) {
    if (distance.defined()) allowed = allowed.bitwise_and(backward_only);
    context.mask = forward_additive_mask(allowed, x);
  } else if (length > 1 && past > 0) {
    context.mask = forward_additive_mask(backward_only, x);
  } else {
    context.causal = length > 1;
  }
  context.mask_local = context.mask;
  context.causal_local = context.causal;
  if (context.window > 0 && keys > context.window) {
    const at::Tensor near = backward_only.bitwise_and(distance.lt(context.window));
    context.mask_local = forward_additive_mask(allowed.defined() ? allowed.bitwise_and(near) : near, x);
    context.causal_local = false;
    context.windowed = context.causal;
  }
  return context;
}

at::Tensor Transformer::attend(std::int64_t layer, const at::Tensor& x, const Context& context, TapSink* taps, KvCache* cache) const {
  const auto i = static_cast<std::size_t>(layer);
  const Attention& a = blocks[i].attention;
  const std::int64_t batch = x.size(0), length = x.size(1);
  at::Tensor q = a.query.forward(x, taps).view({batch, length, a.heads, a.head_dim}).transpose(1, 2);
  at::Tensor k = a.key.forward(x, taps).view({batch, length, a.kv_heads, a.head_dim}).transpose(1, 2);
  at::Tensor v = a.value.forward(x, taps).view({batch, length, a.kv_heads, a.head_dim}).transpose(1, 2);
  // Under autocast over weights that are rounded already (calibration) attention itself is float32 on the CPU: the passes that are fused there
  // know no bfloat16, and what ATen does instead takes longer. Not in training, whose attention keeps half as much for the way back.
  if (q.is_cpu() && q.scalar_type() == at::kBFloat16 && a.query.weight.scalar_type() == at::kBFloat16 && at::autocast::is_autocast_enabled(at::kCPU))
    for (at::Tensor* part : {&q, &k, &v}) *part = part->to(at::kFloat);
  if (a.query_norm.weight.defined()) {
    q = a.query_norm.forward(q);
    k = a.key_norm.forward(k);
  }
  forward_offer(taps, layer, "query", q);
  forward_offer(taps, layer, "key", k);
  forward_offer(taps, layer, "value", v);
  const bool local = !config_.sliding_window.empty() && config_.sliding_window[i] > 0;
  if (context.rope.cos.defined() && (config_.no_rope.empty() || config_.no_rope[i] == 0)) {
    const RopeTables& rope = local && context.rope_local.cos.defined() ? context.rope_local : context.rope;
    q = apply_rope(q, rope);
    k = apply_rope(k, rope);
  }
  forward_offer(taps, layer, "cached_key", k);
  if (a.key_transform) k = a.key_transform(k);
  if (a.value_transform) v = a.value_transform(v);
  if (cache) {
    if (cache->layers.size() <= i) cache->layers.resize(i + 1);
    auto& [past_k, past_v] = cache->layers[i];
    if (past_k.defined()) {
      k = at::cat({past_k, k}, 2);
      v = at::cat({past_v, v}, 2);
    }
    past_k = k;
    past_v = v;
  }
  const double scale = config_.query_scale > 0 ? config_.query_scale : 1.0 / std::sqrt(static_cast<double>(a.head_dim));
  const std::int64_t group = a.heads / a.kv_heads;
  const bool windowed = local && context.windowed, causal = local ? context.causal_local : context.causal;
  const at::Tensor merged = (windowed || causal) && fits_causal_attention(q, k, v)
                                ? causal_attention(q, k, v, scale, windowed ? context.window : 0)
                                : forward_attention(q, forward_repeat_heads(k, group), forward_repeat_heads(v, group), local ? context.mask_local : context.mask, causal, context.plain, context.lengths, scale);
  const at::Tensor out = a.sub_norm.weight.defined() ? a.sub_norm.forward(merged) : merged;
  forward_offer(taps, layer, "context", out);
  return out;
}

at::Tensor Transformer::attention_input(std::int64_t layer, const at::Tensor& x) const {
  return config_.family->post_norm ? x : blocks[static_cast<std::size_t>(layer)].attention_norm.forward(x);
}

at::Tensor Transformer::attention_context(std::int64_t layer, const at::Tensor& in, const ModelInput& input) const {
  return attend(layer, in, make_context(input, in, 0), nullptr, nullptr);
}

at::Tensor Transformer::after_attention(std::int64_t layer, const at::Tensor& x, const at::Tensor& context, TapSink* taps) const {
  const Family& family = *config_.family;
  const Block& block = blocks[static_cast<std::size_t>(layer)];
  at::Tensor a = block.attention.output.forward(context, taps);
  if (family.sandwich_norms) a = block.post_attention_norm.forward(a);
  return family.post_norm ? block.attention_norm.forward(x + a) : x + a;
}

at::Tensor Transformer::mlp_input(std::int64_t layer, const at::Tensor& h) const {
  return config_.family->post_norm ? h : blocks[static_cast<std::size_t>(layer)].mlp_norm.forward(h);
}

at::Tensor Transformer::mlp_inner(std::int64_t layer, const at::Tensor& in, TapSink* taps) const {
  const std::string_view activation = config_.family->activation;
  const Mlp& mlp = blocks[static_cast<std::size_t>(layer)].mlp;
  const at::Tensor first = (mlp.gate.weight.defined() ? mlp.gate : mlp.up).forward(in, taps);
  at::Tensor inner;
  if (!mlp.gate.weight.defined()) inner = forward_activate(activation, first);
  else inner = forward_gated(activation, first, mlp.up.forward(in, taps));
  return mlp.sub_norm.weight.defined() ? mlp.sub_norm.forward(inner) : inner;
}

at::Tensor Transformer::after_mlp(std::int64_t layer, const at::Tensor& h, const at::Tensor& inner, TapSink* taps) const {
  const Block& block = blocks[static_cast<std::size_t>(layer)];
  return forward_join(*config_.family, block, h, block.mlp.down.forward(inner, taps));
}

at::Tensor Transformer::run_block(std::int64_t layer, const at::Tensor& x, const Context& context, TapSink* taps, KvCache* cache) const {
  forward_offer(taps, layer, "input", x);
  const at::Tensor h = after_attention(layer, x, attend(layer, attention_input(layer, x), context, taps, cache), taps);
  const Block& block = blocks[static_cast<std::size_t>(layer)];
  const Mlp& mlp = block.mlp;
  if (config_.family->activation == std::string_view("silu") && mlp.gate.weight.defined() && !mlp.sub_norm.weight.defined() && !mlp.down.input_transform && !mlp.down.side && !forward_wants_inner(mlp, layer, taps)) {
    const at::Tensor in = mlp_input(layer, h), gate = mlp.gate.forward(in, taps), up = mlp.up.forward(in, taps), weight = mlp.down.effective_weight();
    const at::Tensor m = fits_gated_linear(gate, up, weight) ? gated_linear(gate, up, weight, mlp.down.bias) : at::Tensor();
    const at::Tensor y = m.defined() ? forward_join(*config_.family, block, h, m) : after_mlp(layer, h, forward_gated("silu", gate, up), taps);
    forward_offer(taps, layer, "output", y);
    return y;
  }
  const at::Tensor inner = mlp_inner(layer, mlp_input(layer, h), taps);  // [B,T,f]
  forward_offer(taps, layer, "ffn", inner);
  const at::Tensor y = after_mlp(layer, h, inner, taps);
  forward_offer(taps, layer, "output", y);
  return y;
}

at::Tensor Transformer::block_forward(std::int64_t layer, const at::Tensor& x, const ModelInput& input, TapSink* taps, KvCache* cache) const {
  const auto i = static_cast<std::size_t>(layer);
  const std::int64_t past = cache && cache->layers.size() > i && cache->layers[i].first.defined() ? cache->layers[i].first.size(2) : 0;
  return run_block(layer, x, make_context(input, x, past), taps, cache);
}

at::Tensor Transformer::hidden(const ModelInput& input, TapSink* taps, KvCache* cache) const {
  at::Tensor x = embed(input, taps);
  const auto context = std::make_shared<const Context>(make_context(input, x, cache ? cache->length : 0));
  const bool again = recompute_blocks && at::GradMode::is_enabled() && !cache;
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(blocks.size()); ++i) {
    if (!again || forward_taps_inside(blocks[static_cast<std::size_t>(i)], i, taps)) {
      x = run_block(i, x, *context, taps, cache);
      continue;
    }
    forward_offer(taps, i, "input", x);
    x = recompute([this, i, context](const at::Tensor& in) { return run_block(i, in, *context, nullptr, nullptr); }, x);
    forward_offer(taps, i, "output", x);
  }
  if (cache) cache->length += input.ids.size(1);
  if (final_norm.weight.defined()) x = final_norm.forward(x);
  forward_offer(taps, "final", x);
  return x;
}

at::Tensor Transformer::pooled(const at::Tensor& hidden, const ModelInput& input) const {
  if (config_.pooling == "cls") return hidden.select(1, 0);
  if (config_.pooling == "pooler") return pooler.forward(hidden.select(1, 0)).tanh();
  if (!input.lengths.defined()) return hidden.mean(1);
  const at::Tensor lengths = input.lengths.to(hidden.device());
  const at::Tensor real = at::arange(hidden.size(1), lengths.options()).unsqueeze(0).lt(lengths.unsqueeze(1)).to(hidden.scalar_type());  // [B,T]
  // A matrix product per row: sum of the hidden states of real tokens, then the mean.
  return at::bmm(real.unsqueeze(1), hidden).squeeze(1) / lengths.clamp_min(1).unsqueeze(1).to(hidden.scalar_type());
}

at::Tensor Transformer::head(const at::Tensor& x) const {
  if (config_.family->encoder) {
    if (!classifier.weight.defined()) throw std::logic_error("Transformer::head: the encoder has no classifier");
    return classifier.forward(x);
  }
  if (lm_head.weight.defined()) return lm_head.forward(x);
  if (tokens.compacted()) throw std::logic_error("Transformer::head: a tied head needs the whole embedding, which is compacted");
  return at::linear(x, tokens.effective_weight());
}

at::Tensor Transformer::forward(const ModelInput& input, TapSink* taps, KvCache* cache) const {
  const at::Tensor h = hidden(input, taps, cache);
  if (!config_.family->encoder) return head(h);
  at::Tensor p = pooled(h, input);
  forward_offer(taps, "pooled", p);
  if (dropout > 0 && at::GradMode::is_enabled()) p = at::dropout(p, dropout, true);
  return config_.is_classifier() ? head(p) : p;
}

}  // namespace kompakt
