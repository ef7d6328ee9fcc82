// The stage `search`: what the pipeline knows (exports, tokenizer, data, store) around the search itself.
#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <set>
#include <utility>

#include "core/error.h"
#include "core/hash.h"
#include "core/log.h"
#include "core/system.h"
#include "core/text.h"
#include "model/checkpoint.h"
#include "model/parallel.h"
#include "model/rounding.h"
#include "pipeline/budget_target.h"
#include "pipeline/recipe.h"
#include "pipeline/search.h"
#include "pipeline/stages.h"
#include "pipeline/store.h"
#include "prune/stage.h"
#include "train/mask.h"
#include "train/measurement.h"

namespace kompakt {
namespace {

SearchOptions search_options(const Node& node, const Recipe& recipe, std::optional<LatencyTable>& table) {
  SearchOptions options;
  Problems problems;
  read_fields(node, "the stage", problems, [&](FieldVisitor& v) { fields(v, options); });
  check_search(options, node.place.text(), problems);
  problems.throw_if_any("the stage's options are not valid");
  if (!options.budget.latency_table.empty()) table = read_latency_table(recipe.path_of(options.budget.latency_table));
  if (table && options.budget.joules > 0 && !table->watts)
    throw Error("the latency table has no power, so energy cannot be told").at("search.budget.joules").given(options.budget.latency_table).hint("write \"watts\" into the table, or give latency_ms instead of joules");
  return options;
}

bool search_tries_used(const SearchOptions& options) { return std::find(options.vocabulary.begin(), options.vocabulary.end(), "used") != options.vocabulary.end(); }

std::map<std::string, int> search_counts(const std::map<std::string, GridSpec>& plan) {
  std::map<std::string, int> counts;
  for (const auto& [name, spec] : plan) ++counts[std::string(spec.grid->name)];
  return counts;
}

Json search_point_json(const SearchPoint& point, const ModelConfig& before) {
  Json out{{"layers", before.layers - point.shape.removed}, {"ffn", point.shape.ffn}, {"heads", point.shape.heads.heads}, {"kv_heads", point.shape.heads.kv_heads}, {"vocabulary", point.shape.used_vocabulary ? "used" : "all"},
           {"bytes", point.bytes}, {"predicted_kl", point.predicted()}, {"structure_kl", point.structure}, {"formats_kl", point.formats}, {"tensors", search_counts(point.plan)}};
  if (point.latency_ms > 0) out["latency_ms"] = point.latency_ms;
  if (point.measured >= 0) out["measured_kl"] = point.measured;
  return out;
}

// What the measurements depend on; budgets are not among it, so that another budget measures nothing again.
std::filesystem::path search_cache(const StageRun& run, const SearchOptions& options, std::size_t kept) {
  SearchOptions same = options;
  same.budget = {}, same.measure = 1, same.method = search_feeds_back(options) ? "gptq" : "rtn", same.apply = "shape";
  std::string exports;  // candidates are the formats that the exports hold
  for (const RecipeStage& stage : run.recipe.stages)
    if (stage.row->name == "export") exports += dump_yaml(stage.options);
  const Json depends{{"tokenizer", run.current.tokenizer->fingerprint()}, {"data", run.context.data->hash}, {"vocabulary_kept", kept}, {"exports", exports}, {"options", dump_yaml(write_fields([&](FieldVisitor& v) { fields(v, same); }))}};
  return measurement_file(run.context, *run.current.model, "search/2", depends, ".json");
}

void search_describe(Json& details, const BudgetSearch& search, const SearchOptions& options, const SearchPoint& best, const ModelConfig& before, const ModelConfig& after) {
  Json removed = Json::object();
  const std::vector<std::int64_t> gone = search.removed(best.shape);
  if (!gone.empty()) removed["layers"] = gone, removed["depth"] = {before.layers, after.layers};
  if (after.ffn < before.ffn || after.heads < before.heads) {
    removed["ffn"] = Json::array(), removed["heads"] = Json::array();
    for (std::int64_t i = 0; i < after.layers; ++i) removed["ffn"].push_back({i, before.ffn, after.ffn}), removed["heads"].push_back({i, before.heads, after.heads});
    if (after.kv_heads < before.kv_heads && before.kv_heads < before.heads) removed["kv_heads"] = {before.kv_heads, after.kv_heads};
    UnitScores scores;
    std::vector<KeptUnits> kept;
    const std::vector<KeptUnits> units = search.units(best.shape);
    for (std::size_t layer = 0; layer < units.size(); ++layer) {
      if (std::find(gone.begin(), gone.end(), static_cast<std::int64_t>(layer)) != gone.end()) continue;
      scores.ffn.push_back(search.scores().ffn[layer]), scores.heads.push_back(search.scores().heads[layer]), kept.push_back(units[layer]);
    }
    std::size_t examples = 0;
    for (const TokenBatch& batch : search.batches()) examples += static_cast<std::size_t>(batch.rows);
    details["importance"] = describe_importance(options.criterion, scores, kept, examples);
  }
  if (after.vocab < before.vocab) removed["vocabulary"] = {before.vocab, after.vocab};
  if (!removed.empty()) details["removed"] = removed;
  details["parameters"] = {count_parameters(before).total, count_parameters(after).total};
}

}  // namespace

void plan_search(const Node& node, const PlanInput& input, PlannedModel& model) {
  set_rounding(model.config, RuntimeRounding());  // weights change, and with them what is rounded how
  std::optional<LatencyTable> table;
  const SearchOptions options = search_options(node, input.recipe, table);
  const std::vector<SearchShape> shapes = search_shapes(model.config, options);
  std::string reason;
  std::size_t fitting = 0;
  std::int64_t smallest = -1, most = -1;
  const ModelConfig before = model.config;
  bool always_cut = true;
  for (const SearchShape& shape : shapes) {
    const ModelConfig config = search_config(before, shape, input.vocabulary_kept);
    const Transformer meta(config, 0, c10::Device(c10::kMeta));
    const bool cut = shape.used_vocabulary && input.pruned_tokenizer;
    std::string why;
    const std::optional<BudgetFrame> stored = search_frame(config, options, budget_target(input.recipe, meta, cut ? *input.pruned_tokenizer : *input.tokenizer, false), why);
    if (!stored) {
      if (reason.empty()) reason = why;
      continue;
    }
    const BudgetFrame& frame = *stored;
    const std::int64_t limit = search_limit(config, options.budget, table ? &*table : nullptr);
    if (smallest < 0 || frame.smallest_bytes < smallest) smallest = frame.smallest_bytes;
    if (limit < frame.smallest_bytes) continue;
    ++fitting;
    always_cut = always_cut && cut;
    if (const std::int64_t parameters = count_parameters(config).total; parameters > most) {
      most = parameters, model.config = config;
      if (options.apply == "all") model.quantized = frame.smallest, model.budget_bytes = std::min(limit, frame.largest_bytes);
    }
  }
  if (smallest < 0) throw Error(str("no shape of the search can be stored: ", reason)).at("search").hint("name formats with smaller groups, or other widths and multiple_of");
  model.other_tokens = model.other_tokens || always_cut;
  if (fitting == 0)
    throw Error("no shape of the search fits the budget").at("search.budget").given(search_budget_text(options.budget)).allowed(str("files from ", smallest, " bytes (", human_bytes(static_cast<double>(smallest)), ")"))
        .hint("raise the budget, or let the search remove more (layers, ffn, heads, vocabulary: [used])");
  model.notes.push_back(str("the shape is decided in the run: ", fitting, " of ", shapes.size(), " shapes fit the budget; what follows is predicted for the largest of them"));
  const double tokens = static_cast<double>(options.tokens), parameters = static_cast<double>(count_parameters(before).total);
  const double passes = static_cast<double>(options.layers.size() + options.ffn.size() + options.heads.size()) + 3 + static_cast<double>(options.measure);
  if (input.gigaflops > 0) model.seconds += 2 * parameters * tokens * passes * 2 / (input.gigaflops * 1e9);
  model.memory_bytes = std::max(model.memory_bytes, static_cast<std::int64_t>(parameters) * 4 * 3);
  model.bytes = count_parameters(model.config).total * 4;
}

void run_search(const Node& node, StageRun& run) {
  const auto start = std::chrono::steady_clock::now();
  std::optional<LatencyTable> table;
  SearchOptions options = search_options(node, run.recipe, table);
  const SearchBudget asked = options.budget;
  refuse_masks(run.context, "a search cuts matrices");
  set_rounding(*run.current.model, RuntimeRounding());
  if (table && (table->processor != processor_name() || table->threads != at::get_num_threads()))
    log_warning(str(run.context.title, ": the latency table is of ", table->threads, " threads of ", table->processor, ", not of this machine"));
  const std::shared_ptr<Transformer> original = run.current.model;
  const ModelConfig before = original->config();
  std::vector<std::int64_t> kept;
  std::shared_ptr<const Tokenizer> restricted;
  if (search_tries_used(options)) {
    const TaskData& data = *run.context.data;
    std::vector<std::vector<std::int64_t>> texts = data.train.ids;
    texts.insert(texts.end(), data.train_documents.begin(), data.train_documents.end());
    texts.insert(texts.end(), data.calibration.begin(), data.calibration.end());
    kept = kept_vocabulary(*run.current.tokenizer, texts, {});
    restricted = run.current.tokenizer->restrict_to(kept);
  }
  std::set<std::string> halves;  // parameters that half precision holds
  for (const auto& [name, value] : std::as_const(*original).parameters())
    if (at::equal(value.detach().to(at::kHalf).to(at::kFloat), value.detach().to(at::kFloat))) halves.insert(name);
  const auto target = [&](const Transformer& shapes, bool used) {
    // A refit changes biases.
    return budget_target(run.recipe, shapes, used && restricted ? *restricted : *run.current.tokenizer, false, [&halves, refit = options.compensate == "ls"](const std::string& name) { return !halves.count(name) || (refit && ends_with(name, ".bias")); });
  };
  BudgetSearch search(*original, options, kept, target, run.context);
  search.measure(search_cache(run, options, kept.size()));
  // Sizes are predicted from shapes; those of the candidates that are built are known to the byte. One that is too large by a few
  // bytes makes the room smaller for all.
  const auto exact_bytes = [&](const SearchPoint& point) {
    const std::unique_ptr<Transformer> model = search.cut(point.shape);
    const bool used = point.shape.used_vocabulary && !kept.empty();
    if (used) restrict_vocabulary(*model, kept);
    return budget_target(run.recipe, *model, used ? *restricted : *run.current.tokenizer, false).file_bytes(point.plan);
  };
  std::vector<SearchPoint> points;
  std::size_t measured = 0;
  for (int attempt = 0; attempt < 4; ++attempt) {
    points = search.solve(table ? &*table : nullptr);
    measured = std::min(points.size(), static_cast<std::size_t>(options.measure));
    std::int64_t excess = 0;
    for (std::size_t i = 0; i < measured; ++i) {
      points[i].bytes = exact_bytes(points[i]);
      excess = std::max(excess, points[i].bytes - search_limit(search_config(before, points[i].shape, static_cast<std::int64_t>(kept.size())), asked, table ? &*table : nullptr));
    }
    if (excess <= 0) break;
    if (attempt == 3) {  // every round may bring forward others that are larger than predicted: those that fit remain
      std::vector<SearchPoint> fit;
      for (std::size_t i = 0; i < measured; ++i)
        if (points[i].bytes <= search_limit(search_config(before, points[i].shape, static_cast<std::int64_t>(kept.size())), asked, table ? &*table : nullptr)) fit.push_back(points[i]);
      if (fit.empty()) throw Error("no candidate of the search fits the budget once it is built").at("search.budget").hint("raise the budget a little");
      points = std::move(fit);
      measured = points.size();
      break;
    }
    if (options.budget.bytes > 0) options.budget.bytes -= excess;
    if (options.budget.memory > 0) options.budget.memory -= excess;
  }
  std::size_t best = 0;
  for (std::size_t i = 0; i < measured; ++i) {
    points[i].measured = search.divergence(points[i]);
    log_info(str("  ", points[i].shape.text(), ": ", human_bytes(static_cast<double>(points[i].bytes)), ", predicted divergence ", fixed(points[i].predicted(), 4), ", measured ", fixed(points[i].measured, 4)));
    if (points[i].measured < points[best].measured) best = i;
  }
  const SearchPoint& chosen = points[best];
  std::shared_ptr<Transformer> result = search.cut(chosen.shape);
  if (chosen.shape.removed > 0) {
    std::vector<std::int64_t> map = run.context.layer_map;  // empty: layer i follows layer i
    for (std::int64_t layer = 0; run.context.layer_map.empty() && layer < before.layers; ++layer) map.push_back(layer);
    run.context.layer_map = layer_map_without(map, search.removed(chosen.shape));
  }
  run.current.quantized.clear();
  if (options.apply == "all") {
    QuantizationPlan plan;
    plan.tensors = chosen.plan;
    const QuantizedModel quantized = quantize(*result, search.quantize_options(), {}, run.context, &plan);
    for (const auto& [name, values] : quantized.tensors) run.current.quantized[name] = {plan.tensors.at(name), values};
  }
  if (chosen.shape.used_vocabulary && !kept.empty()) {
    // After quantization: the data are tokenized for the whole vocabulary, and rows of a grid are independent of each other.
    const at::Tensor rows = at::tensor(at::ArrayRef<std::int64_t>(kept), at::kLong);
    for (const std::string& name : {result->tokens.name, result->lm_head.weight.defined() ? result->lm_head.name : std::string()})
      if (const auto found = run.current.quantized.find(name); found != run.current.quantized.end())
        for (at::Tensor* part : {&found->second.values.codes, &found->second.values.scales, &found->second.values.offsets})
          if (part->defined()) *part = part->index_select(0, rows).contiguous();
    restrict_vocabulary(*result, kept);
    run.current.tokenizer = restricted;
  }
  run.current.model = result;
  if (!run.context.details) return;
  Json& details = *run.context.details;
  search_describe(details, search, options, chosen, before, result->config());
  Json report{{"apply", options.apply}, {"method", options.method}, {"criterion", options.criterion}, {"tokens", search.set().tokens}, {"calibration_sha256", search.set().hash}, {"shapes", points.size()}};
  for (const auto& [key, value] : {std::pair{"bytes", asked.bytes}, std::pair{"memory", asked.memory}})
    if (value > 0) report["budget"][key] = value;
  for (const auto& [key, value] : {std::pair{"latency_ms", options.budget.latency_ms}, std::pair{"joules", options.budget.joules}})
    if (value > 0) report["budget"][key] = value;
  report["chosen"] = search_point_json(chosen, before);
  report["candidates"] = Json::array(), report["frontier"] = Json::array();
  for (const SearchPoint& point : points) report["candidates"].push_back(search_point_json(point, before));
  for (const SearchPoint& point : search.frontier()) report["frontier"].push_back(search_point_json(point, before));
  Json rows = Json::array();
  for (const auto& [name, spec] : chosen.plan) rows.push_back({name, str(spec.grid->name, spec.grid->group_fixed || spec.group == 0 ? std::string() : str(":", spec.group))});
  report["formats"] = rows;
  report["seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  details["search"] = std::move(report);
  log_info(str(run.context.title, ": ", chosen.shape.text(), "; ", human_bytes(static_cast<double>(chosen.bytes)), " (", points.size(), " shapes fit)"));
}

}  // namespace kompakt
