// Evaluation of gates. Next to its number each side carries its affine form (constant + coefficient per figure), so that
// `accuracy >= teacher.accuracy - 0.01`, however it is written, is seen as a condition on the paired difference.
#include "report/gates.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <pugixml.hpp>
#include <sstream>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"
#include "report/gate_expression.h"
#include "report/metrics.h"

namespace kompakt {
namespace {

// A figure of one model: the key of its term in an affine form.
struct GateFigure {
  std::string subject, metric;
  bool operator<(const GateFigure& other) const { return std::tie(subject, metric) < std::tie(other.subject, other.metric); }
};

struct GateValue {
  double number = 0, constant = 0;
  bool affine = true;
  std::map<GateFigure, double> terms;
  std::string missing;  // why there is no number

  bool plain() const { return affine && terms.empty(); }
};

const Json* gate_stage(const Json& report, const std::string& name) {
  const Json* found = nullptr;
  const Json* stages = find_json(report, {"stages"});
  if (!stages) return nullptr;
  for (const Json& stage : *stages) {
    if (stage.value("name", "") == name) return &stage;
    if (stage.value("stage", "") == name) found = &stage;
  }
  return found;
}

// The entry that the first part of a path names; `start` is where the path goes on.
const Json* gate_subject(const Json& report, const std::vector<std::string>& path, std::string& subject, std::size_t& start, std::string& missing) {
  subject = path[0];
  start = 1;
  for (const char* side : {"artifact", "teacher", "start"}) {
    if (subject != side) continue;
    const Json* entry = find_json(report, {side});
    if (!entry) missing = str("the run has no ", side);
    return entry;
  }
  if (const Json* stage = gate_stage(report, subject)) {
    subject = stage->value("name", subject);
    return stage;
  }
  const auto& top = report_keys();
  if (std::find(top.begin(), top.end(), subject) != top.end()) {
    start = 0;
    subject = "report";
    return &report;
  }
  const auto& inside = entry_keys();
  if (find_metric(subject) || std::find(inside.begin(), inside.end(), subject) != inside.end()) {
    start = 0;
    subject = "artifact";
    const Json* entry = find_json(report, {"artifact"});
    if (!entry) missing = str("the run has no artifact; name a stage, as in distill.", path[0]);
    return entry;
  }
  missing = str("the run has no stage \"", subject, "\"");
  return nullptr;
}

GateValue gate_figure(const Json& report, const GateExpression& tree) {
  GateValue value;
  std::size_t start = 0;
  std::string subject;
  const Json* at = gate_subject(report, tree.path, subject, start, value.missing);
  if (!at) return value;
  const Json& entry = *at;
  const std::string text = join(tree.path, ".");
  for (std::size_t i = start; i < tree.path.size(); ++i) {
    const std::string& key = tree.path[i];
    const auto index = parse_int(key);
    if (at->is_array() && index && *index >= 0 && static_cast<std::size_t>(*index) < at->size()) {
      at = &at->at(static_cast<std::size_t>(*index));
    } else if (at->is_object() && at->contains(key)) {
      at = &at->at(key);
    } else {
      std::vector<std::string> keys;
      if (at->is_object()) {
        for (const auto& [name, unused] : at->items()) keys.push_back(name);
      }
      value.missing = str("the report has no ", text, did_you_mean(key, keys));
      return value;
    }
    if (at->is_null()) {
      const Json* reason = find_json(entry, {"nulls", key.c_str()});
      value.missing = str(text, " was not measured", reason && reason->is_string() ? str(": ", reason->get<std::string>()) : std::string());
      return value;
    }
  }
  if (!at->is_number() && !(at->is_object() && (at->contains("value") || at->contains("mean")))) {
    value.missing = str(text, " is not a figure");
    return value;
  }
  const auto number = number_of(*at, text);
  if (!number || !std::isfinite(*number)) {
    value.missing = str(text, " was not measured");
    return value;
  }
  value.number = *number;
  value.terms[{subject, join(std::span(tree.path).subspan(start), ".")}] = 1;
  return value;
}

GateValue gate_combine(char op, const GateValue& a, const GateValue& b) {
  GateValue value;
  value.missing = a.missing.empty() ? b.missing : a.missing;
  if (!value.missing.empty()) return value;
  value.affine = a.affine && b.affine;
  if (op == '+' || op == '-') {
    const double sign = op == '+' ? 1 : -1;
    value.number = a.number + sign * b.number;
    value.constant = a.constant + sign * b.constant;
    value.terms = a.terms;
    for (const auto& [figure, factor] : b.terms) value.terms[figure] += sign * factor;
    return value;
  }
  if (op == '/' && b.number == 0) {
    value.missing = "division by zero";
    return value;
  }
  value.number = op == '*' ? a.number * b.number : a.number / b.number;
  const bool left_plain = op == '*' && a.plain();
  value.affine = value.affine && (b.plain() || left_plain);
  const GateValue& scaled = left_plain ? b : a;
  const double factor = left_plain ? a.number : op == '*' ? b.number : 1 / b.number;
  value.constant = scaled.constant * factor;
  for (const auto& [figure, old] : scaled.terms) value.terms[figure] = old * factor;
  return value;
}

GateValue gate_value(const Json& report, const GateExpression& tree) {
  if (tree.kind == 'n') return gate_figure(report, tree);
  if (tree.kind == '#') {
    GateValue value;
    value.number = value.constant = tree.number;
    return value;
  }
  const GateValue first = gate_value(report, *tree.first);
  if (tree.second) return gate_combine(tree.kind, first, gate_value(report, *tree.second));
  GateValue minus;
  minus.number = minus.constant = -1;
  return gate_combine('*', minus, first);
}

bool gate_compare(double left, const std::string& op, double right) {
  // Figures pass through decimal text: differences of a few units in the last place are not differences.
  const double slack = 1e-12 * std::max(std::abs(left), std::abs(right));
  if (op == "<=") return left <= right + slack;
  if (op == ">=") return left >= right - slack;
  if (op == "<") return left < right - slack;
  if (op == ">") return left > right + slack;
  const bool equal = std::abs(left - right) <= slack;
  return op == "==" ? equal : !equal;
}

const Json* gate_entry(const Json& report, const std::string& subject) {
  return subject == "artifact" || subject == "teacher" || subject == "start" ? find_json(report, {subject.c_str()}) : gate_stage(report, subject);
}

// Replaces the compared numbers by factor * bound against what remains; false when no interval fits.
bool gate_bound(const Json& report, const GateValue& left, const GateValue& right, GateResult& result) {
  if (!left.affine || !right.affine || result.comparison == "==" || result.comparison == "!=") return false;
  GateValue difference = gate_combine('-', left, right);
  std::erase_if(difference.terms, [](const auto& term) { return term.second == 0; });
  const Json* interval = nullptr;
  std::string what;
  double factor = 1;
  if (difference.terms.size() == 1) {
    const auto& [figure, f] = *difference.terms.begin();
    const Json* entry = gate_entry(report, figure.subject);
    interval = entry ? find_json(*entry, {figure.metric.c_str()}) : nullptr;
    factor = f;
    what = str(figure.subject, ".", figure.metric);
  } else if (difference.terms.size() == 2) {
    auto mine = difference.terms.begin(), other = std::next(mine);
    const auto is_other = [](const auto& term) { return term->first.subject == "teacher" || term->first.subject == "start"; };
    if (is_other(mine) && (!is_other(other) || mine->first.subject == "start")) std::swap(mine, other);  // versus the start before versus the teacher
    if (!is_other(other) || mine->first.metric != other->first.metric) return false;
    const bool start = other->first.subject == "start";
    const Json* entry = gate_entry(report, mine->first.subject);
    const auto pair = [&](const char* kind) { return entry ? find_json(*entry, {start ? "versus_start" : "versus_teacher", (mine->first.metric + kind).c_str()}) : nullptr; };
    const std::string whose = start ? "that of the model at the start" : "the teacher's";
    factor = mine->second;
    if (const Json* ratio = pair("_ratio"); ratio && difference.constant == 0 && mine->second * other->second < 0) {
      // a x - b y against 0, y > 0: x / y against b / a.
      interval = ratio;
      what = str(mine->first.subject, ".", mine->first.metric, " over ", whose);
      difference.constant = other->second;
    } else {
      if (std::abs(mine->second + other->second) > 1e-12 * std::abs(mine->second)) return false;
      interval = pair("_difference");
      what = str(mine->first.subject, ".", mine->first.metric, " minus ", whose);
    }
  }
  if (!interval || !interval->is_object()) return false;
  // left - right = factor * x + constant: what is unfavourable depends on the comparison and the factor's sign.
  const bool at_least = result.comparison[0] == '>';
  const bool low = at_least == (factor > 0);
  const auto bound = number_at(*interval, low ? "low" : "high");
  if (!bound) return false;
  std::string comparison = result.comparison;
  if (factor < 0) comparison[0] = at_least ? '<' : '>';
  result.left = *bound;
  result.right = -difference.constant / factor;
  result.comparison = comparison;
  result.met = gate_compare(*result.left, comparison, *result.right);
  result.note = str(low ? "lower" : "upper", " 95% bound of ", what);
  return true;
}

std::string gate_number(double value) {
  if (value == std::floor(value) && std::abs(value) < 1e15) return fixed(value, 0);
  const double size = std::abs(value);
  return size >= 100 ? fixed(value, 1) : size >= 0.001 ? fixed(value, 4) : str(value);
}

// The unit that all figures of an expression share; nothing when they differ or cancel.
void gate_units_of(const GateExpression& tree, std::vector<Unit>& units, bool& plain) {
  if (tree.kind == 'n') {
    const Metric* metric = find_metric(tree.path.back());
    units.push_back(metric ? metric->unit : Unit::number);
    plain = plain && metric;
  }
  if (tree.kind == '/') plain = false;
  if (tree.kind == '*' && tree.first->kind != '#' && tree.second->kind != '#') plain = false;
  for (const auto& child : {tree.first, tree.second}) {
    if (child) gate_units_of(*child, units, plain);
  }
}

std::string gate_comparison(const std::string& text) {
  try {
    return parse_gate(text).comparison;
  } catch (const Error&) {
    return "against";
  }
}

std::optional<Unit> gate_unit(const std::string& text) {
  try {
    const Gate gate = parse_gate(text);
    std::vector<Unit> units;
    bool plain = true;
    gate_units_of(*gate.left, units, plain);
    gate_units_of(*gate.right, units, plain);
    if (plain && !units.empty() && std::count(units.begin(), units.end(), units[0]) == static_cast<std::ptrdiff_t>(units.size())) return units[0];
  } catch (const Error&) {  // a gate of another version: its figures are shown as they are
  }
  return std::nullopt;
}

}  // namespace

std::string gate_figures(const GateResult& result) {
  if (!result.left || !result.right) return {};
  const auto unit = gate_unit(result.text);
  const auto show = [&](double value) { return !unit ? gate_number(value) : *unit == Unit::share ? str(fixed(100 * value, 2), "%") : show_number(*unit, value); };
  std::string left = show(*result.left), right = show(*result.right);
  if (left == right && *result.left != *result.right) {
    left = shortest(*result.left);
    right = shortest(*result.right);
  }
  return str(left, " ", result.comparison, " ", right);
}

GateResult evaluate_gate(const Json& report, const Gate& gate) {
  GateResult result;
  result.text = gate.text;
  result.comparison = gate.comparison;
  const GateValue left = gate_value(report, *gate.left), right = gate_value(report, *gate.right);
  result.note = left.missing.empty() ? right.missing : left.missing;
  if (!result.note.empty()) return result;
  if (gate.level && gate_bound(report, left, right, result)) return result;
  result.left = left.number;
  result.right = right.number;
  result.met = gate_compare(left.number, gate.comparison, right.number);
  if (gate.level) result.note = "compared plainly: no 95% interval fits this expression";
  return result;
}

std::vector<GateResult> evaluate_gates(const Json& report, const std::vector<std::string>& gates) {
  std::vector<std::string> stages;
  if (const Json* list = find_json(report, {"stages"})) {
    for (const Json& stage : *list) {
      for (const char* key : {"name", "stage"}) {
        const std::string name = stage.value(key, "");
        if (!name.empty() && std::find(stages.begin(), stages.end(), name) == stages.end()) stages.push_back(name);
      }
    }
  }
  std::vector<GateResult> results;
  for (const std::string& text : gates) results.push_back(evaluate_gate(report, parse_gate(text, stages)));
  return results;
}

bool all_met(const std::vector<GateResult>& results) {
  return std::all_of(results.begin(), results.end(), [](const GateResult& r) { return r.met; });
}

Json gates_to_json(const std::vector<GateResult>& results) {
  Json list = Json::array();
  for (const GateResult& r : results) {
    list.push_back({{"text", r.text}, {"met", r.met}, {"left", r.left ? Json(*r.left) : Json()}, {"comparison", r.comparison}, {"right", r.right ? Json(*r.right) : Json()}, {"note", r.note}});
  }
  return list;
}

std::vector<GateResult> gates_from_json(const Json& gates) {
  std::vector<GateResult> results;
  for (const Json& gate : gates) {
    GateResult r;
    r.text = json_get<std::string>(gate, "text", "gates");
    r.met = json_get_or<bool>(gate, "met", "gates", false);
    r.left = number_at(gate, "left");
    r.right = number_at(gate, "right");
    r.comparison = json_get_or<std::string>(gate, "comparison", "gates", gate_comparison(r.text));
    r.note = json_get_or<std::string>(gate, "note", "gates", "");
    results.push_back(r);
  }
  return results;
}

std::string gate_table(const std::vector<GateResult>& results) {
  std::size_t gate_width = 0, figure_width = 0;
  for (const GateResult& r : results) {
    gate_width = std::max(gate_width, text_width(r.text));
    figure_width = std::max(figure_width, text_width(gate_figures(r)));
  }
  std::string table;
  for (const bool met : {false, true}) {
    for (const GateResult& r : results) {
      if (r.met != met) continue;
      const std::string figures = gate_figures(r);
      std::string line = str(met ? "met      " : "NOT MET  ", r.text, std::string(gate_width - text_width(r.text) + 2, ' '), figures, std::string(figure_width - text_width(figures) + 2, ' '), r.note);
      line.erase(line.find_last_not_of(' ') + 1);
      table += line + "\n";
    }
  }
  return table;
}

std::string gate_junit(const std::string& suite, const std::vector<GateResult>& results) {
  const auto failures = std::count_if(results.begin(), results.end(), [](const GateResult& r) { return !r.met; });
  pugi::xml_document document;
  pugi::xml_node declaration = document.append_child(pugi::node_declaration);
  declaration.append_attribute("version") = "1.0";
  declaration.append_attribute("encoding") = "UTF-8";
  pugi::xml_node root = document.append_child("testsuites"), node = root.append_child("testsuite");
  node.append_attribute("name") = suite.c_str();
  node.append_attribute("tests") = static_cast<unsigned>(results.size());
  node.append_attribute("failures") = static_cast<unsigned>(failures);
  for (const GateResult& r : results) {
    pugi::xml_node test = node.append_child("testcase");
    test.append_attribute("classname") = str(suite, ".gates").c_str();
    test.append_attribute("name") = r.text.c_str();
    const std::string figures = gate_figures(r), detail = figures.empty() || r.note.empty() ? figures + r.note : str(figures, " (", r.note, ")");
    if (!r.met) {
      pugi::xml_node failure = test.append_child("failure");
      failure.append_attribute("message") = detail.c_str();
      failure.append_attribute("type") = "gate";
    } else if (!detail.empty()) {
      test.append_child("system-out").text().set(detail.c_str());
    }
  }
  std::ostringstream out;
  document.save(out, "  ", pugi::format_default, pugi::encoding_utf8);
  return out.str();
}

void write_junit(const std::filesystem::path& path, const std::string& suite, const std::vector<GateResult>& results) { write_text(path, gate_junit(suite, results)); }

}  // namespace kompakt
