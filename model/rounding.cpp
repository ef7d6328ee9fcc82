#include "model/rounding.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/text.h"
#include "model/transformer.h"

namespace kompakt {
namespace {

constexpr const char* rounding_place = "config.json: kompakt";

struct RoundingStraight : public torch::autograd::Function<RoundingStraight> {
  static at::Tensor forward(torch::autograd::AutogradContext*, const at::Tensor&, const at::Tensor& rounded) { return rounded.view_as(rounded); }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list gradients) { return {gradients[0], at::Tensor()}; }
};

// The order of operations of compressed-tensors; tensors that broadcast.
at::Tensor rounding_apply(const at::Tensor& x, const RoundingFormat& format, const at::Tensor& scale, const at::Tensor& zero) {
  at::Tensor code = x / scale;
  if (zero.defined()) code = code + zero;
  code = code.clamp(format.low, format.high);
  code = format.small_float ? code.to(at::kFloat8_e4m3fn).to(x.scalar_type()) : code.round();
  if (zero.defined()) code = code - zero;
  return code * scale;
}

const RoundingFormat& rounding_format(const std::string& name) {
  if (const RoundingFormat* format = find_rounding_format(name)) return *format;
  const auto names = rounding_format_names();
  throw Error(str("unknown format \"", name, "\" of activations", did_you_mean(name, names))).at(rounding_place).given(name).allowed(join(names, ", "));
}

float rounding_checked(double value, const std::string& of) {
  if (!std::isfinite(value) || value <= 0 || value > std::numeric_limits<float>::max()) throw Error("the scale of " + of + " cannot be used").at(rounding_place).given(shortest(value)).allowed("a positive number");
  return static_cast<float>(value);
}

std::vector<float> rounding_scales(const Json& json, const char* key, std::int64_t layers) {
  const Json values = json_get<Json>(json, key, rounding_place);
  if (!values.is_array()) throw Error(str(key, " is not a list")).at(rounding_place).given(values.dump());
  if (static_cast<std::int64_t>(values.size()) != layers) throw Error(str(key, " has ", values.size(), " entries for ", layers, " layers")).at(rounding_place);
  std::vector<float> out;
  for (std::size_t i = 0; i < values.size(); ++i) out.push_back(rounding_checked(values[i].is_number() ? values[i].get<double>() : 0, str(key, " of layer ", i)));
  return out;
}

const Json* rounding_json(const ModelConfig& config, const char* key) {
  if (!config.source.is_object() || !config.source.contains("kompakt")) return nullptr;
  const Json& own = config.source.at("kompakt");
  return own.is_object() && own.contains(key) && !own.at(key).is_null() ? &own.at(key) : nullptr;
}

}  // namespace

at::Tensor straight_through(const at::Tensor& value, const at::Tensor& rounded) { return value.requires_grad() && at::GradMode::is_enabled() ? RoundingStraight::apply(value, rounded) : rounded; }

std::span<const RoundingFormat> rounding_formats() {
  static constexpr std::array<RoundingFormat, 2> rows = {{{"int8", "whole numbers of 8 bits", -128, 127, false}, {"fp8_e4m3", "floats of 8 bits, E4M3", -448, 448, true}}};
  return rows;
}

const RoundingFormat* find_rounding_format(std::string_view name) {
  for (const RoundingFormat& row : rounding_formats())
    if (row.name == name) return &row;
  return nullptr;
}

std::vector<std::string> rounding_format_names() {
  std::vector<std::string> names;
  for (const RoundingFormat& row : rounding_formats()) names.emplace_back(row.name);
  return names;
}

RoundingScale rounding_scale(const RoundingFormat& format, bool symmetric, float low, float high) {
  low = std::min(low, 0.0f), high = std::max(high, 0.0f);
  if (symmetric) return {std::max(-low, high) / static_cast<float>(format.range() / 2), 0};
  const float scale = (high - low) / static_cast<float>(format.range());
  if (scale == 0) return {};
  const float zero = std::clamp(static_cast<float>(format.low) - low / scale, static_cast<float>(format.low), static_cast<float>(format.high));
  return {scale, static_cast<std::int64_t>(std::nearbyint(zero))};
}

at::Tensor round_static(const at::Tensor& x, const RoundingFormat& format, const RoundingScale& scale) {
  if (x.is_meta()) return x;
  at::Tensor rounded;
  {
    const at::NoGradGuard no_grad;
    const at::Tensor value = at::full({1}, scale.scale, x.options());
    rounded = rounding_apply(x.detach(), format, value, scale.zero ? at::full({1}, static_cast<double>(scale.zero), x.options()) : at::Tensor());
  }
  return straight_through(x, rounded);
}

at::Tensor round_per_token(const at::Tensor& x, const RoundingFormat& format, bool symmetric) {
  if (x.is_meta() || x.numel() == 0) return x;
  at::Tensor rounded;
  {
    const at::NoGradGuard no_grad;
    const at::Tensor values = x.detach(), low = values.amin(-1, true).clamp_max(0), high = values.amax(-1, true).clamp_min(0);
    at::Tensor scale = symmetric ? at::maximum(-low, high) / at::full({1}, format.range() / 2, x.options()) : (high - low) / at::full({1}, format.range(), x.options());
    // A row of zeros has zero codes, whatever its scale.
    scale = at::where(scale.eq(0), at::full({1}, std::numeric_limits<float>::epsilon(), x.options()), scale);
    const at::Tensor zero = symmetric ? at::Tensor() : (format.low - low / scale).clamp(format.low, format.high).round();
    rounded = rounding_apply(values, format, scale, zero);
  }
  return straight_through(x, rounded);
}

RuntimeRounding rounding_of(const ModelConfig& config) {
  RuntimeRounding out;
  if (const Json* json = rounding_json(config, "activations")) {
    ActivationScheme scheme;
    scheme.format = json_get<std::string>(*json, "format", rounding_place);
    const auto mode = json_get<std::string>(*json, "mode", rounding_place);
    if (mode != "dynamic" && mode != "static") throw Error("unknown mode of activations").at(rounding_place).given(mode).allowed("dynamic, static");
    scheme.dynamic = mode == "dynamic";
    scheme.symmetric = json_get_or<bool>(*json, "symmetric", rounding_place, true);
    const RoundingFormat& format = rounding_format(scheme.format);
    for (const std::string& name : json_get_or<std::vector<std::string>>(*json, "except", rounding_place, {})) scheme.except.insert(name);
    if (!scheme.dynamic) {
      const Json scales = json_get<Json>(*json, "scales", rounding_place), zeros = json_get_or<Json>(*json, "zeros", rounding_place, Json::object());
      for (const auto& [name, value] : scales.items()) {
        RoundingScale& scale = scheme.scales[name];
        scale.scale = rounding_checked(json_get<double>(scales, name, rounding_place), name);
        scale.zero = json_get_or<std::int64_t>(zeros, name, rounding_place, 0);
        if (static_cast<double>(scale.zero) < format.low || static_cast<double>(scale.zero) > format.high) throw Error("the zero point of " + name + " is no code").at(rounding_place).given(str(scale.zero));
      }
    }
    out.activations = std::move(scheme);
  }
  if (const Json* json = rounding_json(config, "kv_cache")) {
    KvCacheScheme scheme;
    scheme.format = json_get<std::string>(*json, "format", rounding_place);
    rounding_format(scheme.format);
    scheme.key_scales = rounding_scales(*json, "key_scales", config.layers);
    scheme.value_scales = rounding_scales(*json, "value_scales", config.layers);
    out.kv_cache = std::move(scheme);
  }
  return out;
}

void set_rounding(ModelConfig& config, const RuntimeRounding& rounding) {
  if (!config.source.is_object()) config.source = Json::object();
  Json own = config.source.contains("kompakt") && config.source.at("kompakt").is_object() ? config.source.at("kompakt") : Json::object();
  own.erase("activations");
  own.erase("kv_cache");
  if (rounding.activations) {
    const ActivationScheme& scheme = *rounding.activations;
    Json json{{"format", scheme.format}, {"mode", scheme.dynamic ? "dynamic" : "static"}, {"symmetric", scheme.symmetric}, {"except", scheme.except}};
    if (!scheme.dynamic) {
      Json scales = Json::object(), zeros = Json::object();
      for (const auto& [name, value] : scheme.scales) {
        scales[name] = static_cast<double>(value.scale);
        if (value.zero) zeros[name] = value.zero;
      }
      json["scales"] = std::move(scales);
      if (!zeros.empty()) json["zeros"] = std::move(zeros);
    }
    own["activations"] = std::move(json);
  }
  if (rounding.kv_cache) {
    const auto numbers = [](const std::vector<float>& values) { return std::vector<double>(values.begin(), values.end()); };
    own["kv_cache"] = Json{{"format", rounding.kv_cache->format}, {"key_scales", numbers(rounding.kv_cache->key_scales)}, {"value_scales", numbers(rounding.kv_cache->value_scales)}};
  }
  if (own.empty()) config.source.erase("kompakt");
  else config.source["kompakt"] = std::move(own);
}

void install_rounding(Transformer& model) {
  const RuntimeRounding rounding = rounding_of(model.config());
  if (rounding.empty()) return;
  if (rounding.activations) {
    const ActivationScheme& scheme = *rounding.activations;
    const RoundingFormat& format = rounding_format(scheme.format);
    for (Linear* linear : model.linears()) {
      if (scheme.except.count(linear->name)) continue;
      if (scheme.dynamic) {
        linear->input_transform = [&format, symmetric = scheme.symmetric](const at::Tensor& x) { return round_per_token(x, format, symmetric); };
        continue;
      }
      const auto found = scheme.scales.find(linear->name);
      if (found == scheme.scales.end()) throw Error("the inputs of " + linear->name + " have no scale").at(rounding_place).hint("the file is damaged: run the quantize stage again");
      linear->input_transform = [&format, scale = found->second](const at::Tensor& x) { return round_static(x, format, scale); };
    }
  }
  if (rounding.kv_cache) {
    const RoundingFormat& format = rounding_format(rounding.kv_cache->format);
    for (std::size_t i = 0; i < model.blocks.size(); ++i) {
      Attention& attention = model.blocks[i].attention;
      attention.key_transform = [&format, scale = RoundingScale{rounding.kv_cache->key_scales[i], 0}](const at::Tensor& x) { return round_static(x, format, scale); };
      attention.value_transform = [&format, scale = RoundingScale{rounding.kv_cache->value_scales[i], 0}](const at::Tensor& x) { return round_static(x, format, scale); };
    }
  }
}

void set_rounding(Transformer& model, const RuntimeRounding& rounding) {
  set_rounding(model.config(), rounding);
  for (Linear* linear : model.linears()) linear->input_transform = {};
  for (Block& block : model.blocks) block.attention.key_transform = block.attention.value_transform = {};
  install_rounding(model);
}

}  // namespace kompakt
