// Rounding of activations and of keys and values, as a deployed model does it: of the inputs of linear layers and of what the
// key/value cache holds. It is a part of the model's config.json ("kompakt": {"activations", "kv_cache"}), so that whoever loads
// the model computes what will be deployed. The arithmetic is that of compressed-tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/json.h"

namespace kompakt {

class Transformer;
struct ModelConfig;

struct RoundingFormat {
  std::string_view name, summary;
  double low, high;       // range of a code
  bool small_float;       // FP8 E4M3 instead of whole numbers
  double range() const { return high - low; }
};
std::span<const RoundingFormat> rounding_formats();
const RoundingFormat* find_rounding_format(std::string_view name);
std::vector<std::string> rounding_format_names();

// x ~ scale (code - zero); zero is 0 where the range is symmetric.
struct RoundingScale {
  float scale = 0;
  std::int64_t zero = 0;
};
// Scale of values in [low, high]; zero is always representable. Symmetric: the larger magnitude over half of the range of codes
// (127.5 for int8, 448 for E4M3). A range without width has scale zero.
RoundingScale rounding_scale(const RoundingFormat& format, bool symmetric, float low, float high);

// decode(encode(x)) with given scale, of any shape; gradients pass straight through.
at::Tensor round_static(const at::Tensor& x, const RoundingFormat& format, const RoundingScale& scale);
// The same with a scale for every row of the last dimension (every token), from its own extremes; a row of zeros stays zero.
at::Tensor round_per_token(const at::Tensor& x, const RoundingFormat& format, bool symmetric);

// Forward: exactly `rounded`. Backward: the gradient passes to `value` unchanged (Bengio et al. 2013).
at::Tensor straight_through(const at::Tensor& value, const at::Tensor& rounded);

struct ActivationScheme {
  std::string format = "int8";                  // row of the table of formats
  bool dynamic = true, symmetric = true;        // dynamic: a scale per token
  std::set<std::string> except;                 // linears in blocks whose inputs stay as they are
  std::map<std::string, RoundingScale> scales;  // static: by the linear's name
};
struct KvCacheScheme {
  std::string format = "fp8_e4m3";
  std::vector<float> key_scales, value_scales;  // per layer
};
struct RuntimeRounding {
  std::optional<ActivationScheme> activations;
  std::optional<KvCacheScheme> kv_cache;
  bool empty() const { return !activations && !kv_cache; }
};

// What the config says. Error for a format, a scale or a layer that cannot be.
RuntimeRounding rounding_of(const ModelConfig& config);
void set_rounding(ModelConfig& config, const RuntimeRounding& rounding);  // an empty one leaves no trace
// Puts into the model's linears and attention what its config says; the constructor of Transformer calls it.
void install_rounding(Transformer& model);
// Both, replacing what was there.
void set_rounding(Transformer& model, const RuntimeRounding& rounding);

}  // namespace kompakt
