// The stage: embedding and head by rounding, the linears of blocks by the chosen method, layer by layer. Afterwards the
// model's weights are the decoded values, so that it computes what will be deployed.
#include "quantize/stage.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "core/error.h"
#include "core/lasting_memory.h"
#include "core/log.h"
#include "core/node.h"
#include "core/system.h"
#include "core/text.h"
#include "model/families.h"
#include "model/paged.h"
#include "quantize/activation_rounding.h"
#include "quantize/basis.h"
#include "quantize/block_tune.h"
#include "quantize/factors.h"
#include "quantize/fake_quant.h"
#include "quantize/kl_tune.h"
#include "quantize/layer_report.h"
#include "quantize/masked.h"
#include "quantize/methods.h"
#include "quantize/records.h"
#include "quantize/sub_norms.h"
#include "quantize/tensors.h"
#include "quantize/token_weights.h"
#include "train/calibration.h"
#include "train/loop.h"
#include "train/precision.h"
#include "train/teacher.h"

namespace kompakt {
namespace {

class QuantizeRun {
 public:
  QuantizeRun(Transformer& model, const QuantizeOptions& options, StageContext& context, const QuantizationPlan* plan, const TuningText& text)
      : model_(model), options_(options), context_(context), text_(text), method_(*find_quantization_method(options.method)), started_(std::chrono::steady_clock::now()) {
    result_.plan = plan ? *plan : plan_quantization(model.config(), options);
    layer_options_ = {options.damping, options.act_order, gptq_block, options.sweep_precision == "float64", options.teacher_target, options.polish_rounds};
    if (method_.name == "trifit") {
      if (layer_options_.teacher_target == 0) layer_options_.teacher_target = 0.5;
      if (layer_options_.polish_rounds == 0) layer_options_.polish_rounds = 4;
    }
    if (method_.needs_train && options.train.label_smoothing > 0)
      throw Error("label_smoothing would not be used").at(context.title).given(shortest(options.train.label_smoothing)).hint("write it into quantize.objective: {labels: cross_entropy, label_smoothing: ...}");
    if (options.has_sparse) layer_options_.sparsity = chosen_pattern(options.sparse, context.title), dense_ = dense_linears(model, options.sparse, context.title);
    check_masks(result_.plan, context);
    for (const std::string& sentence : result_.plan.fallbacks) log_warning(str(context.title, ": ", sentence));
  }

  QuantizedModel run(const std::vector<std::shared_ptr<Objective>>& objectives) {
    if (method_.needs_train) {
      round_while_training(model_, options_, result_.plan.tensors);
      train_on_grid(objectives);
    }
    at::NoGradGuard no_grad;
    std::map<std::string, at::Tensor> original;  // float weights, where latents start from them
    if (options_.tunes_model()) {
      for (const Linear* linear : model_.linears()) original[linear->name] = is_paged(linear->weight) ? linear->weight.detach().clone() : linear->weight;
      if (!context_.teacher) own_teacher_ = live_teacher(std::shared_ptr<const Transformer>(model_.clone()));
    }
    Progress progress(context_.title, static_cast<std::int64_t>(result_.plan.tensors.size()), "tensor");
    progress_ = &progress;
    if (method_.needs_calibration || options_.tunes_blocks())
      calibrate();
    else
      round_tensors(true);
    progress.finish(str(result_.tensors.size(), " tensors, ", human_bytes(static_cast<double>(packed_bytes()))));
    if (options_.tunes_model()) {
      round_while_training(model_, options_, result_.plan.tensors);
      tune_model(original, objectives);
    }
    if (options_.others == "f16") round_others_to_half();
    round_activations(model_, options_, result_.plan.tensors, context_);
    if (options_.layer_table) log_info(layer_table(layers_));
    describe();
    return std::move(result_);
  }

 private:
  // Tensors without a grid as half precision: what is evaluated is what the artifact will hold.
  void round_others_to_half() {
    for (const NamedParameter& parameter : model_.parameters()) {
      const std::string owner = ends_with(parameter.name, ".weight") ? parameter.name.substr(0, parameter.name.size() - 7) : parameter.name;
      if (result_.tensors.count(owner)) continue;
      const at::Tensor rounded = parameter.value->detach().to(at::kHalf).to(at::kFloat);
      if (!at::isfinite(rounded).all().item<bool>()) throw Error(str("tensor \"", parameter.name, "\" does not fit into half precision")).at(context_.title).hint("set others: f32");
      if (is_paged(*parameter.value)) parameter.value->detach().copy_(rounded), release_pages(*parameter.value);
      else *parameter.value = rounded;
    }
  }

  void train_on_grid(const std::vector<std::shared_ptr<Objective>>& objectives) {
    if (objectives.empty()) throw Error("method qad trains, and no loss is given").at(context_.title).hint("give quantize.objective a list of losses as in distill");
    GradualOptions gradual{options_.gradual, options_.gradual_schedule};
    if (options_.has_pretrain) {
      Json details = Json::object();
      StageContext inner = context_;
      inner.title = context_.title + " pretrain", inner.work = context_.work / "pretrain", inner.details = &details;
      const TrainResult trained = train(model_, options_.pretrain, {label_cross_entropy(options_.pretrain.label_smoothing)}, {fake_quantization(result_.plan, gradual)}, inner);
      details["training"] = training_record(trained);
      if (context_.details) (*context_.details)["pretrain"] = std::move(details);
      gradual.share = 0;
    }
    const TrainResult trained = train(model_, options_.train, objectives, {fake_quantization(result_.plan, gradual)}, context_);
    if (context_.details) (*context_.details)["training"] = training_record(trained);
  }

  static Json training_record(const TrainResult& trained) {
    return Json{{"steps", trained.steps}, {"final_loss", trained.final_loss}, {"dev_score", trained.dev_score}, {"seconds", trained.seconds}};
  }

  // By rounding: the embedding, the heads and, with `linears`, the linears of blocks.
  void round_tensors(bool linears) {
    for (const QuantizableTensor& tensor : quantizable_tensors(model_)) {
      if (!result_.plan.tensors.count(tensor.name) || (tensor.role == QuantizableRole::linear && !linears)) continue;
      if (!linears && calibrates_head() && tensor.name == head_name()) continue;
      round_tensor(tensor);
      if (linears) release_pages(*tensor.weight);
    }
  }

  at::Tensor mask_of(const std::string& name) const {
    const auto found = context_.masks.find(name);
    return found == context_.masks.end() ? at::Tensor() : found->second;
  }

  at::Tensor row_importance(const std::string& name) const {
    const auto found = result_.plan.row_importance.find(name);
    return found == result_.plan.row_importance.end() ? at::Tensor() : found->second;
  }

  void round_tensor(const QuantizableTensor& tensor) {
    check_interrupted();
    const auto start = std::chrono::steady_clock::now();
    const GridSpec& spec = result_.plan.tensors.at(tensor.name);
    LayerResult layer;
    try {
      // Embedding and head by rounding; data-free methods round everything themselves.
      layer = (method_.needs_calibration ? quantize_rtn : method_.quantize)({tensor.weight->detach(), {}, {}, {}, {}, row_importance(tensor.name)}, spec, layer_options_);
    } catch (Error& error) {
      throw error.place().empty() ? error.at(tensor.name) : error;
    }
    if (const at::Tensor mask = mask_of(tensor.name); mask.defined()) keep_zeros(spec, mask, layer.quantized);
    Json row = describe_layer(tensor.name, spec, tensor.weight->detach(), layer.quantized);
    row["seconds"] = seconds_since(start);
    store(tensor, spec, std::move(layer.quantized), std::move(row));
  }

  void calibrate() {
    const ReusedMemory memory;  // of activations, part by part
    const CalibrationSet set = calibration_set(context_, options_.calibration_sequences);
    describe_calibration(set);
    if (const TokenWeightRow& row = *find_token_weights(options_.token_weights); row.exponent > 0) weigh_tokens(set, row);
    const std::vector<Linear*> linears = model_.linears();
    const bool means = options_.bias_correction && std::any_of(linears.begin(), linears.end(), [](const Linear* linear) { return linear->bias.defined(); });
    SequentialCalibration calibration(model_, set, {.teacher = layer_options_.teacher_target > 0 || options_.tunes_blocks(), .cross = layer_options_.teacher_target > 0, .means = means, .float64 = layer_options_.float64, .spill = options_.spill ? context_.work : std::filesystem::path(), .bf16 = bf16()});
    round_tensors(false);
    calibration.start();
    release_pages(model_);
    BlockRecords records(context_, identity(set));
    const auto blocks = static_cast<std::int64_t>(model_.blocks.size());
    const std::int64_t known = records.load_activations(calibration);  // in front of this block
    for (std::int64_t layer = 0; layer < blocks; ++layer) {
      check_interrupted();
      Block& block = model_.blocks[static_cast<std::size_t>(layer)];
      std::map<std::string, at::Tensor> original;  // the float block
      for (const NamedParameter& parameter : block_parameters(block)) original[parameter.name] = parameter.value->detach().clone();
      if (auto record = records.load(layer, model_)) {
        for (auto& [name, quantized] : record->quantized.tensors) {
          Json row;
          for (const Json& saved : record->layers)
            if (saved.at("layer") == name) row = saved;
          if (const auto mask = record->masks.find(name); mask != record->masks.end()) context_.masks[name] = mask->second;
          store(find_quantizable(model_, name), record->quantized.plan.tensors.at(name), std::move(quantized), std::move(row));
        }
      } else {
        const std::size_t first_row = layers_.size();
        for (const BlockPart part : block_parts) quantize_part(calibration, layer, part, original);
        if (layer % 2 == 1) release_free_memory();  // holes that nothing fitted into; after every block it costs a tenth of the time
        if (options_.tunes_blocks() && layers_.size() > first_row) tune_one_block(calibration, layer, original, first_row);
        save_block(records, layer, first_row);
      }
      if (layer >= known && (layer + 1 < blocks || calibrates_head())) {
        calibration.advance(layer, original);
        records.save_activations(layer + 1, calibration);
      }
      for (const NamedParameter& parameter : block_parameters(block)) release_pages(*parameter.value);
    }
    if (calibrates_head()) calibrate_head(calibration);
  }

  std::string head_name() const { return model_.lm_head.weight.defined() ? model_.lm_head.name : model_.tokens.name; }

  // Whether the output matrix over the vocabulary is chosen by its inputs too, or rounded like other tensors outside of blocks. Grids of
  // eight bits gain nothing that would be seen.
  bool calibrates_head() const {
    const auto found = result_.plan.tensors.find(head_name());
    return options_.calibrate_head && method_.needs_calibration && !model_.config().family->encoder && found != result_.plan.tensors.end() && found->second.grid->code_bits < 8 && !context_.masks.count(head_name());
  }

  // Behind the last block, where its inputs are known. A tied embedding is the same matrix: predictions feel its errors as an output by an
  // order of magnitude more than as an input. In chunks of rows, which are independent.
  void calibrate_head(SequentialCalibration& calibration) {
    const auto start = std::chrono::steady_clock::now();
    const QuantizableTensor tensor = find_quantizable(model_, head_name());
    const GridSpec& spec = result_.plan.tensors.at(tensor.name);
    const SecondMoments moments = calibration.moments(static_cast<std::int64_t>(model_.blocks.size()), BlockPart::attention, {});
    const at::Tensor hessian = moments.hessian.to(at::kCPU), weight = tensor.weight->detach().to(at::kCPU);
    const auto factors = std::make_shared<InputFactors>();
    LayerResult whole;
    std::vector<at::Tensor> codes, scales, offsets;
    constexpr std::int64_t chunk = 8192;
    for (std::int64_t first = 0; first < weight.size(0); first += chunk) {
      check_interrupted();
      LayerResult part;
      try {
        part = method_.quantize({weight.slice(0, first, std::min(weight.size(0), first + chunk)), hessian, {}, factors, {}, {}, true}, spec, layer_options_);
      } catch (Error& error) {
        throw error.place().empty() ? error.at(tensor.name) : error;
      }
      codes.push_back(part.quantized.codes), scales.push_back(part.quantized.scales);
      if (part.quantized.offsets.defined()) offsets.push_back(part.quantized.offsets);
      whole.damping = part.damping, whole.path = part.path, whole.dead = part.dead, whole.sweep_loss += part.sweep_loss;
      whole.objective.resize(part.objective.size(), 0.0);
      for (std::size_t i = 0; i < part.objective.size(); ++i) whole.objective[i] += part.objective[i];
    }
    whole.quantized = {at::cat(codes), at::cat(scales), offsets.empty() ? at::Tensor() : at::cat(offsets)};
    Json row = describe_layer(tensor.name, spec, weight, whole.quantized);
    describe_output(row, spec, weight, whole, moments);
    row["seconds"] = seconds_since(start);
    store(tensor, spec, std::move(whole.quantized), std::move(row));
  }

  void describe_calibration(const CalibrationSet& set) {
    std::int64_t widest = 0;
    for (const Linear* linear : model_.linears()) widest = std::max(widest, linear->in_features());
    if (set.tokens < 4 * widest)
      log_warning(str(context_.title, ": ", set.tokens, " calibration tokens are few for layers of ", widest, " inputs; 20 tokens an input are a good rule (", 20 * widest, ")"));
    if (context_.details)
      (*context_.details)["calibration"] = Json{{"sequences", set.sequences}, {"tokens", set.tokens}, {"sha256", set.hash}, {"tokens_per_input", static_cast<double>(set.tokens) / static_cast<double>(std::max<std::int64_t>(1, widest))}};
  }

  void weigh_tokens(const CalibrationSet& set, const TokenWeightRow& row) {
    const auto start = std::chrono::steady_clock::now();
    token_weights_ = kept_token_weights(model_, set, row, context_, options_.tunes_blocks() && options_.block_tune.fisher > 0 ? &output_metrics_ : nullptr, bf16());
    double least = static_cast<double>(set.tokens);
    for (const auto& [name, weights] : token_weights_) least = std::min(least, effective_tokens(weights));
    if (context_.details) (*context_.details)["calibration"]["token_weights"] = Json{{"by", options_.token_weights}, {"least_effective_tokens", least}, {"seconds", seconds_since(start)}};
  }

  bool bf16() const { return use_bf16(options_.calibration_precision, model_.device()); }

  // What the blocks' results depend on beside the model, which the work folder stands for.
  Json identity(const CalibrationSet& set) const {
    QuantizeOptions options = options_;
    return Json{{"options", dump_yaml(write_fields([&](FieldVisitor& v) { fields(v, options); }))}, {"calibration", set.hash}, {"seed", context_.seed}};
  }

  void quantize_part(SequentialCalibration& calibration, std::int64_t layer, BlockPart part, const std::map<std::string, at::Tensor>& original) {
    std::vector<Linear*> linears = part_linears(model_.blocks[static_cast<std::size_t>(layer)], part);
    std::erase_if(linears, [&](const Linear* linear) { return !result_.plan.tensors.count(linear->name); });
    if (linears.empty()) return;
    if (!method_.needs_calibration) {
      for (const Linear* linear : linears) round_tensor(find_quantizable(model_, linear->name));
      return;
    }
    auto start = std::chrono::steady_clock::now();  // the first linear carries the time of the moments
    // One for all linears of the part, or one each where their tokens count differently.
    std::vector<const std::vector<at::Tensor>*> weights;
    if (token_weights_.empty()) weights.push_back(nullptr);
    else
      for (const Linear* linear : linears) weights.push_back(&token_weights_.at(linear->name));
    std::vector<SecondMoments> all_moments = calibration.moments(layer, part, original, weights);
    const bool correct_bias = options_.bias_correction && std::all_of(linears.begin(), linears.end(), [](const Linear* linear) { return linear->bias.defined(); });
    std::vector<std::shared_ptr<InputFactors>> all_factors;
    for (SecondMoments& moments : all_moments) {
      if (correct_bias) subtract_means(moments);
      all_factors.push_back(std::make_shared<InputFactors>());
    }
    for (std::size_t i = 0; i < linears.size(); ++i) {
      check_interrupted();
      Linear* linear = linears[i];
      const SecondMoments& moments = all_moments[std::min(i, all_moments.size() - 1)];
      const auto& factors = all_factors[std::min(i, all_factors.size() - 1)];
      const LayerInput input{linear->weight.detach().to(at::kCPU), moments.hessian.to(at::kCPU), moments.cross.defined() ? moments.cross.to(at::kCPU) : at::Tensor(), factors, mask_of(linear->name), row_importance(linear->name), dense_.count(linear->name) > 0};
      const GridSpec& spec = result_.plan.tensors.at(linear->name);
      LayerResult layer_result;
      try {
        layer_result = method_.quantize(input, spec, layer_options_);
      } catch (Error& error) {
        throw error.place().empty() ? error.at(linear->name) : error;
      }
      if (layer_result.mask.defined()) context_.masks[linear->name] = layer_result.mask;
      if (const at::Tensor mask = mask_of(linear->name); mask.defined()) keep_zeros(spec, mask, layer_result.quantized);
      Json row = describe_layer(linear->name, spec, input.weight, layer_result.quantized);
      describe_output(row, spec, input.weight, layer_result, moments);
      if (layer_result.mask.defined()) row["sparsity"] = static_cast<double>(layer_result.mask.logical_not().sum().item<std::int64_t>()) / static_cast<double>(layer_result.mask.numel());
      if (const std::string& path = layer_result.path; path != "rtn" && (path.find("cholesky") != 0 || path.find(',') != std::string::npos))
        log_warning(str(context_.title, ": ", linear->name, ": ", path, " (damping ", shortest(layer_result.damping), ")"));
      if (correct_bias) row["bias_shift"] = shift_bias(*linear, decode(spec, layer_result.quantized), moments);
      row["seconds"] = seconds_since(start);
      store(find_quantizable(model_, linear->name), spec, std::move(layer_result.quantized), std::move(row));
      start = std::chrono::steady_clock::now();
    }
  }

  // The block as a whole, from the method's codes. What the rows of its layers tell of outputs stays the method's.
  void tune_one_block(SequentialCalibration& calibration, std::int64_t layer, const std::map<std::string, at::Tensor>& original, std::size_t first_row) {
    const auto start = std::chrono::steady_clock::now();
    calibration.advance_teacher(layer, original);
    // Behind the block's last linear flows what the block adds: the gradient there is that of the block's output.
    const std::vector<Linear*> last = part_linears(model_.blocks[static_cast<std::size_t>(layer)], BlockPart::down);
    at::Tensor metric;
    if (!output_metrics_.empty()) {
      const at::Tensor& moment = output_metrics_[static_cast<std::size_t>(layer)];
      metric = moment * options_.block_tune.fisher + at::eye(moment.size(0), moment.options()) * (1 - options_.block_tune.fisher);
    }
    const BlockActivations activations{[&](std::size_t b) { return calibration.input(b); }, [&](std::size_t b) { return calibration.teacher(b); }, token_weights_.empty() || last.empty() ? nullptr : &token_weights_.at(last.back()->name), metric};
    std::map<std::string, at::Tensor> places;  // where the weights lie
    for (std::size_t i = first_row; i < layers_.size(); ++i) {
      const std::string name = layers_[i].at("layer");
      places[name] = model_.find_linear(name)->weight;
    }
    const BlockTuneResult tuned = tune_block(model_, layer, calibration.set(), activations, original, result_.plan, options_.block_tune, context_.seed, result_.tensors);
    calibration.restart_block();
    for (std::size_t i = first_row; i < layers_.size(); ++i) {
      const std::string name = layers_[i].at("layer");
      const GridSpec& spec = result_.plan.tensors.at(name);
      at::Tensor& weight = model_.find_linear(name)->weight;
      weight = places.at(name);
      put_decoded(weight, spec, result_.tensors.at(name));
      layers_[i]["error"] = describe_layer(name, spec, original.at(name + ".weight"), result_.tensors.at(name)).at("error");
    }
    layers_.back()["block"] = Json{{"block", layer}, {"error_before", tuned.before}, {"error_after", tuned.after}, {"best_iteration", tuned.best_iteration}, {"precision", tuned.bf16 ? "bf16" : "float32"}, {"seconds", seconds_since(start)}};
    progress_->update(static_cast<std::int64_t>(result_.tensors.size()), str("block ", layer, " tuned, squared error ", shortest(tuned.before), " -> ", shortest(tuned.after)));
  }

  void tune_model(const std::map<std::string, at::Tensor>& original, const std::vector<std::shared_ptr<Objective>>& objectives) {
    const at::AutoGradMode gradient(true);
    StageContext inner = context_;
    inner.work = context_.work / "tune";
    if (own_teacher_) inner.teacher = own_teacher_.get();
    tuning_ = kl_tune(model_, result_, original, options_.tune, options_.tuning, objectives, text_, inner);
    if (tuning_.at("winner_step") == 0) return;
    for (Json& row : layers_)
      if (const auto found = original.find(row.at("layer").get<std::string>()); found != original.end()) row["error"] = describe_layer(found->first, result_.plan.tensors.at(found->first), found->second, result_.tensors.at(found->first)).at("error");
  }

  // b += W m~ - W^ m: the mean error of the outputs, which the codes were chosen without. Root mean square of the change.
  double shift_bias(Linear& linear, const at::Tensor& decoded, const SecondMoments& moments) const {
    const double alpha = moments.teacher_mean.defined() ? layer_options_.teacher_target : 0;
    const at::Tensor mean = moments.mean.to(at::kCPU), target = alpha > 0 ? mean + alpha * (moments.teacher_mean.to(at::kCPU) - mean) : mean;
    const at::Tensor weight = linear.weight.detach().to(at::kCPU);
    const at::Tensor shift = at::matmul(weight.to(at::kDouble), target) - at::matmul(decoded.to(at::kCPU, at::kDouble), mean);
    linear.bias = (linear.bias.detach().to(at::kCPU, at::kDouble) + shift).to(linear.bias.device(), at::kFloat);
    return std::sqrt(shift.square().mean().item<double>());
  }

  void save_block(const BlockRecords& records, std::int64_t layer, std::size_t first_row) {
    QuantizedModel block;
    Json rows = Json::array();
    WeightMasks masks;
    for (std::size_t i = first_row; i < layers_.size(); ++i) {
      const std::string name = layers_[i].at("layer");
      block.plan.tensors[name] = result_.plan.tensors.at(name);
      block.tensors[name] = result_.tensors.at(name);
      rows.push_back(layers_[i]);
      if (layers_[i].contains("sparsity")) masks[name] = context_.masks.at(name);
    }
    records.save(layer, model_, block, rows, masks);
  }

  std::int64_t packed_bytes() const {
    std::int64_t bytes = 0;
    for (const auto& [name, values] : result_.tensors) bytes += stored_bytes(result_.plan.tensors.at(name), values);
    return bytes;
  }

  static double seconds_since(std::chrono::steady_clock::time_point start) { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); }

  void store(const QuantizableTensor& tensor, const GridSpec& spec, Quantized quantized, Json row) {
    std::string note = str(tensor.name, " ", spec.grid->name, " error ", fixed(row.at("error").get<double>(), 4));
    if (row.contains("output_error")) note += str(" output ", fixed(row.at("output_error").get<double>(), 4));
    layers_.push_back(std::move(row));
    weights_ += tensor.weight->numel();
    put_decoded(*tensor.weight, spec, quantized);
    if (tensor.role == QuantizableRole::linear) {
      const ReusedMemory::Lasting lasting;
      quantized = {quantized.codes.clone(), quantized.scales.clone(), quantized.offsets.defined() ? quantized.offsets.clone() : at::Tensor()};
    }
    result_.tensors[tensor.name] = std::move(quantized);
    progress_->update(static_cast<std::int64_t>(result_.tensors.size()), note);
  }

  // Where the weight lies, by rows: weights that lie in a file stay there.
  static void put_decoded(at::Tensor& weight, const GridSpec& spec, const Quantized& quantized) {
    constexpr std::int64_t chunk = 4096;
    at::Tensor target = is_paged(weight) ? weight.detach() : at::empty_like(weight.detach());
    for (std::int64_t first = 0; first < target.size(0); first += chunk) {
      const std::int64_t end = std::min(target.size(0), first + chunk);
      target.slice(0, first, end).copy_(decode(spec, rows_of(quantized, first, end)));
    }
    weight = target;
  }

  void describe() {
    if (!context_.details) return;
    Json& details = *context_.details;
    details["method"] = std::string(method_.name);
    Json blocks = Json::array();
    for (Json& row : layers_) {
      if (!row.contains("block")) continue;
      blocks.push_back(row.at("block"));
      row.erase("block");
    }
    if (!blocks.empty()) details["blocks"] = blocks;
    if (!tuning_.is_null()) details["tuning"] = tuning_;
    details["layers"] = layers_;
    if (layer_options_.sparsity) details["sparsity"] = sparsity_json(layers_, *layer_options_.sparsity, dense_);
    if (const auto unsteady = std::count_if(layers_.begin(), layers_.end(), halves_disagree); details.contains("calibration")) {
      details["calibration"]["layers_whose_halves_disagree"] = unsteady;
      if (unsteady > 0)
        log_warning(str(context_.title, ": in ", unsteady, " of ", layers_.size(), " layers the errors on the two halves of the calibration set differ by more than the method gains over rounding: give more calibration data"));
    }
    const std::int64_t bytes = packed_bytes();
    details["packed_bytes"] = bytes;
    details["bits_per_quantized_weight"] = weights_ > 0 ? 8.0 * static_cast<double>(bytes) / static_cast<double>(weights_) : 0.0;
    details["fallbacks"] = result_.plan.fallbacks;
    details["quantize_seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - started_).count();
  }

  Transformer& model_;
  const QuantizeOptions& options_;
  StageContext& context_;
  const TuningText& text_;  // empty without tuning of the whole model
  const QuantizationMethod& method_;
  std::chrono::steady_clock::time_point started_;
  LayerOptions layer_options_;
  QuantizedModel result_;
  TokenWeights token_weights_;    // by linear; empty = uniform
  OutputMetrics output_metrics_;  // by block; empty = the identity
  Progress* progress_ = nullptr;
  std::unique_ptr<TeacherSource> own_teacher_;
  Json layers_ = Json::array(), tuning_;
  std::int64_t weights_ = 0;
  std::set<std::string> dense_;  // linears that a sparsity leaves as they are
};

}  // namespace

void prepare_model(Transformer& model, const QuantizeOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives, StageContext& context) {
  if (options.subln) {
    Json report = insert_sub_norms(model, options.calibration_sequences, options.train.sequence_length, context);
    if (context.details) (*context.details)["sub_norms"] = std::move(report);
  }
  change_basis(model, options, objectives, context);
}

QuantizedModel quantize(Transformer& model, const QuantizeOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives, StageContext& context, const QuantizationPlan* plan) {
  if (!find_quantization_method(options.method)) plan_quantization(model.config(), options);  // throws with the list of methods
  Problems problems;
  check_tuning(model.config(), options, problems);
  check_activations(model.config(), options, problems);
  check_sparse(model.config(), options, problems);
  check_grid_training(options, context.data ? std::optional<bool>(context.data->kind == TaskData::Kind::classification) : std::nullopt, context.title, problems);
  problems.throw_if_any("the stage cannot run as it is asked to");
  if (!context.masks.empty() && (options.tunes_model() || options.tunes_blocks()))
    throw Error("tuning would fill weights that an earlier stage has pruned").at(context.title).allowed("method: qad, which keeps them zero while it trains").hint("remove tune and block_tune, or the masks of the stage prune");
  set_rounding(model, RuntimeRounding());  // that of an earlier stage is not this one's
  // What is scored is held out of everything: bases and methods see the rest of the text.
  StageContext inner = context;
  TaskData rest;
  TuningText text;
  if (options.tunes_model()) {
    text = tuning_text(context, options.tuning.holdout);
    rest = *context.data;
    rest.calibration = text.tuning;
    inner.data = &rest;
  }
  if (!plan) prepare_model(model, options, objectives, inner);  // who made a plan has done so before
  check_zeros(model, context, options.basis.basis);
  QuantizedModel result = QuantizeRun(model, options, inner, plan, text).run(objectives);
  context.masks = std::move(inner.masks);
  return result;
}

}  // namespace kompakt
