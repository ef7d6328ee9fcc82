// The reader of compressed-tensors folders: ours, and those of other programs as far as they use the same schemes (whole numbers
// of up to 8 bits per tensor, row or group; FP8 E4M3; per-token or per-tensor activations; scales of keys and values).
#include <ATen/ATen.h>

#include <algorithm>
#include <map>
#include <optional>
#include <regex>
#include <set>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"
#include "export/compressed_tensors.h"
#include "export/exporters.h"
#include "formats/safetensors.h"
#include "model/checkpoint.h"
#include "model/checkpoint_source.h"
#include "model/families.h"
#include "model/rounding.h"

namespace kompakt {
namespace fs = std::filesystem;
namespace {

struct OpenedArgs {
  std::int64_t bits = 8, group = 0;
  bool small_float = false, symmetric = true, dynamic = false;
  std::string strategy;
};

struct OpenedGroup {
  std::vector<std::string> targets;
  std::optional<OpenedArgs> weights, inputs;
  std::string format;
};

class CompressedReader {
 public:
  explicit CompressedReader(const fs::path& folder) : folder_(folder), place_((folder / "config.json").string()), config_(config_from_json(read_json(folder / "config.json"), place_)), file_(SafetensorsFile::open(folder)) {
    const Json settings = json_get<Json>(config_.source, "quantization_config", place_);
    config_.source.erase("quantization_config");  // decoded: not what a model saved from here would be
    format_ = json_get<std::string>(settings, "format", place_);
    if (settings.contains("config_groups"))
      for (const auto& [name, row] : settings.at("config_groups").items()) {
        OpenedGroup group;
        group.targets = json_get<std::vector<std::string>>(row, "targets", place_);
        group.weights = args(row, "weights");
        group.inputs = args(row, "input_activations");
        group.format = json_get_or<std::string>(row, "format", place_, format_);
        if (row.contains("output_activations") && !row.at("output_activations").is_null()) throw Error("rounded outputs of layers are not supported").at(place_).given(name);
        groups_.push_back(std::move(group));
      }
    for (const std::string& name : json_get_or<std::vector<std::string>>(settings, "ignore", place_, {})) ignore_.push_back(name);
    if (const auto cache = args(settings, "kv_cache_scheme")) {
      if (cache->dynamic || cache->strategy != "tensor" || !cache->symmetric || cache->bits != 8) throw Error("the scheme of keys and values is not supported").at(place_).given(settings.at("kv_cache_scheme").dump()).allowed("8 bits, symmetric, strategy tensor, static");
      cache_ = cache;
    }
    for (const TensorData& tensor : file_.tensors())
      if (!tensors_.emplace(canonical(tensor.name), &tensor).second) throw Error("two tensors are both \"" + canonical(tensor.name) + "\"").at(folder.string());
  }

  std::unique_ptr<Transformer> read() {
    CheckpointSource source;
    source.place = folder_.string();
    ModelConfig plain = config_;
    set_rounding(plain, RuntimeRounding());
    Transformer shapes(plain, 0, c10::Device(c10::kMeta));
    std::set<std::string> in_blocks;
    std::vector<const Linear*> linears;
    for (const Linear* linear : shapes.linears()) linears.push_back(linear), in_blocks.insert(linear->name);
    for (const Linear* part : {&shapes.lm_head, &shapes.pooler, &shapes.classifier})
      if (part->weight.defined()) linears.push_back(part);
    std::optional<OpenedArgs> inputs;
    ActivationScheme activations;
    for (const Linear* linear : linears) {
      const OpenedGroup* group = find_group(linear->name);
      const bool rounded = group && group->inputs;
      if (group && group->weights) {
        const std::int64_t rows = linear->out_features(), columns = linear->in_features();
        source.tensors[linear->name + ".weight"] = [this, name = linear->name, group, rows, columns] { return decode_weight(name, *group, rows, columns); };
        for (const char* part : {".weight", ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape"}) used_.insert(linear->name + part);
      }
      if (!in_blocks.count(linear->name)) {
        if (rounded) throw Error("rounded inputs of " + linear->name + " are not supported").at(place_).allowed("layers inside blocks");
        continue;
      }
      if (!rounded) {
        activations.except.insert(linear->name);
        continue;
      }
      if (inputs && !same(*inputs, *group->inputs)) throw Error("layers round their inputs differently").at(place_).given(linear->name).allowed("one scheme for all");
      inputs = group->inputs;
      if (!inputs->dynamic) activations.scales[linear->name] = {scalar(linear->name + ".input_scale"), inputs->symmetric ? 0 : static_cast<std::int64_t>(scalar(linear->name + ".input_zero_point"))};
      if (!inputs->dynamic && inputs->symmetric) used_.insert(linear->name + ".input_zero_point");  // zeros, where a writer keeps them
    }
    RuntimeRounding rounding;
    if (inputs) {
      if (inputs->bits != 8 || inputs->strategy != (inputs->dynamic ? "token" : "tensor")) throw Error("the scheme of activations is not supported").at(place_).given(str(inputs->bits, " bits, strategy ", inputs->strategy)).allowed("8 bits; strategy token and dynamic, or tensor and static");
      activations.format = inputs->small_float ? "fp8_e4m3" : "int8", activations.dynamic = inputs->dynamic, activations.symmetric = inputs->symmetric;
      rounding.activations = std::move(activations);
    }
    if (cache_) {
      rounding.kv_cache = KvCacheScheme{cache_->small_float ? "fp8_e4m3" : "int8", {}, {}};
      for (const Block& block : shapes.blocks) {
        const std::string attention = compressed_parent(block.attention.key.name);
        rounding.kv_cache->key_scales.push_back(scalar(attention + ".k_scale"));
        rounding.kv_cache->value_scales.push_back(scalar(attention + ".v_scale"));
      }
    }
    set_rounding(config_, rounding);
    for (const auto& [name, tensor] : tensors_)
      if (!used_.count(name)) source.tensors[name] = [tensor = tensor] { return as_tensor(*tensor); };
    return build_from_source(config_, source, c10::Device(c10::kCPU));
  }

 private:
  static bool same(const OpenedArgs& a, const OpenedArgs& b) { return a.bits == b.bits && a.small_float == b.small_float && a.symmetric == b.symmetric && a.dynamic == b.dynamic && a.strategy == b.strategy; }

  std::string canonical(const std::string& name) const {
    for (const std::string_view prefix : config_.family->prefixes)
      if (starts_with(name, prefix)) return name.substr(prefix.size());
    return name;
  }

  std::optional<OpenedArgs> args(const Json& object, const char* key) const {
    if (!object.contains(key) || object.at(key).is_null()) return std::nullopt;
    const Json& row = object.at(key);
    OpenedArgs out;
    out.bits = json_get_or<std::int64_t>(row, "num_bits", place_, 8);
    const auto type = json_get_or<std::string>(row, "type", place_, "int");
    out.small_float = type == "float";
    out.symmetric = json_get_or<bool>(row, "symmetric", place_, true);
    if (row.contains("dynamic") && !row.at("dynamic").is_boolean()) throw Error("scales that are partly dynamic are not supported").at(place_).given(row.at("dynamic").dump()).allowed("true, false");
    out.dynamic = json_get_or<bool>(row, "dynamic", place_, false);
    out.group = std::max<std::int64_t>(0, json_get_or<std::int64_t>(row, "group_size", place_, 0));
    out.strategy = json_get_or<std::string>(row, "strategy", place_, out.group > 0 ? "group" : "tensor");
    if ((type != "int" && type != "float") || out.bits < 1 || out.bits > 8 || (out.small_float && out.bits != 8)) throw Error("the number type is not supported").at(str(place_, ": ", key)).given(str(type, ", ", out.bits, " bits")).allowed("int of up to 8 bits, float of 8 bits");
    return out;
  }

  bool matches(const std::string& target, const std::string& name) const {
    if (!starts_with(target, "re:")) return target == "Linear" || canonical(target) == name;
    try {
      const std::regex pattern("^(?:" + target.substr(3) + ")");
      if (std::regex_search(name, pattern)) return true;
      return std::any_of(config_.family->prefixes.begin(), config_.family->prefixes.end(), [&](std::string_view prefix) { return std::regex_search(std::string(prefix) + name, pattern); });
    } catch (const std::regex_error&) {
      throw Error("a target is no regular expression").at(place_).given(target);
    }
  }

  const OpenedGroup* find_group(const std::string& name) const {
    const auto any = [&](const std::vector<std::string>& patterns) { return std::any_of(patterns.begin(), patterns.end(), [&](const std::string& pattern) { return matches(pattern, name); }); };
    if (any(ignore_)) return nullptr;
    // As the library: names before patterns before the class.
    const auto rank = [](const std::string& target) { return target == "Linear" ? 2 : starts_with(target, "re:") ? 1 : 0; };
    for (const int wanted : {0, 1, 2})
      for (const OpenedGroup& group : groups_)
        if (std::any_of(group.targets.begin(), group.targets.end(), [&](const std::string& target) { return rank(target) == wanted && matches(target, name); })) return &group;
    return nullptr;
  }

  const TensorData& tensor(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) throw Error("tensor \"" + name + "\" is missing").at(folder_.string()).hint("the artifact is incomplete: export it again");
    return *found->second;
  }

  float scalar(const std::string& name) {
    const TensorData& data = tensor(name);
    if (data.elements() != 1) throw Error("\"" + name + "\" is not one number").at(folder_.string()).given(shape_text(data.shape));
    used_.insert(name);
    return as_tensor(data).to(at::kFloat).item<float>();
  }

  at::Tensor shaped(const std::string& name, std::vector<std::int64_t> shape) const {
    const TensorData& data = tensor(name);
    const bool scalar = shape.size() == 2 && shape[0] == 1 && shape[1] == 1 && data.elements() == 1;
    if (!scalar && data.shape != shape) throw Error("\"" + name + "\" has the wrong shape").at(folder_.string()).given(shape_text(data.shape)).allowed(shape_text(shape));
    return scalar ? as_tensor(data).reshape({1, 1}) : as_tensor(data);
  }

  // Little-endian strings of `bits` in words of 32 along the rows of `words`; [N, columns] int.
  at::Tensor unpack(const at::Tensor& words, std::int64_t columns, std::int64_t bits, const std::string& name) const {
    if (words.scalar_type() != at::kInt) throw Error("\"" + name + "\" has the wrong element type").at(folder_.string()).allowed("I32");
    const at::Tensor w = words.contiguous();
    const std::int64_t rows = w.size(0), stride = w.size(1), offset = std::int64_t{1} << (bits - 1);
    at::Tensor out = at::empty({rows, columns}, at::kInt);
    const std::int32_t* in = w.const_data_ptr<std::int32_t>();
    std::int32_t* codes = out.data_ptr<std::int32_t>();
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t k = 0; k < columns; ++k) {
        const std::int64_t at = k * bits, word = at / 32, shift = at % 32;
        std::uint64_t value = static_cast<std::uint32_t>(in[r * stride + word]);
        if (shift + bits > 32) value |= static_cast<std::uint64_t>(static_cast<std::uint32_t>(in[r * stride + word + 1])) << 32;
        codes[r * columns + k] = static_cast<std::int32_t>(static_cast<std::int64_t>((value >> shift) & ((1u << bits) - 1)) - offset);
      }
    return out;
  }

  at::Tensor decode_weight(const std::string& name, const OpenedGroup& group, std::int64_t rows, std::int64_t columns) const {
    const OpenedArgs& w = *group.weights;
    const std::string base = name + ".weight";
    std::int64_t groups = 1;
    if (w.strategy == "group") {
      if (w.group <= 0 || columns % w.group != 0) throw Error(str("rows of ", columns, " weights do not divide into groups")).at(str(place_, ": ", name)).given(str(w.group));
      groups = columns / w.group;
    } else if (w.strategy != "channel" && w.strategy != "tensor") {
      throw Error("the strategy of weights is not supported").at(str(place_, ": ", name)).given(w.strategy).allowed("tensor, channel, group");
    }
    const std::int64_t scale_rows = w.strategy == "tensor" ? 1 : rows;
    const at::Tensor scale = shaped(base + "_scale", {scale_rows, groups}).to(at::kFloat);
    at::Tensor codes, zero;
    if (group.format == "pack-quantized") {
      codes = unpack(shaped(base + "_packed", {rows, (columns * w.bits + 31) / 32}), columns, w.bits, base + "_packed");
      const at::Tensor shape = shaped(base + "_shape", {2}).to(at::kLong);
      if (shape[0].item<std::int64_t>() != rows || shape[1].item<std::int64_t>() != columns) throw Error("\"" + base + "_shape\" is not the shape of the layer").at(folder_.string()).allowed(str("[", rows, ", ", columns, "]"));
      if (!w.symmetric) zero = unpack(shaped(base + "_zero_point", {(scale_rows * w.bits + 31) / 32, groups}).t(), scale_rows, w.bits, base + "_zero_point").t();
    } else if (group.format == "int-quantized" || group.format == "float-quantized" || group.format == "naive-quantized") {
      codes = shaped(base, {rows, columns});
      if (codes.scalar_type() != (w.small_float ? at::kFloat8_e4m3fn : at::kChar)) throw Error("\"" + base + "\" has the wrong element type").at(folder_.string()).given(std::string(name_of(tensor(base).dtype))).allowed(w.small_float ? "F8_E4M3" : "I8");
      if (!w.symmetric) zero = shaped(base + "_zero_point", {scale_rows, groups});
    } else {
      throw Error("the format of weights is not supported").at(str(place_, ": ", name)).given(group.format).allowed("pack-quantized, int-quantized, float-quantized, naive-quantized");
    }
    at::Tensor value = codes.to(at::kFloat).reshape({rows, groups, -1});
    if (zero.defined()) value = value - zero.to(at::kFloat).unsqueeze(2);
    return (value * scale.unsqueeze(2)).reshape({rows, columns});
  }

  fs::path folder_;
  std::string place_, format_;
  ModelConfig config_;
  SafetensorsFile file_;
  std::vector<OpenedGroup> groups_;
  std::vector<std::string> ignore_;
  std::optional<OpenedArgs> cache_;
  std::map<std::string, const TensorData*> tensors_;
  std::set<std::string> used_;
};

}  // namespace

bool is_compressed(const fs::path& folder) {
  if (!fs::is_directory(folder) || !fs::exists(folder / "config.json")) return false;
  const Json config = read_json(folder / "config.json");
  return config.is_object() && config.contains("quantization_config") && config.at("quantization_config").is_object() && config.at("quantization_config").value("quant_method", "") == "compressed-tensors";
}

std::unique_ptr<Transformer> reopen_compressed(const fs::path& folder) { return CompressedReader(folder).read(); }

}  // namespace kompakt
