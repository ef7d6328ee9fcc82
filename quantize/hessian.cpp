// Collection of second moments through taps. A pass stops as soon as the wanted input has been seen.
#include "quantize/hessian.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "core/error.h"
#include "core/hash.h"
#include "core/random.h"
#include "core/system.h"
#include "core/text.h"
#include "train/teacher.h"

namespace kompakt {
namespace {

struct HessianTapSeen {};  // leaves the forward pass early

class HessianTap final : public TapSink {
 public:
  explicit HessianTap(std::string name) : name_(std::move(name)) {}
  bool wants(const std::string& name) const override { return name == name_; }
  void put(const std::string&, const at::Tensor& value) override {
    value_ = value;
    throw HessianTapSeen{};
  }
  const at::Tensor& value() const { return value_; }

 private:
  std::string name_;
  at::Tensor value_;
};

constexpr std::int64_t hessian_batch_tokens = 4096;  // activations of one batch stay in the cache hierarchy and small in memory

void hessian_add(CalibrationSet& set, const TokenBatch& batch, Sha256& hash, c10::Device device) {
  const ModelInput input = to_input(batch, device);
  hash.update(std::as_bytes(std::span(batch.ids)));
  const std::int64_t tokens = batch.tokens();
  at::Tensor valid;
  if (tokens != batch.rows * batch.columns) {
    std::vector<std::int64_t> positions;
    for (std::int64_t r = 0; r < batch.rows; ++r)
      for (std::int64_t t = 0; t < batch.lengths[static_cast<std::size_t>(r)]; ++t) positions.push_back(r * batch.columns + t);
    valid = at::tensor(at::ArrayRef<std::int64_t>(positions), at::kLong).to(device);
  }
  set.inputs.push_back(input);
  set.valid.push_back(valid);
  set.sequences += batch.rows, set.tokens += tokens;
}

}  // namespace

CalibrationSet calibration_set(const StageContext& context, std::int64_t sequences) {
  CalibrationSet set;
  Sha256 hash;
  const TaskData* data = context.data;
  const bool text = data && data->kind == TaskData::Kind::text;
  if (!data || (text ? data->calibration.empty() : data->train.ids.empty()))
    throw Error("the quantization method needs calibration data and the run has none").at(context.title).hint(text || !data ? "name text files under data.calibration, or use method: rtn" : "name training examples under data.train, or use method: rtn");
  if (text) {
    const std::int64_t count = std::min<std::int64_t>(sequences, static_cast<std::int64_t>(data->calibration.size()));
    const std::int64_t length = static_cast<std::int64_t>(data->calibration.front().size());
    const std::int64_t rows = std::max<std::int64_t>(1, hessian_batch_tokens / std::max<std::int64_t>(1, length));
    for (std::int64_t first = 0; first < count; first += rows) {
      TokenBatch batch;
      batch.rows = std::min(rows, count - first), batch.columns = length;
      for (std::int64_t r = 0; r < batch.rows; ++r) {
        const auto& window = data->calibration[static_cast<std::size_t>(first + r)];
        if (static_cast<std::int64_t>(window.size()) != length) throw std::logic_error("calibration windows differ in length");
        batch.ids.insert(batch.ids.end(), window.begin(), window.end());
        batch.lengths.push_back(length);
        batch.examples.push_back(first + r);
      }
      hessian_add(set, batch, hash, context.device);
    }
  } else {
    const auto order = CounterRandom(context.seed, "calibration").permutation(static_cast<std::int64_t>(data->train.ids.size()));
    TokenizedExamples chosen;
    for (std::size_t i = 0; i < order.size() && static_cast<std::int64_t>(i) < sequences; ++i) {
      chosen.ids.push_back(data->train.ids[static_cast<std::size_t>(order[i])]);
      chosen.labels.push_back(data->train.labels[static_cast<std::size_t>(order[i])]);
    }
    const std::int64_t pad = data->tokenizer && data->tokenizer->special().pad >= 0 ? data->tokenizer->special().pad : 0;
    const ClassificationBatches batches(chosen, 64, 0, context.seed, pad);
    for (const TokenBatch& batch : batches.evaluation(64)) hessian_add(set, batch, hash, context.device);
  }
  set.hash = hash.hex();
  return set;
}

SequentialCalibration::SequentialCalibration(Transformer& model, const CalibrationSet& set, const at::Tensor& original_embedding) : model_(model), set_(set) {
  at::NoGradGuard no_grad;
  for (const ModelInput& input : set_.inputs) quantized_.push_back(model_.embed(input));
  if (!original_embedding.defined()) return;
  at::Tensor present = model_.tokens.weight;
  model_.tokens.weight = original_embedding;
  for (const ModelInput& input : set_.inputs) teacher_.push_back(model_.embed(input));
  model_.tokens.weight = present;
}

void SequentialCalibration::swap_weights(std::int64_t layer, std::map<std::string, at::Tensor>& weights) {
  Block& block = model_.blocks[static_cast<std::size_t>(layer)];
  for (Linear* linear : {&block.attention.query, &block.attention.key, &block.attention.value, &block.attention.output, &block.mlp.gate, &block.mlp.up, &block.mlp.down}) {
    const auto found = weights.find(linear->name);
    if (linear->weight.defined() && found != weights.end()) std::swap(linear->weight, found->second);
  }
}

at::Tensor SequentialCalibration::input_of(std::int64_t layer, const at::Tensor& x, std::size_t batch, const std::string& linear) const {
  HessianTap tap("input:" + linear);
  try {
    model_.block_forward(layer, x, set_.inputs[batch], &tap);
  } catch (const HessianTapSeen&) {
  }
  TORCH_CHECK(tap.value().defined(), "block ", layer, " has no input of ", linear);
  const at::Tensor flat = tap.value().reshape({-1, tap.value().size(-1)}).to(at::kFloat);
  return set_.valid[batch].defined() ? flat.index_select(0, set_.valid[batch]) : flat;
}

SecondMoments SequentialCalibration::moments(std::int64_t layer, const std::string& linear, const std::map<std::string, at::Tensor>& original) {
  at::NoGradGuard no_grad;
  SecondMoments out;
  std::map<std::string, at::Tensor> held = original;
  for (std::size_t b = 0; b < set_.inputs.size(); ++b) {
    check_interrupted();
    const at::Tensor x = input_of(layer, quantized_[b], b, linear);
    const auto add = [](at::Tensor& sum, const at::Tensor& product) { sum = sum.defined() ? sum.add_(product) : product.to(at::kDouble); };
    add(out.hessian, at::matmul(x.t(), x));
    if (!teacher_.empty()) {
      swap_weights(layer, held);
      at::Tensor teacher;
      try {
        teacher = input_of(layer, teacher_[b], b, linear);
      } catch (...) {
        swap_weights(layer, held);
        throw;
      }
      swap_weights(layer, held);
      add(out.cross, at::matmul(teacher.t(), x));
    }
    out.tokens += x.size(0);
  }
  const double count = static_cast<double>(std::max<std::int64_t>(out.tokens, 1));
  out.hessian.div_(count);
  if (out.cross.defined()) out.cross.div_(count);
  return out;
}

void SequentialCalibration::advance(std::int64_t layer, const std::map<std::string, at::Tensor>& original) {
  at::NoGradGuard no_grad;
  for (std::size_t b = 0; b < quantized_.size(); ++b) quantized_[b] = model_.block_forward(layer, quantized_[b], set_.inputs[b]);
  if (teacher_.empty()) return;
  std::map<std::string, at::Tensor> held = original;
  swap_weights(layer, held);
  try {
    for (std::size_t b = 0; b < teacher_.size(); ++b) teacher_[b] = model_.block_forward(layer, teacher_[b], set_.inputs[b]);
  } catch (...) {
    swap_weights(layer, held);
    throw;
  }
  swap_weights(layer, held);
}

}  // namespace kompakt
