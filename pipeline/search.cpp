#include "pipeline/search.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <set>

#include "core/error.h"
#include "core/files.h"
#include "core/log.h"
#include "core/system.h"
#include "core/text.h"
#include "model/depth.h"
#include "model/families.h"
#include "prune/depth.h"
#include "quantize/budget_probe.h"
#include "quantize/compensation.h"
#include "quantize/methods.h"
#include "quantize/sensitivity.h"
#include "quantize/tensors.h"
#include "train/measurement.h"

namespace kompakt {
namespace {

constexpr std::int64_t search_batch_tokens = 512, search_units = 1 << 14;
constexpr int search_curve_points = 6;  // limits of every shape between its smallest and its largest file

std::string search_format(const GridSpec& spec) { return str(spec.grid->name, ":", spec.group); }

double search_sum(const at::Tensor& scores, const std::vector<std::int64_t>& units) { return scores.index_select(0, at::tensor(at::ArrayRef<std::int64_t>(units), at::kLong)).sum().item<double>(); }

// Rows whose length the group does not divide are filled up with zeros: a narrower layer may have rows that it divides.
at::Tensor search_error(const at::Tensor& weight, const GridSpec& spec, const at::Tensor& inputs) {
  const std::int64_t columns = weight.size(1), group = spec.span_for(columns), missing = (group - columns % group) % group;
  if (missing == 0) return rounding_error(weight, spec, inputs);
  const at::Tensor wide = at::constant_pad_nd(weight, {0, missing});
  return rounding_error(wide, spec, inputs.defined() ? at::constant_pad_nd(inputs, {0, missing}) : inputs).slice(1, 0, columns).contiguous();
}

std::int64_t search_rows(const StageContext& context, std::int64_t tokens) {
  const bool windows = context.data && context.data->kind == TaskData::Kind::text && !context.data->calibration.empty();
  const std::int64_t length = windows ? static_cast<std::int64_t>(context.data->calibration.front().size()) : 32;
  return std::max<std::int64_t>(1, (tokens + length - 1) / std::max<std::int64_t>(1, length));
}

std::vector<double> search_shares(const std::vector<std::string>& texts, const char* key) {
  std::vector<double> out;
  for (const std::string& text : texts) {
    const auto share = parse_double(text);
    if (!share || *share <= 0 || *share > 1) throw Error("a share is a number above 0, at most 1").at(str("search.", key)).given(text).allowed("such as 0.75");
    out.push_back(*share);
  }
  return out;
}

template <class Map>
Json search_map(const Map& map) {
  Json out = Json::array();
  for (const auto& [key, value] : map) out.push_back({key, value});
  return out;
}

std::map<std::int64_t, double> search_unmap(const Json& list) {
  std::map<std::int64_t, double> out;
  for (const Json& pair : list) out[pair.at(0).get<std::int64_t>()] = pair.at(1).get<double>();
  return out;
}

}  // namespace

void fields(FieldVisitor& visitor, SearchOptions& options) {
  visitor.section("budget", options.has_budget, "what the result may cost: any of bytes, memory, latency_ms, joules", [&](FieldVisitor& inner) {
    SearchBudget& b = options.budget;
    inner.bytes("bytes", b.bytes, "largest size of the artifact file, such as 62MB");
    inner.bytes("memory", b.memory, "largest size of the file and the key/value cache (half precision) of `context` tokens together");
    inner.integer("context", b.context, "tokens of that cache", {.min = 1});
    inner.number("latency_ms", b.latency_ms, "longest time of one forward pass, by latency_table", {.min = 0});
    inner.number("joules", b.joules, "energy of the same, by the table's mean power", {.min = 0});
    inner.text("latency_table", b.latency_table, "file of `kompakt doctor --latency-table FILE --model DIR`");
  });
  visitor.integers("layers", options.layers, "numbers of layers to remove that are tried; 0 is always among them", {.min = 0});
  visitor.texts("ffn", options.ffn, "shares of feed-forward neurons kept that are tried; 1 is always among them");
  visitor.texts("heads", options.heads, "shares of attention heads kept that are tried; 1 is always among them");
  visitor.texts("vocabulary", options.vocabulary, "vocabularies that are tried: all, used (what the data use)");
  visitor.texts("formats", options.formats, "grids to choose among, with a group as in int4:128; empty = those that suit the export");
  visitor.choice("criterion", options.criterion, "importance of a neuron or head", criterion_names());
  visitor.choice("depth", options.depth, "which layer goes first", {"removal_kl", "block_influence"});
  visitor.choice("compensate", options.compensate, "least-squares refit of what reads the removed units", {"none", "ls"});
  visitor.integer("samples", options.samples, "training examples or calibration windows that importance is measured on", {.min = 1});
  visitor.integer("multiple_of", options.multiple_of, "feed-forward widths are rounded to a multiple", {.min = 1});
  visitor.integer("tokens", options.tokens, "calibration tokens that divergences are measured on", {.min = 16});
  visitor.integer("measure", options.measure, "so many of the best predicted candidates are built and measured; the best measured is taken", {.min = 1, .max = 64});
  visitor.choice("method", options.method, "how candidates are quantized when they are measured and applied", {"rtn", "gptq", "hqq", "trifit"});
  visitor.choice("apply", options.apply, "shape: the model is cut and stays float, a later quantize stage with the same budget chooses formats anew (after a recovery, for instance); all: it is quantized with the formats found", {"shape", "all"});
}

void check_search(const SearchOptions& options, const std::string& place, Problems& problems) {
  const SearchBudget& b = options.budget;
  if (!options.has_budget || (b.bytes == 0 && b.memory == 0 && b.latency_ms == 0 && b.joules == 0))
    problems.add(Error("a search needs a budget").at(place).allowed("any of bytes, memory, latency_ms, joules").hint("write budget: {bytes: 62MB}"));
  if ((b.latency_ms > 0 || b.joules > 0) == b.latency_table.empty())
    problems.add(Error(b.latency_table.empty() ? "times and energies are read from a latency table" : "the latency table would not be used").at(place).given(b.latency_table.empty() ? "no latency_table" : b.latency_table)
                     .hint(b.latency_table.empty() ? "make one with kompakt doctor --latency-table FILE --model DIR" : "add latency_ms or joules, or leave latency_table out"));
  if (b.memory == 0 && b.context != SearchBudget().context) problems.add(Error("budget.context counts for budget.memory alone").at(place).given(str(b.context)).hint("add memory, or leave context out"));
  for (const std::string& name : options.vocabulary)
    if (name != "all" && name != "used") problems.add(Error("unknown vocabulary").at(place).given(name).allowed("all, used"));
  if (options.vocabulary.empty()) problems.add(Error("no vocabulary to try").at(place).allowed("all, used"));
  for (const auto& [list, key] : {std::pair{&options.ffn, "ffn"}, std::pair{&options.heads, "heads"}}) {
    try {
      search_shares(*list, key);
    } catch (const Error& error) {
      problems.add(error);
    }
  }
  for (const std::string& text : options.formats) grid_format(text, "search.formats", problems);
  const auto has_zero_points = [](const std::string& text) {
    const Grid* grid = find_grid(text.substr(0, text.find(':')));
    return grid && grid->asymmetric && !grid->kquant;
  };
  if (const QuantizationMethod* method = find_quantization_method(options.method); method && method->needs_asymmetric && !options.formats.empty() && std::none_of(options.formats.begin(), options.formats.end(), has_zero_points))
    problems.add(Error(str("method ", method->name, " moves zero points, and no format of the search has them")).at(place).given(join(options.formats, ", ")).allowed("a format such as int4_asym:64 among them").hint("add one, or take method: rtn"));
}

std::string SearchShape::text() const { return str(removed == 0 ? "no" : std::to_string(removed), " layers less, ffn ", ffn, ", ", heads.heads, " heads", used_vocabulary ? ", used vocabulary" : ""); }

std::vector<SearchShape> search_shapes(const ModelConfig& config, const SearchOptions& options) {
  std::set<std::int64_t, std::greater<>> widths = {config.ffn};
  for (const double share : search_shares(options.ffn, "ffn")) widths.insert(plan_width(config.ffn, share, options.multiple_of));
  std::vector<HeadPlan> heads = {{config.heads, config.kv_heads}};
  for (const double share : search_shares(options.heads, "heads")) {
    const HeadPlan plan = plan_heads(config.heads, config.kv_heads, share);
    if (std::none_of(heads.begin(), heads.end(), [&](const HeadPlan& h) { return h.heads == plan.heads; })) heads.push_back(plan);
  }
  std::set<std::int64_t> layers = {0};
  for (const std::int64_t n : options.layers) {
    if (n >= config.layers) throw Error(str("removing ", n, " of ", config.layers, " layers leaves nothing")).at("search.layers").given(str(n)).allowed(str("0 to ", config.layers - 1));
    layers.insert(n);
  }
  std::vector<SearchShape> out;
  for (const bool used : {false, true}) {
    if (std::find(options.vocabulary.begin(), options.vocabulary.end(), used ? "used" : "all") == options.vocabulary.end()) continue;
    for (const std::int64_t n : layers)
      for (const std::int64_t width : widths)
        for (const HeadPlan& plan : heads) out.push_back({n, width, plan, used});
  }
  return out;
}

ModelConfig search_config(const ModelConfig& config, const SearchShape& shape, std::int64_t pieces) {
  ModelConfig out = with_layers(config, config.layers - shape.removed);
  out.ffn = shape.ffn, out.heads = shape.heads.heads, out.kv_heads = shape.heads.kv_heads;
  if (shape.used_vocabulary && pieces > 0) out.vocab = pieces;
  return out;
}

std::optional<BudgetFrame> search_frame(const ModelConfig& config, const SearchOptions& options, const BudgetTarget& target, std::string& why) {
  QuantizeOptions open;
  open.has_budget = true, open.budget.bytes = std::numeric_limits<std::int64_t>::max() / 4;
  for (const std::string& text : options.formats.empty() ? target.formats : options.formats) {
    Problems problems;
    const auto read = grid_format(text, "search.formats", problems);
    problems.throw_if_any("the formats of the search");
    const GridSpec spec = *read;
    const auto fits = [&](std::int64_t columns) {
      std::string reason;
      return columns % spec.span_for(columns) == 0 && target.holds(spec, columns, reason);
    };
    if (fits(config.hidden) || fits(config.ffn) || fits(config.heads * config.head_dim)) open.budget.formats.push_back(text);
  }
  if (open.budget.formats.empty()) {
    why = "no format of the search fits rows of this shape";
    return std::nullopt;
  }
  try {
    return budget_frame(config, open, target);
  } catch (const Error& error) {
    why = error.what();
    return std::nullopt;
  }
}

std::int64_t search_limit(const ModelConfig& config, const SearchBudget& budget, const LatencyTable* table) {
  std::int64_t limit = std::numeric_limits<std::int64_t>::max() / 8;
  if (budget.bytes > 0) limit = budget.bytes;
  if (budget.memory > 0) {
    const std::int64_t cache = config.family->encoder ? 0 : config.layers * 2 * config.kv_heads * config.head_dim * budget.context * 2;
    limit = std::min(limit, budget.memory - cache);
  }
  if (table) {
    const double ms = table->milliseconds(config);
    if (budget.latency_ms > 0 && ms > budget.latency_ms) return -1;
    if (budget.joules > 0 && ms / 1e3 * table->watts.value_or(0) > budget.joules) return -1;
  }
  return limit;
}

std::string search_budget_text(const SearchBudget& budget) {
  std::vector<std::string> all;
  for (const auto& [key, value] : {std::pair{"bytes", budget.bytes}, std::pair{"memory", budget.memory}})
    if (value > 0) all.push_back(str(key, ": ", value, " (", human_bytes(static_cast<double>(value)), ")"));
  for (const auto& [key, value] : {std::pair{"latency_ms", budget.latency_ms}, std::pair{"joules", budget.joules}})
    if (value > 0) all.push_back(str(key, ": ", shortest(value)));
  return join(all, ", ");
}

BudgetSearch::BudgetSearch(Transformer& model, const SearchOptions& options, std::vector<std::int64_t> kept, TargetOf target, StageContext& context)
    : model_(model), options_(options), kept_(std::move(kept)), target_(std::move(target)), context_(context), shapes_(search_shapes(model.config(), options)) {
  if (model.config().family->encoder && !model.config().is_classifier())
    throw Error("a search weighs candidates by the model's predictions, and this encoder makes none").at(context.title).hint("put finetune or distill before it");
  set_ = smaller_batches(calibration_set(context, search_rows(context, options.tokens), "a recipe without search"), search_batch_tokens);
  batches_ = measuring_batches(*context.data, options.samples, context.seed);
  probe_ = std::make_unique<BudgetProbe>(model, set_);
}

BudgetSearch::~BudgetSearch() = default;

bool search_feeds_back(const SearchOptions& options) {
  const QuantizationMethod* method = find_quantization_method(options.method);
  return method && method->needs_calibration;
}

QuantizeOptions BudgetSearch::quantize_options() const {
  QuantizeOptions out;
  out.method = options_.method;
  return out;
}

std::vector<std::int64_t> BudgetSearch::removed(const SearchShape& shape) const { return {order_.begin(), order_.begin() + shape.removed}; }

std::vector<KeptUnits> BudgetSearch::units(const SearchShape& shape) const { return choose_units(model_, scores_, shape.ffn, shape.heads); }

std::unique_ptr<Transformer> BudgetSearch::cut(const SearchShape& shape) const {
  const at::NoGradGuard no_grad;
  std::unique_ptr<Transformer> out = model_.clone();
  std::vector<KeptUnits> kept = units(shape);
  if (shape.removed > 0) {
    const std::vector<std::int64_t> gone = removed(shape);
    std::vector<std::int64_t> left;
    std::vector<KeptUnits> left_units;
    for (std::int64_t layer = 0; layer < model_.config().layers; ++layer)
      if (std::find(gone.begin(), gone.end(), layer) == gone.end()) left.push_back(layer), left_units.push_back(kept[static_cast<std::size_t>(layer)]);
    keep_blocks(*out, left);
    kept = std::move(left_units);
  }
  if (shape.ffn == model_.config().ffn && shape.heads.heads == model_.config().heads) return out;
  if (options_.compensate == "ls") cut_units_with_refit(*out, kept, batches_);
  else cut_units(*out, kept);
  return out;
}

void BudgetSearch::recall(const std::filesystem::path& file) {
  const ModelConfig& config = model_.config();
  const Json saved = read_json(file);
  const auto list = [&](const char* key, std::int64_t width) {
    std::vector<at::Tensor> out;
    for (const Json& row : saved.at(key)) out.push_back(at::tensor(at::ArrayRef<double>(row.get<std::vector<double>>()), at::kDouble).clone());
    if (static_cast<std::int64_t>(out.size()) != config.layers || std::any_of(out.begin(), out.end(), [&](const at::Tensor& row) { return row.numel() != width; })) throw std::runtime_error(str(key, " is of another model"));
    return out;
  };
  auto order = saved.at("order").get<std::vector<std::int64_t>>();
  auto depth = search_unmap(saved.at("depth")), ffn = search_unmap(saved.at("ffn")), heads = search_unmap(saved.at("heads"));
  const double vocabulary = saved.at("vocabulary").get<double>();
  UnitScores scores{list("scores_ffn", config.ffn), list("scores_heads", config.heads)};
  auto sensitivities = saved.at("sensitivities").get<std::map<std::string, std::map<std::string, double>>>();
  for (const SearchShape& shape : shapes_)
    if (!depth.count(shape.removed) || !ffn.count(shape.ffn) || !heads.count(shape.heads.heads) || static_cast<std::int64_t>(order.size()) < shape.removed) throw std::runtime_error(str("nothing of ", shape.text()));
  order_ = std::move(order), depth_kl_ = std::move(depth), ffn_kl_ = std::move(ffn), heads_kl_ = std::move(heads), vocabulary_kl_ = vocabulary, scores_ = std::move(scores), sensitivities_ = std::move(sensitivities);
}

void BudgetSearch::measure(const std::filesystem::path& file) {
  const ModelConfig& config = model_.config();
  if (recall_measurement(context_, file, "importance and sensitivities", [&] { recall(file); })) return;
  std::map<std::string, std::vector<GridSpec>> wanted;  // formats of all shapes, by tensors of the uncut model
  for (const SearchShape& shape : shapes_) {
    const ModelConfig cut_config = search_config(config, shape, static_cast<std::int64_t>(kept_.size()));
    const Transformer shapes(cut_config, 0, c10::Device(c10::kMeta));
    std::string why;
    const std::optional<BudgetFrame> frame = search_frame(cut_config, options_, target_(shapes, shape.used_vocabulary), why);
    if (!frame) continue;
    // Names are those of a model with all layers: every width is among the shapes without removal, too.
    for (const BudgetTensor& tensor : frame->tensors)
      for (const GridSpec& spec : tensor.formats) {
        auto& list = wanted[tensor.name];
        if (std::none_of(list.begin(), list.end(), [&](const GridSpec& s) { return s.grid == spec.grid && s.group == spec.group; })) list.push_back(spec);
      }
  }
  scores_ = measure_units(*find_criterion(options_.criterion), model_, batches_, context_.seed);
  std::int64_t most = 0;
  std::set<std::int64_t> depths, widths, heads;
  for (const SearchShape& shape : shapes_) most = std::max(most, shape.removed), depths.insert(shape.removed), widths.insert(shape.ffn), heads.insert(shape.heads.heads);
  if (most > 0) {
    const std::unique_ptr<Transformer> victim = model_.clone();
    order_ = remove_layers(*victim, most, batches_, options_.depth);
  }
  Progress progress(str(context_.title, ": structure"), static_cast<std::int64_t>(depths.size() + widths.size() + heads.size()), "cut");
  std::int64_t done = 0;
  const SearchShape whole = {0, config.ffn, {config.heads, config.kv_heads}, false};
  const auto alone = [&](SearchShape shape) {
    check_interrupted();
    const bool uncut = shape.removed == 0 && shape.ffn == config.ffn && shape.heads.heads == config.heads;
    const double kl = uncut ? 0 : std::max(0.0, probe_->divergence(*cut(shape)));
    progress.update(++done, str(shape.text(), ": ", fixed(kl, 4)));
    return kl;
  };
  for (const std::int64_t n : depths) depth_kl_[n] = alone({n, whole.ffn, whole.heads, false});
  for (const std::int64_t width : widths) ffn_kl_[width] = alone({0, width, whole.heads, false});
  for (const SearchShape& shape : shapes_)
    if (!heads_kl_.count(shape.heads.heads)) heads_kl_[shape.heads.heads] = alone({0, whole.ffn, shape.heads, false});
  progress.finish();
  if (!kept_.empty() && !config.is_classifier()) vocabulary_kl_ = std::max(0.0, probe_->divergence(model_, at::tensor(at::ArrayRef<std::int64_t>(kept_), at::kLong).to(model_.device())));
  SensitivityRequest request;
  request.formats = wanted, request.error = search_error, request.seed = context_.seed;
  // What the candidates' method makes of rounding errors: without it few bits look worse than they are, and the search cuts instead.
  if (search_feeds_back(options_))
    request.reduction = [damping = quantize_options().damping](const std::string&, const at::Tensor& inputs) { return compensation_ratio(inputs, damping); };
  for (const auto& [name, sensitivity] : measure_sensitivities(model_, set_, request))
    for (std::size_t f = 0; f < wanted.at(name).size(); ++f) sensitivities_[name][search_format(wanted.at(name)[f])] = sensitivity.divergence.at(f);
  if (!file.empty()) {
    make_folder(file.parent_path());
    write_json(file, measured_json());
  }
}

Json BudgetSearch::measured_json() const {
  const auto list = [](const std::vector<at::Tensor>& tensors) {
    Json out = Json::array();
    for (const at::Tensor& t : tensors) {
      const at::Tensor flat = t.to(at::kCPU, at::kDouble).contiguous();
      out.push_back(std::vector<double>(flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel()));
    }
    return out;
  };
  return Json{{"order", order_}, {"depth", search_map(depth_kl_)}, {"ffn", search_map(ffn_kl_)}, {"heads", search_map(heads_kl_)}, {"vocabulary", vocabulary_kl_},
              {"scores_ffn", list(scores_.ffn)}, {"scores_heads", list(scores_.heads)}, {"sensitivities", sensitivities_}};
}

double BudgetSearch::structure(const SearchShape& shape) const {
  const ModelConfig& config = model_.config();
  double out = depth_kl_.at(shape.removed) + (shape.used_vocabulary ? vocabulary_kl_ : 0);
  if (shape.ffn == config.ffn && shape.heads.heads == config.heads) return out;
  // Of what all layers lose, the share of those that stay.
  const std::vector<std::int64_t> gone = removed(shape);
  const std::vector<KeptUnits> kept = units(shape);
  double ffn_all = 0, ffn_left = 0, heads_all = 0, heads_left = 0;
  for (std::size_t layer = 0; layer < kept.size(); ++layer) {
    const bool stays = std::find(gone.begin(), gone.end(), static_cast<std::int64_t>(layer)) == gone.end();
    const double f = scores_.ffn[layer].sum().item<double>() - search_sum(scores_.ffn[layer], kept[layer].ffn);
    const double h = scores_.heads[layer].sum().item<double>() - search_sum(scores_.heads[layer], kept[layer].heads);
    ffn_all += f, heads_all += h;
    if (stays) ffn_left += f, heads_left += h;
  }
  const double even = static_cast<double>(config.layers - shape.removed) / static_cast<double>(config.layers);
  return out + ffn_kl_.at(shape.ffn) * (ffn_all > 0 ? ffn_left / ffn_all : even) + heads_kl_.at(shape.heads.heads) * (heads_all > 0 ? heads_left / heads_all : even);
}

std::map<std::string, std::pair<std::string, double>> BudgetSearch::origins(const SearchShape& shape) const {
  std::map<std::string, std::pair<std::string, double>> out;
  if (scores_.ffn.empty()) return out;
  const std::vector<std::int64_t> gone = removed(shape);
  const std::vector<KeptUnits> kept = units(shape);
  const std::vector<Linear*> old = model_.linears();
  const std::size_t each = old.size() / model_.blocks.size();
  std::size_t fresh = 0;  // the names of the first blocks are those that stay
  for (std::size_t layer = 0; layer < model_.blocks.size(); ++layer) {
    if (std::find(gone.begin(), gone.end(), static_cast<std::int64_t>(layer)) != gone.end()) continue;
    const auto share = [](const at::Tensor& scores, const std::vector<std::int64_t>& stays) {
      const double all = scores.sum().item<double>();
      return all > 0 ? search_sum(scores, stays) / all : static_cast<double>(stays.size()) / static_cast<double>(scores.numel());
    };
    const Attention& a = model_.blocks[layer].attention;
    const double heads = share(scores_.heads[layer], kept[layer].heads), ffn = share(scores_.ffn[layer], kept[layer].ffn);
    for (std::size_t k = 0; k < each; ++k) {
      const std::string& name = old[layer * each + k]->name;
      const bool own = name == a.query.name || name == a.output.name, shared = name == a.key.name || name == a.value.name;
      out[old[fresh * each + k]->name] = {name, own ? heads : shared ? (shape.heads.kv_heads < a.kv_heads ? heads : 1.0) : ffn};
    }
    ++fresh;
  }
  return out;
}

double BudgetSearch::predict(const SearchShape& shape, const std::map<std::string, GridSpec>& plan) const {
  const auto names = origins(shape);
  double sum = structure(shape);
  for (const auto& [name, spec] : plan) {
    const auto found = names.find(name);
    sum += found == names.end() ? sensitivities_.at(name).at(search_format(spec)) : sensitivities_.at(found->second.first).at(search_format(spec)) * found->second.second;
  }
  return sum;
}

std::vector<SearchPoint> BudgetSearch::solve(const LatencyTable* table) {
  std::vector<SearchPoint> found, all;
  std::int64_t smallest = std::numeric_limits<std::int64_t>::max();
  std::string reason;
  double fastest = std::numeric_limits<double>::infinity();
  Progress progress(str(context_.title, ": candidates"), static_cast<std::int64_t>(shapes_.size()), "shape");
  std::int64_t done = 0;
  for (const SearchShape& shape : shapes_) {
    check_interrupted();
    const ModelConfig config = search_config(model_.config(), shape, static_cast<std::int64_t>(kept_.size()));
    const Transformer shapes(config, 0, c10::Device(c10::kMeta));
    const BudgetTarget target = target_(shapes, shape.used_vocabulary);
    std::string why;
    const std::optional<BudgetFrame> stored = search_frame(config, options_, target, why);
    progress.update(++done);
    if (!stored) {
      if (reason.empty()) reason = why;
      continue;
    }
    const BudgetFrame& frame = *stored;
    const auto names = origins(shape);
    std::vector<KnapsackItem> items;
    std::int64_t floor = 0;
    for (const BudgetTensor& tensor : frame.tensors) {
      const auto origin = names.find(tensor.name);
      const auto& costs = sensitivities_.at(origin == names.end() ? tensor.name : origin->second.first);
      items.emplace_back();
      for (const GridSpec& spec : tensor.formats) items.back().push_back({target.tensor_bytes(spec, tensor.rows, tensor.columns), costs.at(search_format(spec)) * (origin == names.end() ? 1.0 : origin->second.second)});
      floor += std::min_element(items.back().begin(), items.back().end(), [](const auto& a, const auto& b) { return a.bytes < b.bytes; })->bytes;
    }
    const std::int64_t fixed_bytes = frame.smallest_bytes - floor, limit = search_limit(config, options_.budget, table);
    const Knapsack knapsack(items, std::max(frame.largest_bytes, frame.smallest_bytes) - fixed_bytes, search_units);
    SearchPoint base{shape, {}, 0, 0, structure(shape), 0, table ? table->milliseconds(config) : 0, -1};
    const auto solve_for = [&](std::int64_t bytes, SearchPoint& point) {
      std::int64_t room = std::min(bytes, frame.largest_bytes) - fixed_bytes;
      for (KnapsackChoice choice = knapsack.solve(room); !choice.option.empty(); choice = knapsack.solve(room)) {
        point = base;
        for (std::size_t i = 0; i < items.size(); ++i) point.plan[frame.tensors[i].name] = frame.tensors[i].formats[choice.option[i]];
        point.bytes = target.file_bytes(point.plan), point.limit = bytes, point.formats = choice.cost;
        if (point.bytes <= bytes) return true;
        room -= point.bytes - bytes;  // headers may differ by a few bytes
      }
      return false;
    };
    SearchPoint point;
    for (int i = 0; i <= search_curve_points; ++i)
      if (solve_for(frame.smallest_bytes + (frame.largest_bytes - frame.smallest_bytes) * i / search_curve_points, point)) all.push_back(point);
    if (limit >= 0 && solve_for(limit, point)) found.push_back(point), all.push_back(point);
    smallest = std::min(smallest, frame.smallest_bytes), fastest = std::min(fastest, base.latency_ms);
  }
  progress.finish();
  const auto better = [](const SearchPoint& a, const SearchPoint& b) { return a.predicted() != b.predicted() ? a.predicted() < b.predicted() : a.bytes < b.bytes; };
  std::stable_sort(found.begin(), found.end(), better);
  std::stable_sort(all.begin(), all.end(), [](const SearchPoint& a, const SearchPoint& b) { return a.bytes != b.bytes ? a.bytes < b.bytes : a.predicted() < b.predicted(); });
  frontier_.clear();
  for (SearchPoint& point : all)
    if (frontier_.empty() || point.predicted() < frontier_.back().predicted()) frontier_.push_back(std::move(point));
  if (frontier_.empty()) throw Error(str("no shape of the search can be stored: ", reason)).at("search").hint("name formats with smaller groups, or other widths and multiple_of");
  if (found.empty()) {
    Error error("no shape of the search fits the budget");
    error.at("search.budget").given(search_budget_text(options_.budget));
    error.allowed(table ? str("files from ", human_bytes(static_cast<double>(smallest)), ", passes from ", fixed(fastest, 3), " ms") : str("files from ", smallest, " bytes"));
    error.hint("raise the budget, or let the search remove more (layers, ffn, heads, vocabulary: [used])");
    throw error;
  }
  return found;
}

double BudgetSearch::divergence(const SearchPoint& point) const {
  const std::unique_ptr<Transformer> candidate = cut(point.shape);
  StageContext quiet = context_;
  quiet.details = nullptr;
  quiet.work = context_.work.empty() ? context_.work : context_.work / "candidate";
  if (!quiet.work.empty()) make_folder(quiet.work);
  quiet.resume = false;
  QuantizationPlan plan;
  plan.tensors = point.plan;
  quantize(*candidate, quantize_options(), {}, quiet, &plan);
  if (!quiet.work.empty()) std::filesystem::remove_all(quiet.work);
  const bool rows = point.shape.used_vocabulary && !kept_.empty() && !model_.config().is_classifier();
  return probe_->divergence(*candidate, rows ? at::tensor(at::ArrayRef<std::int64_t>(kept_), at::kLong).to(model_.device()) : at::Tensor());
}

}  // namespace kompakt
