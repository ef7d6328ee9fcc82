// Writing GGUF version 3: header, metadata, tensor infos, padding, data. A pure function of its input.
#include <algorithm>
#include <stdexcept>
#include <unordered_set>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"
#include "formats/gguf.h"
#include "formats/gguf_value.h"

namespace kompakt {
namespace {

constexpr std::size_t ggml_max_name = 63;  // llama.cpp refuses longer tensor names

Error unwritable(const std::filesystem::path& path, const char* kind, const std::string& name, const std::string& why) {
  return Error(why).at(str(path.string(), ": ", kind, " \"", name, "\""));
}

std::uint64_t write_alignment(const std::filesystem::path& path, const std::vector<std::pair<std::string, GgufValue>>& metadata) {
  for (const auto& [key, value] : metadata) {
    if (key != "general.alignment") continue;
    const auto* alignment = std::get_if<std::uint64_t>(&value.data);
    if (value.type != GgufValue::Type::u32 || !alignment || *alignment == 0 || (*alignment & (*alignment - 1)) != 0)
      throw unwritable(path, "key", key, "the alignment must be a u32 and a power of two");
    return *alignment;
  }
  return gguf_default_alignment;
}

void check_names(const std::filesystem::path& path, const std::vector<std::pair<std::string, GgufValue>>& metadata, const std::vector<GgufTensor>& tensors) {
  std::unordered_set<std::string> seen;
  for (const auto& [key, value] : metadata) {
    if (key.empty() || key.size() > 65535 || invalid_utf8(key)) throw unwritable(path, "key", key, "the key is empty, too long or not valid UTF-8");
    if (!seen.insert(key).second) throw unwritable(path, "key", key, "the key appears twice");
  }
  seen.clear();
  for (const GgufTensor& tensor : tensors) {
    if (tensor.name.empty() || tensor.name.size() > ggml_max_name || invalid_utf8(tensor.name))
      throw unwritable(path, "tensor", tensor.name, "the tensor's name is empty, not valid UTF-8 or too long").given(str(tensor.name.size(), " bytes")).allowed(str("1 to ", ggml_max_name, " bytes")).hint("shorten the names; llama.cpp refuses longer ones");
    if (!seen.insert(tensor.name).second) throw unwritable(path, "tensor", tensor.name, "two tensors with the same name cannot be written");
  }
}

void check_tensor(const GgufTensor& tensor, const std::filesystem::path& path) {
  if (!tensor.type) throw std::logic_error("write_gguf: tensor \"" + tensor.name + "\" has no type");
  if (tensor.shape.size() > gguf_max_rank) throw unwritable(path, "tensor", tensor.name, "the tensor has too many dimensions for GGUF").given(shape_text(tensor.shape)).allowed(str("at most ", gguf_max_rank));
  const std::int64_t count = tensor.elements(), row = tensor.shape.empty() ? 1 : tensor.shape.back();
  if (count == 0) throw unwritable(path, "tensor", tensor.name, "an empty tensor cannot be written to GGUF").given(shape_text(tensor.shape));
  if (row % tensor.type->block != 0)
    throw unwritable(path, "tensor", tensor.name, str("rows of ", row, " values do not divide into blocks of ", tensor.type->name)).allowed(str("a multiple of ", tensor.type->block)).hint("choose a type with a smaller block for this tensor");
  const auto bytes = ggml_tensor_bytes(*tensor.type, row, count / row);
  if (!bytes || static_cast<std::size_t>(*bytes) != tensor.bytes.size()) throw std::logic_error("write_gguf: bytes do not match type and shape of \"" + tensor.name + "\"");
}

std::size_t write_padding(std::uint64_t size, std::uint64_t alignment) { return static_cast<std::size_t>((alignment - size % alignment) % alignment); }

// Bytes that type and shape ask for.
std::uint64_t write_size(const GgufTensor& tensor) {
  const std::int64_t row = tensor.shape.empty() ? 1 : tensor.shape.back();
  return static_cast<std::uint64_t>(ggml_tensor_bytes(*tensor.type, row, tensor.elements() / row).value());
}

// Everything before the data of the first tensor.
std::string write_head(const std::vector<std::pair<std::string, GgufValue>>& metadata, const std::vector<GgufTensor>& tensors, std::uint64_t alignment) {
  std::string head = "GGUF";
  append_little_endian(head, std::uint32_t{3});
  append_little_endian(head, static_cast<std::uint64_t>(tensors.size()));
  append_little_endian(head, static_cast<std::uint64_t>(metadata.size()));
  for (const auto& [key, value] : metadata) {
    append_gguf_text(head, key);
    append_gguf_value(head, value);
  }
  std::uint64_t offset = 0;
  for (const GgufTensor& tensor : tensors) {
    append_gguf_text(head, tensor.name);
    append_little_endian(head, static_cast<std::uint32_t>(tensor.shape.size()));
    for (auto size = tensor.shape.rbegin(); size != tensor.shape.rend(); ++size) append_little_endian(head, *size);
    append_little_endian(head, tensor.type->id);
    append_little_endian(head, offset);
    offset += write_size(tensor) + write_padding(write_size(tensor), alignment);
  }
  head.append(write_padding(head.size(), alignment), '\0');
  return head;
}

}  // namespace

std::int64_t gguf_file_bytes(const std::vector<std::pair<std::string, GgufValue>>& metadata, const std::vector<GgufTensor>& tensors) {
  const std::uint64_t alignment = write_alignment({}, metadata);
  std::uint64_t size = write_head(metadata, tensors, alignment).size();
  for (const GgufTensor& tensor : tensors) size += write_size(tensor) + write_padding(write_size(tensor), alignment);
  return static_cast<std::int64_t>(size);
}

void write_gguf(const std::filesystem::path& path, const std::vector<std::pair<std::string, GgufValue>>& metadata, const std::vector<GgufTensor>& tensors) {
  check_names(path, metadata, tensors);
  for (const GgufTensor& tensor : tensors) check_tensor(tensor, path);
  const std::uint64_t alignment = write_alignment(path, metadata);
  AtomicFile file(path);
  file.write(write_head(metadata, tensors, alignment));
  for (const GgufTensor& tensor : tensors) {
    file.write(tensor.bytes);
    file.write(std::string(write_padding(tensor.bytes.size(), alignment), '\0'));
  }
  file.commit();
}

}  // namespace kompakt
