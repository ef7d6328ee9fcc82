// `kompakt inspect`: what lies in a model file, without loading the weights.
#include <algorithm>

#include "core/files.h"
#include "core/text.h"
#include "export/exporters.h"
#include "formats/gguf.h"
#include "formats/hdf5_file.h"
#include "formats/safetensors.h"
#include "pipeline/describe.h"

namespace kompakt {
namespace fs = std::filesystem;
namespace {

std::string inspect_shape(const std::vector<std::int64_t>& shape) {
  std::vector<std::string> parts;
  for (const std::int64_t size : shape) parts.push_back(std::to_string(size));
  return join(parts, "x");
}

struct InspectTotals {
  std::int64_t elements = 0, bytes = 0;
  std::map<std::string, std::pair<std::int64_t, std::int64_t>> by_type;  // tensors, bytes
  void add(const std::string& type, std::int64_t count, std::int64_t size) {
    elements += count;
    bytes += size;
    ++by_type[type].first;
    by_type[type].second += size;
  }
};

void inspect_finish(Json& out, const InspectTotals& totals, const fs::path& path) {
  const auto whole = static_cast<std::int64_t>(bytes_on_disk(path));
  out["bytes"] = whole;
  out["tensor_bytes"] = totals.bytes;
  Json types = Json::object();
  for (const auto& [type, count] : totals.by_type) types[type] = Json{{"tensors", count.first}, {"bytes", count.second}};
  out["types"] = std::move(types);
}

std::string inspect_value(const GgufValue& value) {
  struct Show {
    std::string operator()(std::uint64_t v) const { return std::to_string(v); }
    std::string operator()(std::int64_t v) const { return std::to_string(v); }
    std::string operator()(double v) const { return shortest(v); }
    std::string operator()(bool v) const { return v ? "true" : "false"; }
    std::string operator()(const std::string& v) const { return v.size() > 120 ? str(v.substr(0, 117), "... (", v.size(), " bytes)") : v; }
    std::string operator()(const std::vector<std::int64_t>& v) const { return str("[", v.size(), " integers]"); }
    std::string operator()(const std::vector<double>& v) const { return str("[", v.size(), " numbers]"); }
    std::string operator()(const std::vector<std::string>& v) const { return str("[", v.size(), " texts]"); }
  };
  return std::visit(Show{}, value.data);
}

Json inspect_safetensors(const fs::path& path) {
  const SafetensorsFile file = SafetensorsFile::open(path);
  Json out{{"path", path.string()}, {"format", "safetensors"}};
  InspectTotals totals;
  Json tensors = Json::array();
  for (const TensorData& tensor : file.tensors()) {
    totals.add(std::string(name_of(tensor.dtype)), tensor.elements(), static_cast<std::int64_t>(tensor.bytes.size()));
    tensors.push_back(Json{{"name", tensor.name}, {"type", name_of(tensor.dtype)}, {"shape", tensor.shape}, {"bytes", tensor.bytes.size()}});
  }
  std::int64_t parameters = totals.elements;
  if (fs::is_directory(path) && is_packed(path)) {
    out["format"] = "kompakt packed artifact";
    Json grids = Json::object();
    const Json entries = read_json(path / "config.json").at("kompakt").at("packed").at("tensors");
    parameters = 0;
    for (const TensorData& tensor : file.tensors())
      if (!ends_with(tensor.name, ".blocks") && !ends_with(tensor.name, ".codes") && !ends_with(tensor.name, ".scales") && !ends_with(tensor.name, ".offsets")) parameters += tensor.elements();
    for (const auto& [name, entry] : entries.items()) {
      parameters += entry.at("rows").get<std::int64_t>() * entry.at("columns").get<std::int64_t>();
      grids[name] = str(entry.at("grid").get<std::string>(), entry.at("group").get<std::int64_t>() > 0 ? str(" group ", entry.at("group").get<std::int64_t>()) : std::string(" per row"));
    }
    out["grids"] = std::move(grids);
  }
  out["parameters"] = parameters;
  inspect_finish(out, totals, path);
  out["bits_per_weight"] = parameters > 0 ? Json(8.0 * out["bytes"].get<double>() / static_cast<double>(parameters)) : Json(nullptr);
  out["metadata"] = file.metadata();
  out["tensors"] = std::move(tensors);
  return out;
}

Json inspect_gguf(const fs::path& path) {
  const GgufFile file = GgufFile::open(path);
  Json out{{"path", path.string()}, {"format", "GGUF"}};
  InspectTotals totals;
  Json tensors = Json::array(), metadata = Json::object();
  for (const GgufTensor& tensor : file.tensors()) {
    totals.add(std::string(tensor.type->name), tensor.elements(), static_cast<std::int64_t>(tensor.bytes.size()));
    tensors.push_back(Json{{"name", tensor.name}, {"type", tensor.type->name}, {"shape", tensor.shape}, {"bytes", tensor.bytes.size()}});
  }
  for (const auto& [key, value] : file.metadata()) metadata[key] = inspect_value(value);
  out["parameters"] = totals.elements;
  inspect_finish(out, totals, path);
  out["bits_per_weight"] = totals.elements > 0 ? Json(8.0 * out["bytes"].get<double>() / static_cast<double>(totals.elements)) : Json(nullptr);
  out["metadata"] = std::move(metadata);
  out["tensors"] = std::move(tensors);
  return out;
}

Json inspect_hdf5(const fs::path& path) {
  const Hdf5File file(path, Hdf5File::Mode::read);
  Json out{{"path", path.string()}, {"format", "HDF5"}, {"bytes", bytes_on_disk(path)}};
  Json tensors = Json::array();
  for (const std::string& name : file.list()) tensors.push_back(Json{{"name", name}, {"rows", file.rows(name)}});
  out["tensors"] = std::move(tensors);
  return out;
}

}  // namespace

Json inspect(const fs::path& path) {
  if (!fs::exists(path)) throw Error("there is no such file or folder").at(path.string());
  if (fs::is_directory(path)) {
    if (!fs::exists(path / "model.safetensors") && !fs::exists(path / "model.safetensors.index.json") && fs::exists(path / "model.gguf")) return inspect_gguf(path / "model.gguf");
    return inspect_safetensors(path);
  }
  // The first bytes tell; a name may lie.
  const MappedFile file(path);
  if (starts_with(file.text(), "GGUF")) return inspect_gguf(path);
  if (starts_with(file.text(), "\x89HDF\r\n")) return inspect_hdf5(path);
  if (path.extension() == ".safetensors") return inspect_safetensors(path);
  throw Error("this is no file that kompakt can look into").at(path.string()).allowed("safetensors, GGUF, HDF5, or a model folder");
}

std::string inspect_text(const Json& inspection) {
  std::string out = str(inspection.at("path").get<std::string>(), "\n", inspection.at("format").get<std::string>(), ", ", human_bytes(inspection.at("bytes").get<double>()), " (", inspection.at("bytes").get<std::int64_t>(), " bytes)");
  if (inspection.contains("parameters")) out += str(", ", human_count(inspection.at("parameters").get<double>()), " parameters");
  if (inspection.contains("bits_per_weight") && inspection.at("bits_per_weight").is_number()) out += str(", ", fixed(inspection.at("bits_per_weight").get<double>(), 2), " bits per weight of the whole");
  out += "\n";
  const Json none = Json::object();
  const Json types = inspection.value("types", none);
  for (const auto& [type, count] : types.items()) out += str("  ", type, ": ", count.at("tensors").get<std::int64_t>(), " tensors, ", human_bytes(count.at("bytes").get<double>()), "\n");
  if (const Json metadata = inspection.value("metadata", none); !metadata.empty()) {
    out += "\nmetadata\n";
    for (const auto& [key, value] : metadata.items()) out += str("  ", key, " = ", replace_all(value.get<std::string>(), "\n", "\\n"), "\n");
  }
  out += "\ntensors\n";
  std::size_t width = 0;
  for (const Json& tensor : inspection.at("tensors")) width = std::max(width, tensor.at("name").get<std::string>().size());
  const Json grids = inspection.value("grids", none);
  for (const Json& tensor : inspection.at("tensors")) {
    const std::string name = tensor.at("name");
    out += "  " + name + std::string(width - name.size() + 2, ' ');
    if (tensor.contains("type")) out += str(tensor.at("type").get<std::string>(), "  ", inspect_shape(tensor.at("shape").get<std::vector<std::int64_t>>()), "  ", human_bytes(tensor.at("bytes").get<double>()));
    else out += str(tensor.at("rows").get<std::int64_t>(), " rows");
    if (const std::string owner = ends_with(name, ".codes") ? name.substr(0, name.size() - 6) : ""; grids.contains(owner)) out += "  " + grids.at(owner).get<std::string>();
    out += "\n";
  }
  return out;
}

}  // namespace kompakt
