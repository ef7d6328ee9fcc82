// The rows, and how a figure reads.
#include "report/metrics.h"

#include <array>
#include <cmath>

#include "core/error.h"
#include "core/text.h"

namespace kompakt {
namespace {

using Needs = Metric::Needs;

constexpr std::array<Metric, 24> metric_rows = {{
    {"accuracy", "accuracy", Unit::share, Better::higher, Needs::task, "share of right labels, Wilson 95% interval"},
    {"macro_f1", "macro-F1", Unit::share, Better::higher, Needs::task, "mean F1 over classes, bootstrap 95% interval"},
    {"ece", "calibration error", Unit::small_number, Better::lower, Needs::task, "expected calibration error, 15 bins"},
    {"agreement", "same label", Unit::share, Better::higher, Needs::task, "share of examples with the teacher's label"},
    {"perplexity", "perplexity", Unit::number, Better::lower, Needs::language, "exp of the mean negative log-likelihood"},
    {"kl", "KL", Unit::small_number, Better::lower, Needs::language, "mean divergence from the teacher, nats a token"},
    {"top1_agreement", "same top-1", Unit::share, Better::higher, Needs::language, "share of positions with the teacher's first choice"},
    {"rank_correlation", "rank correlation", Unit::small_number, Better::higher, Needs::embeddings, "Spearman's, of the similarities of a text to all others with those that the teacher sees; mean over texts"},
    {"same_nearest", "same nearest", Unit::share, Better::higher, Needs::embeddings, "share of texts whose nearest other text is the teacher's"},
    {"cosine", "cosine", Unit::small_number, Better::higher, Needs::embeddings, "mean cosine of a text's vector with the teacher's, where both are of one width"},
    {"previous_accuracy", "accuracy before", Unit::share, Better::higher, Needs::earlier_task, "share of right labels of the task that the model did before the run"},
    {"previous_macro_f1", "macro-F1 before", Unit::share, Better::higher, Needs::earlier_task, "mean F1 over the classes of that task"},
    {"previous_perplexity", "perplexity before", Unit::number, Better::lower, Needs::earlier_text, "perplexity of the text that the model was made for before the run"},
    {"bytes", "size", Unit::bytes, Better::lower, Needs::any, "bytes of whole files"},
    {"weight_bytes", "weights", Unit::bytes, Better::lower, Needs::any, "bytes of tensor data"},
    {"bits_per_weight", "bits/weight", Unit::number, Better::lower, Needs::any, "8 * bytes of whole files / parameters"},
    {"parameters", "parameters", Unit::count, Better::neither, Needs::any, "stored parameters, tied ones once"},
    {"embedding_share", "embedding share", Unit::share, Better::neither, Needs::any, "share of bytes taken by embeddings"},
    {"latency_ms", "latency", Unit::milliseconds, Better::lower, Needs::any, "milliseconds a request"},
    {"tokens_per_second", "tokens/s", Unit::rate, Better::higher, Needs::any, "tokens a second"},
    {"joules_per_token", "J/token", Unit::joules, Better::lower, Needs::any, "measured energy a token"},
    {"energy_joules", "energy", Unit::joules, Better::lower, Needs::any, "measured energy of making it"},
    {"peak_memory_bytes", "peak memory", Unit::bytes, Better::lower, Needs::any, "high-water mark of resident memory"},
    {"seconds", "time", Unit::seconds, Better::lower, Needs::any, "wall time of making it"},
}};

std::string metric_significant(double value) {
  const double size = std::abs(value);
  return size >= 1000 ? fixed(value, 0) : size >= 100 ? fixed(value, 1) : size >= 0.1 || value == 0 ? fixed(value, 2) : shortest(std::stod(str(value)));
}

}  // namespace

std::span<const Metric> metrics() { return metric_rows; }

const Metric* find_metric(std::string_view name) {
  for (const Metric& row : metric_rows) {
    if (row.name == name) return &row;
  }
  return nullptr;
}

std::vector<std::string> metric_names() {
  std::vector<std::string> names;
  for (const Metric& row : metric_rows) names.emplace_back(row.name);
  return names;
}

std::optional<double> number_of(const Json& value, const std::string& place) {
  if (value.is_null()) return std::nullopt;
  if (value.is_number()) return value.get<double>();
  for (const char* key : {"value", "mean"}) {
    if (value.is_object() && value.contains(key)) return number_of(value.at(key), str(place, ".", key));
  }
  throw Error(str(place, " is not a figure")).given(value.dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 60)).allowed("a number, null, or an object with \"value\" or \"mean\"");
}

std::optional<double> number_at(const Json& object, const std::string& key) {
  if (!object.is_object() || !object.contains(key)) return std::nullopt;
  return number_of(object.at(key), key);
}

const Json* find_json(const Json& root, std::initializer_list<const char*> path) {
  const Json* at = &root;
  for (const char* key : path) {
    if (!at->is_object() || !at->contains(key)) return nullptr;
    at = &at->at(key);
  }
  return at->is_null() ? nullptr : at;
}

std::string show_number(Unit unit, double value) {
  if (!std::isfinite(value)) return "–";
  switch (unit) {
    case Unit::share: return fixed(100 * value, 1) + "%";
    case Unit::number: return metric_significant(value);
    case Unit::small_number: return std::abs(value) >= 1 ? fixed(value, 2) : std::abs(value) >= 0.01 || value == 0 ? fixed(value, 3) : std::abs(value) >= 0.0001 ? fixed(value, 5) : str(value);
    case Unit::bytes: return human_bytes(value);
    case Unit::count: return human_count(value);
    case Unit::milliseconds: return str(metric_significant(value), " ms");
    case Unit::seconds: return human_seconds(value);
    case Unit::rate: return value >= 10000 ? human_count(value) : value >= 100 ? fixed(value, 0) : fixed(value, 1);
    case Unit::joules: return str(metric_significant(value), " J");
  }
  return {};
}

std::string show_metric(const Metric& metric, const Json& entry) {
  const auto value = number_at(entry, metric.name);
  if (!value) return "–";
  std::string text = show_number(metric.unit, *value);
  const Json& figure = entry.at(metric.name);
  const auto low = number_at(figure, "low"), high = number_at(figure, "high");
  if (!low || !high) return text;
  const double half = (*high - *low) / 2;
  return str(text, " ±", metric.unit == Unit::share ? fixed(100 * half, 1) : metric.unit == Unit::small_number ? fixed(half, *value >= 0.01 ? 3 : 5) : metric_significant(half));
}

std::string show_points(double share) {
  const std::string size = fixed(std::abs(100 * share), 1);
  return (size == "0.0" ? "±" : share < 0 ? "−" : "+") + size;
}

std::string show_times(double ratio) { return str(ratio >= 10 ? fixed(ratio, 0) : ratio >= 0.1 ? fixed(ratio, 1) : fixed(ratio, 2), "×"); }

std::size_t text_width(std::string_view text) {
  std::size_t width = 0;
  for (const char c : text) width += (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  return width;
}

}  // namespace kompakt
