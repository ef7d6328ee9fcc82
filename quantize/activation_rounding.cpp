#include "quantize/activation_rounding.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "core/log.h"
#include "core/text.h"
#include "model/families.h"
#include "model/paged.h"
#include "quantize/activation_clip.h"
#include "train/activations.h"
#include "train/calibration.h"

namespace kompakt {
namespace {

constexpr std::int64_t rounding_sample_values = 1 << 20;

// Something in a block that gets a scale of its own: the input of linears that share it, keys or values.
struct RoundedValue {
  std::string name;
  std::vector<Linear*> linears;  // empty for keys and values
  bool key = false;
  const RoundingFormat* format = nullptr;
  bool symmetric = true;
  const Clip* clip = nullptr;
  double percentile = 0;
  RoundingScale scale;
  Json row;
};

// [.., K] or [B,H,T,hd] -> [tokens, K] without padding.
at::Tensor rounding_tokens(const at::Tensor& x, const at::Tensor& valid) {
  const at::Tensor rows = x.dim() == 4 ? x.permute({0, 2, 1, 3}).reshape({x.size(0) * x.size(2), -1}) : x.reshape({-1, x.size(-1)});
  const at::Tensor flat = rows.to(at::kFloat);
  return valid.defined() ? flat.index_select(0, valid) : flat;
}

struct RoundingSeen {};  // leaves the forward pass as soon as keys and values are there

class RoundingCacheTap final : public TapSink {
 public:
  explicit RoundingCacheTap(std::int64_t layer) : key_name_(str("layer.", layer, ".cached_key")), value_name_(str("layer.", layer, ".value")) {}
  bool wants(const std::string& name) const override { return name == key_name_ || name == value_name_; }
  void put(const std::string& name, const at::Tensor& tensor) override {
    (name == key_name_ ? key : value) = tensor;
    if (name == key_name_) throw RoundingSeen{};  // offered after the values
  }
  at::Tensor key, value;

 private:
  std::string key_name_, value_name_;
};

// A block runs once, part by part: the scale of a part is chosen behind parts that round already.
class RoundingCalibration {
 public:
  RoundingCalibration(Transformer& model, const QuantizeOptions& options, StageContext& context, RuntimeRounding& rounding)
      : model_(model), options_(options), context_(context), rounding_(rounding), set_(calibration_set(context, options.calibration_sequences, "activations: {mode: dynamic} without kv_cache")),
        x_(spill()), h_(spill()), inside_(spill()) {}

  void run() {
    const at::NoGradGuard no_grad;
    const std::size_t batches = set_.inputs.size();
    for (Activations* values : {&x_, &h_, &inside_}) values->resize(batches);
    for (std::size_t b = 0; b < batches; ++b) x_.put(b, model_.embed(set_.inputs[b]));
    Progress progress(context_.title + " activations", static_cast<std::int64_t>(model_.blocks.size()), "block");
    for (std::int64_t layer = 0; layer < static_cast<std::int64_t>(model_.blocks.size()); ++layer) {
      run_block(layer);
      for (const NamedParameter& parameter : block_parameters(model_.blocks[static_cast<std::size_t>(layer)])) release_pages(*parameter.value);
      progress.update(layer + 1, "");
    }
    progress.finish(str(input_rows_.size(), " scales of inputs, ", kv_rows_.size(), " layers of keys and values"));
  }

  const CalibrationSet& set() const { return set_; }
  const Json& input_rows() const { return input_rows_; }
  const Json& kv_rows() const { return kv_rows_; }

 private:
  std::filesystem::path spill() const { return options_.spill ? context_.work : std::filesystem::path(); }
  void each_batch(const std::function<void(std::size_t)>& work) { for_each_batch(model_.device(), set_.inputs.size(), work); }

  void run_block(std::int64_t layer) {
    calibrate(layer, inputs_of(layer, BlockPart::attention), [&](std::size_t b) { return std::vector<at::Tensor>{model_.attention_input(layer, x_.get(b))}; });
    calibrate(layer, cache_of(layer), [&](std::size_t b) {
      RoundingCacheTap tap(layer);
      try {
        model_.block_forward(layer, x_.get(b), set_.inputs[b], &tap);
      } catch (const RoundingSeen&) {
      }
      return std::vector<at::Tensor>{tap.key, tap.value};
    });
    each_batch([&](std::size_t b) { inside_.put(b, model_.attention_context(layer, model_.attention_input(layer, x_.get(b)), set_.inputs[b])); });
    calibrate(layer, inputs_of(layer, BlockPart::output), [&](std::size_t b) { return std::vector<at::Tensor>{inside_.get(b)}; });
    each_batch([&](std::size_t b) { h_.put(b, model_.after_attention(layer, x_.get(b), inside_.get(b))), inside_.drop(b); });
    calibrate(layer, inputs_of(layer, BlockPart::feed_forward), [&](std::size_t b) { return std::vector<at::Tensor>{model_.mlp_input(layer, h_.get(b))}; });
    each_batch([&](std::size_t b) { inside_.put(b, model_.mlp_inner(layer, model_.mlp_input(layer, h_.get(b)))); });
    calibrate(layer, inputs_of(layer, BlockPart::down), [&](std::size_t b) { return std::vector<at::Tensor>{inside_.get(b)}; });
    each_batch([&](std::size_t b) { x_.put(b, model_.after_mlp(layer, h_.get(b), inside_.get(b))), h_.drop(b), inside_.drop(b); });
  }

  std::vector<RoundedValue> inputs_of(std::int64_t layer, BlockPart part) {
    if (!rounding_.activations || rounding_.activations->dynamic) return {};
    RoundedValue value;
    for (Linear* linear : part_linears(model_.blocks[static_cast<std::size_t>(layer)], part))
      if (!rounding_.activations->except.count(linear->name)) value.linears.push_back(linear);
    if (value.linears.empty()) return {};
    value.name = value.linears.front()->name;
    value.format = find_rounding_format(options_.activations.format), value.symmetric = options_.activations.symmetric;
    value.clip = find_clip(options_.activations.clip), value.percentile = options_.activations.percentile;
    return {value};
  }

  std::vector<RoundedValue> cache_of(std::int64_t layer) const {
    std::vector<RoundedValue> values;
    if (!rounding_.kv_cache) return values;
    for (const bool key : {true, false}) {
      RoundedValue value;
      value.name = str(key ? "keys" : "values", " of layer ", layer), value.key = key;
      value.format = find_rounding_format(options_.kv_cache.format);
      value.clip = find_clip(options_.kv_cache.clip), value.percentile = options_.kv_cache.percentile;
      values.push_back(std::move(value));
    }
    return values;
  }

  // `tensors` of a batch, one for each of `values`, are looked at; then the scales are in place.
  void calibrate(std::int64_t layer, std::vector<RoundedValue> values, const std::function<std::vector<at::Tensor>(std::size_t)>& tensors) {
    if (values.empty()) return;
    const std::vector<ValueSample> samples = look(values, tensors);
    for_each_batch(model_.device(), values.size(), [&](std::size_t i) { choose(values[i], samples[i], layer); });
    for (RoundedValue& value : values) keep(model_.blocks[static_cast<std::size_t>(layer)], value);
  }

  // Extremes of every value, and every so many of its elements.
  std::vector<ValueSample> look(const std::vector<RoundedValue>& values, const std::function<std::vector<at::Tensor>(std::size_t)>& tensors) {
    const std::size_t batches = set_.inputs.size();
    std::vector<std::int64_t> before(batches + 1, 0);  // tokens in front of a batch
    for (std::size_t b = 0; b < batches; ++b) before[b + 1] = before[b] + (set_.valid[b].defined() ? set_.valid[b].size(0) : set_.inputs[b].ids.numel());
    std::vector<std::vector<ValueSample>> seen(batches, std::vector<ValueSample>(values.size()));
    each_batch([&](std::size_t b) {
      const std::vector<at::Tensor> given = tensors(b);
      for (std::size_t i = 0; i < values.size(); ++i) {
        const at::Tensor x = rounding_tokens(given[i], set_.valid[b]);
        if (x.numel() == 0) continue;
        const auto [low, high] = x.aminmax();
        const std::int64_t columns = x.size(1);
        std::int64_t step = std::max<std::int64_t>(1, set_.tokens * columns / rounding_sample_values);
        while (std::gcd(step, columns) > 1) ++step;  // every channel has its turn
        const std::int64_t first = (step - before[b] * columns % step) % step;
        seen[b][i] = {low.item<float>(), high.item<float>(), x.reshape({-1}).slice(0, first, x.numel(), step).clone()};
      }
    });
    std::vector<ValueSample> out(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) {
      std::vector<at::Tensor> parts;
      for (std::size_t b = 0; b < batches; ++b) {
        const ValueSample& part = seen[b][i];
        if (!part.values.defined()) continue;
        if (!std::isfinite(part.low) || !std::isfinite(part.high))
          throw Error(str(values[i].linears.empty() ? "" : "inputs of ", values[i].name, " are not finite on the calibration set")).at(context_.title).given(str("batch ", b)).hint("the model overflows: look at its weights, or take other calibration text");
        out[i].low = std::min(out[i].low, part.low), out[i].high = std::max(out[i].high, part.high);
        parts.push_back(part.values);
      }
      out[i].values = parts.empty() ? at::zeros({0}) : at::cat(parts).to(at::kCPU);
    }
    return out;
  }

  void choose(RoundedValue& value, const ValueSample& sample, std::int64_t layer) const {
    const at::NoGradGuard no_grad;
    const ClipRange range = value.clip->range(sample, {*value.format, value.symmetric, value.percentile});
    value.scale = rounding_scale(*value.format, value.symmetric, range.low, range.high);
    if (!(value.scale.scale > 0))
      throw Error(str(value.linears.empty() ? "" : "inputs of ", value.name, " are all zero on the calibration set: they have no scale")).at(context_.title).hint(value.linears.empty() ? "leave kv_cache out, or take more calibration data" : "take more calibration data, activations: {mode: dynamic}, or name the layer in keep_float");
    value.row = Json{{"layer", layer}, {"scale", value.scale.scale}, {"largest", std::max(-sample.low, sample.high)}, {"covered", std::max(-range.low, range.high)}, {"error", sample_error(sample, *value.format, value.scale)}};
    if (value.scale.zero) value.row["zero"] = value.scale.zero;
  }

  void keep(Block& block, RoundedValue& value) {
    const auto transform = [&] { return InputTransform([format = value.format, scale = value.scale](const at::Tensor& x) { return round_static(x, *format, scale); }); };
    if (!value.linears.empty()) {
      for (Linear* linear : value.linears) rounding_.activations->scales[linear->name] = value.scale, linear->input_transform = transform();
      value.row["input"] = value.name;
      input_rows_.push_back(value.row);
    } else if (value.key) {
      rounding_.kv_cache->key_scales[value.row.at("layer").get<std::size_t>()] = value.scale.scale;
      block.attention.key_transform = transform();
      kv_rows_.push_back(Json{{"layer", value.row.at("layer")}, {"key_scale", value.scale.scale}, {"key_error", value.row.at("error")}});
    } else {
      rounding_.kv_cache->value_scales[value.row.at("layer").get<std::size_t>()] = value.scale.scale;
      block.attention.value_transform = transform();
      kv_rows_.back()["value_scale"] = value.scale.scale, kv_rows_.back()["value_error"] = value.row.at("error");
    }
  }

  Transformer& model_;
  const QuantizeOptions& options_;
  StageContext& context_;
  RuntimeRounding& rounding_;
  CalibrationSet set_;
  Activations x_, h_, inside_;  // in front of the block, behind attention, in front of the output or the down projection
  Json input_rows_ = Json::array(), kv_rows_ = Json::array();
};

void rounding_clip_fields(FieldVisitor& visitor, std::string& clip, double& percentile) {
  visitor.choice("clip", clip, "the range that a static scale covers: all that was seen, a share of it, or the one with the least squared error", clip_names());
  visitor.number("percentile", percentile, "clip percentile: share of the magnitudes that is not clipped, in percent", {.min = 50, .max = 100});
}

void rounding_check_clip(const std::string& key, const std::string& clip, double percentile, double unset, Problems& problems) {
  if (clip != "percentile" && percentile != unset) problems.add(Error("a percentile that nothing asks for").at(key + ".percentile").given(str("clip: ", clip)).allowed("clip: percentile").hint("set clip, or leave percentile out"));
}

}  // namespace

void fields(FieldVisitor& visitor, ActivationOptions& options) {
  visitor.choice("format", options.format, "codes of the inputs of linear layers", rounding_format_names());
  visitor.choice("mode", options.mode, "dynamic: a scale per token, from the token itself; static: one per linear, calibrated", {"dynamic", "static"});
  visitor.flag("symmetric", options.symmetric, "whether zero lies in the middle of the range; int8 only when false");
  rounding_clip_fields(visitor, options.clip, options.percentile);
}

void fields(FieldVisitor& visitor, KvCacheOptions& options) {
  visitor.choice("format", options.format, "codes of keys and values, with a scale each per layer", rounding_format_names());
  rounding_clip_fields(visitor, options.clip, options.percentile);
}

void check_activations(const ModelConfig& config, const QuantizeOptions& options, Problems& problems) {
  if (options.has_budget && (options.has_activations || options.has_kv_cache))
    problems.add(Error("a budget does not count the scales of rounded activations, keys and values").at("quantize.budget").given(options.has_activations ? "activations" : "kv_cache").hint("choose the grids by weights and embedding instead of a budget, or leave activations and kv_cache out"));
  if (options.has_activations) {
    const ActivationOptions& a = options.activations;
    const RoundingFormat* format = find_rounding_format(a.format);
    if (!a.symmetric && format && format->small_float) problems.add(Error("floats have no zero point").at("quantize.activations.symmetric").given(str("false with format: ", a.format)).allowed("true").hint("leave symmetric out, or take format: int8"));
    if (a.mode == "dynamic" && a.clip != ActivationOptions().clip) problems.add(Error("dynamic scales are taken from each token, and nothing is clipped").at("quantize.activations.clip").given(a.clip).allowed("mode: static").hint("leave clip out, or set mode: static"));
    rounding_check_clip("quantize.activations", a.clip, a.percentile, ActivationOptions().percentile, problems);
  }
  if (options.has_kv_cache) {
    if (config.family && config.family->encoder) problems.add(Error("an encoder keeps no keys and values").at("quantize.kv_cache").given(std::string(config.family->name)).allowed("a decoder").hint("leave kv_cache out"));
    rounding_check_clip("quantize.kv_cache", options.kv_cache.clip, options.kv_cache.percentile, KvCacheOptions().percentile, problems);
  }
}

RuntimeRounding planned_rounding(const ModelConfig& config, const QuantizeOptions& options, const std::map<std::string, GridSpec>& plan) {
  RuntimeRounding rounding;
  if (options.has_activations) {
    ActivationScheme scheme;
    scheme.format = options.activations.format, scheme.dynamic = options.activations.mode == "dynamic", scheme.symmetric = options.activations.symmetric;
    ModelConfig plain = config;
    set_rounding(plain, RuntimeRounding());
    Transformer shapes(plain, 0, c10::Device(c10::kMeta));
    bool any = false;
    for (const Linear* linear : shapes.linears()) {
      const bool rounded = plan.count(linear->name) > 0;
      any |= rounded;
      if (!rounded) scheme.except.insert(linear->name);
      else if (!scheme.dynamic) scheme.scales[linear->name] = {1, 0};
    }
    if (!any) throw Error("activations are rounded where weights are, and all weights are kept in float").at("quantize.activations").hint("leave activations out, or keep fewer layers in float");
    rounding.activations = std::move(scheme);
  }
  if (options.has_kv_cache) {
    const std::vector<float> ones(static_cast<std::size_t>(config.layers), 1.0f);
    rounding.kv_cache = KvCacheScheme{options.kv_cache.format, ones, ones};
  }
  return rounding;
}

void round_while_training(Transformer& model, const QuantizeOptions& options, const std::map<std::string, GridSpec>& plan) {
  if (!options.has_activations || options.activations.mode != "dynamic") return;
  RuntimeRounding rounding = planned_rounding(model.config(), options, plan);
  rounding.kv_cache.reset();
  set_rounding(model, rounding);
}

void round_activations(Transformer& model, const QuantizeOptions& options, const std::map<std::string, GridSpec>& plan, StageContext& context) {
  if (!options.has_activations && !options.has_kv_cache) return;
  RuntimeRounding rounding = planned_rounding(model.config(), options, plan);
  const bool is_static = rounding.activations && !rounding.activations->dynamic;
  RuntimeRounding known;  // in front of the calibration
  if (rounding.activations && !is_static) known.activations = rounding.activations;
  set_rounding(model, known);
  Json inputs = Json::array(), layers = Json::array(), calibration;
  if (is_static || rounding.kv_cache) {
    RoundingCalibration run(model, options, context, rounding);
    run.run();
    inputs = run.input_rows(), layers = run.kv_rows();
    calibration = Json{{"sequences", run.set().sequences}, {"tokens", run.set().tokens}, {"sha256", run.set().hash}};
  }
  set_rounding(model, rounding);
  if (!context.details) return;
  if (rounding.activations) {
    const ActivationScheme& scheme = *rounding.activations;
    const std::int64_t linears = static_cast<std::int64_t>(model.linears().size()), kept = static_cast<std::int64_t>(scheme.except.size());
    Json row{{"format", scheme.format}, {"mode", options.activations.mode}, {"symmetric", scheme.symmetric}, {"linears", linears - kept}, {"kept_in_float", kept}};
    if (is_static) row["clip"] = options.activations.clip, row["inputs"] = inputs, row["calibration"] = calibration;
    (*context.details)["activations"] = std::move(row);
  }
  if (rounding.kv_cache) (*context.details)["kv_cache"] = Json{{"format", rounding.kv_cache->format}, {"clip", options.kv_cache.clip}, {"layers", layers}, {"calibration", calibration}};
}

}  // namespace kompakt
