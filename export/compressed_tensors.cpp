// A compressed-tensors folder, as vLLM and transformers read it: model.safetensors and config.json with "quantization_config".
// Per quantized matrix NAME [N,K] with G = K / group scales a row (G = 1 without groups):
//   pack-quantized    weights alone: NAME.weight_packed I32 [N, K bits / 32 rounded up], NAME.weight_shape I64 [2], and for
//                     asymmetric grids NAME.weight_zero_point I32 [N bits / 32 rounded up, G], packed along the rows
//   int-quantized     with rounded activations: NAME.weight I8 [N,K], asymmetric NAME.weight_zero_point I8 [N,G]
//   float-quantized   NAME.weight F8_E4M3 [N,K]; naive-quantized without rounded activations
// and NAME.weight_scale F16 [N,G] in all of them. Static activations: NAME.input_scale F32 [1] (and NAME.input_zero_point I8 [1]).
// Key/value cache: k_scale and v_scale F32 [1] of every attention module. Grids of 2 and 3 bits, ternary included, take 4 bits:
// that is what runtimes have kernels for. The embedding has no scheme: its decoded values are written.
#include "export/compressed_tensors.h"

#include <ATen/ATen.h>

#include <map>
#include <optional>
#include <set>
#include <stdexcept>

#include "core/files.h"
#include "core/text.h"
#include "export/exporters.h"
#include "formats/safetensors.h"
#include "model/checkpoint.h"
#include "model/families.h"
#include "model/rounding.h"

namespace kompakt {
namespace fs = std::filesystem;
namespace {

// Every value that a code of the grid stands for is one of E4M3.
bool compressed_is_e4m3(const Grid& grid) {
  const at::Tensor codes = at::arange(grid.code_min, grid.code_max + 1, at::kInt).to(at::kChar).unsqueeze(0);
  const at::Tensor values = decode({&grid, 0}, {codes, at::ones({1, 1}), {}});
  return at::equal(values.to(at::kFloat8_e4m3fn).to(at::kFloat), values);
}

// A scheme with the activations that go with it: one config group each.
struct CompressedScheme {
  CompressedWeights weights;
  bool activations = false;
  bool operator==(const CompressedScheme&) const = default;

  // As the library itself infers the format of a scheme.
  std::string_view format() const {
    if (weights.small_float) return activations ? "float-quantized" : "naive-quantized";
    return activations ? "int-quantized" : "pack-quantized";
  }
};

Json compressed_args(int bits, bool small_float, bool symmetric, std::string_view strategy, std::int64_t group, bool dynamic) {
  return Json{{"num_bits", bits}, {"type", small_float ? "float" : "int"}, {"symmetric", symmetric}, {"group_size", group > 0 ? Json(group) : Json()}, {"strategy", strategy}, {"block_structure", nullptr},
              {"dynamic", dynamic}, {"actorder", nullptr}, {"observer", dynamic ? Json() : Json("minmax")}, {"observer_kwargs", Json::object()}};
}

TensorData compressed_float(const std::string& name, const at::Tensor& value, bool half) {
  const at::Tensor plain = value.detach().to(at::kCPU, at::kFloat);
  return as_data(name, half ? plain.to(at::kHalf) : plain);
}

class CompressedWriter {
 public:
  explicit CompressedWriter(const ExportRequest& request) : request_(request), config_(request.model.config()), rounding_(rounding_of(config_)) {
    // Only a pooler classifier is what transformers means by BertForSequenceClassification, which keeps its encoder under a prefix.
    if (config_.is_classifier() && config_.pooling == "pooler" && !config_.family->prefixes.empty()) prefix_ = config_.family->prefixes.front();
    for (const Linear* linear : const_cast<Transformer&>(request.model).linears()) linears_.insert(linear->name);
  }

  void write(const fs::path& folder) {
    bool half = true;  // every float tensor is a half exactly
    for (const auto& [parameter, value] : request_.model.parameters())
      if (!scheme_of(owner(parameter))) half = half && at::equal(value.detach().to(at::kHalf).to(at::kFloat), value.detach().to(at::kFloat));
    for (const auto& [parameter, value] : request_.model.parameters()) {
      const std::string name = owner(parameter);
      const auto scheme = scheme_of(name);
      if (scheme) add_matrix(name, *scheme, value);
      else tensors_.push_back(compressed_float(public_name(parameter), value, half));
    }
    add_scales();
    write_safetensors(folder / "model.safetensors", std::move(tensors_), {{"format", "pt"}});
    ModelConfig plain = config_;
    set_rounding(plain, RuntimeRounding());  // the format has fields of its own for it
    Json config = config_to_json(plain);
    config.erase("dtype");
    config["torch_dtype"] = half ? "float16" : "float32";
    config["quantization_config"] = quantization_config();
    write_json(folder / "config.json", config);
  }

 private:
  static std::string owner(const std::string& parameter) { return ends_with(parameter, ".weight") ? parameter.substr(0, parameter.size() - 7) : std::string(); }
  std::string public_name(const std::string& name) const { return starts_with(name, "classifier") ? name : prefix_ + name; }
  bool rounds(const std::string& name) const { return rounding_.activations && linears_.count(name) && !rounding_.activations->except.count(name); }

  std::optional<CompressedScheme> scheme_of(const std::string& name) const {
    const auto found = request_.quantized.find(name);
    if (found == request_.quantized.end() || name == request_.model.tokens.name) return std::nullopt;
    CompressedScheme scheme;
    std::string why;
    if (!compressed_weights(found->second.spec, found->second.values.codes.size(1), scheme.weights, why)) throw std::logic_error("compressed-tensors: " + name + ": " + why);
    scheme.activations = rounds(name);
    return scheme;
  }

  void add_matrix(const std::string& name, const CompressedScheme& scheme, const at::Tensor& weight) {
    const auto& [spec, q] = request_.quantized.at(name);
    if (!at::equal(decode(spec, q), weight.detach().to(at::kCPU, at::kFloat))) throw std::logic_error("compressed-tensors: codes of " + name + " do not decode to the model's weight");
    const std::string base = public_name(name) + ".weight";
    const bool packed = scheme.format() == "pack-quantized";
    const CompressedWeights& w = scheme.weights;
    if (w.small_float) {
      const at::Tensor ones = at::ones_like(q.scales);
      tensors_.push_back(as_data(base, decode(spec, {q.codes, ones, {}}).to(at::kFloat8_e4m3fn)));
    } else {
      const at::Tensor codes = (q.codes.to(at::kCPU, at::kInt) - w.shift).to(at::kChar);
      tensors_.push_back(packed ? pack_compressed(base + "_packed", codes, w.bits) : as_data(base, codes));
    }
    tensors_.push_back(as_data(base + "_scale", q.scales.to(at::kCPU, at::kHalf)));
    if (!w.symmetric) {
      const at::Tensor safe = at::where(q.scales.eq(0), at::ones_like(q.scales), q.scales);
      const at::Tensor zeros = (at::where(q.scales.eq(0), at::zeros_like(q.scales), (-q.offsets / safe).round()) - w.shift).to(at::kCPU, at::kChar);
      // The library packs zero points along the rows: it transposes, packs, transposes back.
      if (packed) {
        const TensorData turned = pack_compressed("", zeros.t(), w.bits);
        tensors_.push_back(as_data(base + "_zero_point", as_tensor(turned).t()));
      } else {
        tensors_.push_back(as_data(base + "_zero_point", zeros));
      }
    }
    if (packed) tensors_.push_back(as_data(base + "_shape", at::tensor({weight.size(0), weight.size(1)}, at::kLong)));
    group(scheme).push_back(name);
  }

  std::vector<std::string>& group(const CompressedScheme& scheme) {
    for (auto& [known, names] : groups_)
      if (known == scheme) return names;
    groups_.emplace_back(scheme, std::vector<std::string>());
    return groups_.back().second;
  }

  void add_scales() {
    if (rounding_.activations && !rounding_.activations->dynamic) {
      for (const auto& [name, scale] : rounding_.activations->scales) {
        tensors_.push_back(as_data(public_name(name) + ".input_scale", at::full({1}, scale.scale)));
        if (!rounding_.activations->symmetric) tensors_.push_back(as_data(public_name(name) + ".input_zero_point", at::full({1}, scale.zero, at::kChar)));
      }
    }
    if (!rounding_.kv_cache) return;
    for (std::size_t i = 0; i < request_.model.blocks.size(); ++i) {
      const std::string attention = compressed_parent(public_name(request_.model.blocks[i].attention.key.name));
      tensors_.push_back(as_data(attention + ".k_scale", at::full({1}, rounding_.kv_cache->key_scales[i])));
      tensors_.push_back(as_data(attention + ".v_scale", at::full({1}, rounding_.kv_cache->value_scales[i])));
    }
  }

  Json quantization_config() const {
    // Linear modules that stay in float; a decoder has an output layer as a module even where it shares the embedding.
    std::set<std::string> ignored;
    for (const std::string& name : linears_) ignored.insert(name);
    for (const Linear* part : {&request_.model.lm_head, &request_.model.pooler, &request_.model.classifier})
      if (part->weight.defined()) ignored.insert(part->name);
    if (!config_.family->encoder) ignored.insert("lm_head");
    std::set<std::string_view> formats;
    for (const auto& [scheme, names] : groups_) {
      formats.insert(scheme.format());
      for (const std::string& name : names) ignored.erase(name);
    }
    const bool mixed = formats.size() > 1;
    Json groups = Json::object(), ignore = Json::array();
    for (const auto& [scheme, names] : groups_) {
      const CompressedWeights& w = scheme.weights;
      Json targets = Json::array();
      if (groups_.size() == 1) targets.push_back("Linear");
      else
        for (const std::string& name : names) targets.push_back(public_name(name));
      Json inputs;
      if (scheme.activations) {
        const RoundingFormat& format = *find_rounding_format(rounding_.activations->format);
        const bool dynamic = rounding_.activations->dynamic;
        inputs = compressed_args(8, format.small_float, rounding_.activations->symmetric, dynamic ? "token" : "tensor", 0, dynamic);
      }
      Json row{{"targets", targets}, {"weights", compressed_args(w.bits, w.small_float, w.symmetric, w.group > 0 ? "group" : "channel", w.group, false)}, {"input_activations", inputs}, {"output_activations", nullptr}};
      if (mixed) row["format"] = scheme.format();
      groups[str("group_", groups.size())] = std::move(row);
    }
    for (const std::string& name : ignored) ignore.push_back(public_name(name));
    Json cache;
    if (rounding_.kv_cache) cache = compressed_args(8, find_rounding_format(rounding_.kv_cache->format)->small_float, true, "tensor", 0, false);
    return Json{{"quant_method", "compressed-tensors"}, {"format", mixed ? "mixed-precision" : formats.empty() ? "dense" : *formats.begin()}, {"quantization_status", "compressed"}, {"global_compression_ratio", nullptr},
                {"config_groups", groups}, {"ignore", ignore}, {"kv_cache_scheme", cache}};
  }

  const ExportRequest& request_;
  const ModelConfig& config_;
  RuntimeRounding rounding_;
  std::string prefix_;
  std::set<std::string> linears_;
  std::vector<TensorData> tensors_;
  std::vector<std::pair<CompressedScheme, std::vector<std::string>>> groups_;  // in the order of the model
};

}  // namespace

TensorData pack_compressed(const std::string& name, const at::Tensor& codes, int bits) {
  const std::int64_t rows = codes.size(0), columns = codes.size(1), words = (columns * bits + 31) / 32;
  std::vector<std::byte> bytes(static_cast<std::size_t>(rows * words * 4));
  const at::Tensor c = codes.to(at::kCPU, at::kChar).contiguous();
  const int low = -(1 << (bits - 1));
  const CodeLayout layout{Packing::bits, bits, low, -low - 1};
  for (std::int64_t r = 0; r < rows; ++r) pack_codes(layout, c.const_data_ptr<std::int8_t>() + r * columns, 1, columns, reinterpret_cast<std::uint8_t*>(bytes.data()) + r * words * 4);
  return make_tensor(name, DType::i32, {rows, words}, std::move(bytes));
}

std::string compressed_parent(const std::string& module) {
  const std::size_t dot = module.rfind('.');
  return dot == std::string::npos ? std::string() : module.substr(0, dot);
}

bool compressed_weights(const GridSpec& spec, std::int64_t columns, CompressedWeights& out, std::string& why) {
  const Grid& grid = *spec.grid;
  out = {};
  if (grid.kquant) {
    why = str("grid \"", grid.name, "\" keeps its scales in super-blocks, which no scheme of the format does");
    return false;
  }
  const std::int64_t group = spec.group_for(columns);
  if (group > 0 && columns % group != 0) {
    why = str("rows of ", columns, " weights do not divide into groups of ", group);
    return false;
  }
  out.group = group >= columns ? 0 : group;
  out.symmetric = !grid.asymmetric;
  if (grid.levels) {
    out.bits = 8, out.small_float = true;
    if (grid.layout.bits == 8 && compressed_is_e4m3(grid)) return true;
    why = str("grid \"", grid.name, "\" has uneven levels that no scheme of the format stores");
    return false;
  }
  if (grid.asymmetric && !grid.integer_zero) {
    why = str("grid \"", grid.name, "\" has minima in half precision, and the format has whole zero points (int4_asym has)");
    return false;
  }
  const int low = grid.asymmetric ? 0 : -8, high = grid.asymmetric ? 15 : 7;
  out.bits = grid.code_min >= low && grid.code_max <= high ? 4 : 8;
  out.shift = grid.asymmetric ? 1 << (out.bits - 1) : 0;
  return true;
}

bool compressed_holds(const GridSpec& spec, std::int64_t columns, std::string& why) {
  CompressedWeights ignored;
  return compressed_weights(spec, columns, ignored, why);
}

std::vector<std::string> compressed_obstacles(const ModelConfig& config, const std::map<std::string, GridSpec>& plan) {
  std::vector<std::string> obstacles;
  if (config.sub_norms) return {"no other program knows the model's sub-norms (quantize.subln), and would compute without them (take format kompakt)"};
  const Transformer shapes(config, 0, c10::Device(c10::kMeta));
  for (const auto& [name, value] : shapes.parameters()) {
    const std::string owner = ends_with(name, ".weight") ? name.substr(0, name.size() - 7) : name;
    const auto found = plan.find(owner);
    std::string why;
    if (found != plan.end() && owner != shapes.tokens.name && !compressed_holds(found->second, value.size(1), why)) obstacles.push_back(str(owner, ": ", why));
  }
  return obstacles;
}

void write_compressed(const ExportRequest& request, const fs::path& folder) { CompressedWriter(request).write(folder); }

}  // namespace kompakt
