// Reading maps the file and checks every number of the header before a span is made; writing is a pure function of its input.
#include "formats/safetensors.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <set>

#include "core/error.h"
#include "core/files.h"
#include "core/json.h"
#include "core/text.h"
#include "formats/safetensors_header.h"

namespace kompakt {
namespace fs = std::filesystem;
namespace {

constexpr std::uint64_t max_header_bytes = 100'000'000;  // the limit of the reference reader
constexpr const char* single_name = "model.safetensors";
constexpr const char* index_name = "model.safetensors.index.json";

struct Shard {
  std::vector<TensorData> tensors;  // sorted by name
  std::map<std::string, std::string> metadata;
};

std::string safetensors_place(const fs::path& path, const std::string& tensor) { return str(path.string(), ": tensor \"", tensor, "\""); }

std::vector<std::string> safetensors_dtype_names() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(DType::boolean); ++i) names.emplace_back(name_of(static_cast<DType>(i)));
  return names;
}

// Offsets must tile the data section exactly: no hole, no overlap, nothing before, between or after.
void check_tiling(const std::vector<SafetensorsEntry>& entries, std::int64_t data_size, const fs::path& path) {
  std::vector<const SafetensorsEntry*> order;
  for (const auto& entry : entries) order.push_back(&entry);
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) { return std::tie(a->begin, a->end, a->name) < std::tie(b->begin, b->end, b->name); });
  std::int64_t reached = 0;
  for (const auto* entry : order) {
    if (entry->begin < reached)
      throw Error(str("the data overlaps the tensor before it: begins at ", entry->begin, ", which the other one holds up to ", reached)).at(safetensors_place(path, entry->name));
    if (entry->begin > reached) throw Error(str("there is a hole of ", entry->begin - reached, " bytes before the tensor")).at(safetensors_place(path, entry->name)).hint("the file is damaged");
    reached = entry->end;
  }
  if (reached < data_size)
    throw Error(str(data_size - reached, " bytes follow the last tensor")).at(path.string()).allowed("a file that ends with its last tensor").hint("the file is damaged, or not complete in its header");
}

TensorData checked_tensor(const SafetensorsEntry& entry, std::span<const std::byte> data, const std::shared_ptr<const MappedFile>& map) {
  const std::string place = safetensors_place(map->path(), entry.name);
  const auto dtype = dtype_from_name(entry.dtype);
  if (!dtype) {
    const auto names = safetensors_dtype_names();
    throw Error(str("unknown dtype", did_you_mean(entry.dtype, names))).at(place).given(entry.dtype).allowed(join(names, ", "));
  }
  if (entry.end < entry.begin) throw Error("the data offsets are reversed").at(place).given(str("[", entry.begin, ", ", entry.end, "]"));
  if (static_cast<std::uint64_t>(entry.end) > data.size())
    throw Error(str("the data ends at byte ", entry.end, " but the file has only ", data.size(), " bytes of data")).at(place).hint("the file is cut short: download or copy it again");
  std::int64_t bytes = 0;
  const auto count = checked_product(entry.shape);
  if (!count || __builtin_mul_overflow(*count, static_cast<std::int64_t>(size_of(*dtype)), &bytes))
    throw Error("the size of the tensor overflows").at(place).given(shape_text(entry.shape)).allowed("fewer than 2^63 bytes");
  if (bytes != entry.end - entry.begin)
    throw Error(str("shape and data differ: ", shape_text(entry.shape), " of ", entry.dtype, " needs ", bytes, " bytes, the offsets give ", entry.end - entry.begin)).at(place);
  return {entry.name, *dtype, entry.shape, data.subspan(static_cast<std::size_t>(entry.begin), static_cast<std::size_t>(bytes)), map};
}

Shard open_shard(const fs::path& path) {
  const auto map = std::make_shared<const MappedFile>(path);
  const auto bytes = map->bytes();
  if (bytes.size() < 8) throw Error(str("the file has only ", bytes.size(), " bytes: too short for a safetensors file")).at(path.string()).hint("the file is cut short: download or copy it again");
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  if (length > max_header_bytes) throw Error(str("the header length is too large")).at(path.string()).given(str(length)).allowed(str("at most ", max_header_bytes)).hint("this is not a safetensors file");
  if (length > bytes.size() - 8) throw Error(str("the header of ", length, " bytes does not fit into the file of ", bytes.size(), " bytes")).at(path.string()).hint("the file is cut short: download or copy it again");
  const std::string_view text = map->text().substr(8, length);
  if (text.empty() || text.front() != '{') throw Error("the header does not begin with '{'").at(path.string()).hint("this is not a safetensors file");
  SafetensorsHeader header = parse_safetensors_header(text, path.string());
  const auto data = bytes.subspan(8 + length);
  Shard shard;
  shard.metadata = std::move(header.metadata);
  for (const auto& entry : header.entries) shard.tensors.push_back(checked_tensor(entry, data, map));
  check_tiling(header.entries, static_cast<std::int64_t>(data.size()), path);
  std::sort(shard.tensors.begin(), shard.tensors.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  return shard;
}

// The index names the shard of each tensor; both directions are checked.
std::map<std::string, std::set<std::string>> read_index(const fs::path& path) {
  const Json json = read_json(path);
  if (!json.is_object() || !json.contains("weight_map") || !json.at("weight_map").is_object())
    throw Error("the index has no \"weight_map\" object").at(path.string()).hint("the file must be written by save_pretrained or by kompakt");
  std::map<std::string, std::set<std::string>> shards;
  for (const auto& [tensor, file] : json.at("weight_map").items()) {
    if (!file.is_string()) throw Error("the shard of the tensor is not a file name").at(safetensors_place(path, tensor)).given(file.dump(-1, ' ', false, Json::error_handler_t::replace));
    const std::string name = file.get<std::string>();
    // The index is untrusted: a shard is a plain file beside it and nothing else.
    if (name.empty() || name == "." || name == ".." || name.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos)
      throw Error("the shard must be a plain file name").at(safetensors_place(path, tensor)).given(name);
    shards[name].insert(tensor);
  }
  return shards;
}

void check_shard_against_index(const Shard& shard, const fs::path& file, const std::set<std::string>& expected, const std::map<std::string, std::set<std::string>>& index) {
  std::set<std::string> present;
  for (const auto& tensor : shard.tensors) {
    present.insert(tensor.name);
    if (expected.count(tensor.name)) continue;
    for (const auto& [other, names] : index)
      if (names.count(tensor.name)) throw Error(str("the tensor lies in this shard, the index says ", other)).at(safetensors_place(file, tensor.name)).hint("a tensor in two shards would be ambiguous: write the model again");
    throw Error("the tensor is missing in the index").at(safetensors_place(file, tensor.name)).hint("the index belongs to another version of the model");
  }
  for (const auto& name : expected)
    if (!present.count(name)) throw Error("the index promises a tensor that the shard does not hold").at(safetensors_place(file, name)).hint("the index belongs to another version of the model");
}

fs::path file_of_folder(const fs::path& folder) {
  const bool single = fs::exists(folder / single_name), sharded = fs::exists(folder / index_name);
  if (single && sharded) throw Error(str("the folder has both ", single_name, " and ", index_name)).at(folder.string()).hint("remove the one that is out of date");
  if (single) return folder / single_name;
  if (sharded) return folder / index_name;
  throw Error(str("the folder has neither ", single_name, " nor ", index_name))
      .at(folder.string())
      .hint(fs::exists(folder / "pytorch_model.bin") ? "convert pytorch_model.bin to safetensors first (save_pretrained does)" : "give a folder of a Hugging Face checkpoint, or a .safetensors file");
}

std::vector<TensorData> in_file_order(std::vector<TensorData> tensors, const fs::path& place) {
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorData& tensor = tensors[i];
    if (i && tensors[i - 1].name == tensor.name) throw Error("two tensors with the same name cannot be written").at(safetensors_place(place, tensor.name));
    if (tensor.name == "__metadata__") throw Error("the name is reserved by the format").at(safetensors_place(place, tensor.name));
    if (invalid_utf8(tensor.name)) throw Error("the name is not valid UTF-8").at(safetensors_place(place, tensor.name));
    if (static_cast<std::size_t>(tensor.elements()) * size_of(tensor.dtype) != tensor.bytes.size())
      throw std::logic_error("write_safetensors: bytes do not match the shape of \"" + tensor.name + "\"");
  }
  std::stable_sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) { return size_of(a.dtype) > size_of(b.dtype); });
  return tensors;
}

void write_ordered(const fs::path& path, std::vector<TensorData> tensors, const std::map<std::string, std::string>& metadata) {
  for (const auto& [key, value] : metadata)
    if (invalid_utf8(key) || invalid_utf8(value)) throw Error(str("the metadata \"", key, "\" is not valid UTF-8")).at(path.string());
  const std::string header = write_safetensors_header(tensors, metadata);
  if (header.size() > max_header_bytes) throw Error("the header would be too large").at(path.string()).given(str(header.size(), " bytes")).allowed(str("at most ", max_header_bytes));
  AtomicFile file(path);
  const std::uint64_t length = header.size();
  file.write(std::as_bytes(std::span(&length, 1)));
  file.write(header);
  for (auto& tensor : tensors) {
    file.write(tensor.bytes);
    tensor.owner.reset();  // written: its memory may go
  }
  file.commit();
}

}  // namespace

SafetensorsFile SafetensorsFile::open(const fs::path& file_or_folder) {
  const fs::path path = fs::is_directory(file_or_folder) ? file_of_folder(file_or_folder) : file_or_folder;
  SafetensorsFile result;
  if (path.extension() != ".json") {
    Shard shard = open_shard(path);
    result.tensors_ = std::move(shard.tensors);
    result.metadata_ = std::move(shard.metadata);
    return result;
  }
  const auto index = read_index(path);
  for (const auto& [name, expected] : index) {
    const fs::path file = path.parent_path() / name;
    Shard shard = open_shard(file);
    check_shard_against_index(shard, file, expected, index);
    for (auto& tensor : shard.tensors) result.tensors_.push_back(std::move(tensor));
    for (const auto& [key, value] : shard.metadata) {
      const auto [at, fresh] = result.metadata_.emplace(key, value);
      if (!fresh && at->second != value) throw Error(str("the metadata \"", key, "\" differs between the shards")).at(file.string()).given(value).allowed(at->second);
    }
  }
  std::sort(result.tensors_.begin(), result.tensors_.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  return result;
}

const TensorData* SafetensorsFile::find(const std::string& name) const {
  const auto at = std::lower_bound(tensors_.begin(), tensors_.end(), name, [](const TensorData& tensor, const std::string& wanted) { return tensor.name < wanted; });
  return at != tensors_.end() && at->name == name ? &*at : nullptr;
}

void write_safetensors(const fs::path& file, std::vector<TensorData> tensors, const std::map<std::string, std::string>& metadata) {
  write_ordered(file, in_file_order(std::move(tensors), file), metadata);
}

std::int64_t safetensors_file_bytes(std::vector<TensorData> tensors, const std::map<std::string, std::string>& metadata) {
  tensors = in_file_order(std::move(tensors), {});
  std::int64_t size = static_cast<std::int64_t>(sizeof(std::uint64_t) + write_safetensors_header(tensors, metadata).size());
  for (const TensorData& tensor : tensors) size += static_cast<std::int64_t>(tensor.bytes.size());
  return size;
}

void write_safetensors_sharded(const fs::path& folder, std::vector<TensorData> tensors, std::int64_t shard_bytes, const std::map<std::string, std::string>& metadata) {
  if (shard_bytes <= 0) throw Error("the size of a shard must be positive").at(folder.string()).given(str(shard_bytes));
  make_folder(folder);
  tensors = in_file_order(std::move(tensors), folder);
  // Shards are filled in order of the names, as layers lie beside each other then; one tensor larger than a shard gets its own.
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  std::vector<std::vector<TensorData>> shards(1);
  std::int64_t filled = 0, total = 0;
  for (auto& tensor : tensors) {
    const auto size = static_cast<std::int64_t>(tensor.bytes.size());
    if (!shards.back().empty() && size > shard_bytes - filled) {
      shards.emplace_back();
      filled = 0;
    }
    filled += size;
    total += size;
    shards.back().push_back(std::move(tensor));
  }
  if (shards.size() == 1) {
    write_ordered(folder / single_name, in_file_order(std::move(shards[0]), folder), metadata);
    return;
  }
  std::map<std::string, std::string> shard_of;
  for (std::size_t i = 0; i < shards.size(); ++i) {
    char name[64];
    std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", i + 1, shards.size());
    for (const auto& tensor : shards[i]) shard_of[tensor.name] = name;
    write_ordered(folder / name, in_file_order(std::move(shards[i]), folder), metadata);
  }
  Json index = Json::object();
  index["metadata"]["total_size"] = total;
  index["weight_map"] = nlohmann::json(shard_of);
  write_json(folder / index_name, index);
}

}  // namespace kompakt
