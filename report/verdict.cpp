// Words for figures. Careful ones: "below" needs an interval, else the sentence says that there is none.
#include "report/verdict.h"

#include <algorithm>
#include <cmath>

#include "core/text.h"
#include "report/earlier.h"
#include "report/metrics.h"

namespace kompakt {
namespace {

std::string verdict_points(const Json& interval) {
  const double value = number_of(interval, "accuracy_difference").value_or(0);
  const auto low = number_at(interval, "low"), high = number_at(interval, "high");
  const std::string size = fixed(std::abs(100 * value), 1);
  std::string text = size == "0.0" ? "as accurate as it" : str(size, size == "1.0" ? " point " : " points ", value < 0 ? "below it" : "above it");
  return low && high ? str(text, " (95%: ", show_points(*low), " … ", show_points(*high), ")") : text;
}

std::string verdict_language(const Json& model, const Json& teacher) {
  std::string text;
  const auto mine = number_at(model, "perplexity"), theirs = number_at(teacher, "perplexity"), kl = number_at(model, "kl");
  if (mine && theirs && *theirs > 0) {
    text = str("perplexity ", show_number(Unit::number, *mine), " against ", show_number(Unit::number, *theirs), " (", *mine >= *theirs ? "+" : "−", fixed(100 * std::abs(*mine / *theirs - 1), 1), "%)");
  } else if (mine) {
    text = str("perplexity ", show_number(Unit::number, *mine));
  }
  if (kl) text += str(text.empty() ? "" : ", ", "KL ", show_number(Unit::small_number, *kl), " nats");
  return text;
}

}  // namespace

std::vector<const Json*> model_rows(const Json& report) {
  std::vector<const Json*> rows;
  if (const Json* start = find_json(report, {"start"}); start && !same_as_teacher(report, *start)) rows.push_back(start);
  if (const Json* teacher = find_json(report, {"teacher"})) rows.push_back(teacher);
  if (const Json* stages = find_json(report, {"stages"})) {
    for (const Json& stage : *stages) rows.push_back(&stage);
  }
  if (const Json* artifact = find_json(report, {"artifact"})) rows.push_back(artifact);
  return rows;
}

bool same_as_teacher(const Json& report, const Json& row) {
  const Json* teacher = find_json(report, {"teacher"});
  const Json *mine = find_json(row, {"path"}), *theirs = teacher ? find_json(*teacher, {"path"}) : nullptr;
  return teacher != &row && mine && theirs && *mine == *theirs;
}

bool makes_model(const Json& row) {
  for (const char* key : {"bytes", "parameters", "accuracy", "perplexity", "kl"}) {
    if (number_at(row, key)) return true;
  }
  return false;
}

const Json* final_model(const Json& report) {
  if (const Json* artifact = find_json(report, {"artifact"})) return artifact;
  const Json* last = nullptr;
  for (const Json& stage : report.at("stages")) {
    if (makes_model(stage)) last = &stage;
  }
  return last;
}

std::string verdict(const Json& report) {
  const Json* model = final_model(report);
  if (!model) return "No model was made in this run.";
  const Json none;
  const Json* given = find_json(report, {"teacher"});
  const Json& teacher = given ? *given : none;
  std::vector<std::string> parts;
  const auto bytes = number_at(*model, "bytes"), ratio = number_at(model->contains("ratio_to_teacher") ? (*model)["ratio_to_teacher"] : none, "bytes");
  if (bytes) parts.push_back(human_bytes(*bytes));
  if (ratio && *ratio > 0) parts.push_back(std::abs(*ratio - 1) < 0.005 ? "as large as the teacher" : *ratio < 1 ? str(show_times(1 / *ratio), " smaller than the teacher") : str(show_times(*ratio), " larger than the teacher"));
  const Json* difference = find_json(*model, {"versus_teacher", "accuracy_difference"});
  const auto accuracy = number_at(*model, "accuracy"), theirs = number_at(teacher, "accuracy");
  if (difference) {
    parts.push_back(verdict_points(*difference));
  } else if (accuracy && theirs) {
    parts.push_back(str(verdict_points(*accuracy - *theirs), ", unpaired"));
  } else if (accuracy) {
    parts.push_back(str("accuracy ", show_number(Unit::share, *accuracy)));
  }
  if (const std::string language = verdict_language(*model, teacher); !language.empty()) parts.push_back(language);
  if (const auto correlation = number_at(*model, "rank_correlation")) parts.push_back(str("similarities of texts in rank correlation ", show_number(Unit::small_number, *correlation), " with its own"));
  if (parts.empty()) parts.emplace_back("A model was made, nothing was measured");
  std::string text = join(parts, ", ") + ".";
  if (!find_json(report, {"artifact"})) text += str(" No artifact: these are the figures of ", model->value("name", "the last stage"), ".");
  return text;
}

Json regressions(const Json& report) {
  Json list = Json::array();
  for (const Json& gate : report.at("gates")) {
    if (!gate.value("met", false)) list.push_back(str("gate not met: ", gate.value("text", "")));
  }
  for (const BeforeAfter& row : before_after(report))
    if (row.worse) list.push_back(row.sentence);
  const Json *teacher = find_json(report, {"teacher"}), *start = find_json(report, {"start"});
  for (const Json* row : model_rows(report)) {
    if (row == teacher || row == start) continue;
    const std::string name = row->value("name", "");
    for (const auto& [metric, title] : {std::pair("accuracy", "accuracy"), std::pair("macro_f1", "macro-F1")}) {
      const Json* interval = find_json(*row, {"versus_teacher", (std::string(metric) + "_difference").c_str()});
      if (!interval) continue;
      const auto value = number_of(*interval, metric), low = number_at(*interval, "low"), high = number_at(*interval, "high");
      if (value && low && high && *high < 0) list.push_back(str(name, ": ", title, " ", show_points(*value), " points against the teacher (95%: ", show_points(*low), " … ", show_points(*high), ")"));
    }
    if (!teacher) continue;
    const auto mine = number_at(*row, "perplexity"), theirs = number_at(*teacher, "perplexity");
    const auto low = mine ? number_at((*row)["perplexity"], "low") : std::nullopt, high = theirs ? number_at((*teacher)["perplexity"], "high") : std::nullopt;
    if (low && high && *low > *high) list.push_back(str(name, ": perplexity ", show_number(Unit::number, *mine), " against ", show_number(Unit::number, *theirs), ", intervals apart"));
  }
  const Json* artifact = find_json(report, {"artifact"});
  for (const char* key : {"bytes", "latency_ms", "peak_memory_bytes"}) {
    const Metric& metric = *find_metric(key);
    const auto ratio = artifact && teacher ? number_at(artifact->at("ratio_to_teacher"), key) : std::nullopt;
    if (ratio && *ratio > 1.02) list.push_back(str("artifact: ", metric.title, " ", show_number(metric.unit, *number_at(*artifact, key)), ", ", show_times(*ratio), " the teacher's"));
  }
  return list;
}

std::vector<std::string> not_measured(const Json& report) {
  std::vector<std::pair<std::string, std::vector<std::string>>> groups;  // "title: reason" -> names, in order of the table
  for (const Metric& metric : metrics()) {
    for (const Json* row : model_rows(report)) {
      const Json* reason = find_json(*row, {"nulls", metric.name});
      if (!reason || !reason->is_string()) continue;
      const std::string text = reason->get<std::string>();
      if (text == no_task_reason || text == no_text_reason || text == no_embedding_reason || text == no_earlier_reason || starts_with(text, "the teacher ") || text == "this stage makes no model" || text == "stated for each stage" || (same_as_teacher(report, *row) && metric.needs != Metric::Needs::any)) continue;
      const std::string line = str(metric.title, ": ", text);
      auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& g) { return g.first == line; });
      if (group == groups.end()) group = groups.insert(groups.end(), {line, {}});
      group->second.push_back(row->value("name", ""));
    }
  }
  std::size_t all = 0;
  for (const Json* row : model_rows(report)) all += makes_model(*row);
  std::vector<std::string> lines;
  for (const auto& [line, names] : groups) lines.push_back(names.size() == all && all > 1 ? str(line, " (all models)") : str(line, " (", join(names, ", "), ")"));
  return lines;
}

}  // namespace kompakt
