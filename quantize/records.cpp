#include "quantize/records.h"

#include <ATen/ATen.h>

#include <cstdio>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"
#include "quantize/tensors.h"
#include "train/mask.h"

namespace kompakt {
namespace {

constexpr const char* records_state = "state.safetensors";
constexpr std::chrono::seconds records_interval(30);

// Norms and biases of a block: all that a method may change beside the matrices.
NamedTensors records_vectors(Transformer& model, std::int64_t layer) {
  NamedTensors out;
  for (const NamedParameter& parameter : block_parameters(model.blocks[static_cast<std::size_t>(layer)]))
    if (parameter.value->dim() == 1) out.emplace_back(parameter.name, *parameter.value);
  return out;
}

}  // namespace

BlockRecords::BlockRecords(const StageContext& context, Json identity) : work_(context.work), resume_(context.resume), identity_(std::move(identity)) {}

std::filesystem::path BlockRecords::block_folder(std::int64_t layer) const {
  char name[32];
  std::snprintf(name, sizeof name, "block-%04d", static_cast<int>(layer));
  return work_ / name;
}

std::filesystem::path BlockRecords::activation_file() const { return work_ / "activations.safetensors"; }

std::optional<BlockRecords::Record> BlockRecords::load(std::int64_t layer, Transformer& model) const {
  if (work_.empty() || !resume_ || !std::filesystem::exists(block_folder(layer))) return std::nullopt;
  const std::filesystem::path file = block_folder(layer) / records_state;
  const Json saved = read_state_json(file);
  if (saved.is_null()) throw Error("the record of a block is not complete").at(block_folder(layer).string()).hint("start the stage without --resume");
  check_identity(saved.at("identity"), identity_, file);
  load_state(file, records_vectors(model, layer));
  return Record{load_quantized(block_folder(layer)), saved.at("layers"), load_masks(block_folder(layer))};
}

void BlockRecords::save(std::int64_t layer, Transformer& model, const QuantizedModel& quantized, const Json& layers, const WeightMasks& masks) const {
  if (work_.empty()) return;
  AtomicFolder folder(block_folder(layer));
  save_quantized(quantized, folder.path());
  save_masks(masks, folder.path());
  save_state(folder.path() / records_state, records_vectors(model, layer), Json{{"identity", identity_}, {"layers", layers}});
  folder.commit();
}

std::int64_t BlockRecords::load_activations(SequentialCalibration& calibration) const {
  if (work_.empty() || !resume_ || !std::filesystem::exists(activation_file())) return 0;
  const Json saved = read_state_json(activation_file());
  check_identity(saved.at("identity"), identity_, activation_file());
  const std::int64_t layer = saved.at("layer").get<std::int64_t>();
  if (layer > 0 && !std::filesystem::exists(block_folder(layer - 1))) return 0;  // made for a block whose record is gone
  NamedTensors values = calibration.activations();
  load_state(activation_file(), values);
  calibration.set_activations(values);
  return layer;
}

void BlockRecords::save_activations(std::int64_t layer, const SequentialCalibration& calibration) {
  if (work_.empty() || std::chrono::steady_clock::now() - saved_ < records_interval) return;
  save_state(activation_file(), calibration.activations(), Json{{"identity", identity_}, {"layer", layer}});
  saved_ = std::chrono::steady_clock::now();
}

}  // namespace kompakt
