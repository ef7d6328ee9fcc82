// Checkpoints to a Transformer and back. Every source is a function from a parameter's name to a float32 tensor plus the list
// of names that it holds; the strict comparison is one place for all sources. GGUF: checkpoint_gguf.cpp.
#include "model/checkpoint.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "core/error.h"
#include "core/files.h"
#include "core/hash.h"
#include "core/paging.h"
#include "core/text.h"
#include "formats/safetensors.h"
#include "model/checkpoint_source.h"
#include "model/families.h"

namespace kompakt {

namespace {

std::string checkpoint_list(const std::vector<std::string>& names) {
  const std::size_t shown = std::min<std::size_t>(names.size(), 20);
  std::string text = join(std::span(names).first(shown), ", ");
  return names.size() > shown ? str(text, ", and ", names.size() - shown, " more") : text;
}

// Names of a safetensors checkpoint as the family spells them: optional prefix away, old LayerNorm names renewed.
std::string checkpoint_canonical_name(std::string name, const Family& family) {
  for (std::string_view prefix : family.prefixes) {
    if (starts_with(name, prefix)) name = name.substr(prefix.size());
  }
  if (ends_with(name, ".gamma")) return name.substr(0, name.size() - 5) + "weight";
  if (ends_with(name, ".beta")) return name.substr(0, name.size() - 4) + "bias";
  return name;
}

CheckpointSource checkpoint_safetensors(const std::filesystem::path& folder, const ModelConfig& config) {
  const auto file = std::make_shared<SafetensorsFile>(SafetensorsFile::open(folder));
  CheckpointSource source;
  source.place = folder.string();
  for (const TensorData& tensor : file->tensors()) {
    const std::string name = checkpoint_canonical_name(tensor.name, *config.family);
    const bool fresh = source.tensors.emplace(name, [&tensor, file] {
      TensorData borrowed = tensor;  // its pages leave the process with the tensor that was made of them
      borrowed.owner = std::shared_ptr<const void>(tensor.bytes.data(), [file, size = tensor.bytes.size()](const void* data) { release_mapped_pages(data, size); });
      return as_tensor(borrowed);
    }).second;
    if (!fresh) throw Error("two tensors are both '" + name + "'").at(folder.string()).given(tensor.name);
  }
  return source;
}

void checkpoint_add(Sha256& hash, const std::string& name, const at::Tensor& weight) {
  const TensorData data = as_data(name, weight.detach().to(at::kFloat));
  hash.update(str(name, shape_text(data.shape), "\n")).update(data.bytes);
}

}  // namespace

bool checkpoint_ignored(const Family& family, const std::string& name) {
  for (std::string_view pattern : family.ignored) {
    const auto hole = pattern.find("{i}");
    if (hole == std::string_view::npos ? name == pattern : starts_with(name, pattern.substr(0, hole)) && ends_with(name, pattern.substr(hole + 3))) return true;
  }
  return false;
}

std::unique_ptr<Transformer> build_from_source(ModelConfig config, const CheckpointSource& source, c10::Device device, const std::function<at::Tensor(const std::string&, const at::Tensor&)>& place) {
  const at::NoGradGuard no_grad;
  auto model = std::make_unique<Transformer>(std::move(config), 0, c10::Device(c10::kMeta));
  const Family& family = *model->config().family;
  std::vector<std::string> missing, unexpected, shapes, not_finite;
  std::set<std::string> known;
  for (NamedParameter& parameter : model->parameters()) {
    known.insert(parameter.name);
    const auto found = source.tensors.find(parameter.name);
    if (found == source.tensors.end()) {
      missing.push_back(parameter.name);
      continue;
    }
    const at::Tensor stored = found->second();
    if (stored.sizes() != parameter.value->sizes()) {
      shapes.push_back(str(parameter.name, " ", shape_text(stored.sizes().vec()), " instead of ", shape_text(parameter.value->sizes().vec())));
      continue;
    }
    // Always a copy: the file's memory map is read-only and training writes in place.
    const at::Tensor value = stored.to(stored.options().dtype(at::kFloat), false, !place).contiguous();
    // The sum is infinite or NaN when an element is; only then are the elements themselves looked at.
    if (!std::isfinite(value.sum(at::kDouble).item<double>()) && !value.isfinite().all().item<bool>()) not_finite.push_back(parameter.name);
    else *parameter.value = place ? place(parameter.name, value) : value.to(device);
  }
  const bool tied = model->config().tied;
  for (const auto& [name, read] : source.tensors) {
    if (known.count(name)) continue;
    if (tied && name == "lm_head.weight") {  // some writers store the shared matrix twice
      const auto table = source.tensors.find(model->tokens.name + ".weight");
      if (table == source.tensors.end() || !read().to(at::kFloat).equal(table->second().to(at::kFloat))) {
        throw Error("lm_head.weight differs from the embedding although config.json says that they are tied")
            .at(source.place).hint("set tie_word_embeddings to false if the head is its own matrix");
      }
      continue;
    }
    if (!checkpoint_ignored(family, name)) unexpected.push_back(name);
  }
  if (!missing.empty() || !unexpected.empty() || !shapes.empty()) {
    std::string text = "the checkpoint does not fit its config:";
    if (!missing.empty()) text += str("\n  ", missing.size(), " missing: ", checkpoint_list(missing));
    if (!unexpected.empty()) text += str("\n  ", unexpected.size(), " unexpected: ", checkpoint_list(unexpected));
    if (!shapes.empty()) text += str("\n  ", shapes.size(), " of another shape: ", checkpoint_list(shapes));
    throw Error(text).at(source.place).hint(str("a model of the family '", family.name, "' was expected; check model_type and the sizes in config.json"));
  }
  if (!not_finite.empty()) {
    throw Error(str("weights hold NaN or infinity: ", checkpoint_list(not_finite))).at(source.place).hint("the file is damaged or its training diverged");
  }
  return model;
}

ModelConfig load_config(const std::filesystem::path& path) {
  if (path.extension() == ".gguf") return load_config_gguf(path);
  if (!std::filesystem::exists(path)) throw Error("the model was not found").at(path.string()).hint("give a folder with config.json and safetensors, or a .gguf file");
  const auto file = path / "config.json";
  if (!std::filesystem::is_directory(path) || !std::filesystem::exists(file)) {
    throw Error("not a model: no config.json").at(path.string()).allowed("a folder with config.json and safetensors, or a .gguf file");
  }
  return config_from_json(read_json(file), file.string());
}

std::pair<ModelConfig, CheckpointSource> open_checkpoint(const std::filesystem::path& path) {
  if (path.extension() == ".gguf") return open_checkpoint_gguf(path);
  ModelConfig config = load_config(path);
  CheckpointSource source = checkpoint_safetensors(path, config);
  return {std::move(config), std::move(source)};
}

std::unique_ptr<Transformer> load_model(const std::filesystem::path& path, c10::Device device) {
  auto [config, source] = open_checkpoint(path);
  return build_from_source(std::move(config), source, device);
}

void save_model(const Transformer& model, const std::filesystem::path& folder, c10::ScalarType dtype) {
  struct Row {
    c10::ScalarType type;
    const char* name;
  };
  static constexpr Row kTypes[] = {{at::kFloat, "float32"}, {at::kBFloat16, "bfloat16"}, {at::kHalf, "float16"}};
  const auto* row = std::find_if(std::begin(kTypes), std::end(kTypes), [&](const Row& r) { return r.type == dtype; });
  if (row == std::end(kTypes)) throw std::logic_error("save_model: float32, bfloat16 or float16");
  const ModelConfig& config = model.config();
  // BertForSequenceClassification keeps its encoder under a prefix.
  const std::string prefix = config.is_classifier() && config.pooling == "pooler" && !config.family->prefixes.empty() ? std::string(config.family->prefixes.front()) : "";
  std::vector<TensorData> tensors;
  for (const auto& [name, value] : model.parameters()) {
    const at::Tensor& whole = name == model.tokens.name + ".weight" ? model.tokens.full_weight() : value;
    tensors.push_back(as_data(starts_with(name, "classifier") ? name : prefix + name, whole.detach().to(dtype)));
  }
  make_folder(folder);
  Json json = config_to_json(config);
  json.erase("dtype");
  json["torch_dtype"] = row->name;
  write_json(folder / "config.json", json);
  write_safetensors(folder / "model.safetensors", std::move(tensors), {{"format", "pt"}});
}

std::string fingerprint(const Transformer& model) {
  Sha256 hash;
  std::vector<std::pair<std::string, at::Tensor>> all = model.parameters();
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  for (const auto& [name, value] : all) checkpoint_add(hash, name, name == model.tokens.name + ".weight" ? model.tokens.full_weight() : value);
  return hash.hex();
}

std::string fingerprint(const std::filesystem::path& path) {
  const at::NoGradGuard no_grad;
  const auto [config, source] = open_checkpoint(path);
  std::vector<std::string> names;
  for (const auto& [name, value] : Transformer(config, 0, c10::Device(c10::kMeta)).parameters()) names.push_back(name);
  std::sort(names.begin(), names.end());
  Sha256 hash;
  for (const std::string& name : names) {
    const auto found = source.tensors.find(name);
    if (found == source.tensors.end()) throw Error("the checkpoint does not fit its config").at(source.place).given("missing: " + name);
    checkpoint_add(hash, name, found->second());
  }
  return hash.hex();
}

}  // namespace kompakt
