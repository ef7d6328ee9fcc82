// One transformer for encoders (BERT: post-norm, LayerNorm, learned positions) and decoders (Llama and relatives: pre-norm,
// RMSNorm, rotary, gated MLP, grouped queries). What differs between families is data: the Family row and ModelConfig.
//
// Shapes: B batch, T tokens, d hidden, H heads, Hkv key/value heads, hd head size, f feed-forward, V vocabulary, C classes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "model/config.h"
#include "model/linear.h"
#include "model/taps.h"

namespace kompakt {

struct Norm {
  std::string name;
  at::Tensor weight, bias;  // bias undefined for RMSNorm
  double eps = 1e-5;
  bool rms = false;
  bool plus_one = false;    // Gemma: multiplies by (1 + weight)
  at::Tensor forward(const at::Tensor& x) const;  // statistics in float32
};

struct Attention {
  Linear query, key, value, output;
  Norm query_norm, key_norm;  // per head (Qwen3, Gemma 3); weight undefined when absent
  Norm sub_norm;              // [H*hd] SubLN, in front of the output projection; weight undefined when absent
  InputTransform key_transform, value_transform;  // of keys (after rotation) and values [B,Hkv,T,hd]: what a cache holds; empty = identity
  std::int64_t heads = 0, kv_heads = 0, head_dim = 0;
};

struct Mlp {
  Linear gate;      // weight undefined when the MLP is not gated (BERT)
  Linear up, down;  // BERT: up = intermediate.dense, down = output.dense
  Norm sub_norm;    // [f] SubLN, in front of the down projection; weight undefined when absent
};

struct Block {
  Norm attention_norm;       // pre-norm: before attention; post-norm (BERT): after attention + residual
  Attention attention;
  Norm mlp_norm;             // pre-norm: before the MLP; post-norm: after MLP + residual
  Norm post_attention_norm, post_mlp_norm;  // Gemma 3 sandwich norms; weight undefined when absent
  Mlp mlp;
};

// Keys and values of earlier tokens, per layer [B,Hkv,T,hd]; grows with every forward.
struct KvCache {
  std::vector<std::pair<at::Tensor, at::Tensor>> layers;
  std::int64_t length = 0;
};

struct ModelInput {
  at::Tensor ids;        // [B,T] int64
  at::Tensor lengths;    // [B] int64, tokens without padding; undefined = no padding
  at::Tensor documents;  // [B,T] int64 document number of packed text; undefined = one document a row
  at::Tensor positions;  // [B,T] int64; undefined = 0..T-1 (plus cache length)
};

struct NamedParameter {
  std::string name;      // Hugging Face tensor name
  at::Tensor* value;     // the slot inside the model: assigning replaces the parameter
};

class Transformer {
 public:
  // Parameters are allocated on `device` ("meta" computes shapes only) and filled from CounterRandom(seed, tensor name),
  // N(0, 0.02), norms one, biases zero: adding a parameter does not change the others.
  explicit Transformer(ModelConfig config, std::uint64_t seed = 0, c10::Device device = c10::Device(c10::kCPU));
  Transformer(const Transformer&) = delete;
  Transformer& operator=(const Transformer&) = delete;

  // Last hidden states [B,T,d] after the final norm.
  at::Tensor hidden(const ModelInput& input, TapSink* taps = nullptr, KvCache* cache = nullptr) const;
  // Classifier: pooled [B,d] -> logits [B,C]. Decoder: hidden [.., d] -> logits [.., V].
  at::Tensor pooled(const at::Tensor& hidden, const ModelInput& input) const;
  at::Tensor head(const at::Tensor& x) const;
  // hidden -> (pooled) -> head. Dropout acts on the pooled vector when `dropout` > 0 and gradients are on.
  at::Tensor forward(const ModelInput& input, TapSink* taps = nullptr, KvCache* cache = nullptr) const;
  // One block alone, for layer-sequential work: x [B,T,d] -> [B,T,d].
  at::Tensor block_forward(std::int64_t layer, const at::Tensor& x, const ModelInput& input, TapSink* taps = nullptr, KvCache* cache = nullptr) const;
  at::Tensor embed(const ModelInput& input, TapSink* taps = nullptr) const;
  // A block in parts, for work between its linears; block_forward is their composition. x, h [B,T,d]: the residual stream.
  at::Tensor attention_input(std::int64_t layer, const at::Tensor& x) const;                              // [B,T,d] that query, key and value see
  at::Tensor attention_context(std::int64_t layer, const at::Tensor& in, const ModelInput& input) const;  // [B,T,H*hd] that the output projection sees
  at::Tensor after_attention(std::int64_t layer, const at::Tensor& x, const at::Tensor& context, TapSink* taps = nullptr) const;  // h
  at::Tensor mlp_input(std::int64_t layer, const at::Tensor& h) const;                                    // [B,T,d] that gate and up see
  at::Tensor mlp_inner(std::int64_t layer, const at::Tensor& in, TapSink* taps = nullptr) const;          // [B,T,f] that down sees
  at::Tensor after_mlp(std::int64_t layer, const at::Tensor& h, const at::Tensor& inner, TapSink* taps = nullptr) const;  // x of the next block

  ModelConfig& config() { return config_; }
  const ModelConfig& config() const { return config_; }
  std::vector<NamedParameter> parameters();               // every tensor once (tied head absent), in checkpoint order
  std::vector<std::pair<std::string, at::Tensor>> parameters() const;
  std::vector<Linear*> linears();                         // of all blocks, in order q,k,v,o,(gate),up,down
  Linear* find_linear(const std::string& name);
  c10::Device device() const;
  void to(c10::Device device);
  void requires_grad(bool on);
  std::unique_ptr<Transformer> clone() const;             // deep copy of weights; transforms are not copied
  void add_classifier(std::vector<std::string> labels, const std::string& pooling);  // weights zero
  // SubLN (Wang et al. 2022; BitNet b1.58 2B4T and BitDistill in front of ternary projections): RMSNorms with gains of one, which
  // change what the model computes. std::logic_error when it has them.
  void add_sub_norms();

  Embedding tokens;
  at::Tensor positions;       // [max_positions, d] learned positions (BERT) or undefined
  at::Tensor token_types;     // [type_vocab, d] (BERT) or undefined
  Norm embedding_norm;        // BERT; weight undefined otherwise
  std::vector<Block> blocks;
  Norm final_norm;            // decoders
  Linear lm_head;             // weight undefined when tied or encoder
  Linear pooler, classifier;  // weight undefined when absent
  bool recompute_blocks = false;  // with gradients on, hidden() keeps only the input of each block and runs it again in the backward pass
  double dropout = 0;         // on the pooled vector, training only (torch's generator, seeded per step by the loop)

 private:
  struct Context;  // what all blocks of one forward pass share: masks and rotary tables
  Context make_context(const ModelInput& input, const at::Tensor& x, std::int64_t past) const;
  at::Tensor run_block(std::int64_t layer, const at::Tensor& x, const Context& context, TapSink* taps, KvCache* cache) const;
  at::Tensor attend(std::int64_t layer, const at::Tensor& in, const Context& context, TapSink* taps, KvCache* cache) const;  // [B,T,H*hd]

  ModelConfig config_;
};

}  // namespace kompakt
