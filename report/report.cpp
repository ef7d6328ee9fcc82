// Manifest to report: one layout for teacher, stages and artifact; what is absent becomes null with a reason.
#include "report/report.h"

#include <algorithm>
#include <array>
#include <map>
#include <vector>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"
#include "report/gates.h"
#include "report/metrics.h"
#include "report/verdict.h"

namespace kompakt {
namespace {
namespace fs = std::filesystem;

constexpr const char* report_not_measured = "not measured in this run";

const Json& report_member(const Json& object, const char* key, Json::value_t type, const std::string& place) {
  static const Json empty_object = Json::object(), empty_array = Json::array();
  const Json* value = find_json(object, {key});
  if (!value) return type == Json::value_t::array ? empty_array : empty_object;
  if (value->type() != type) throw Error(str("\"", key, "\" of the manifest has the wrong type")).at(place).given(value->type_name()).allowed(type == Json::value_t::array ? "a list" : "an object");
  return *value;
}

void report_copy(const Json& from, Json& to, std::initializer_list<const char*> keys) {
  for (const char* key : keys) {
    if (const Json* value = find_json(from, {key})) to[key] = *value;
  }
}

// The split whose score stands in headings: test before dev before any other, and the only one when there is one.
std::string report_headline(Json groups, std::initializer_list<const char*> preferred) {
  groups.erase("previous");  // of the task before: figures of its own
  for (const char* name : preferred) {
    if (groups.contains(name)) return name;
  }
  return groups.empty() ? std::string() : groups.begin().key();
}

// Figures of a MODEL at the top level of an entry, where every reader finds them.
void report_model(const Json& model, Json& entry, const std::string& place) {
  report_copy(model, entry, {"label", "path", "bytes", "weight_bytes", "parameters", "bits_per_weight", "embedding_share", "shape"});
  const Json& tasks = report_member(model, "tasks", Json::value_t::object, place);
  if (const std::string name = report_headline(tasks, {"test", "dev"}); !name.empty()) {
    const Json& task = report_member(tasks, name.c_str(), Json::value_t::object, place);
    entry["task"] = name;
    report_copy(task, entry, {"n", "accuracy", "macro_f1", "ece"});
    if (const Json* versus = find_json(task, {"versus_start"})) report_copy(*versus, entry["versus_start"], {"accuracy_difference", "macro_f1_difference"});
    if (const Json* versus = find_json(task, {"versus_teacher"})) {
      entry["versus_teacher"] = *versus;
      report_copy(*versus, entry, {"agreement"});
    }
  }
  const Json& texts = report_member(model, "language", Json::value_t::object, place);
  if (const std::string name = report_headline(texts, {}); !name.empty()) {
    entry["text"] = name;
    report_copy(report_member(texts, name.c_str(), Json::value_t::object, place), entry, {"perplexity", "kl", "top1_agreement"});
    if (const Json* versus = find_json(texts, {name.c_str(), "versus_start"})) report_copy(*versus, entry["versus_start"], {"perplexity_ratio"});
  }
  const Json& vectors = report_member(model, "embeddings", Json::value_t::object, place);
  if (const std::string name = report_headline(vectors, {"test"}); !name.empty()) report_copy(report_member(vectors, name.c_str(), Json::value_t::object, place), entry, {"rank_correlation", "same_nearest", "cosine"});
  for (const auto& [groups, names] : {std::pair(&tasks, std::array<const char*, 2>{"accuracy", "macro_f1"}), std::pair(&texts, std::array<const char*, 2>{"perplexity", ""})}) {
    const Json* before = find_json(*groups, {"previous"});
    for (const std::string metric : names) {
      if (!before || metric.empty()) continue;
      if (const Json* value = find_json(*before, {metric.c_str()})) entry["previous_" + metric] = *value;
      for (const char* pair : {"_difference", "_ratio"})
        if (const Json* versus = find_json(*before, {"versus_start", (metric + pair).c_str()})) entry["versus_start"]["previous_" + metric + pair] = *versus;
    }
  }
  if (const Json* latency = find_json(model, {"latency_ms"})) {
    if (const auto value = number_of(*latency, "latency_ms")) entry["latency_ms"] = *value;
    if (const Json* protocol = find_json(*latency, {"protocol"})) entry["latency_protocol"] = *protocol;
  }
  report_copy(model, entry, {"tokens_per_second", "joules_per_token"});
  if (!tasks.empty()) entry["tasks"] = tasks;
  if (!texts.empty()) entry["language"] = texts;
  if (!vectors.empty()) entry["embeddings"] = vectors;
  if (!entry.contains("bits_per_weight")) {
    const auto bytes = number_at(entry, "bytes"), parameters = number_at(entry, "parameters");
    if (bytes && parameters && *parameters > 0) entry["bits_per_weight"] = 8 * *bytes / *parameters;
  }
}

// What any model of a run was measured on.
struct ReportKinds {
  bool tasks = false, texts = false, vectors = false, earlier_tasks = false, earlier_texts = false;
  const char* reason_without(Metric::Needs needs) const {  // null where it was measured
    switch (needs) {
      case Metric::Needs::any: return nullptr;
      case Metric::Needs::task: return tasks ? nullptr : no_task_reason;
      case Metric::Needs::language: return texts ? nullptr : no_text_reason;
      case Metric::Needs::embeddings: return vectors ? nullptr : no_embedding_reason;
      case Metric::Needs::earlier_task: return earlier_tasks ? nullptr : no_earlier_reason;
      case Metric::Needs::earlier_text: return earlier_texts ? nullptr : no_earlier_reason;
    }
    return nullptr;
  }
};

// Every metric that the entry lacks becomes null with a reason.
void report_nulls(const Json& model, Json& entry, const ReportKinds& kinds, Json reasons) {
  if (const Json* given = find_json(model, {"nulls"})) reasons.update(*given);
  Json nulls = Json::object();
  for (const Metric& metric : metrics()) {
    if (number_at(entry, metric.name)) continue;
    entry[metric.name] = nullptr;
    const char* foreign = kinds.reason_without(metric.needs);
    nulls[metric.name] = reasons.contains(metric.name) ? reasons[metric.name] : Json(foreign ? foreign : report_not_measured);
  }
  entry["nulls"] = nulls;
}

// this / teacher. Time and energy of making a model have no counterpart; nor has a stage's memory, which is that of training.
void report_ratios(const Json& teacher, Json& entry) {
  Json ratios = Json::object();
  for (const Metric& metric : metrics()) {
    const auto mine = number_at(entry, metric.name), theirs = number_at(teacher, metric.name);
    const std::string name = metric.name;
    if (name == "seconds" || name == "energy_joules" || (name == "peak_memory_bytes" && entry.contains("stage"))) continue;
    if (mine && theirs && *theirs > 0 && metric.unit != Unit::share) ratios[metric.name] = *mine / *theirs;
  }
  entry["ratio_to_teacher"] = ratios;
}

// {"seconds": {"predicted":70,"measured":81.2,"ratio":1.16}}: measured over predicted.
Json report_predictions(const Json& predicted, const Json& entry) {
  Json result = Json::object();
  for (const auto& [key, value] : predicted.items()) {
    const auto expected = number_of(value, str("predicted.", key)), measured = number_at(entry, key);
    if (!expected) continue;
    result[key] = {{"predicted", *expected}, {"measured", measured ? Json(*measured) : Json()}, {"ratio", measured && *expected > 0 ? Json(*measured / *expected) : Json()}};
  }
  return result;
}

// Some model has figures of a group ("tasks", "language"): of the task before, or of any other.
bool report_any(const Json& manifest, const char* group, bool earlier) {
  const auto has = [&](const Json& model) {
    const Json* found = find_json(model, {group});
    if (!found || !found->is_object()) return false;
    return earlier ? found->contains("previous") : found->size() > (found->contains("previous") ? 1u : 0u);
  };
  if (const Json* start = find_json(manifest, {"start"}); start && has(*start)) return true;
  if (const Json* teacher = find_json(manifest, {"teacher"}); teacher && has(*teacher)) return true;
  if (const Json* artifact = find_json(manifest, {"artifact"}); artifact && has(*artifact)) return true;
  if (const Json* stages = find_json(manifest, {"stages"})) {
    for (const Json& stage : *stages) {
      if (const Json* model = find_json(stage, {"model"}); model && has(*model)) return true;
    }
  }
  return false;
}

// A report shows the shape of a curve; metrics.jsonl keeps every step.
void report_thin(Json& stage) {
  constexpr std::size_t most = 400;
  if (!find_json(stage, {"details", "loss_curve"})) return;
  Json& curve = stage["details"]["loss_curve"];
  if (!curve.is_array() || curve.size() <= most) return;
  const std::size_t every = (curve.size() + most - 1) / most;
  Json thin = Json::array();
  for (std::size_t i = 0; i < curve.size(); i += every) thin.push_back(curve[i]);
  if ((curve.size() - 1) % every != 0) thin.push_back(curve.back());
  curve = thin;
}

Json report_stage(const Json& stage, const Json& teacher, const ReportKinds& kinds, const std::string& place) {
  Json entry = {{"name", json_get<std::string>(stage, "name", place)}};
  report_copy(stage, entry, {"stage", "key", "reused"});
  const Json& model = report_member(stage, "model", Json::value_t::object, place);
  report_model(model, entry, place);
  report_copy(stage, entry, {"seconds", "cpu_seconds", "peak_memory_bytes", "peak_device_memory_bytes", "energy_joules"});
  // Of a stage the time and memory are those of making the model; those of using it have names of their own.
  if (const Json* memory = find_json(model, {"peak_memory_bytes"})) entry["inference_peak_memory_bytes"] = *memory;
  Json reasons = Json::object();
  if (const Json* reason = find_json(stage, {"energy_reason"})) reasons["energy_joules"] = *reason;
  if (model.empty()) {
    for (const Metric& metric : metrics()) {
      if (!find_json(stage, {metric.name})) reasons[metric.name] = reasons.value(metric.name, "this stage makes no model");
    }
  }
  report_nulls(model, entry, kinds, reasons);
  if (!teacher.is_null()) report_ratios(teacher, entry);
  entry["predicted"] = report_predictions(report_member(stage, "predicted", Json::value_t::object, place), entry);
  report_copy(stage, entry, {"outputs", "details"});
  report_thin(entry);
  return entry;
}

// Loss curves of stages that carry none, from the events of metrics.jsonl. A torn last line (a killed run) is left out.
void report_curves(const fs::path& file, Json& manifest) {
  const Json* stages = find_json(manifest, {"stages"});
  if (!fs::exists(file) || !stages || !stages->is_array()) return;  // a wrong type is refused where the stages are read
  std::map<std::string, Json> curves;
  for (const std::string& line : split(read_text(file), '\n')) {
    const Json event = Json::parse(line, nullptr, false);
    if (event.is_discarded() || !event.is_object() || event.value("event", "") != "step") continue;
    const auto step = number_at(event, "step"), loss = number_at(event, "loss");
    if (step && loss && event.contains("stage") && event["stage"].is_string()) curves[event["stage"].get<std::string>()].push_back({*step, *loss, Json::object()});
  }
  for (Json& stage : manifest["stages"]) {
    if (!stage.is_object() || find_json(stage, {"details", "loss_curve"})) continue;
    const auto curve = curves.find(stage.value("name", ""));
    if (curve != curves.end()) stage["details"]["loss_curve"] = curve->second;
  }
}

}  // namespace

Json report_from_manifest(const Json& manifest, const std::string& place) {
  if (!manifest.is_object()) throw Error("the manifest is not an object").at(place).given(manifest.type_name());
  const ReportKinds kinds{report_any(manifest, "tasks", false), report_any(manifest, "language", false), report_any(manifest, "embeddings", false), report_any(manifest, "tasks", true), report_any(manifest, "language", true)};
  Json report = {{"format", "kompakt report 1"}, {"name", json_get_or<std::string>(manifest, "name", place, "unnamed run")}, {"verdict", ""}};
  report_copy(manifest, report, {"kompakt_version", "seed", "recipe_sha256", "started", "environment", "data"});

  if (const Json* model = find_json(manifest, {"start"})) {
    Json entry = {{"name", "start"}};
    report_model(*model, entry, place);
    report_copy(*model, entry, {"peak_memory_bytes"});
    report_nulls(*model, entry, kinds, {{"seconds", "the run begins with it"}, {"kl", "it is compared with nothing"}, {"top1_agreement", "it is compared with nothing"}, {"agreement", "it is compared with nothing"}, {"rank_correlation", "it is compared with nothing"}, {"same_nearest", "it is compared with nothing"}, {"cosine", "it is compared with nothing"}, {"energy_joules", "the run begins with it"}});
    report["start"] = entry;
  }
  report["teacher"] = nullptr;
  if (const Json* model = find_json(manifest, {"teacher"})) {
    Json entry = {{"name", "teacher"}};
    report_model(*model, entry, place);
    report_copy(*model, entry, {"peak_memory_bytes", "seconds"});
    report_nulls(*model, entry, kinds, {{"seconds", "the teacher was given, or is timed under the stage that made it"}, {"kl", "the teacher is its own reference"}, {"top1_agreement", "the teacher is its own reference"}, {"agreement", "the teacher is its own reference"}, {"rank_correlation", "the teacher is its own reference"}, {"same_nearest", "the teacher is its own reference"}, {"cosine", "the teacher is its own reference"}, {"energy_joules", "the teacher was given, or is timed under the stage that made it"}});
    report["teacher"] = entry;
  }
  report["stages"] = Json::array();
  double seconds = 0, cpu = 0, memory = 0;
  bool reused = false;
  for (const Json& stage : report_member(manifest, "stages", Json::value_t::array, place)) {
    report["stages"].push_back(report_stage(stage, report["teacher"], kinds, place));
    const Json& entry = report["stages"].back();
    seconds += number_at(entry, "seconds").value_or(0);
    cpu += number_at(entry, "cpu_seconds").value_or(0);
    memory = std::max(memory, number_at(entry, "peak_memory_bytes").value_or(0));
    reused = reused || json_get_or<bool>(entry, "reused", place, false);
  }
  report["artifact"] = nullptr;
  if (const Json* model = find_json(manifest, {"artifact"})) {
    Json entry = {{"name", "artifact"}};
    report_model(*model, entry, place);
    report_copy(*model, entry, {"peak_memory_bytes"});
    if (seconds > 0) entry["seconds"] = seconds;  // of all stages: what it took to make it
    report_nulls(*model, entry, kinds, {{"energy_joules", "stated for each stage"}});
    if (!report["teacher"].is_null()) report_ratios(report["teacher"], entry);
    report_copy(*model, entry, {"details"});
    report["artifact"] = entry;
  }
  report["totals"] = {{"stages", report["stages"].size()}, {"seconds", seconds}, {"cpu_seconds", cpu}, {"peak_memory_bytes", memory > 0 ? Json(memory) : Json()}, {"some_reused", reused}};
  report["warnings"] = report_member(manifest, "warnings", Json::value_t::array, place);

  // Gates come judged from the run, or as texts.
  Json gates = Json::array();
  for (const Json& gate : report_member(manifest, "gates", Json::value_t::array, place)) {
    const std::string text = gate.is_string() ? gate.get<std::string>() : json_get<std::string>(gate, "text", place);
    if (find_json(gate, {"met"})) {
      gates.push_back(gate);
    } else {
      gates.push_back(gates_to_json(evaluate_gates(report, {text})).front());
    }
  }
  report["gates"] = gates;
  report["regressions"] = regressions(report);
  report["verdict"] = verdict(report);
  return report;
}

Json build_report(const fs::path& run) {
  if (!fs::is_directory(run)) throw Error(str("\"", run.string(), "\" is no run folder")).hint("give the folder that `kompakt run` wrote, such as runs/NAME");
  const fs::path file = run / "manifest.json";
  if (!fs::exists(file)) throw Error(str("\"", run.string(), "\" holds no manifest.json")).at(file.string()).hint("give the folder that `kompakt run` wrote, such as runs/NAME");
  Json manifest = read_json(file);
  report_curves(run / "metrics.jsonl", manifest);
  return report_from_manifest(manifest, file.string());
}

void write_report(const fs::path& run) {
  const Json report = build_report(run);
  // All texts first: a mistake in one leaves none half made.
  const std::string json = dump_json(report), markdown = report_markdown(report), html = report_html(report);
  const std::string junit = gate_junit(report.at("name").get<std::string>(), gates_from_json(report.at("gates")));
  write_text(run / "report.json", json);
  write_text(run / "report.md", markdown);
  write_text(run / "report.html", html);
  write_text(run / "junit.xml", junit);
}

}  // namespace kompakt
