// Collection of second moments: a block runs part by part, batches beside each other.
#include "train/calibration.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <functional>
#include <limits>

#include "core/error.h"
#include "core/hash.h"
#include "core/random.h"
#include "core/system.h"
#include "core/text.h"
#include "model/gram_product.h"
#include "model/parallel.h"
#include "train/precision.h"
#include "train/teacher.h"

namespace kompakt {
namespace {

constexpr std::int64_t hessian_chunk_tokens = 4096;  // rows of one product: activations of a chunk stay small beside the moments

// Tokens of one pass. On the CPU passes run beside each other, one a thread, so that every bit is independent of their number.
std::int64_t hessian_batch_tokens(c10::Device device) { return device.is_cpu() ? 512 : 4096; }

// A divisor: of tokens that all count nothing the sums are zero.
double positive(double weight) { return std::max(weight, std::numeric_limits<double>::min()); }

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

void for_each_batch(c10::Device device, std::size_t count, const std::function<void(std::size_t)>& work) {
  const auto range = [&](std::int64_t begin, std::int64_t end) {
    at::NoGradGuard no_grad;  // a worker thread has its own mode
    for (std::int64_t i = begin; i < end; ++i) {
      check_interrupted();
      work(static_cast<std::size_t>(i));
    }
  };
  if (device.is_cpu() && count > 1) {
    at::parallel_for(0, static_cast<std::int64_t>(count), 1, range);
    return;
  }
  const SingleThread single;
  range(0, static_cast<std::int64_t>(count));
}

CalibrationSet calibration_set(const StageContext& context, std::int64_t sequences, std::string_view otherwise) {
  CalibrationSet set;
  Sha256 hash;
  const TaskData* data = context.data;
  const bool text = data && data->kind == TaskData::Kind::text;
  if (!data || (text ? data->calibration.empty() : data->train.ids.empty()))
    throw Error("the stage needs calibration data and the run has none").at(context.title).hint(str(text || !data ? "name text files under data.calibration" : "name training examples under data.train", ", or use ", otherwise));
  if (text) {
    const std::int64_t count = std::min<std::int64_t>(sequences, static_cast<std::int64_t>(data->calibration.size()));
    const std::int64_t length = static_cast<std::int64_t>(data->calibration.front().size());
    const std::int64_t rows = std::max<std::int64_t>(1, hessian_batch_tokens(context.device) / std::max<std::int64_t>(1, length));
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

std::vector<NamedParameter> block_parameters(Block& block) {
  std::vector<NamedParameter> out;
  const auto add = [&](auto& part) {
    if (!part.weight.defined()) return;
    out.push_back({part.name + ".weight", &part.weight});
    if (part.bias.defined()) out.push_back({part.name + ".bias", &part.bias});
  };
  for (Linear* linear : {&block.attention.query, &block.attention.key, &block.attention.value, &block.attention.output, &block.mlp.gate, &block.mlp.up, &block.mlp.down}) add(*linear);
  for (Norm* norm : {&block.attention_norm, &block.mlp_norm, &block.post_attention_norm, &block.post_mlp_norm, &block.attention.query_norm, &block.attention.key_norm, &block.attention.sub_norm, &block.mlp.sub_norm}) add(*norm);
  return out;
}

std::vector<Linear*> part_linears(Block& block, BlockPart part) {
  std::vector<Linear*> all, present;
  switch (part) {
    case BlockPart::attention: all = {&block.attention.query, &block.attention.key, &block.attention.value}; break;
    case BlockPart::output: all = {&block.attention.output}; break;
    case BlockPart::feed_forward: all = {&block.mlp.gate, &block.mlp.up}; break;
    case BlockPart::down: all = {&block.mlp.down}; break;
  }
  for (Linear* linear : all)
    if (linear->weight.defined()) present.push_back(linear);
  return present;
}

void calibration_precision_field(FieldVisitor& visitor, std::string& precision) {
  visitor.choice("calibration_precision", precision, "of the products of passes over calibration text and of the inputs' second moments; sums and residual stream are float32. auto = bf16 where the hardware multiplies it faster", precision_names());
}

void subtract_means(SecondMoments& moments) {
  const auto subtract = [](at::Tensor& second, const at::Tensor& a, const at::Tensor& b) {
    if (second.defined()) second = (second.to(at::kDouble) - at::outer(a, b)).to(second.scalar_type());
  };
  subtract(moments.hessian, moments.mean, moments.mean);
  subtract(moments.half, moments.half_mean, moments.half_mean);
  if (moments.cross.defined()) subtract(moments.cross, moments.teacher_mean, moments.mean);
}

SequentialCalibration::SequentialCalibration(Transformer& model, const CalibrationSet& set, const CalibrationOptions& options)
    : model_(model), set_(set), options_(options), quantized_(make_stream()), teacher_(make_stream()) {
  TORCH_CHECK(!options_.bf16 || !options_.float64, "moments of float64 are not made from rounded inputs");
  if (options_.teacher) embed(teacher_);
}

void SequentialCalibration::start() { embed(quantized_); }

SequentialCalibration::Stream SequentialCalibration::make_stream() const {
  return {Activations(options_.spill), Activations(options_.spill), Activations(options_.spill), Activations(options_.spill)};
}

void SequentialCalibration::embed(Stream& stream) {
  at::NoGradGuard no_grad;
  stream.x.resize(set_.inputs.size());
  for (std::size_t b = 0; b < set_.inputs.size(); ++b) stream.x.put(b, model_.embed(set_.inputs[b]));
}

std::vector<std::pair<std::string, at::Tensor>> SequentialCalibration::activations() const {
  std::vector<std::pair<std::string, at::Tensor>> out;
  for (std::size_t b = 0; b < quantized_.x.size(); ++b) out.emplace_back(str("quantized.", b), quantized_.x.get(b));
  for (std::size_t b = 0; b < teacher_.x.size(); ++b) out.emplace_back(str("teacher.", b), teacher_.x.get(b));
  return out;
}

void SequentialCalibration::set_activations(const std::vector<std::pair<std::string, at::Tensor>>& values) {
  const std::size_t count = quantized_.x.size();
  TORCH_CHECK(values.size() == count + teacher_.x.size(), "activations of another calibration");
  for (std::size_t i = 0; i < values.size(); ++i) (i < count ? quantized_.x : teacher_.x).put(i < count ? i : i - count, values[i].second);
}

void SequentialCalibration::swap_weights(std::int64_t layer, std::map<std::string, at::Tensor>& weights) {
  for (const NamedParameter& parameter : block_parameters(model_.blocks[static_cast<std::size_t>(layer)]))
    if (const auto found = weights.find(parameter.name); found != weights.end()) std::swap(*parameter.value, found->second);
}

void SequentialCalibration::compute(Stream& stream, std::int64_t layer, int parts) {
  at::NoGradGuard no_grad;
  for (; stream.done < parts; ++stream.done) {
    for (Activations* values : {&stream.context, &stream.h, &stream.inner}) values->resize(set_.inputs.size());
    const RoundedWeights rounded(options_.bf16 ? part_linears(model_.blocks[static_cast<std::size_t>(layer)], block_parts[static_cast<std::size_t>(stream.done)]) : std::vector<Linear*>());
    for_each_batch(model_.device(), set_.inputs.size(), [&](std::size_t b) {
      const AutocastGuard autocast(model_.device(), options_.bf16);
      switch (stream.done) {
        case 0: stream.context.put(b, model_.attention_context(layer, model_.attention_input(layer, stream.x.get(b)), set_.inputs[b])); break;
        case 1: stream.h.put(b, model_.after_attention(layer, stream.x.get(b), stream.context.get(b))), stream.context.drop(b); break;
        case 2: stream.inner.put(b, model_.mlp_inner(layer, model_.mlp_input(layer, stream.h.get(b)))); break;
        case 3: stream.x.put(b, model_.after_mlp(layer, stream.h.get(b), stream.inner.get(b))), stream.h.drop(b), stream.inner.drop(b); break;
      }
    });
  }
}

void SequentialCalibration::compute_teacher(std::int64_t layer, int parts, const std::map<std::string, at::Tensor>& original) {
  if (!has_teacher() || teacher_ahead_ || teacher_.done >= parts) return;
  std::map<std::string, at::Tensor> held = original;
  swap_weights(layer, held);
  try {
    compute(teacher_, layer, parts);
  } catch (...) {
    swap_weights(layer, held);
    throw;
  }
  swap_weights(layer, held);
}

at::Tensor SequentialCalibration::part_input(const Stream& stream, std::int64_t layer, BlockPart part, std::size_t batch) const {
  at::Tensor x;
  if (layer == static_cast<std::int64_t>(model_.blocks.size())) x = model_.final_norm.weight.defined() ? model_.final_norm.forward(stream.x.get(batch)) : stream.x.get(batch);
  else switch (part) {
    case BlockPart::attention: x = model_.attention_input(layer, stream.x.get(batch)); break;
    case BlockPart::output: x = stream.context.get(batch); break;
    case BlockPart::feed_forward: x = model_.mlp_input(layer, stream.h.get(batch)); break;
    case BlockPart::down: x = stream.inner.get(batch); break;
  }
  at::Tensor flat = x.reshape({-1, x.size(-1)});
  if (!options_.bf16) flat = flat.to(options_.float64 ? at::kDouble : at::kFloat);
  return set_.valid[batch].defined() ? flat.index_select(0, set_.valid[batch]) : flat;
}

std::vector<at::Tensor> SequentialCalibration::part_inputs(const Stream& stream, std::int64_t layer, BlockPart part, std::size_t first, std::size_t end) const {
  std::vector<at::Tensor> rows(end - first);
  for_each_batch(model_.device(), rows.size(), [&](std::size_t i) { rows[i] = part_input(stream, layer, part, first + i); });
  return rows;
}

SecondMoments SequentialCalibration::moments(std::int64_t layer, BlockPart part, const std::map<std::string, at::Tensor>& original) {
  return moments(layer, part, original, {nullptr}).front();
}

std::vector<SecondMoments> SequentialCalibration::moments(std::int64_t layer, BlockPart part, const std::map<std::string, at::Tensor>& original, const std::vector<const std::vector<at::Tensor>*>& weights) {
  at::NoGradGuard no_grad;
  TORCH_CHECK(!teacher_ahead_, "the teacher has left the block");
  compute(quantized_, layer, static_cast<int>(part));
  const bool cross = has_teacher() && options_.cross;
  if (cross) compute_teacher(layer, static_cast<int>(part), original);
  std::vector<SecondMoments> moments(weights.size());
  std::vector<double> weight_seen(weights.size(), 0.0);
  std::int64_t seen = 0;
  const std::size_t batches = set_.inputs.size();
  const auto rows_of = [&](std::size_t b) { return set_.valid[b].defined() ? set_.valid[b].size(0) : set_.inputs[b].ids.numel(); };
  // Chunks of batches; one ends where half of the tokens have been seen.
  for (std::size_t first = 0; first < batches;) {
    check_interrupted();
    std::size_t end = first;
    std::int64_t count = 0;
    const std::int64_t half = set_.tokens / 2;
    while (end < batches && count < hessian_chunk_tokens && (seen >= half || seen + count < half)) count += rows_of(end++);
    using Rows = std::vector<at::Tensor>;
    const Rows x = part_inputs(quantized_, layer, part, first, end), teacher = cross && !options_.squares_only ? part_inputs(teacher_, layer, part, first, end) : Rows();
    seen += count;
    for (std::size_t k = 0; k < weights.size(); ++k) {
      SecondMoments& out = moments[k];
      Rows weight;  // [tokens,1] each
      if (weights[k])
        for (std::size_t i = 0; i < x.size(); ++i) weight.push_back((*weights[k])[first + i].to(x[i].options().dtype(options_.float64 ? at::kDouble : at::kFloat)).unsqueeze(1));
      const auto weighted = [&](const Rows& rows) {
        Rows product = rows;
        for (std::size_t i = 0; i < weight.size(); ++i) product[i] = rows[i] * (options_.bf16 ? weight[i].sqrt() : weight[i]);
        for (at::Tensor& some : product)
          if (options_.bf16) some = some.to(at::kBFloat16);
        return product;
      };
      double& whole = weight_seen[k];
      if (!weights[k]) whole += static_cast<double>(count);
      for (const at::Tensor& w : weight) whole += w.sum(at::kDouble).item<double>();
      out.tokens += count;
      if (options_.squares_only) {
        for (std::size_t i = 0; i < x.size(); ++i) {
          const at::Tensor square = x[i].to(options_.float64 ? at::kDouble : at::kFloat).square(), sum = (weight.empty() ? square : square * weight[i]).sum(0, false, at::kDouble);
          out.square = out.square.defined() ? out.square + sum : sum;
        }
        continue;
      }
      // Sums until the end. Rows are weighted on one side of every product; rounded ones by the root of the weight on both, and means are taken
      // of what is multiplied: neither moments nor covariances of rounded rows have a negative direction then.
      const Rows left = weighted(x), right = options_.bf16 ? left : x;
      const auto sum = [&](at::Tensor& value, const Rows& rows) {
        if (!value.defined()) value = at::zeros({rows[0].size(1)}, rows[0].options().dtype(at::kDouble));
        for (std::size_t i = 0; i < rows.size(); ++i) value += (options_.bf16 && !weight.empty() ? rows[i] * weight[i].sqrt() : rows[i]).sum(0, false, at::kDouble);
      };
      const auto add = options_.bf16 ? add_gram_bf16 : add_gram;
      add(out.hessian, left, right, true);
      if (options_.means) sum(out.mean, left);
      if (cross) {
        const Rows others = options_.bf16 || options_.means ? weighted(teacher) : Rows();
        add(out.cross, options_.bf16 ? others : teacher, left, false);
        if (options_.means) sum(out.teacher_mean, others);
      }
      if (!out.half.defined() && seen >= half && end < batches) {
        out.half = mirrored(out.hessian, whole > 0 ? 1 / whole : 0), out.half_tokens = seen, out.half_share = whole;
        if (options_.means) out.half_mean = out.mean / positive(whole);
      }
    }
    first = end;
  }
  for (std::size_t k = 0; k < weights.size(); ++k) {
    SecondMoments& out = moments[k];
    const double whole = positive(weight_seen[k]);
    out.half_share = out.half_share / whole;
    for (at::Tensor* value : {&out.square, &out.cross, &out.mean, &out.teacher_mean})
      if (value->defined()) value->div_(whole);
    if (out.hessian.defined()) out.hessian = mirrored(out.hessian, weight_seen[k] > 0 ? 1 / whole : 0);
  }
  return moments;
}

void SequentialCalibration::advance_teacher(std::int64_t layer, const std::map<std::string, at::Tensor>& original) {
  compute_teacher(layer, 4, original);
  teacher_ahead_ = has_teacher();
}

void SequentialCalibration::advance(std::int64_t layer, const std::map<std::string, at::Tensor>& original) {
  advance_teacher(layer, original);
  compute(quantized_, layer, 4);
  quantized_.done = teacher_.done = 0;
  teacher_ahead_ = false;
}

}  // namespace kompakt
