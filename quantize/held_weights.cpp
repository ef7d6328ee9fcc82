// A held matrix is one tensor in place of the float32 one: bfloat16 [N,K], or bytes [N,R] where a row holds its codes and behind them
// its scales as half floats, so that single rows of an embedding can be decoded. The transform of the layer gives the floats back.
#include "quantize/held_weights.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <map>

#include "core/error.h"
#include "core/text.h"
#include "model/checkpoint_source.h"
#include "quantize/grids.h"

namespace kompakt {
namespace {

constexpr std::array<HeldPrecision, 4> held_rows = {{
    {"float32", "as training has them", "", "", 0, false},
    {"bf16", "half of the memory; exact where the checkpoint is bfloat16", "", "", 0, true},
    {"int8", "a quarter; a scale for every row", "int8", "int8", 0, false},
    {"int4", "blocks in 4 bits with a scale for 64 columns, embedding and head as int8", "int4", "int8", 64, false},
}};

// What is needed to decode rows of a matrix of K columns.
struct HeldShape {
  GridSpec spec;
  std::int64_t columns;
  std::int64_t group() const { return spec.group_for(columns); }
  std::int64_t groups() const { return (columns + group() - 1) / group(); }
  bool nibbles() const { return spec.grid->code_max - spec.grid->code_min < 16; }
  std::int64_t padded() const {  // codes of a row, whole groups and whole bytes
    const std::int64_t whole = groups() * group();
    return whole + (nibbles() && whole % 2 ? 1 : 0);
  }
  std::int64_t code_bytes() const { return nibbles() ? padded() / 2 : padded(); }
  std::int64_t row_bytes() const { return (code_bytes() + 1) / 2 * 2 + 2 * groups(); }  // half floats stand at even places
};

// w float32 [N,K] -> uint8 [N,row_bytes]
at::Tensor held_encode(const HeldShape& shape, const at::Tensor& w) {
  const Quantized q = encode(shape.spec, w);
  const std::int64_t rows = w.size(0), lowest = shape.spec.grid->code_min;
  at::Tensor codes = at::constant_pad_nd(q.codes, {0, shape.padded() - shape.columns});
  if (shape.nibbles()) {
    const at::Tensor unsigned_codes = (codes - lowest).to(at::kByte).view({rows, -1, 2});
    codes = unsigned_codes.select(2, 0).bitwise_or(unsigned_codes.select(2, 1).bitwise_left_shift(4));
  } else {
    codes = codes.contiguous().view(at::kByte);
  }
  at::Tensor out = at::zeros({rows, shape.row_bytes()}, at::kByte);
  out.narrow(1, 0, shape.code_bytes()).copy_(codes);
  out.narrow(1, shape.row_bytes() - 2 * shape.groups(), 2 * shape.groups()).copy_(q.scales.to(at::kHalf).contiguous().view(at::kByte));
  return out;
}

// uint8 [n,row_bytes], any rows -> float32 [n,K]
at::Tensor held_decode(const HeldShape& shape, const at::Tensor& rows) {
  const std::int64_t count = rows.size(0), lowest = shape.spec.grid->code_min;
  const at::Tensor packed = rows.narrow(1, 0, shape.code_bytes());
  const at::Tensor scales = rows.narrow(1, shape.row_bytes() - 2 * shape.groups(), 2 * shape.groups()).contiguous().view(at::kHalf).to(at::kFloat).unsqueeze(2);  // [n,G,1]
  at::Tensor codes;
  if (shape.nibbles()) {
    codes = at::empty({count, shape.code_bytes(), 2}, rows.options().dtype(at::kFloat));
    codes.select(2, 0).copy_(packed.bitwise_and(15));
    codes.select(2, 1).copy_(packed.bitwise_right_shift(4));
    codes = codes.view({count, -1}).add_(static_cast<double>(lowest));
  } else {
    codes = packed.contiguous().view(at::kChar).to(at::kFloat);
  }
  at::Tensor out = codes.narrow(1, 0, shape.groups() * shape.group()).reshape({count, shape.groups(), shape.group()}).mul_(scales).view({count, -1});
  return shape.columns == out.size(1) ? out : out.narrow(1, 0, shape.columns).contiguous();
}

// One matrix of the model: where its values go, and the transform that gives them back.
struct HeldSlot {
  WeightTransform* transform;
  bool table;  // embedding or head
};

// By parameter name.
std::map<std::string, HeldSlot> held_slots(Transformer& model) {
  std::map<std::string, HeldSlot> out;
  for (Linear* linear : model.linears()) out[linear->name + ".weight"] = {&linear->transform, false};
  for (Linear* linear : {&model.lm_head, &model.pooler, &model.classifier})
    if (linear->weight.defined()) out[linear->name + ".weight"] = {&linear->transform, true};
  out[model.tokens.name + ".weight"] = {&model.tokens.transform, true};
  return out;
}

GridSpec held_spec(const HeldPrecision& precision, const HeldSlot& slot) {
  const std::string_view name = slot.table ? precision.tables : precision.linears;
  return {name.empty() ? nullptr : find_grid(name), slot.table ? 0 : precision.group};
}

// What stands in place of a float32 matrix.
at::Tensor held_value(const HeldPrecision& precision, const HeldSlot& slot, const at::Tensor& w) {
  const GridSpec spec = held_spec(precision, slot);
  if (!spec.grid) return precision.halves ? w.to(at::kBFloat16) : w.clone();
  return held_encode({spec, w.size(1)}, w);
}

WeightTransform held_transform(const HeldPrecision& precision, const HeldSlot& slot, std::int64_t columns) {
  const GridSpec spec = held_spec(precision, slot);
  if (!spec.grid) {
    if (!precision.halves) return {};
    return [](const at::Tensor& weight) { return weight.to(at::kFloat); };
  }
  return [shape = HeldShape{spec, columns}](const at::Tensor& weight) { return held_decode(shape, weight); };
}

// Columns of the matrices, from a model of the same shape.
std::map<std::string, std::int64_t> held_columns(const Transformer& shapes) {
  std::map<std::string, std::int64_t> out;
  for (const auto& [name, value] : shapes.parameters())
    if (value.dim() == 2) out[name] = value.size(1);
  return out;
}

void held_install(Transformer& model, const HeldPrecision& precision, const std::map<std::string, std::int64_t>& columns) {
  for (auto& [name, slot] : held_slots(model)) *slot.transform = held_transform(precision, slot, columns.at(name));
  model.tokens.transform_by_row = static_cast<bool>(model.tokens.transform);
}

}  // namespace

std::span<const HeldPrecision> held_precisions() { return held_rows; }

std::vector<std::string> held_precision_names() {
  std::vector<std::string> names;
  for (const HeldPrecision& row : held_rows) names.emplace_back(row.name);
  return names;
}

const HeldPrecision& find_held_precision(std::string_view name) {
  const auto found = std::find_if(held_rows.begin(), held_rows.end(), [&](const HeldPrecision& row) { return row.name == name; });
  if (found == held_rows.end()) throw Error(str("weights are not held as \"", name, "\"", did_you_mean(std::string(name), held_precision_names()))).allowed(join(held_precision_names(), ", "));
  return *found;
}

std::int64_t held_bytes(const ModelConfig& config, const HeldPrecision& precision) {
  Transformer shapes(config, 0, c10::Device(c10::kMeta));
  const auto slots = held_slots(shapes);
  std::int64_t bytes = 0, decoded = 0;
  for (const auto& [name, value] : static_cast<const Transformer&>(shapes).parameters()) {
    const auto slot = slots.find(name);
    const GridSpec spec = slot == slots.end() ? GridSpec{} : held_spec(precision, slot->second);
    const bool held = slot != slots.end() && (spec.grid || precision.halves);
    if (!held) bytes += value.numel() * 4;
    else if (spec.grid) bytes += value.size(0) * HeldShape{spec, value.size(1)}.row_bytes();
    else bytes += value.numel() * 2;
    if (held) decoded = std::max(decoded, value.numel() * 4);
  }
  return bytes + decoded;
}

std::unique_ptr<Transformer> load_held_model(const std::filesystem::path& path, const HeldPrecision& precision) {
  auto [config, source] = open_checkpoint(path);
  Transformer shapes(config, 0, c10::Device(c10::kMeta));
  const auto slots = held_slots(shapes);
  auto model = build_from_source(std::move(config), source, c10::Device(c10::kCPU), [&](const std::string& name, const at::Tensor& value) {
    const auto slot = slots.find(name);
    return slot == slots.end() ? value.clone() : held_value(precision, slot->second, value);
  });
  held_install(*model, precision, held_columns(shapes));
  return model;
}

void hold_weights(Transformer& model, const HeldPrecision& precision) {
  const at::NoGradGuard no_grad;
  const auto columns = held_columns(model);
  const auto slots = held_slots(model);
  for (const NamedParameter& parameter : model.parameters())
    if (const auto slot = slots.find(parameter.name); slot != slots.end()) *parameter.value = held_value(precision, slot->second, parameter.value->detach());
  held_install(model, precision, columns);
}

}  // namespace kompakt
