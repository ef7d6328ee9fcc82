// The stage: embedding and head by rounding, the linears of blocks by the chosen method, layer by layer. Afterwards the
// model's weights are the decoded values, so that it computes what will be deployed.
#include "quantize/stage.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <chrono>

#include "core/error.h"
#include "core/log.h"
#include "core/system.h"
#include "core/text.h"
#include "quantize/basis.h"
#include "quantize/hessian.h"
#include "quantize/methods.h"
#include "quantize/tensors.h"
#include "train/loop.h"

namespace kompakt {
namespace {

class QuantizeRun {
 public:
  QuantizeRun(Transformer& model, const QuantizeOptions& options, StageContext& context, const QuantizationPlan* plan)
      : model_(model), options_(options), context_(context), method_(*find_quantization_method(options.method)), started_(std::chrono::steady_clock::now()) {
    result_.plan = plan ? *plan : plan_quantization(model.config(), options);
    layer_options_ = {options.damping, options.act_order, 128, options.sweep_precision == "float64", options.teacher_target, options.polish_rounds};
    if (method_.name == "trifit") {
      if (layer_options_.teacher_target == 0) layer_options_.teacher_target = 0.5;
      if (layer_options_.polish_rounds == 0) layer_options_.polish_rounds = 4;
    }
    for (const std::string& sentence : result_.plan.fallbacks) log_warning(str(context.title, ": ", sentence));
  }

  QuantizedModel run(const std::vector<std::shared_ptr<Objective>>& objectives) {
    if (method_.needs_train) train_on_grid(objectives);
    at::NoGradGuard no_grad;
    Progress progress(context_.title, static_cast<std::int64_t>(result_.plan.tensors.size()), "tensor");
    progress_ = &progress;
    const at::Tensor float_embedding = model_.tokens.weight;
    for (const QuantizableTensor& tensor : quantizable_tensors(model_))
      if (tensor.role != QuantizableRole::linear || !method_.needs_calibration) round_tensor(tensor);
    if (method_.needs_calibration) calibrate(layer_options_.teacher_target > 0 ? float_embedding : at::Tensor());
    progress.finish(str(result_.tensors.size(), " tensors, ", human_bytes(static_cast<double>(packed_bytes_))));
    describe();
    return std::move(result_);
  }

 private:
  void train_on_grid(const std::vector<std::shared_ptr<Objective>>& objectives) {
    if (objectives.empty()) throw Error("method qad trains, and no loss is given").at(context_.title).hint("give quantize.objective a list of losses as in distill");
    const TrainResult trained = train(model_, options_.train, objectives, {fake_quantization(result_.plan, options_.warmup_strength)}, context_);
    if (context_.details) (*context_.details)["training"] = Json{{"steps", trained.steps}, {"final_loss", trained.final_loss}, {"dev_score", trained.dev_score}, {"seconds", trained.seconds}};
  }

  void round_tensor(const QuantizableTensor& tensor) {
    const auto planned = result_.plan.tensors.find(tensor.name);
    if (planned == result_.plan.tensors.end()) return;
    check_interrupted();
    const auto start = std::chrono::steady_clock::now();
    LayerResult layer;
    try {
      // Embedding and head by rounding; data-free methods round everything themselves.
      layer = (method_.needs_calibration ? quantize_rtn : method_.quantize)({tensor.weight->detach(), {}, {}}, planned->second, layer_options_);
    } catch (Error& error) {
      throw error.place().empty() ? error.at(tensor.name) : error;
    }
    store(tensor, planned->second, std::move(layer), {}, start);
  }

  void calibrate(const at::Tensor& float_embedding) {
    const CalibrationSet set = calibration_set(context_, options_.calibration_sequences);
    std::int64_t widest = 0;
    for (Linear* linear : model_.linears()) widest = std::max(widest, linear->in_features());
    if (set.tokens < 4 * widest)
      log_warning(str(context_.title, ": ", set.tokens, " calibration tokens are few for layers of ", widest, " inputs; 20 tokens an input are a good rule (", 20 * widest, ")"));
    if (context_.details)
      (*context_.details)["calibration"] = Json{{"sequences", set.sequences}, {"tokens", set.tokens}, {"sha256", set.hash}, {"tokens_per_input", static_cast<double>(set.tokens) / static_cast<double>(std::max<std::int64_t>(1, widest))}};
    SequentialCalibration calibration(model_, set, float_embedding);
    for (std::size_t layer = 0; layer < model_.blocks.size(); ++layer) {
      Block& block = model_.blocks[layer];
      std::map<std::string, at::Tensor> original;  // float weights of this block, for the teacher's passes
      const std::vector<std::vector<Linear*>> groups = {{&block.attention.query, &block.attention.key, &block.attention.value}, {&block.attention.output}, {&block.mlp.gate, &block.mlp.up}, {&block.mlp.down}};
      for (const auto& group : groups)
        for (const Linear* linear : group)
          if (linear->weight.defined()) original[linear->name] = linear->weight;
      for (const auto& group : groups) {
        SecondMoments moments;  // shared by linears with the same input
        for (Linear* linear : group) {
          const auto planned = result_.plan.tensors.find(linear->name);
          if (!linear->weight.defined() || planned == result_.plan.tensors.end()) continue;
          check_interrupted();
          const auto start = std::chrono::steady_clock::now();
          if (!moments.hessian.defined()) moments = calibration.moments(static_cast<std::int64_t>(layer), linear->name, original);
          const at::Tensor weight = linear->weight.detach();
          const LayerInput input{weight.to(at::kCPU), moments.hessian.to(at::kCPU), moments.cross.defined() ? moments.cross.to(at::kCPU) : at::Tensor()};
          LayerResult result;
          try {
            result = method_.quantize(input, planned->second, layer_options_);
          } catch (Error& error) {
            throw error.place().empty() ? error.at(linear->name) : error;
          }
          store(find_quantizable(model_, linear->name), planned->second, std::move(result), input.hessian, start);
        }
      }
      calibration.advance(static_cast<std::int64_t>(layer), original);
    }
  }

  void store(const QuantizableTensor& tensor, const GridSpec& spec, LayerResult layer, const at::Tensor& hessian, std::chrono::steady_clock::time_point start) {
    const at::Tensor original = tensor.weight->detach().to(at::kCPU, at::kFloat), decoded = decode(spec, layer.quantized).to(at::kCPU);
    const double square = original.square().sum(at::kDouble).item<double>();
    const double relative = square > 0 ? (original - decoded).square().sum(at::kDouble).item<double>() / square : 0;
    Json row = {{"layer", tensor.name}, {"format", std::string(spec.grid->name)}, {"group", spec.group}, {"rows", original.size(0)}, {"columns", original.size(1)},
                {"bits", spec.bits_per_weight(original.size(1))}, {"error", relative}};
    std::string note = str(tensor.name, " ", spec.grid->name, " error ", fixed(relative, 4));
    if (hessian.defined()) {
      const double output = output_error(original, decoded, hessian);
      row["output_error"] = output;
      row["damping"] = layer.damping;
      row["path"] = layer.path;
      row["dead_inputs"] = layer.dead;
      if (!layer.objective.empty() && layer.objective.front() > 0) row["polish_gain"] = 1 - layer.objective.back() / layer.objective.front();
      note += str(" output ", fixed(output, 4));
      if (layer.path.find("cholesky") != 0 || layer.path.find(',') != std::string::npos) log_warning(str(context_.title, ": ", tensor.name, ": ", layer.path, " (damping ", shortest(layer.damping), ")"));
    }
    row["seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    layers_.push_back(std::move(row));
    packed_bytes_ += spec.packed_bytes(original.size(0), original.size(1));
    weights_ += original.numel();
    *tensor.weight = decoded.to(tensor.weight->device());
    result_.tensors[tensor.name] = std::move(layer.quantized);
    progress_->update(static_cast<std::int64_t>(result_.tensors.size()), note);
  }

  void describe() {
    if (!context_.details) return;
    Json& details = *context_.details;
    details["method"] = std::string(method_.name);
    details["layers"] = layers_;
    details["packed_bytes"] = packed_bytes_;
    details["bits_per_quantized_weight"] = weights_ > 0 ? 8.0 * static_cast<double>(packed_bytes_) / static_cast<double>(weights_) : 0.0;
    details["fallbacks"] = result_.plan.fallbacks;
    details["quantize_seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - started_).count();
  }

  Transformer& model_;
  const QuantizeOptions& options_;
  StageContext& context_;
  const QuantizationMethod& method_;
  std::chrono::steady_clock::time_point started_;
  LayerOptions layer_options_;
  QuantizedModel result_;
  Progress* progress_ = nullptr;
  Json layers_ = Json::array();
  std::int64_t packed_bytes_ = 0, weights_ = 0;
};

}  // namespace

QuantizedModel quantize(Transformer& model, const QuantizeOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives, StageContext& context, const QuantizationPlan* plan) {
  if (!find_quantization_method(options.method)) plan_quantization(model.config(), options);  // throws with the list of methods
  if (!plan) change_basis(model, options, objectives, context);  // who made a plan has changed the basis before
  return QuantizeRun(model, options, context, plan).run(objectives);
}

}  // namespace kompakt
