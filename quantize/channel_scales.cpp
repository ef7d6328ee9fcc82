#include "quantize/channel_scales.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <set>
#include <stdexcept>

#include "core/system.h"
#include "core/text.h"
#include "model/families.h"
#include "model/invariance.h"

namespace kompakt {
namespace {

struct ScaleTapSeen {};  // leaves the forward pass as soon as the wanted value is there

class ScaleTap final : public TapSink {
 public:
  explicit ScaleTap(std::string name) : name_(std::move(name)) {}
  bool wants(const std::string& name) const override { return name == name_; }
  void put(const std::string&, const at::Tensor& value) override {
    value_ = value;
    throw ScaleTapSeen{};
  }
  const at::Tensor& value() const { return value_; }

 private:
  std::string name_;
  at::Tensor value_;
};

at::Tensor scale_tokens(const at::Tensor& x, const at::Tensor& valid) {
  const at::Tensor flat = x.reshape({-1, x.size(-1)}).to(at::kFloat);
  return valid.defined() ? flat.index_select(0, valid) : flat;
}

// [heads x repeats x size] -> [heads x size], mean or maximum over the repeats.
at::Tensor scale_channels(const ScaleMapping& mapping, const at::Tensor& columns, bool largest) {
  if (mapping.repeats == 1) return columns;
  const at::Tensor split = columns.reshape({mapping.heads, mapping.repeats, -1});
  return (largest ? split.amax(1) : split.mean(1)).reshape(-1);
}

// Mean over rows of |w| relative to the largest of its group, [K].
at::Tensor scale_weight_mean(const Linear& linear, const std::map<std::string, GridSpec>& grids) {
  const at::Tensor w = linear.weight.detach().to(at::kDouble).abs();
  const std::int64_t columns = w.size(1);
  const auto found = grids.find(linear.name);
  std::int64_t group = found == grids.end() ? columns : found->second.group_for(columns);
  if (columns % group != 0) group = columns;
  const at::Tensor split = w.reshape({w.size(0), -1, group});
  return (split / (split.amax(2, true) + 1e-6)).reshape(w.sizes()).sum(0);
}

// One block of a model in float: states in front of it, and the inputs of all its linears.
class ScaleBlock {
 public:
  ScaleBlock(Transformer& model, const CalibrationSet& set, std::vector<at::Tensor>& states, std::int64_t layer) : model_(model), set_(set), states_(states), layer_(layer) {
    const Block& block = model.blocks[static_cast<std::size_t>(layer)];
    for (const Linear* linear : {&block.attention.query, &block.attention.output, &block.mlp.up, &block.mlp.down}) wanted_.insert("input:" + linear->name);
    for (std::size_t b = 0; b < states_.size(); ++b) {
      check_interrupted();
      TapMap taps(wanted_);
      next_.push_back(model_.block_forward(layer, states_[b], set.inputs[b], &taps));
      for (const auto& [name, value] : taps.values()) inputs_[name].push_back(scale_tokens(value, set.valid[b]));
    }
  }

  void advance() { states_ = std::move(next_); }
  // Per batch [tokens,K]. Query, key and value share an input, gate and up likewise.
  const std::vector<at::Tensor>& inputs(const ScaleMapping& mapping) const {
    for (const Linear* reader : mapping.readers)
      if (const auto found = inputs_.find("input:" + reader->name); found != inputs_.end()) return found->second;
    throw std::logic_error("no inputs of " + mapping.name);
  }

  at::Tensor mean_magnitude(const ScaleMapping& mapping) const {
    at::Tensor sum;
    std::int64_t tokens = 0;
    for (const at::Tensor& x : inputs(mapping)) {
      const at::Tensor part = x.abs().sum(0, false, at::kDouble);
      sum = sum.defined() ? sum + part : part;
      tokens += x.size(0);
    }
    return scale_channels(mapping, sum / static_cast<double>(std::max<std::int64_t>(tokens, 1)), false);
  }
  at::Tensor largest_magnitude(const ScaleMapping& mapping) const {
    at::Tensor top;
    for (const at::Tensor& x : inputs(mapping)) {
      const at::Tensor part = x.abs().amax(0).to(at::kDouble);
      top = top.defined() ? at::maximum(top, part) : part;
    }
    return scale_channels(mapping, top, true);
  }

  // Squared error of what the parent module puts out when every reader with a grid holds round(W diag(s)) diag(s)^-1.
  double loss(const ScaleMapping& mapping, const at::Tensor& scales, const std::map<std::string, GridSpec>& grids) {
    const at::Tensor s = reader_scales(mapping, scales).to(at::kFloat);
    std::vector<at::Tensor> original;
    for (Linear* reader : mapping.readers) {
      original.push_back(reader->weight);
      const auto found = grids.find(reader->name);
      if (found != grids.end()) reader->weight = round_to_grid(found->second, reader->weight.detach() * s) / s;
    }
    double sum = 0;
    try {
      sum = mapping.end ? module_error(mapping) : linear_error(mapping, original.front());
    } catch (...) {
      for (std::size_t i = 0; i < original.size(); ++i) mapping.readers[i]->weight = original[i];
      throw;
    }
    for (std::size_t i = 0; i < original.size(); ++i) mapping.readers[i]->weight = original[i];
    return sum;
  }

 private:
  double linear_error(const ScaleMapping& mapping, const at::Tensor& original) {
    if (second_moment_of_ != mapping.name) {
      second_moment_ = at::Tensor(), second_moment_of_ = mapping.name;
      for (const at::Tensor& x : inputs(mapping)) second_moment_ = second_moment_.defined() ? second_moment_ + at::matmul(x.t(), x) : at::matmul(x.t(), x);
    }
    const at::Tensor e = mapping.readers.front()->weight - original;
    return (at::matmul(e, second_moment_) * e).sum(at::kDouble).item<double>();
  }

  double module_error(const ScaleMapping& mapping) {
    double sum = 0;
    const std::vector<at::Tensor>& before = inputs_.at("input:" + mapping.end->name);
    for (std::size_t b = 0; b < states_.size(); ++b) {
      check_interrupted();
      ScaleTap tap(str("layer.", layer_, ".", mapping.end_tap));
      try {
        model_.block_forward(layer_, states_[b], set_.inputs[b], &tap);
      } catch (const ScaleTapSeen&) {
      }
      const at::Tensor change = scale_tokens(tap.value(), set_.valid[b]) - before[b];
      sum += at::matmul(change, mapping.end->weight.detach().t()).square().sum(at::kDouble).item<double>();  // the bias cancels
    }
    return sum;
  }

  Transformer& model_;
  const CalibrationSet& set_;
  std::vector<at::Tensor>& states_;
  std::int64_t layer_;
  std::set<std::string> wanted_;
  std::vector<at::Tensor> next_;
  std::map<std::string, std::vector<at::Tensor>> inputs_;
  at::Tensor second_moment_;
  std::string second_moment_of_;
};

std::vector<at::Tensor> scale_states(const Transformer& model, const CalibrationSet& set) {
  std::vector<at::Tensor> states;
  for (const ModelInput& input : set.inputs) states.push_back(model.embed(input));
  return states;
}

}  // namespace

std::vector<ScaleMapping> scale_mappings(Transformer& model, std::int64_t layer) {
  Block& block = model.blocks[static_cast<std::size_t>(layer)];
  Attention& a = block.attention;
  std::vector<ScaleMapping> out;
  const bool pre_norm = fold_obstacle(model.config()).empty();
  if (pre_norm) out.push_back({block.attention_norm.name, &block.attention_norm, nullptr, {&a.query, &a.key, &a.value}, 1, 1, &a.output, "context"});
  // A sub-norm between two linears divides by a mean over all channels: scales do not pass.
  if (!a.sub_norm.weight.defined()) out.push_back({a.value.name, nullptr, &a.value, {&a.output}, a.kv_heads, a.heads / a.kv_heads});
  if (pre_norm) {
    ScaleMapping mlp{block.mlp_norm.name, &block.mlp_norm, nullptr, {}, 1, 1, &block.mlp.down, "ffn"};
    if (block.mlp.gate.weight.defined()) mlp.readers.push_back(&block.mlp.gate);
    mlp.readers.push_back(&block.mlp.up);
    out.push_back(mlp);
  }
  // Without a gate the activation function stands between the two.
  if (block.mlp.gate.weight.defined() && !block.mlp.sub_norm.weight.defined()) out.push_back({block.mlp.up.name, nullptr, &block.mlp.up, {&block.mlp.down}});
  return out;
}

at::Tensor reader_scales(const ScaleMapping& mapping, const at::Tensor& scales) {
  if (mapping.repeats == 1) return scales;
  const at::Tensor split = scales.reshape({mapping.heads, 1, -1});
  return split.expand({mapping.heads, mapping.repeats, split.size(2)}).reshape(-1);
}

void apply_scales(const ScaleMapping& mapping, const at::Tensor& scales) {
  const at::NoGradGuard no_grad;
  if (mapping.norm) set_norm_gain(*mapping.norm, norm_gain(*mapping.norm) / scales);
  if (mapping.producer) {
    Linear& producer = *mapping.producer;
    producer.weight = (producer.weight.detach().to(at::kDouble) / scales.unsqueeze(1)).to(producer.weight.scalar_type());
    if (producer.bias.defined()) producer.bias = (producer.bias.detach().to(at::kDouble) / scales).to(producer.bias.scalar_type());
  }
  const at::Tensor columns = reader_scales(mapping, scales);
  for (Linear* reader : mapping.readers) reader->weight = (reader->weight.detach().to(at::kDouble) * columns).to(reader->weight.scalar_type());
}

at::Tensor awq_scales(const at::Tensor& input_mean, const at::Tensor& weight_mean, double ratio, bool duo) {
  at::Tensor s = input_mean.pow(ratio);
  if (duo) s = s / (weight_mean.pow(1 - ratio) + 1e-4);
  s = s.clamp_min(1e-4);
  s = s / (s.max() * s.min()).sqrt();
  return at::where(s.isfinite(), s, at::ones_like(s));
}

at::Tensor smoothquant_scales(const at::Tensor& input_max, const at::Tensor& weight_max, double alpha) {
  const at::Tensor s = (input_max.pow(alpha) / weight_max.pow(1 - alpha)).clamp_min(1e-5);
  return at::where(input_max.gt(0).logical_and(weight_max.gt(0)).logical_and(s.isfinite()), s, at::ones_like(s));
}

Json search_scales(Transformer& model, const CalibrationSet& set, const ScaleSearch& search) {
  const at::NoGradGuard no_grad;
  Json rows = Json::array();
  std::vector<at::Tensor> states = scale_states(model, set);
  const std::int64_t layers = static_cast<std::int64_t>(model.blocks.size()), last = search.blocks > 0 ? std::min(search.blocks, layers) : layers;
  for (std::int64_t layer = 0; layer < last; ++layer) {
    ScaleBlock block(model, set, states, layer);
    std::vector<std::pair<ScaleMapping, at::Tensor>> chosen;
    for (const ScaleMapping& mapping : scale_mappings(model, layer)) {
      at::Tensor weights;
      std::int64_t rounded = 0, outputs = 0;
      for (const Linear* reader : mapping.readers) {
        const at::Tensor part = scale_weight_mean(*reader, search.grids);
        weights = weights.defined() ? weights + part : part;
        outputs += reader->out_features(), rounded += search.grids.count(reader->name) > 0;
      }
      if (rounded == 0) continue;
      const at::Tensor input_mean = block.mean_magnitude(mapping), weight_mean = scale_channels(mapping, weights / static_cast<double>(outputs), false);
      at::Tensor best = at::ones_like(input_mean);
      const double identity = block.loss(mapping, best, search.grids);
      double least = identity;
      std::string name = "identity";
      const auto consider = [&](const at::Tensor& scales, const std::string& label) {
        const double loss = block.loss(mapping, scales, search.grids);
        if (loss < least) least = loss, best = scales, name = label;
      };
      for (std::int64_t i = 0; i < search.points; ++i) {
        const double ratio = search.points > 1 ? static_cast<double>(i) / static_cast<double>(search.points - 1) : 0.5;
        if (i > 0 || search.points == 1) consider(awq_scales(input_mean, weight_mean, ratio, false), str("r ", shortest(ratio)));
        consider(awq_scales(input_mean, weight_mean, ratio, true), str("r ", shortest(ratio), " duo"));
      }
      if (const auto gain = mapping.norm ? search.folded.find(mapping.norm->name) : search.folded.end(); gain != search.folded.end()) {
        const at::Tensor back = 1 / gain->second;
        if (back.isfinite().all().item<bool>()) consider(back, "not folded");
      }
      rows.push_back(Json{{"mapping", mapping.name}, {"choice", name}, {"loss", least}, {"loss_of_identity", identity}});
      chosen.emplace_back(mapping, best);
    }
    // All statistics were taken in front of any change: the input of the output projection moves with the value's scales.
    for (const auto& [mapping, scales] : chosen) apply_scales(mapping, scales);
    block.advance();
  }
  return rows;
}

std::int64_t smooth_scales(Transformer& model, const CalibrationSet& set, double alpha) {
  const at::NoGradGuard no_grad;
  std::int64_t count = 0;
  std::vector<at::Tensor> states = scale_states(model, set);
  for (std::int64_t layer = 0; layer < static_cast<std::int64_t>(model.blocks.size()); ++layer) {
    ScaleBlock block(model, set, states, layer);
    for (const ScaleMapping& mapping : scale_mappings(model, layer)) {
      if (!mapping.norm) continue;
      at::Tensor weights;
      for (const Linear* reader : mapping.readers) {
        const at::Tensor top = reader->weight.detach().abs().amax(0).to(at::kDouble);
        weights = weights.defined() ? at::maximum(weights, top) : top;
      }
      apply_scales(mapping, smoothquant_scales(block.largest_magnitude(mapping), weights, alpha));
      ++count;
    }
    block.advance();
  }
  return count;
}

}  // namespace kompakt
