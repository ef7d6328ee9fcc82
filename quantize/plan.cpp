// Options of the stage, and which tensor takes which grid. Nothing is changed quietly: what does not fit is an Error, or,
// when the recipe asked for it, a named fallback that the report lists.
#include <c10/core/Device.h>

#include "core/error.h"
#include "core/text.h"
#include "model/families.h"
#include "quantize/activation_rounding.h"
#include "quantize/fake_quant.h"
#include "quantize/kl_tune.h"
#include "quantize/masked.h"
#include "quantize/methods.h"
#include "quantize/stage.h"
#include "quantize/tensors.h"
#include "quantize/token_weights.h"

namespace kompakt {
namespace {

std::vector<std::string> plan_names_or_none() {
  std::vector<std::string> names = grid_names();
  names.emplace_back("none");
  return names;
}

const Grid& plan_grid(const std::string& name, const char* key, Problems& problems) {
  const Grid* grid = find_grid(name);
  if (!grid) {
    const auto names = grid_names();
    problems.add(Error(str("unknown grid \"", name, "\"", did_you_mean(name, names))).at(str("quantize.", key)).given(name).allowed(join(names, ", ")));
    return grids().front();
  }
  return *grid;
}

std::int64_t plan_group(const Grid& grid, std::int64_t asked, const char* key, Problems& problems) {
  if (grid.group_fixed && asked >= 0 && asked != grid.default_group)
    problems.add(Error(str("grid \"", grid.name, "\" has groups of ", grid.default_group)).at(str("quantize.", key)).given(str(asked)).allowed(str(grid.default_group)).hint("leave the key out"));
  return grid.group_fixed || asked < 0 ? grid.default_group : asked;
}

std::string plan_divisors(std::int64_t columns) {
  std::vector<std::string> out;
  for (const std::int64_t group : {32, 64, 128, 256})
    if (columns % group == 0) out.push_back(str(group));
  out.emplace_back("0 (whole row)");
  return join(out, ", ");
}

}  // namespace

void fields(FieldVisitor& visitor, QuantizeOptions& options) {
  visitor.choice("weights", options.weights, "grid of all linear layers in blocks", grid_names());
  visitor.integer("group", options.group, "weights that share a scale; 0 = a whole row, -1 = the grid's own", {.min = -1, .max = 1 << 20});
  visitor.choice("embedding", options.embedding, "grid of the token embedding (and of the head that shares it)", plan_names_or_none());
  visitor.integer("embedding_group", options.embedding_group, "weights of the embedding that share a scale; 0 = a whole row, -1 = the grid's own", {.min = -1, .max = 1 << 20});
  visitor.choice("method", options.method, "how codes and scales are found", quantization_method_names());
  visitor.choice("head", options.head, "grid of the classifier, the pooler and an untied output layer", plan_names_or_none());
  visitor.texts("keep_float", options.keep_float, "names of tensors left in float; * stands for anything");
  fields(visitor, options.basis);
  visitor.flag("allow_fallback", options.allow_fallback, "where a row does not divide into groups, take the fallback grid and list it in the report");
  visitor.choice("fallback", options.fallback, "grid of tensors that do not divide into groups", grid_names());
  visitor.number("damping", options.damping, "share of the mean diagonal added to the Hessian", {.min = 0, .max = 10});
  visitor.flag("act_order", options.act_order, "process groups and columns in the order of their input energy; groups stay where they are");
  visitor.number("teacher_target", options.teacher_target, "strength of the teacher's activations as target, 0 to 1; 0 = off, trifit takes 0.5 when 0", {.min = 0, .max = 1});
  visitor.integer("polish_rounds", options.polish_rounds, "rounds of scale refit and coordinate descent after the sweep; trifit takes 4 when 0", {.min = 0, .max = 100});
  visitor.integer("calibration_sequences", options.calibration_sequences, "training examples or text windows that the method looks at", {.min = 1});
  visitor.choice("token_weights", options.token_weights, "how much a calibration token counts in a layer: all the same, or by the loss's gradient at the layer's outputs (one backward pass): its norm, or the square of that (fisher, which needs far more text)", token_weight_names());
  visitor.section("budget", options.has_budget, "a size of the whole file: the grid of every tensor is chosen so that it fits and the predictions change least", [&](FieldVisitor& inner) { fields(inner, options.budget); });
  visitor.section("activations", options.has_activations, "the inputs of quantized linears in blocks are rounded too, as a runtime with integer or FP8 products does", [&](FieldVisitor& inner) { fields(inner, options.activations); });
  visitor.section("kv_cache", options.has_kv_cache, "keys and values are rounded, with calibrated scales per layer", [&](FieldVisitor& inner) { fields(inner, options.kv_cache); });
  visitor.choice("others", options.others, "type of tensors without a grid", {"f32", "f16"});
  visitor.choice("sweep_precision", options.sweep_precision, "number type of the inputs' second moments, of factorization and sweep", {"float32", "float64"});
  calibration_precision_field(visitor, options.calibration_precision);
  visitor.flag("calibrate_head", options.calibrate_head, "decoders: the output matrix over the vocabulary, a tied embedding included, is chosen by its inputs like a linear of a block; false = it is rounded");
  visitor.flag("bias_correction", options.bias_correction, "where a layer has a bias, codes are chosen for the covariance of its inputs and the bias takes the mean error");
  visitor.flag("spill", options.spill, "keep the activations of the calibration set on disk: less memory, a little slower");
  visitor.flag("layer_table", options.layer_table, "print the table of layers when the stage is done");
  visitor.section("sparse", options.has_sparse, "gptq and trifit: single weights of linears in blocks become zero in the same sweep, whose later columns make up for both errors; masks are kept as those of prune.unstructured", [&](FieldVisitor& inner) {
    inner.number("sparsity", options.sparse.sparsity, "share of the weights of every block of columns that becomes zero; 0 = the pattern says it", {.min = 0.0, .max = 0.99});
    inner.text("pattern", options.sparse.pattern, "N:M, for example \"2:4\": of every M weights in a row N stay");
    inner.texts("skip", options.sparse.skip, "patterns of linears that stay dense (* = anything)");
  });
  visitor.section("block_tune", options.has_block_tune, "after the method, every block: roundings and scales by sign descent towards the float block's output", [&](FieldVisitor& inner) { fields(inner, options.block_tune); });
  visitor.choice("tune", options.tune, "after that, the whole model towards the teacher's predictions: scales and norms, or latent weights too; the best by held-out text is kept", tune_mode_names());
  visitor.section("tuning", options.has_tuning, "how tune goes about it", [&](FieldVisitor& inner) { fields(inner, options.tuning); });
  visitor.flag("subln", options.subln, "method qad: RMSNorms in front of the output and the down projection, started so that they change the model least; format kompakt alone can hold them");
  visitor.number("gradual", options.gradual, "method qad: share of the steps over which quantization fades in, of those of pretrain where that is given", {.min = 0, .max = 1});
  visitor.choice("gradual_schedule", options.gradual_schedule, "course of its strength from 0 to 1", gradual_schedule_names());
  visitor.section("pretrain", options.has_pretrain, "method qad on text: next-token training on the grid before the training under the teacher", [&](FieldVisitor& inner) { fields(inner, options.pretrain); });
  visitor.subtree("objective", options.objective, "method qad and tune: list of losses, as in distill");
  fields(visitor, options.train);  // method qad
}

void check_tuning(const ModelConfig& config, const QuantizeOptions& options, Problems& problems) {
  if (options.has_tuning && !options.tunes_model()) problems.add(Error("options of a tuning that does not take place").at("quantize.tuning").given("tune: none").allowed("tune: scales or weights").hint("set tune, or leave tuning out"));
  if (options.tune == "scales" && options.tuning.scale_learning_rate > 0)
    problems.add(Error("tune: scales has one rate, that of scales").at("quantize.tuning.scale_learning_rate").given(shortest(options.tuning.scale_learning_rate)).allowed("learning_rate").hint("set learning_rate instead"));
  if (!options.tunes_model() && !options.tunes_blocks()) return;
  const char* key = options.tunes_model() ? "quantize.tune" : "quantize.block_tune";
  if (const QuantizationMethod* method = find_quantization_method(options.method); method && method->needs_train)
    problems.add(Error(str("method ", method->name, " trains on the grid itself")).at(key).given(str("method: ", method->name)).allowed("a method that does not train").hint("leave the key out, or take method: trifit"));
  if (const Grid* grid = find_grid(options.weights); grid && grid->levels && !options.has_budget)
    problems.add(Error(str("tuning moves between even levels, and those of grid \"", grid->name, "\" are not")).at(key).given(str("weights: ", grid->name)).hint("leave the key out, or take another grid of this size"));
  if (const Grid* grid = find_grid(options.weights); grid && grid->kquant && !grid->levels && !options.has_budget)
    problems.add(Error(str("tuning moves every scale on its own, and those of grid \"", grid->name, "\" are integers times one factor a super-block")).at(key).given(str("weights: ", grid->name)).hint("leave the key out, or take a grid of this size with free scales, such as q4_0, q5_0 or q2_0"));
  if (options.tunes_model() && (config.family->encoder || config.is_classifier()))
    problems.add(Error("tuning towards the teacher's predictions works on decoders and calibration text").at(key).given(config.is_classifier() ? "a classifier" : "an encoder").hint("method: qad trains on labelled examples under the teacher; block_tune needs neither"));
}

void check_sparse(const ModelConfig& config, const QuantizeOptions& options, Problems& problems) {
  if (!options.has_sparse) return;
  const QuantizationMethod* method = find_quantization_method(options.method);
  if (method && method->quantize != quantize_trifit)
    problems.add(Error(str("method ", method->name, " has no sweep that could choose zeros")).at("quantize.sparse").given(str("method: ", method->name)).allowed("method: gptq or trifit").hint("take one of them, or put prune: {unstructured: ...} in front"));
  if (options.has_budget) problems.add(Error("a budget does not foresee which weights become zero").at("quantize.sparse").given("budget").hint("choose the grids by weights and embedding, or put prune: {unstructured: ...} in front"));
  if (options.tunes_model() || options.tunes_blocks()) problems.add(Error("tuning would fill the zeros again").at("quantize.sparse").given(options.tunes_model() ? "tune" : "block_tune").hint("leave one of the two out"));
  SparsityPattern pattern;
  try {
    pattern = chosen_pattern(options.sparse, "quantize.sparse");
    check_sparsity(config, options.sparse, "quantize.sparse");
    Transformer shapes(config, 0, c10::Device(c10::kMeta));
    dense_linears(shapes, options.sparse, "quantize.sparse");
  } catch (Error& error) {
    problems.add(error);
    return;
  }
  const Grid* grid = find_grid(options.weights);
  if (!grid) return;
  const GridSpec spec{grid, options.group >= 0 && !grid->group_fixed ? options.group : grid->default_group};
  if (!has_zero(spec)) problems.add(Error(str("the grid ", grid->name, " has no zero")).at("quantize.sparse").given(str("weights: ", grid->name)).allowed(grids_with_zero()));
  if (const std::int64_t span = spec.span_for(0); pattern.grouped() && ((span > 0 && span % pattern.m != 0) || ((span == 0 || span > gptq_block) && gptq_block % pattern.m != 0)))
    problems.add(Error(str("the pattern does not divide ", span > 0 && span % pattern.m != 0 ? grid_span_name(spec) : str("the ", gptq_block, " columns that the sweep takes at a time"))).at("quantize.sparse.pattern").given(pattern.text()).allowed("such as 2:4 or 4:8"));
}

void check_grid_training(const QuantizeOptions& options, std::optional<bool> classification, const std::string& place, Problems& problems) {
  const QuantizationMethod* method = find_quantization_method(options.method);
  const auto needs_training = [&](bool asked, const char* key, const char* why) {
    if (asked && method && !method->needs_train) problems.add(Error(str("\"", key, "\" ", why)).at(place).given(str("method: ", options.method)).allowed("method: qad").hint("leave the key out, or train on the grid"));
  };
  needs_training(options.subln, "subln", "puts norms into the model that only training can make use of");
  needs_training(options.gradual > 0, "gradual", "fades quantization in while the model trains");
  needs_training(options.has_pretrain, "pretrain", "trains on the grid");
  if (options.gradual == 0 && options.gradual_schedule != "linear") problems.add(Error("\"gradual_schedule\" has nothing to shape").at(place).given("gradual: 0").allowed("a share above 0, such as gradual: 0.3"));
  if (options.has_pretrain && options.pretrain.has_lora) problems.add(Error("lora trains adapters beside the weights, and pretrain trains the weights themselves on the grid").at(place).given("pretrain.lora").hint("remove lora"));
  if (options.has_pretrain && classification.value_or(false)) problems.add(Error("\"pretrain\" predicts the next token, and the run has class labels").at(place).given("data of format classification").allowed("data of format text").hint("leave pretrain out; objective may hold {labels: cross_entropy}"));
}

void check_method_keys(const ModelConfig& config, const QuantizeOptions& options, Problems& problems) {
  const QuantizationMethod* method = find_quantization_method(options.method);
  if (const TokenWeightRow* row = find_token_weights(options.token_weights); row && row->exponent > 0) {
    if (config.family->encoder && !config.is_classifier())
      problems.add(Error("an encoder without a classifier predicts nothing, so that its tokens have no gradient").at("quantize.token_weights").given(options.token_weights).allowed("uniform").hint("leave the key out"));
    if (method && !method->needs_calibration)
      problems.add(Error(str("method ", method->name, " looks at no calibration token")).at("quantize.token_weights").given(str("method: ", options.method)).allowed("method: gptq, trifit or imatrix").hint("leave the key out"));
  }
  if (options.tunes_blocks() && options.block_tune.fisher > 0 && options.token_weights == "uniform")
    problems.add(Error("the metric of a block's output is made from the gradients that weigh tokens").at("quantize.block_tune.fisher").given("token_weights: uniform").allowed("token_weights: gradient_norm or fisher").hint("set token_weights, or leave fisher out"));
  if (options.calibration_precision != "float32") {
    if (method && !method->needs_calibration)
      problems.add(Error(str("method ", method->name, " makes no pass over calibration text")).at("quantize.calibration_precision").given(str("method: ", options.method)).allowed("method: gptq, trifit or imatrix").hint("leave the key out"));
    if (options.tunes_blocks())  // measured: docs/how-to/tuning.md
      problems.add(Error("blocks are tuned towards outputs of float32: rounded ones would hide the error of the codes").at("quantize.calibration_precision").given(options.calibration_precision).allowed("float32").hint("leave the key out; block_tune: {precision: bf16} rounds the passes that learn alone"));
    if (options.sweep_precision == "float64")
      problems.add(Error("moments of float64 are not made from inputs rounded to bfloat16").at("quantize.calibration_precision").given(str(options.calibration_precision, " with sweep_precision: float64")).allowed("float32").hint("leave one of the two out"));
  }
  if (options.method != "imatrix") return;
  const QuantizeOptions plain;
  const struct { const char* key; bool set; } unused[] = {{"damping", options.damping != plain.damping}, {"act_order", options.act_order != plain.act_order}, {"teacher_target", options.teacher_target != plain.teacher_target}, {"polish_rounds", options.polish_rounds != plain.polish_rounds}};
  for (const auto& row : unused)
    if (row.set) problems.add(Error("method imatrix rounds: it compensates and polishes nothing").at(str("quantize.", row.key)).given("method: imatrix").allowed("method: gptq or trifit").hint("leave the key out"));
}

QuantizationPlan plan_quantization(const ModelConfig& config, const QuantizeOptions& options) {
  Problems problems;
  QuantizationPlan plan;
  const Grid& weights = plan_grid(options.weights, "weights", problems);
  const std::int64_t weights_group = plan_group(weights, options.group, "group", problems);
  const bool embedding = options.embedding != "none", head = options.head != "none";
  const Grid& embedding_grid = embedding ? plan_grid(options.embedding, "embedding", problems) : weights;
  const std::int64_t embedding_group = embedding ? plan_group(embedding_grid, options.embedding_group, "embedding_group", problems) : 0;
  const Grid& head_grid = head ? plan_grid(options.head, "head", problems) : weights;
  const Grid& fallback = plan_grid(options.fallback, "fallback", problems);
  const QuantizationMethod* method = find_quantization_method(options.method);
  if (!method) {
    const auto names = quantization_method_names();
    problems.add(Error(str("unknown method \"", options.method, "\"", did_you_mean(options.method, names))).at("quantize.method").given(options.method).allowed(join(names, ", ")));
  }
  if (method && method->needs_asymmetric && (!weights.asymmetric || weights.kquant)) {
    std::vector<std::string> names;
    for (const Grid& grid : grids())
      if (grid.asymmetric && !grid.kquant) names.emplace_back(grid.name);
    problems.add(Error(str("method ", method->name, " moves zero points, and grid \"", weights.name, weights.asymmetric ? "\" ties its minima together" : "\" has none")).at("quantize.method").given(options.method).allowed(str("weights: ", join(names, ", "))).hint("take a grid with an offset, or method: rtn"));
  }
  if (options.basis.untie && options.basis.basis != "hadamard") problems.add(Error(str("untie serves basis hadamard alone, and basis is ", options.basis.basis)).at("quantize.untie").given("true").allowed("false").hint("leave the key out"));
  check_tuning(config, options, problems);
  check_activations(config, options, problems);
  check_method_keys(config, options, problems);
  check_sparse(config, options, problems);
  problems.throw_if_any("the quantize stage cannot be planned");

  Transformer shape(basis_config(config, options.basis), 0, c10::Device(c10::kMeta));
  const std::vector<QuantizableTensor> tensors = quantizable_tensors(shape);
  const std::set<std::string> kept = kept_in_float(tensors, options.keep_float, problems);
  for (const QuantizableTensor& tensor : tensors) {
    GridSpec spec;
    const char* key = "weights";
    if (tensor.role == QuantizableRole::linear) spec = {&weights, weights_group};
    if (tensor.role == QuantizableRole::embedding && embedding) spec = {&embedding_grid, embedding_group}, key = "embedding";
    if (tensor.role == QuantizableRole::head && head) spec = {&head_grid, head_grid.default_group}, key = "head";
    if (!spec.grid || kept.count(tensor.name)) continue;
    const std::int64_t columns = tensor.weight->size(1), group = spec.span_for(columns);
    if (columns % group != 0) {
      const GridSpec other{&fallback, fallback.default_group};
      if (!options.allow_fallback) {
        problems.add(Error(str(tensor.name, " has rows of ", columns, " weights, which do not divide into ", grid_span_name(spec), " (grid \"", spec.grid->name, "\")"))
                         .at(str("quantize.", key))
                         .given(str(spec.grid->name, ", group ", group))
                         .allowed(str("groups of ", plan_divisors(columns)))
                         .hint(str("choose another group or grid, or set allow_fallback: true to store such tensors as ", options.fallback)));
        continue;
      }
      if (columns % other.span_for(columns) != 0) {
        problems.add(Error(str(tensor.name, ": the fallback grid \"", fallback.name, "\" does not fit rows of ", columns, " either")).at("quantize.fallback").given(options.fallback).allowed("a grid with groups of whole rows, such as int8"));
        continue;
      }
      plan.fallbacks.push_back(str(tensor.name, ": rows of ", columns, " do not divide into ", grid_span_name(spec), ", stored as ", fallback.name, " instead of ", spec.grid->name));
      spec = other;
    }
    plan.tensors[tensor.name] = spec;
  }
  problems.throw_if_any("the quantize stage does not fit the model");
  return plan;
}

}  // namespace kompakt
