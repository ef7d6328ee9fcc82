#include "quantize/budget.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <set>

#include "core/error.h"
#include "core/files.h"
#include "core/json.h"
#include "core/log.h"
#include "core/system.h"
#include "core/text.h"
#include "model/families.h"
#include "quantize/activation_rounding.h"
#include "quantize/budget_probe.h"
#include "quantize/compensation.h"
#include "quantize/entropy_steps.h"
#include "quantize/knapsack.h"
#include "quantize/methods.h"
#include "quantize/sensitivity.h"
#include "quantize/stage.h"
#include "quantize/tensors.h"
#include "train/measurement.h"

namespace kompakt {
namespace {

constexpr std::int64_t budget_batch_tokens = 512;  // of one backward pass through a block
constexpr int budget_curve_points = 24;

std::string budget_format_name(const GridSpec& spec) {
  return spec.group == spec.grid->default_group ? std::string(spec.grid->name) : str(spec.grid->name, ":", spec.group);
}

std::int64_t budget_size(const std::string& text, Problems& problems) {
  const auto bytes = parse_bytes(text);
  if (!bytes || *bytes < 1) problems.add(Error("a point of the curve is not a size").at("quantize.budget.pareto").given(text).allowed("such as 62MB"));
  return bytes.value_or(0);
}

// Knapsack items: one per tensor, or one per layer for query, key and value that share a format.
struct BudgetItem {
  std::vector<std::size_t> tensors;
  std::vector<GridSpec> formats;
};

std::vector<BudgetItem> budget_items(Transformer& shapes, const BudgetFrame& frame, bool fuse) {
  std::map<std::string, std::size_t> index;
  for (std::size_t t = 0; t < frame.tensors.size(); ++t) index[frame.tensors[t].name] = t;
  std::vector<BudgetItem> items;
  std::set<std::size_t> taken;
  if (fuse)
    for (const Block& block : shapes.blocks) {
      BudgetItem item;
      for (const Linear* linear : {&block.attention.query, &block.attention.key, &block.attention.value})
        if (const auto found = index.find(linear->name); found != index.end()) item.tensors.push_back(found->second);
      if (item.tensors.size() < 2) continue;
      for (const GridSpec& spec : frame.tensors[item.tensors.front()].formats) {
        const bool all = std::all_of(item.tensors.begin(), item.tensors.end(), [&](std::size_t t) {
          const auto& formats = frame.tensors[t].formats;
          return std::any_of(formats.begin(), formats.end(), [&](const GridSpec& f) { return f.grid == spec.grid && f.group == spec.group; });
        });
        if (all) item.formats.push_back(spec);
      }
      if (item.formats.empty()) continue;
      taken.insert(item.tensors.begin(), item.tensors.end());
      items.push_back(std::move(item));
    }
  for (std::size_t t = 0; t < frame.tensors.size(); ++t)
    if (!taken.count(t)) items.push_back({{t}, frame.tensors[t].formats});
  return items;
}

std::map<std::string, double> budget_costs(const BudgetTensor& tensor, const TensorSensitivity& sensitivity) {
  std::map<std::string, double> costs;
  for (std::size_t f = 0; f < tensor.formats.size(); ++f) costs[budget_format_name(tensor.formats[f])] = sensitivity.divergence.at(f);
  return costs;
}

Json budget_sensitivities_json(const std::map<std::string, TensorSensitivity>& sensitivities) {
  Json out = Json::object();
  for (const auto& [name, s] : sensitivities) {
    out[name] = Json{{"divergence", s.divergence}, {"relative_error", s.relative_error}};
    if (s.row_importance.defined()) out[name]["row_importance"] = std::vector<double>(s.row_importance.const_data_ptr<double>(), s.row_importance.const_data_ptr<double>() + s.row_importance.numel());
  }
  return out;
}

// Throws where the file is damaged.
std::map<std::string, TensorSensitivity> budget_sensitivities(const Json& saved, const BudgetFrame& frame) {
  std::map<std::string, TensorSensitivity> out;
  for (const BudgetTensor& tensor : frame.tensors) {
    const Json& row = saved.at(tensor.name);
    TensorSensitivity s{row.at("divergence").get<std::vector<double>>(), row.at("relative_error").get<std::vector<double>>(), {}};
    if (s.divergence.size() != tensor.formats.size()) throw std::runtime_error(str(tensor.name, " has other formats"));
    if (row.contains("row_importance")) s.row_importance = at::tensor(row.at("row_importance").get<std::vector<double>>(), at::kDouble);
    out[tensor.name] = std::move(s);
  }
  return out;
}

class BudgetAllocation {
 public:
  BudgetAllocation(Transformer& model, const QuantizeOptions& options, StageContext& context, const BudgetTarget& target, BudgetFrame frame)
      : model_(model), options_(options), context_(context), target_(target), frame_(std::move(frame)) {
    const std::int64_t length = context.data && context.data->kind == TaskData::Kind::text && !context.data->calibration.empty() ? static_cast<std::int64_t>(context.data->calibration.front().size()) : 0;
    // Texts of classification differ in length: as many of them as have the tokens when they are 32 long.
    const std::int64_t sequences = std::max<std::int64_t>(1, (options.budget.tokens + std::max<std::int64_t>(1, length) - 1) / (length > 0 ? length : 32));
    set_ = smaller_batches(calibration_set(context, sequences), budget_batch_tokens);
  }

  void measure() {
    const std::filesystem::path file = measurement_file(context_, model_, "sensitivities/2", depends(), ".json");
    if (recall_measurement(context_, file, "sensitivities", [&] { sensitivities_ = budget_sensitivities(read_json(file), frame_); })) return;
    SensitivityRequest request;
    for (const BudgetTensor& tensor : frame_.tensors) request.formats[tensor.name] = tensor.formats;
    request.seed = context_.seed;
    Progress progress(str(context_.title, ": sensitivities"), static_cast<std::int64_t>(frame_.tensors.size()), "tensor");
    request.progress = [&](std::int64_t done) { progress.update(done); };
    const QuantizationMethod& method = *find_quantization_method(options_.method);
    if (options_.budget.errors == "method" && method.needs_calibration) {
      LayerOptions layer{options_.damping, options_.act_order, 128, options_.sweep_precision == "float64", 0, options_.polish_rounds};
      if (method.name == "trifit" && layer.polish_rounds == 0) layer.polish_rounds = 4;
      request.split = true;
      request.error = [&method, layer](const at::Tensor& weight, const GridSpec& spec, const at::Tensor& inputs) {
        if (!inputs.defined()) return rounding_error(weight, spec, inputs);
        const at::Tensor hessian = at::matmul(inputs.t(), inputs) / static_cast<double>(inputs.size(0));
        return at::Tensor(weight - decode(spec, method.quantize({weight, hessian, {}}, spec, layer).quantized));
      };
    }
    if (options_.budget.errors == "rounding" && method.needs_calibration) {
      const std::string head = model_.lm_head.weight.defined() ? model_.lm_head.name : model_.tokens.name;
      request.reduction = [&, head](const std::string& name, const at::Tensor& inputs) { return name == head && !options_.calibrate_head ? 1.0 : compensation_ratio(inputs, options_.damping); };
    }
    sensitivities_ = measure_sensitivities(model_, set_, request);
    progress.finish();
    release_free_memory();  // states and gradients of all blocks
    // Errors were measured under the grids' own steps; rows that share out their bits do better.
    for (const BudgetTensor& tensor : frame_.tensors) {
      TensorSensitivity& s = sensitivities_.at(tensor.name);
      if (s.row_importance.defined()) s.row_importance = s.row_importance.contiguous();
      for (std::size_t f = 0; f < tensor.formats.size(); ++f) s.divergence[f] *= entropy_row_gain(tensor.formats[f], *find_quantizable(model_, tensor.name).weight, s.row_importance);
    }
    if (file.empty()) return;
    make_folder(file.parent_path());
    write_json(file, budget_sensitivities_json(sensitivities_));
  }

  // The plan for the limit; details of it, and of the curve, go into `out`.
  std::map<std::string, GridSpec> choose(Json& out) {
    const std::vector<BudgetItem> items = budget_items(model_, frame_, options_.budget.fuse_qkv);
    std::vector<KnapsackItem> options;
    std::int64_t smallest = 0;
    for (const BudgetItem& item : items) {
      options.emplace_back();
      for (const GridSpec& spec : item.formats) {
        KnapsackOption option;
        for (const std::size_t t : item.tensors) {
          const BudgetTensor& tensor = frame_.tensors[t];
          option.bytes += target_.tensor_bytes(spec, tensor.rows, tensor.columns);
          option.cost += budget_costs(tensor, sensitivities_.at(tensor.name)).at(budget_format_name(spec));
        }
        options.back().push_back(option);
      }
      smallest += std::min_element(options.back().begin(), options.back().end(), [](const auto& a, const auto& b) { return a.bytes < b.bytes; })->bytes;
    }
    // Everything else in the file. Exact for the smallest plan; headers of others may differ by a few bytes, which fit() mends.
    fixed_ = frame_.smallest_bytes - smallest;
    const Knapsack knapsack(options, std::max(frame_.limit, frame_.largest_bytes) - fixed_);
    out["unit"] = knapsack.unit();
    const auto plan_of = [&](const KnapsackChoice& choice) {
      std::map<std::string, GridSpec> plan;
      for (std::size_t i = 0; i < items.size(); ++i)
        for (const std::size_t t : items[i].tensors) plan[frame_.tensors[t].name] = items[i].formats[choice.option[i]];
      return plan;
    };
    const auto fit = [&](std::int64_t limit) {
      std::int64_t room = limit - fixed_;
      KnapsackChoice choice = knapsack.solve(room);
      while (!choice.option.empty()) {
        const std::int64_t bytes = target_.file_bytes(plan_of(choice));
        if (bytes <= limit) break;
        room -= bytes - limit;
        choice = knapsack.solve(room);
      }
      return choice;
    };
    const auto point = [&](std::int64_t limit, const KnapsackChoice& choice) {
      const auto plan = plan_of(choice);
      std::map<std::string, int> counts;
      for (const auto& [name, spec] : plan) ++counts[budget_format_name(spec)];
      return Json{{"limit", limit}, {"bytes", target_.file_bytes(plan)}, {"predicted_kl", choice.cost}, {"tensors", counts}};
    };
    Json curve = Json::array();
    std::set<std::int64_t> limits(frame_.pareto.begin(), frame_.pareto.end());
    const std::int64_t low = frame_.smallest_bytes, high = frame_.largest_bytes;
    for (int i = 0; i <= budget_curve_points; ++i) limits.insert(low + (high - low) * i / budget_curve_points);
    std::vector<std::size_t> last;
    for (const std::int64_t limit : limits) {
      const bool asked = std::find(frame_.pareto.begin(), frame_.pareto.end(), limit) != frame_.pareto.end();
      const KnapsackChoice choice = fit(limit);
      if (choice.option.empty() || (choice.option == last && !asked)) continue;
      last = choice.option;
      curve.push_back(point(limit, choice));
      if (asked) curve.back()["asked"] = true;
    }
    out["curve"] = std::move(curve);
    const KnapsackChoice choice = fit(frame_.limit);
    if (choice.option.empty()) throw Error("no choice of formats fits the budget").at("quantize.budget").given(human_bytes(static_cast<double>(frame_.limit))).allowed(str("at least ", frame_.smallest_bytes, " bytes"));
    const auto plan = plan_of(choice);
    const Json chosen = point(frame_.limit, choice);
    for (const char* key : {"bytes", "predicted_kl", "tensors"}) out[std::string(key) == "bytes" ? "predicted_bytes" : key] = chosen.at(key);
    Json rows = Json::array();
    for (const BudgetTensor& tensor : frame_.tensors) {
      const GridSpec& spec = plan.at(tensor.name);
      const auto costs = budget_costs(tensor, sensitivities_.at(tensor.name));
      rows.push_back(Json{{"tensor", tensor.name}, {"format", budget_format_name(spec)}, {"bytes", target_.tensor_bytes(spec, tensor.rows, tensor.columns)}, {"predicted_kl", costs.at(budget_format_name(spec))}, {"candidates", costs}});
    }
    out["formats"] = std::move(rows);
    return plan;
  }

  std::map<std::string, at::Tensor> row_importance() const {
    std::map<std::string, at::Tensor> out;
    for (const auto& [name, s] : sensitivities_)
      if (s.row_importance.defined()) out[name] = s.row_importance;
    return out;
  }

  const CalibrationSet& set() const { return set_; }
  const BudgetFrame& frame() const { return frame_; }

 private:
  // What sensitivities depend on beside the model and the seed: sizes and tunings are not among it.
  Json depends() const {
    Json formats = Json::object();
    for (const BudgetTensor& tensor : frame_.tensors)
      for (const GridSpec& spec : tensor.formats) formats[tensor.name].push_back(budget_format_name(spec));
    return Json{{"formats", formats}, {"calibration", set_.hash}, {"batch_tokens", budget_batch_tokens}, {"errors", options_.budget.errors}, {"method", options_.method}, {"damping", options_.damping},
                {"act_order", options_.act_order}, {"sweep_precision", options_.sweep_precision}, {"polish_rounds", options_.polish_rounds}, {"calibrate_head", options_.calibrate_head}};
  }

  Transformer& model_;
  const QuantizeOptions& options_;
  StageContext& context_;
  const BudgetTarget& target_;
  BudgetFrame frame_;
  CalibrationSet set_;
  std::map<std::string, TensorSensitivity> sensitivities_;
  std::int64_t fixed_ = 0;
};

}  // namespace

std::optional<GridSpec> grid_format(const std::string& text, const std::string& place, Problems& problems) {
  const std::size_t colon = text.find(':');
  const std::string name = text.substr(0, colon);
  const Grid* grid = find_grid(name);
  if (!grid) {
    problems.add(Error(str("unknown grid \"", name, "\"", did_you_mean(name, grid_names()))).at(place).given(text).allowed(join(grid_names(), ", ")));
    return {};
  }
  GridSpec spec{grid, grid->default_group};
  if (colon == std::string::npos) return spec;
  const auto group = parse_int(std::string_view(text).substr(colon + 1));
  if (!group || *group < 0 || (grid->group_fixed && *group != grid->default_group)) {
    problems.add(Error("a format is a grid, or a grid and its group").at(place).given(text).allowed(grid->group_fixed ? str("\"", name, "\", whose groups are of ", grid->default_group) : str("such as \"", name, ":128\"")));
    return {};
  }
  spec.group = *group;
  return spec;
}

void fields(FieldVisitor& visitor, BudgetOptions& options) {
  visitor.bytes("bytes", options.bytes, "largest size of the whole artifact file, such as 62MB");
  visitor.number("bits_per_weight", options.bits_per_weight, "the same as bits of the whole file per parameter", {.min = 0, .max = 32});
  visitor.text("not_larger_than", options.not_larger_than, "the same as the size of another file; a resolved recipe holds its bytes");
  visitor.texts("pareto", options.pareto, "sizes that the predicted curve of divergence against bytes must hold; alone, the largest is the budget");
  visitor.texts("formats", options.formats, "grids to choose among, with a group as in int4:128; empty = those that suit the export");
  visitor.flag("fuse_qkv", options.fuse_qkv, "one format for query, key and value of a layer, for runtimes that fuse them");
  visitor.integer("tokens", options.tokens, "calibration tokens of the backward pass that measures sensitivities", {.min = 16});
  visitor.choice("errors", options.errors, "error of a tensor in a candidate format: by rounding it, or by the stage's method (slower)", {"rounding", "method"});
}

void check_budget(const QuantizeOptions& options, const std::string& place, Problems& problems) {
  if (!options.has_budget) return;
  const BudgetOptions& b = options.budget;
  const int given = (b.bytes > 0) + (b.bits_per_weight > 0) + !b.not_larger_than.empty();
  if (given > 1 || (given == 0 && b.pareto.empty()))
    problems.add(Error("a budget is one size").at(place).given(given == 0 ? "none" : "several").allowed("one of bytes, bits_per_weight, not_larger_than; or pareto alone").hint("write budget: {bytes: 62MB}"));
  for (const std::string& size : b.pareto) budget_size(size, problems);
  for (const std::string& format : b.formats) grid_format(format, "quantize.budget.formats", problems);
  const QuantizeOptions defaults;
  if (options.weights != defaults.weights || options.group != defaults.group || options.embedding != defaults.embedding || options.embedding_group != defaults.embedding_group || options.head != defaults.head)
    problems.add(Error("a budget chooses the grid of every tensor").at(place).given("weights, embedding or head beside budget").hint("name the grids in budget.formats, and tensors that must stay float in keep_float"));
}

std::string BudgetFrame::note() const {
  std::map<std::string, int> counts;
  for (const BudgetTensor& tensor : tensors)
    for (const GridSpec& spec : tensor.formats) ++counts[budget_format_name(spec)];
  std::vector<std::string> names;
  for (const auto& [name, count] : counts) names.push_back(str(name, " (", count, ")"));
  return str("formats of ", tensors.size(), " tensors are decided in the run: at most ", human_bytes(static_cast<double>(limit)), " of a possible ", human_bytes(static_cast<double>(smallest_bytes)), " to ", human_bytes(static_cast<double>(largest_bytes)),
             "; candidates and how many tensors can take them: ", join(names, ", "), left_out.empty() ? std::string() : str("; not held everywhere: ", join(left_out, "; ")));
}

BudgetFrame budget_frame(const ModelConfig& config, const QuantizeOptions& options, const BudgetTarget& target) {
  const BudgetOptions& b = options.budget;
  Problems problems;
  check_budget(options, "quantize.budget", problems);
  check_tuning(config, options, problems);
  check_activations(config, options, problems);
  check_method_keys(config, options, problems);
  std::vector<GridSpec> specs;
  for (const std::string& text : b.formats.empty() ? target.formats : b.formats)
    if (const auto spec = grid_format(text, "quantize.budget.formats", problems)) specs.push_back(*spec);
  if (options.tunes_model() || options.tunes_blocks()) {
    const auto is_kquant = [](const GridSpec& spec) { return spec.grid->kquant != nullptr; };
    if (!b.formats.empty() && std::any_of(specs.begin(), specs.end(), is_kquant))
      problems.add(Error("tuning cannot move the tied scales of super-blocks").at("quantize.budget.formats").hint("leave tune and block_tune out, or the formats *_k and iq4_xs"));
    std::erase_if(specs, is_kquant);
  }
  problems.throw_if_any("the budget cannot be planned");
  BudgetFrame frame;
  for (const std::string& size : b.pareto) frame.pareto.push_back(budget_size(size, problems));
  std::sort(frame.pareto.begin(), frame.pareto.end());

  Transformer shapes(config, 0, c10::Device(c10::kMeta));
  const std::vector<QuantizableTensor> all = quantizable_tensors(shapes);
  const std::set<std::string> kept = kept_in_float(all, options.keep_float, problems);
  std::vector<std::string> reason(specs.size());
  std::vector<std::int64_t> refused(specs.size(), 0);
  std::vector<bool> used(specs.size(), false);
  std::map<std::string, GridSpec> largest;
  for (const QuantizableTensor& tensor : all) {
    if (kept.count(tensor.name)) continue;
    BudgetTensor row{tensor.name, tensor.weight->size(0), tensor.weight->size(1), {}};
    for (std::size_t s = 0; s < specs.size(); ++s) {
      std::string why;
      bool fits = row.columns % specs[s].span_for(row.columns) == 0;
      if (!fits) why = str("rows of ", row.columns, " do not divide into ", grid_span_name(specs[s]));
      fits = fits && target.holds(specs[s], row.columns, why);
      if (fits)
        row.formats.push_back(specs[s]), used[s] = true;
      else if (refused[s]++ == 0)
        reason[s] = str(tensor.name, ": ", why);
    }
    if (row.formats.empty()) {
      problems.add(Error(str("no format of the budget fits ", tensor.name, " with rows of ", row.columns)).at("quantize.budget.formats").given(join(b.formats.empty() ? target.formats : b.formats, ", ")).hint("add a format with smaller groups, such as q8_0 or int8, or keep the tensor with keep_float"));
      continue;
    }
    const auto bytes = [&](const GridSpec& spec) { return target.tensor_bytes(spec, row.rows, row.columns); };
    const auto by_bytes = [&](const GridSpec& a, const GridSpec& c) { return bytes(a) < bytes(c); };
    frame.smallest[row.name] = *std::min_element(row.formats.begin(), row.formats.end(), by_bytes);
    largest[row.name] = *std::max_element(row.formats.begin(), row.formats.end(), by_bytes);
    frame.tensors.push_back(std::move(row));
  }
  for (std::size_t s = 0; s < specs.size(); ++s)
    if (refused[s] > 0) frame.left_out.push_back(str(budget_format_name(specs[s]), ": ", reason[s], refused[s] > 1 ? str(" (and ", refused[s] - 1, " more)") : std::string()));
  for (std::size_t s = 0; s < specs.size() && !b.formats.empty(); ++s)
    if (!used[s]) problems.add(Error(str("no tensor can take format ", b.formats[s])).at("quantize.budget.formats").given(b.formats[s]).hint(str(reason[s], "; leave the format out")));
  problems.throw_if_any("the budget does not fit the model");
  if (frame.tensors.empty()) throw Error("no tensor is left to choose a format for").at("quantize.keep_float");

  frame.smallest_bytes = target.file_bytes(frame.smallest), frame.largest_bytes = target.file_bytes(largest);
  frame.limit = b.bytes > 0 ? b.bytes : b.bits_per_weight > 0 ? static_cast<std::int64_t>(b.bits_per_weight * static_cast<double>(count_parameters(config).total) / 8) : frame.pareto.empty() ? 0 : frame.pareto.back();
  if (!b.not_larger_than.empty()) {
    if (!std::filesystem::exists(b.not_larger_than)) throw Error("there is no file to compare with").at("quantize.budget.not_larger_than").given(b.not_larger_than);
    frame.limit = static_cast<std::int64_t>(std::filesystem::file_size(b.not_larger_than));
  }
  const auto refuse = [&](std::int64_t bytes, const char* key) {
    throw Error(str("the smallest ", target.format, " file of this model has ", frame.smallest_bytes, " bytes (", human_bytes(static_cast<double>(frame.smallest_bytes)), ")"))
        .at(key)
        .given(str(bytes, " bytes (", human_bytes(static_cast<double>(bytes)), ")"))
        .allowed(str(frame.smallest_bytes, " to ", frame.largest_bytes, " bytes with these formats"))
        .hint("raise the budget, add smaller formats, or prune vocabulary or layers first");
  };
  if (frame.limit < frame.smallest_bytes) refuse(frame.limit, "quantize.budget");
  if (!frame.pareto.empty() && frame.pareto.front() < frame.smallest_bytes) refuse(frame.pareto.front(), "quantize.budget.pareto");
  return frame;
}

QuantizedModel quantize_within_budget(Transformer& model, const QuantizeOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives, StageContext& context,
                                      const BudgetTarget& target) {
  if (!find_quantization_method(options.method)) plan_quantization(model.config(), options);  // throws with the list of methods
  if (model.config().family->encoder && !model.config().is_classifier())
    throw Error("a budget weighs errors by the model's predictions, and this encoder makes none").at(context.title).hint("put finetune or distill before quantize, or name the grids (weights, embedding)");
  const auto start = std::chrono::steady_clock::now();
  prepare_model(model, options, objectives, context);
  BudgetAllocation allocation(model, options, context, target, budget_frame(model.config(), options, target));
  allocation.measure();
  Json report = {{"limit", allocation.frame().limit}, {"format", target.format}, {"smallest_bytes", allocation.frame().smallest_bytes}, {"largest_bytes", allocation.frame().largest_bytes}};
  QuantizationPlan plan;
  plan.tensors = allocation.choose(report);
  plan.row_importance = allocation.row_importance();
  report["tokens"] = allocation.set().tokens;
  report["left_out"] = allocation.frame().left_out;
  report["calibration_sha256"] = allocation.set().hash;
  report["errors"] = options.budget.errors;
  report["seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const double predicted = report.at("predicted_kl").get<double>();
  std::vector<std::string> counts;
  for (const auto& [name, count] : report.at("tensors").items()) counts.push_back(str(count.get<int>(), " ", name));
  log_info(str("  budget ", human_bytes(static_cast<double>(allocation.frame().limit)), ": ", human_bytes(report.at("predicted_bytes").get<double>()), ", predicted divergence ", fixed(predicted, 4), " (", join(counts, ", "), ")"));

  const BudgetProbe probe(model, allocation.set());
  QuantizedModel result = quantize(model, options, objectives, context, &plan);
  std::int64_t surplus = 0;  // of entropy-coded tensors, whose size is known now
  for (const auto& [name, values] : result.tensors) {
    const GridSpec& spec = result.plan.tensors.at(name);
    surplus += stored_bytes(spec, values) - spec.packed_bytes(values.codes.size(0), values.codes.size(1));
  }
  const std::int64_t bytes = report.at("predicted_bytes").get<std::int64_t>() + surplus, limit = allocation.frame().limit;
  report["bytes_after_quantization"] = bytes;
  if (bytes > limit)
    throw Error(str("the codes take ", bytes - limit, " bytes more than the budget: entropy-coded grids were expected to take ", surplus, " less")).at("quantize.budget").given(human_bytes(static_cast<double>(limit))).hint(str("ask for ", limit - 2 * (bytes - limit), " bytes"));
  const double measured = probe.divergence(model);
  report["measured_kl_calibration"] = measured;
  report["measured_over_predicted"] = predicted > 0 ? Json(measured / predicted) : Json();
  if (context.details) (*context.details)["budget"] = std::move(report);
  return result;
}

}  // namespace kompakt
