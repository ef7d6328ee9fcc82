// quantization.safetensors of a stage folder: per matrix NAME.codes (packed bytes), NAME.scales (half) and, for grids with
// offsets, NAME.offsets (half) or NAME.zeros (a byte each); of super-blocks NAME.blocks, ggml's bytes; grid, group and shape in the metadata. Reading gives what was
// written, bit for bit.
#include <ATen/ATen.h>

#include <cstring>

#include "core/error.h"
#include "core/json.h"
#include "core/text.h"
#include "formats/safetensors.h"
#include "quantize/stage.h"

namespace kompakt {
namespace {

constexpr const char* quantized_file_name = "quantization.safetensors";

std::vector<std::byte> quantized_halves(const at::Tensor& values) {
  const at::Tensor halves = values.to(at::kCPU, at::kHalf).contiguous();
  if (!at::equal(halves.to(at::kFloat), values.to(at::kCPU, at::kFloat))) throw std::logic_error("a scale is not a half-precision value");
  std::vector<std::byte> bytes(static_cast<std::size_t>(halves.numel()) * 2);
  if (!bytes.empty()) std::memcpy(bytes.data(), halves.const_data_ptr(), bytes.size());
  return bytes;
}

at::Tensor quantized_zeros(const Quantized& q) {
  const at::Tensor safe = at::where(q.scales.eq(0), at::ones_like(q.scales), q.scales);
  return at::where(q.scales.eq(0), at::zeros_like(q.scales), (-q.offsets / safe).round());
}

const TensorData& quantized_tensor(const SafetensorsFile& file, const std::string& name, DType dtype, std::int64_t elements, const std::string& place) {
  const TensorData* found = file.find(name);
  if (!found) throw Error("tensor " + name + " is missing").at(place).hint("the file is damaged: run the quantize stage again");
  if (found->dtype != dtype || found->elements() != elements)
    throw Error(str("tensor ", name, " has ", found->elements(), " elements of type ", name_of(found->dtype))).at(place).allowed(str(elements, " of type ", name_of(dtype))).hint("the file is damaged: run the quantize stage again");
  return *found;
}

at::Tensor quantized_read_halves(const TensorData& data, std::int64_t rows, std::int64_t groups) {
  at::Tensor halves = at::empty({rows, groups}, at::kHalf);
  if (data.bytes.size() > 0) std::memcpy(halves.mutable_data_ptr(), data.bytes.data(), data.bytes.size());
  return halves.to(at::kFloat);
}

}  // namespace

bool has_quantized(const std::filesystem::path& folder) { return std::filesystem::exists(folder / quantized_file_name); }

void save_quantized(const QuantizedModel& quantized, const std::filesystem::path& folder) {
  std::vector<TensorData> tensors;
  Json table = Json::object();
  for (const auto& [name, q] : quantized.tensors) {
    const GridSpec& spec = quantized.plan.tensors.at(name);
    const std::int64_t rows = q.codes.size(0), columns = q.codes.size(1), groups = q.scales.size(1);
    table[name] = Json{{"grid", std::string(spec.grid->name)}, {"group", spec.group}, {"rows", rows}, {"columns", columns}};
    if (spec.grid->kquant) {
      tensors.push_back(make_tensor(name + ".blocks", DType::u8, {rows, spec.packed_bytes(1, columns)}, kquant_blocks(*spec.grid, q)));
      continue;
    }
    std::vector<std::byte> codes = spec.grid->pack(q.codes);
    const std::int64_t bytes = static_cast<std::int64_t>(codes.size());
    tensors.push_back(make_tensor(name + ".codes", DType::u8, {bytes}, std::move(codes)));
    tensors.push_back(make_tensor(name + ".scales", DType::f16, {rows, groups}, quantized_halves(q.scales)));
    if (q.offsets.defined() && spec.grid->integer_zero) {
      const at::Tensor zeros = quantized_zeros(q).to(at::kCPU, at::kByte).contiguous();
      if (!at::equal(-(zeros.to(at::kFloat) * q.scales.to(at::kCPU)), q.offsets.to(at::kCPU))) throw std::logic_error("an offset is not a multiple of its scale");
      std::vector<std::byte> raw(static_cast<std::size_t>(zeros.numel()));
      if (!raw.empty()) std::memcpy(raw.data(), zeros.const_data_ptr(), raw.size());
      tensors.push_back(make_tensor(name + ".zeros", DType::u8, {rows, groups}, std::move(raw)));
    } else if (q.offsets.defined()) {
      tensors.push_back(make_tensor(name + ".offsets", DType::f16, {rows, groups}, quantized_halves(q.offsets)));
    }
  }
  Json fallbacks = Json::array();
  for (const std::string& sentence : quantized.plan.fallbacks) fallbacks.push_back(sentence);
  write_safetensors(folder / quantized_file_name, std::move(tensors), {{"kompakt.grids", table.dump()}, {"kompakt.fallbacks", fallbacks.dump()}});
}

QuantizedModel load_quantized(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / quantized_file_name;
  const std::string place = path.string();
  const SafetensorsFile file = SafetensorsFile::open(path);
  const auto text = file.metadata().find("kompakt.grids");
  if (text == file.metadata().end()) throw Error("the file does not say which grids its tensors have").at(place).hint("it was not written by the quantize stage");
  QuantizedModel out;
  const Json table = parse_json(text->second, place);
  if (!table.is_object()) throw Error("the table of grids is not a map").at(place);
  for (const auto& [name, entry] : table.items()) {
    const std::string grid_name = json_get<std::string>(entry, "grid", place);
    const GridSpec spec{find_grid(grid_name), json_get<std::int64_t>(entry, "group", place)};
    if (!spec.grid) throw Error("tensor " + name + " has an unknown grid").at(place).given(grid_name).allowed(join(grid_names(), ", "));
    const std::int64_t rows = json_get<std::int64_t>(entry, "rows", place), columns = json_get<std::int64_t>(entry, "columns", place);
    constexpr std::int64_t limit = std::int64_t(1) << 31;
    if (rows < 0 || columns < 0 || rows > limit || columns > limit || spec.group < 0) throw Error("tensor " + name + " has an impossible shape").at(place);
    const std::int64_t groups = spec.scale_count(columns);
    Quantized q;
    out.plan.tensors[name] = spec;
    if (spec.grid->kquant) {
      const TensorData& blocks = quantized_tensor(file, name + ".blocks", DType::u8, spec.packed_bytes(rows, columns), place);
      try {
        out.tensors[name] = kquant_values(*spec.grid, blocks.bytes, rows, columns);
      } catch (Error& error) {
        throw error.at(place + ": " + name);
      }
      continue;
    }
    const TensorData& codes = quantized_tensor(file, name + ".codes", DType::u8, rows * spec.grid->layout.row_bytes(columns), place);
    q.codes = spec.grid->unpack(codes.bytes, rows, columns);
    q.scales = quantized_read_halves(quantized_tensor(file, name + ".scales", DType::f16, rows * groups, place), rows, groups);
    if (spec.grid->asymmetric && spec.grid->integer_zero) {
      const TensorData& data = quantized_tensor(file, name + ".zeros", DType::u8, rows * groups, place);
      at::Tensor zeros = at::empty({rows, groups}, at::kByte);
      if (!data.bytes.empty()) std::memcpy(zeros.mutable_data_ptr(), data.bytes.data(), data.bytes.size());
      q.offsets = -(zeros.to(at::kFloat) * q.scales);
    } else if (spec.grid->asymmetric) {
      q.offsets = quantized_read_halves(quantized_tensor(file, name + ".offsets", DType::f16, rows * groups, place), rows, groups);
    }
    out.tensors[name] = std::move(q);
  }
  if (const auto found = file.metadata().find("kompakt.fallbacks"); found != file.metadata().end())
    for (const auto& sentence : parse_json(found->second, place)) out.plan.fallbacks.push_back(sentence.get<std::string>());
  return out;
}

}  // namespace kompakt
