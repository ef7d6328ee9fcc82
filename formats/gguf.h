// GGUF v2/v3 reader (memory-mapped, strict) and v3 writer.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "formats/ggml_blocks.h"
#include "formats/tensor_data.h"

namespace kompakt {

// A metadata value; arrays are homogeneous. Integer types keep their width so that a rewrite gives the same bytes.
struct GgufValue {
  enum class Type : std::uint32_t { u8 = 0, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };
  Type type = Type::u32;
  Type element = Type::u32;  // for arrays
  std::variant<std::uint64_t, std::int64_t, double, bool, std::string, std::vector<std::int64_t>, std::vector<double>, std::vector<std::string>> data;

  static GgufValue uint32(std::uint32_t v);
  static GgufValue int32(std::int32_t v);
  static GgufValue uint64(std::uint64_t v);
  static GgufValue float32(float v);
  static GgufValue boolean_(bool v);
  static GgufValue text(std::string v);
  static GgufValue texts(std::vector<std::string> v);
  static GgufValue floats(std::vector<double> v);               // array of f32
  static GgufValue int32s(std::vector<std::int64_t> v);         // array of i32
};

struct GgufTensor {
  std::string name;
  const GgmlType* type = nullptr;
  std::vector<std::int64_t> shape;  // row-major order as everywhere in kompakt (the file's dims reversed): [rows, row]
  std::span<const std::byte> bytes;
  std::shared_ptr<const void> owner;
  std::int64_t elements() const;  // product of shape; 1 for a scalar
};

// "u32", "string", "array of f32": for messages and listings.
std::string gguf_type_name(const GgufValue& value);

// Dequantized to float32. `shape` product elements.
std::vector<float> to_float32(const GgufTensor& tensor);

class GgufFile {
 public:
  // Refuses bad magic, unknown version or type, counts that overflow, offsets that overlap, are unaligned or past the end,
  // duplicate names or keys, strings past the end. The Error names file and tensor or key.
  static GgufFile open(const std::filesystem::path& path);
  const std::vector<std::pair<std::string, GgufValue>>& metadata() const { return metadata_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }  // in the file's order
  const GgufTensor* find(const std::string& name) const;
  const GgufValue* get(const std::string& key) const;
  // Typed access; Error names the key, the type given and the type needed.
  std::int64_t integer(const std::string& key) const;
  std::int64_t integer_or(const std::string& key, std::int64_t fallback) const;
  double number_or(const std::string& key, double fallback) const;
  std::string text(const std::string& key) const;
  std::string text_or(const std::string& key, const std::string& fallback) const;
  bool flag_or(const std::string& key, bool fallback) const;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  std::vector<std::pair<std::string, GgufValue>> metadata_;
  std::vector<GgufTensor> tensors_;
};

// Writes tensors in the given order, data aligned to 32 or to the metadata's general.alignment. `bytes` of each tensor must
// match type and shape. Equal input, equal bytes; a file of version 3 in tensor order is reproduced byte for byte.
void write_gguf(const std::filesystem::path& path, const std::vector<std::pair<std::string, GgufValue>>& metadata, const std::vector<GgufTensor>& tensors);

// Size of the file that write_gguf would write; tensors need name, type and shape, no bytes.
std::int64_t gguf_file_bytes(const std::vector<std::pair<std::string, GgufValue>>& metadata, const std::vector<GgufTensor>& tensors);

}  // namespace kompakt
