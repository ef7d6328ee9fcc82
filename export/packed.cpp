// The packed folder. model.safetensors holds, for a quantized matrix NAME [N,K] with groups of g columns:
//   NAME.codes   U8 [bytes]        rows of codes packed as the grid says, or of all rows together by their entropy (quantize/entropy_code.h)
//   NAME.scales  F16|F32 [N, K/g]  F16 when every value is a half exactly
//   NAME.offsets likewise, asymmetric grids only
// or, for grids of super-blocks,
//   NAME.blocks  U8 [N, bytes]     ggml's blocks, as in GGUF
// and every other tensor under its own name as F16 when that is exact, else F32. config.json has "kompakt": {"packed":
// {"version": 1, "tensors": {NAME: {"grid","group","rows","columns"}}}}. Nothing is rounded here.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <set>
#include <stdexcept>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"
#include "export/exporters.h"
#include "formats/safetensors.h"
#include "model/checkpoint.h"

namespace kompakt {
namespace fs = std::filesystem;
namespace {

constexpr std::int64_t packed_version = 1;

bool packed_fits_half(const at::Tensor& tensor) { return at::equal(tensor.to(at::kHalf).to(at::kFloat), tensor); }

TensorData packed_float(const std::string& name, const at::Tensor& tensor) {
  const at::Tensor plain = tensor.detach().to(at::kCPU, at::kFloat).contiguous();
  return as_data(name, packed_fits_half(plain) ? plain.to(at::kHalf) : plain);
}

// The name of the matrix that a parameter belongs to: "a.b.weight" -> "a.b".
std::string packed_owner(const std::string& parameter) {
  return ends_with(parameter, ".weight") ? parameter.substr(0, parameter.size() - 7) : parameter;
}

const TensorData& packed_tensor(const SafetensorsFile& file, const std::string& name, const fs::path& folder) {
  const TensorData* found = file.find(name);
  if (!found) throw Error(str("tensor \"", name, "\" is missing")).at((folder / "model.safetensors").string()).hint("the artifact is incomplete: export it again");
  return *found;
}

struct PackedEntry {
  GridSpec spec;
  std::int64_t rows = 0, columns = 0;
};

std::map<std::string, PackedEntry> packed_entries(const fs::path& folder) {
  const std::string place = (folder / "config.json").string();
  const Json config = read_json(folder / "config.json");
  const Json packed = json_get<Json>(json_get<Json>(config, "kompakt", place), "packed", place);
  const auto version = json_get<std::int64_t>(packed, "version", place);
  if (version != packed_version) throw Error("this version of the packed format is not known").at(place).given(std::to_string(version)).allowed(std::to_string(packed_version)).hint("use a newer kompakt");
  std::map<std::string, PackedEntry> entries;
  const Json tensors = json_get<Json>(packed, "tensors", place);
  for (const auto& [name, entry] : tensors.items()) {
    const std::string grid = json_get<std::string>(entry, "grid", place);
    PackedEntry read;
    read.spec.grid = find_grid(grid);
    if (!read.spec.grid) throw Error(str("unknown grid \"", grid, "\" of tensor \"", name, "\"", did_you_mean(grid, grid_names()))).at(place).allowed(join(grid_names(), ", "));
    read.spec.group = json_get<std::int64_t>(entry, "group", place);
    read.rows = json_get<std::int64_t>(entry, "rows", place);
    read.columns = json_get<std::int64_t>(entry, "columns", place);
    if (read.spec.group < 0 || read.rows < 1 || read.columns < 1 || read.rows > (std::int64_t{1} << 31) || read.columns > (std::int64_t{1} << 31))
      throw Error(str("impossible sizes of tensor \"", name, "\"")).at(place).given(entry.dump());
    entries[name] = read;
  }
  return entries;
}

at::Tensor packed_decode(const SafetensorsFile& file, const std::string& name, const PackedEntry& entry, const fs::path& folder) {
  const std::string place = str((folder / "model.safetensors").string(), ": ", name);
  if (entry.spec.grid->kquant) {
    const TensorData& blocks = packed_tensor(file, name + ".blocks", folder);
    if (blocks.dtype != DType::u8) throw Error("the blocks have the wrong type").at(place).given(std::string(name_of(blocks.dtype))).allowed("U8");
    try {
    return decode(entry.spec, kquant_values(*entry.spec.grid, blocks.bytes, entry.rows, entry.columns));
  } catch (Error& error) {
    throw error.at(place);
  }
  }
  const TensorData& codes = packed_tensor(file, name + ".codes", folder);
  Quantized values;
  values.scales = as_tensor(packed_tensor(file, name + ".scales", folder)).to(at::kFloat);
  const std::int64_t group = entry.spec.group_for(entry.columns), groups = (entry.columns + group - 1) / group;
  if (values.scales.dim() != 2 || values.scales.size(0) != entry.rows || values.scales.size(1) != groups)
    throw Error("the scales have the wrong shape").at(place).given(kompakt::str(values.scales.sizes())).allowed(str("[", entry.rows, ", ", groups, "]"));
  if (entry.spec.grid->asymmetric) {
    values.offsets = as_tensor(packed_tensor(file, name + ".offsets", folder)).to(at::kFloat);
    if (values.offsets.sizes() != values.scales.sizes()) throw Error("the offsets have the wrong shape").at(place).given(kompakt::str(values.offsets.sizes()));
  }
  if (!at::isfinite(values.scales).all().item<bool>() || (values.offsets.defined() && !at::isfinite(values.offsets).all().item<bool>())) throw Error("a scale or an offset is not finite").at(place);
  if (codes.dtype != DType::u8) throw Error("the codes have the wrong type").at(place).given(std::string(name_of(codes.dtype))).allowed("U8");
  values.codes = read_codes(*entry.spec.grid, codes.bytes, entry.rows, entry.columns, place);
  return decode(entry.spec, values);
}

}  // namespace

std::vector<std::string> packed_obstacles(const ModelConfig&, const std::map<std::string, GridSpec>&) { return {}; }

std::int64_t packed_tensor_bytes(const GridSpec& spec, std::int64_t rows, std::int64_t columns) {
  if (spec.grid->kquant || spec.grid->entropy_coded()) return spec.packed_bytes(rows, columns);
  // An integer zero point is written as the offset that it stands for, scale times zero: a float32, as a half rarely holds it.
  const std::int64_t side = 2 + (spec.grid->asymmetric ? (spec.grid->integer_zero ? 4 : 2) : 0);
  return rows * (spec.grid->layout.row_bytes(columns) + side * spec.scale_count(columns));
}

std::int64_t packed_file_bytes(const ArtifactShape& shape) {
  std::vector<TensorData> tensors;
  Json table = Json::object();
  const auto add = [&](const std::string& name, DType type, std::vector<std::int64_t> sizes) {
    TensorData tensor;
    tensor.name = name, tensor.dtype = type, tensor.shape = std::move(sizes);
    tensor.bytes = {static_cast<const std::byte*>(nullptr), static_cast<std::size_t>(tensor.elements()) * size_of(type)};
    tensors.push_back(std::move(tensor));
  };
  for (const auto& [parameter, value] : shape.model.parameters()) {
    const std::string owner = packed_owner(parameter);
    const auto found = shape.plan.find(owner);
    if (found == shape.plan.end()) {
      const bool half = !shape.stays_whole(parameter) && (shape.halves || value.is_meta() || packed_fits_half(value.detach().to(at::kCPU, at::kFloat)));
      add(parameter, half ? DType::f16 : DType::f32, value.sizes().vec());
      continue;
    }
    const GridSpec& spec = found->second;
    const std::int64_t rows = value.size(0), columns = value.size(1), groups = spec.scale_count(columns);
    table[owner] = Json{{"grid", spec.grid->name}, {"group", spec.group}, {"rows", rows}, {"columns", columns}};
    if (spec.grid->kquant) {
      add(owner + ".blocks", DType::u8, {rows, spec.packed_bytes(1, columns)});
      continue;
    }
    add(owner + ".codes", DType::u8, {spec.grid->entropy_coded() ? spec.packed_bytes(rows, columns) - 2 * rows * groups : rows * spec.grid->layout.row_bytes(columns)});
    add(owner + ".scales", DType::f16, {rows, groups});
    if (spec.grid->asymmetric) add(owner + ".offsets", spec.grid->integer_zero ? DType::f32 : DType::f16, {rows, groups});
  }
  Json config = config_to_json(shape.model.config());
  config["kompakt"]["packed"] = Json{{"version", packed_version}, {"tensors", std::move(table)}};
  return safetensors_file_bytes(std::move(tensors), {{"format", "kompakt-packed"}}) + static_cast<std::int64_t>(dump_json(config).size());
}

void write_packed(const ExportRequest& request, const fs::path& folder) {
  std::vector<TensorData> tensors;
  Json table = Json::object();
  std::set<std::string> written;
  for (const auto& [parameter, value] : request.model.parameters()) {
    const std::string owner = packed_owner(parameter);
    const auto found = request.quantized.find(owner);
    if (found == request.quantized.end()) {
      tensors.push_back(packed_float(parameter, value));
      continue;
    }
    const auto& [spec, quantized] = found->second;
    if (!at::equal(decode(spec, quantized), value.detach().to(at::kCPU, at::kFloat))) throw std::logic_error("packed export: codes of " + owner + " do not decode to the model's weight");
    table[owner] = Json{{"grid", spec.grid->name}, {"group", spec.group}, {"rows", quantized.codes.size(0)}, {"columns", quantized.codes.size(1)}};
    written.insert(owner);
    if (spec.grid->kquant) {
      tensors.push_back(make_tensor(owner + ".blocks", DType::u8, {quantized.codes.size(0), spec.packed_bytes(1, quantized.codes.size(1))}, kquant_blocks(*spec.grid, quantized)));
      continue;
    }
    std::vector<std::byte> codes = stored_codes(*spec.grid, quantized.codes);
    const auto size = static_cast<std::int64_t>(codes.size());
    tensors.push_back(make_tensor(owner + ".codes", DType::u8, {size}, std::move(codes)));
    tensors.push_back(packed_float(owner + ".scales", quantized.scales));
    if (quantized.offsets.defined()) tensors.push_back(packed_float(owner + ".offsets", quantized.offsets));
  }
  for (const auto& [name, tensor] : request.quantized)
    if (!written.count(name)) throw std::logic_error("packed export: quantized tensor " + name + " is not in the model");
  write_safetensors(folder / "model.safetensors", std::move(tensors), {{"format", "kompakt-packed"}});
  Json config = config_to_json(request.model.config());
  config["kompakt"]["packed"] = Json{{"version", packed_version}, {"tensors", std::move(table)}};
  write_json(folder / "config.json", config);
}

std::map<std::string, GridSpec> packed_grids(const fs::path& folder) {
  std::map<std::string, GridSpec> grids;
  if (is_packed(folder))
    for (const auto& [name, entry] : packed_entries(folder)) grids[name] = entry.spec;
  return grids;
}

std::unique_ptr<Transformer> reopen_packed(const fs::path& folder) {
  Json json = read_json(folder / "config.json");
  ModelConfig config = config_from_json(json, (folder / "config.json").string());
  if (config.source.is_object() && config.source.contains("kompakt")) {  // decoded: not what a model saved from here would be
    config.source["kompakt"].erase("packed");
    if (config.source["kompakt"].empty()) config.source.erase("kompakt");
  }
  const std::map<std::string, PackedEntry> entries = packed_entries(folder);
  const SafetensorsFile file = SafetensorsFile::open(folder / "model.safetensors");
  auto model = std::make_unique<Transformer>(config, 0, c10::Device(c10::kMeta));  // no weights are drawn that would be replaced
  const at::NoGradGuard no_grad;
  std::set<std::string> used;
  for (const NamedParameter& parameter : model->parameters()) {
    const std::string owner = packed_owner(parameter.name);
    at::Tensor value;
    if (const auto entry = entries.find(owner); entry != entries.end()) {
      value = packed_decode(file, owner, entry->second, folder);
      for (const char* part : {".codes", ".scales", ".offsets", ".blocks"}) used.insert(owner + part);
    } else {
      value = as_tensor(packed_tensor(file, parameter.name, folder)).to(at::kFloat);
      used.insert(parameter.name);
      if (!at::isfinite(value).all().item<bool>()) throw Error("a weight is not finite").at(str((folder / "model.safetensors").string(), ": ", parameter.name));
    }
    if (value.sizes() != parameter.value->sizes())
      throw Error(str("tensor \"", parameter.name, "\" has the wrong shape")).at((folder / "model.safetensors").string()).given(kompakt::str(value.sizes())).allowed(kompakt::str(parameter.value->sizes()));
    *parameter.value = value.clone();
  }
  Problems problems;
  for (const TensorData& tensor : file.tensors())
    if (!used.count(tensor.name)) problems.add(Error(str("unexpected tensor \"", tensor.name, "\"")).at((folder / "model.safetensors").string()));
  problems.throw_if_any("the artifact holds tensors that its model does not have");
  return model;
}

}  // namespace kompakt
