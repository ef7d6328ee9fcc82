// The reader maps the file and checks every count and offset before it makes a span; typed access to the metadata.
#include "formats/gguf.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <unordered_set>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"
#include "formats/gguf_value.h"

namespace kompakt {
namespace fs = std::filesystem;
namespace {

// Longer than ggml's own 63, as forks are built with 127; the writer keeps to 63.
constexpr std::size_t max_tensor_name = 127, max_key = 65535;

// Types of ggml that have no row here, so that the message can call them by name.
struct ForeignType {
  std::uint32_t id;
  const char* name;
};
constexpr ForeignType foreign_types[] = {{4, "Q4_2"}, {5, "Q4_3"}, {9, "Q8_1"}, {15, "Q8_K"}, {16, "IQ2_XXS"}, {17, "IQ2_XS"}, {18, "IQ3_XXS"}, {19, "IQ1_S"}, {21, "IQ3_S"}, {22, "IQ2_S"}, {29, "IQ1_M"}, {40, "NVFP4"}, {41, "Q1_0"}};

struct TensorPlan {
  GgufTensor tensor;
  std::uint64_t offset = 0, bytes = 0;
};

std::string gguf_place(const fs::path& path, const char* kind, const std::string& name) { return str(path.string(), ": ", kind, " \"", name, "\""); }

Error unknown_type(std::uint32_t id, const std::string& place) {
  std::vector<std::string> names;
  for (const GgmlType& type : ggml_types()) names.emplace_back(type.name);
  std::string given = str(id);
  for (const ForeignType& foreign : foreign_types)
    if (foreign.id == id) given = str(id, " (", foreign.name, ")");
  return Error("the tensor has a type that cannot be decoded").at(place).given(given).allowed(join(names, ", ")).hint("quantize the model again to one of these types");
}

std::uint64_t rounded_up(std::uint64_t value, std::uint64_t alignment) { return value + (alignment - value % alignment) % alignment; }

std::uint32_t read_version(GgufCursor& cursor) {
  const auto magic = cursor.take(4, "the magic number");
  if (std::memcmp(magic.data(), "GGUF", 4) != 0) throw Error("the file does not begin with \"GGUF\"").at(cursor.place()).hint("this is not a GGUF file");
  const std::uint32_t version = cursor.u32("the version");
  if (version == 0x02000000 || version == 0x03000000) throw Error("the GGUF file is big-endian").at(cursor.place()).hint("convert it with gguf-py's gguf_convert_endian");
  if (version != 2 && version != 3) throw Error("unknown GGUF version").at(cursor.place()).given(str(version)).allowed("2, 3").hint(version == 1 ? "convert the model again with a newer llama.cpp" : "the file is damaged, or made by a newer program");
  return version;
}

TensorPlan read_tensor_info(GgufCursor& cursor, const fs::path& path, std::uint64_t number) {
  TensorPlan plan;
  GgufTensor& tensor = plan.tensor;
  cursor.place(str(path.string(), ": tensor number ", number));
  tensor.name = cursor.text("a tensor's name");
  if (invalid_utf8(tensor.name)) throw Error("the tensor's name is not valid UTF-8").at(cursor.place()).hint("the file is damaged");
  if (tensor.name.empty() || tensor.name.size() > max_tensor_name) throw Error(str("the tensor's name has ", tensor.name.size(), " bytes")).at(cursor.place()).allowed(str("1 to ", max_tensor_name));
  cursor.place(gguf_place(path, "tensor", tensor.name));
  const std::uint32_t rank = cursor.u32("the number of dimensions");
  if (rank > gguf_max_rank) throw Error("the tensor has too many dimensions").at(cursor.place()).given(str(rank)).allowed(str("at most ", gguf_max_rank));
  for (std::uint32_t i = 0; i < rank; ++i) {
    const std::uint64_t size = cursor.u64("a dimension");
    if (size == 0 || size > INT64_MAX) throw Error("a dimension of the tensor is out of range").at(cursor.place()).given(str(size)).allowed("1 to 2^63 - 1");
    tensor.shape.push_back(static_cast<std::int64_t>(size));
  }
  std::reverse(tensor.shape.begin(), tensor.shape.end());
  const std::uint32_t id = cursor.u32("the type");
  tensor.type = find_ggml_type(id);
  if (!tensor.type) throw unknown_type(id, cursor.place());
  plan.offset = cursor.u64("the offset");
  const std::int64_t row = tensor.shape.empty() ? 1 : tensor.shape.back();
  if (row % tensor.type->block != 0) throw Error(str("rows of ", row, " values do not divide into blocks of ", tensor.type->name)).at(cursor.place()).given(shape_text(tensor.shape)).allowed(str("a multiple of ", tensor.type->block));
  const auto rows = tensor.shape.empty() ? std::optional<std::int64_t>(1) : checked_product(std::span(tensor.shape).first(tensor.shape.size() - 1));
  const auto bytes = rows ? ggml_tensor_bytes(*tensor.type, row, *rows) : std::nullopt;
  // The number of elements must fit as well: it is larger than that of bytes for types below 8 bits.
  if (!bytes || !checked_product(tensor.shape)) throw Error("the size of the tensor overflows").at(cursor.place()).given(shape_text(tensor.shape)).allowed("fewer than 2^63 elements");
  plan.bytes = static_cast<std::uint64_t>(*bytes);
  return plan;
}

// Tensors must tile the data section with nothing but the padding between them; their order is free.
void place_tensors(std::vector<TensorPlan>& plans, std::span<const std::byte> data, std::uint64_t alignment, const fs::path& path) {
  std::vector<const TensorPlan*> order;
  for (auto& plan : plans) {
    const std::string place = gguf_place(path, "tensor", plan.tensor.name);
    if (plan.offset % alignment != 0) throw Error("the tensor's offset is not aligned").at(place).given(str(plan.offset)).allowed(str("a multiple of ", alignment));
    if (plan.offset > data.size() || plan.bytes > data.size() - plan.offset)
      throw Error(str("the tensor's data goes past the end of the file: offset ", plan.offset, ", ", plan.bytes, " bytes, the data section has ", data.size())).at(place).hint("the file is cut short: download or copy it again");
    plan.tensor.bytes = data.subspan(static_cast<std::size_t>(plan.offset), static_cast<std::size_t>(plan.bytes));
    order.push_back(&plan);
  }
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) { return a->offset < b->offset; });
  std::uint64_t reached = 0;
  for (const auto* plan : order) {
    const std::string place = gguf_place(path, "tensor", plan->tensor.name);
    if (plan->offset < reached) throw Error(str("the tensor's data overlaps another tensor: offset ", plan->offset, ", already used up to ", reached)).at(place).hint("the file is damaged");
    if (plan->offset > reached) throw Error(str("there is a hole of ", plan->offset - reached, " bytes before the tensor")).at(place).hint("the file is damaged");
    reached = rounded_up(plan->offset + plan->bytes, alignment);
  }
  // The padding after the last tensor may be missing.
  if (data.size() > reached) throw Error(str(data.size() - reached, " bytes follow the last tensor")).at(path.string()).hint("the file is damaged");
}

std::uint64_t alignment_of(const GgufFile& file) {
  const GgufValue* value = file.get("general.alignment");
  if (!value) return gguf_default_alignment;
  const std::string place = gguf_place(file.path(), "key", "general.alignment");
  if (value->type != GgufValue::Type::u32) throw Error("the key has the wrong type").at(place).given(gguf_type_name(*value)).allowed("u32");
  const std::uint64_t alignment = std::get<std::uint64_t>(value->data);
  if (alignment == 0 || (alignment & (alignment - 1)) != 0) throw Error("the alignment is not a power of two").at(place).given(str(alignment));
  return alignment;
}

[[noreturn]] void refuse_value(const fs::path& path, const std::string& key, const GgufValue& value, const char* needed) {
  throw Error("the key has the wrong type").at(gguf_place(path, "key", key)).given(gguf_type_name(value)).allowed(needed);
}

const GgufValue& gguf_required(const GgufFile& file, const std::string& key) {
  if (const GgufValue* value = file.get(key)) return *value;
  std::vector<std::string> keys;
  for (const auto& entry : file.metadata()) keys.push_back(entry.first);
  throw Error(str("the key is missing", did_you_mean(key, keys))).at(gguf_place(file.path(), "key", key)).hint("convert the model again; its metadata is not complete");
}

}  // namespace

std::int64_t GgufTensor::elements() const {
  const auto product = checked_product(shape);
  if (!product) throw std::logic_error("GGUF tensor \"" + name + "\" has the impossible shape " + shape_text(shape));
  return *product;
}

std::vector<float> to_float32(const GgufTensor& tensor) {
  const std::int64_t count = tensor.elements(), row = tensor.shape.empty() ? 1 : tensor.shape.back();
  const GgmlType& type = *tensor.type;
  const auto bytes = ggml_tensor_bytes(type, row, row == 0 ? 0 : count / row);
  if (!bytes || static_cast<std::size_t>(*bytes) != tensor.bytes.size()) throw std::logic_error("GGUF tensor \"" + tensor.name + "\" has bytes that do not match its shape");
  std::vector<float> values(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count / type.block; ++i) type.decode(tensor.bytes.data() + i * type.bytes, values.data() + i * type.block);
  return values;
}

GgufFile GgufFile::open(const fs::path& path) {
  const auto map = std::make_shared<const MappedFile>(path);
  GgufFile file;
  file.path_ = path;
  GgufCursor cursor(map->bytes(), path.string());
  read_version(cursor);
  const std::uint64_t tensor_count = cursor.u64("the number of tensors"), key_count = cursor.u64("the number of keys");
  // The least bytes of a key (empty name) and of a tensor (no dimensions): a count beyond them is a lie, told before any allocation.
  if (key_count > cursor.left() / 13) throw Error("the number of keys is larger than the file can hold").at(path.string()).given(str(key_count)).hint("the file is damaged");
  if (tensor_count > cursor.left() / 24) throw Error("the number of tensors is larger than the file can hold").at(path.string()).given(str(tensor_count)).hint("the file is damaged");
  std::unordered_set<std::string> seen;
  for (std::uint64_t i = 0; i < key_count; ++i) {
    cursor.place(str(path.string(), ": key number ", i));
    std::string key = cursor.text("a key");
    if (invalid_utf8(key)) throw Error("the key is not valid UTF-8").at(cursor.place()).hint("the file is damaged");
    if (key.empty() || key.size() > max_key) throw Error(str("the key has ", key.size(), " bytes")).at(cursor.place()).allowed(str("1 to ", max_key));
    cursor.place(gguf_place(path, "key", key));
    if (!seen.insert(key).second) throw Error("the key appears twice").at(cursor.place());
    GgufValue value = read_gguf_value(cursor);
    file.metadata_.emplace_back(std::move(key), std::move(value));
  }
  const std::uint64_t alignment = alignment_of(file);
  std::vector<TensorPlan> plans;
  seen.clear();
  for (std::uint64_t i = 0; i < tensor_count; ++i) {
    plans.push_back(read_tensor_info(cursor, path, i));
    if (!seen.insert(plans.back().tensor.name).second) throw Error("the tensor appears twice").at(gguf_place(path, "tensor", plans.back().tensor.name));
  }
  const std::uint64_t start = rounded_up(cursor.position(), alignment);
  // A file without tensors may end right after its metadata.
  const auto data = start <= map->bytes().size() ? map->bytes().subspan(static_cast<std::size_t>(start)) : std::span<const std::byte>();
  place_tensors(plans, data, alignment, path);
  for (auto& plan : plans) {
    plan.tensor.owner = map;
    file.tensors_.push_back(std::move(plan.tensor));
  }
  return file;
}

const GgufTensor* GgufFile::find(const std::string& name) const {
  const auto at = std::find_if(tensors_.begin(), tensors_.end(), [&](const GgufTensor& tensor) { return tensor.name == name; });
  return at == tensors_.end() ? nullptr : &*at;
}

const GgufValue* GgufFile::get(const std::string& key) const {
  const auto at = std::find_if(metadata_.begin(), metadata_.end(), [&](const auto& entry) { return entry.first == key; });
  return at == metadata_.end() ? nullptr : &at->second;
}

std::int64_t GgufFile::integer(const std::string& key) const {
  const GgufValue& value = gguf_required(*this, key);
  if (const auto* whole = std::get_if<std::int64_t>(&value.data)) return *whole;
  if (const auto* whole = std::get_if<std::uint64_t>(&value.data); whole && *whole <= INT64_MAX) return static_cast<std::int64_t>(*whole);
  refuse_value(path_, key, value, "a whole number below 2^63");
}

std::int64_t GgufFile::integer_or(const std::string& key, std::int64_t fallback) const { return get(key) ? integer(key) : fallback; }

double GgufFile::number_or(const std::string& key, double fallback) const {
  const GgufValue* value = get(key);
  if (!value) return fallback;
  if (const auto* real = std::get_if<double>(&value->data)) return *real;
  if (const auto* whole = std::get_if<std::int64_t>(&value->data)) return static_cast<double>(*whole);
  if (const auto* whole = std::get_if<std::uint64_t>(&value->data)) return static_cast<double>(*whole);
  refuse_value(path_, key, *value, "a number");
}

std::string GgufFile::text(const std::string& key) const {
  const GgufValue& value = gguf_required(*this, key);
  const auto* text = std::get_if<std::string>(&value.data);
  if (!text) refuse_value(path_, key, value, "string");
  if (invalid_utf8(*text)) throw Error("the text is not valid UTF-8").at(gguf_place(path_, "key", key)).hint("the file is damaged");
  return *text;
}

std::string GgufFile::text_or(const std::string& key, const std::string& fallback) const { return get(key) ? text(key) : fallback; }

bool GgufFile::flag_or(const std::string& key, bool fallback) const {
  const GgufValue* value = get(key);
  if (!value) return fallback;
  if (const auto* truth = std::get_if<bool>(&value->data)) return *truth;
  refuse_value(path_, key, *value, "bool");
}

}  // namespace kompakt
