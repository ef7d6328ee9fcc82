// Gates: conditions of a recipe or of `kompakt gate` over the figures of a report.
//
//   accuracy >= teacher.accuracy - 0.01 @ 95%      artifact.bytes <= 2.9 MB      02-distill.kl.p99 < 0.5
//
// A name is a metric (of the artifact), SUBJECT.METRIC with artifact, teacher, start (the model that a run with data.previous begins with), a stage's name or its kind (the last stage of
// that kind), or a longer path into report.json; a part with odd characters stands in quotes: artifact.language.'wiki-2'.kl.
// Numbers may carry %, B, kB, MB, GB, KiB, MiB, GiB, s, min, h. Operators: + - * / ( ) and one of <= >= < > == !=.
// `@ 95%` takes the unfavourable bound of the 95% interval. Reads JSON only; decides nothing about exit codes.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/json.h"

namespace kompakt {

struct GateExpression;

struct Gate {
  std::string text;
  std::shared_ptr<const GateExpression> left, right;
  std::string comparison;       // "<=", ...
  std::optional<double> level;  // 0.95 with "@ 95%"
};

// Checks the text without a report: syntax, units, names. `stages` are the names and kinds that the recipe has; without
// them any name that can be a stage's passes. Throws Error with the column, what is allowed and the nearest match.
Gate parse_gate(const std::string& text, const std::vector<std::string>& stages = {});

struct GateResult {
  std::string text;
  bool met = false;
  std::optional<double> left, right;  // what was compared; absent when a figure is missing
  std::string comparison;
  std::string note;                   // which bound was taken, or why the gate cannot be met
};

GateResult evaluate_gate(const Json& report, const Gate& gate);
// Texts are parsed with the stages of the report. A figure that was not measured makes its gate unmet, with the reason.
std::vector<GateResult> evaluate_gates(const Json& report, const std::vector<std::string>& gates);
bool all_met(const std::vector<GateResult>& results);

Json gates_to_json(const std::vector<GateResult>& results);
std::vector<GateResult> gates_from_json(const Json& gates);
// "93.4% >= 92.8%", "4.19 MB <= 2.90 MB": the compared figures in the unit of the gate's metrics; "" when one is missing.
std::string gate_figures(const GateResult& result);
// Aligned lines, unmet ones first: verdict, gate, figures, note.
std::string gate_table(const std::vector<GateResult>& results);
// One JUnit test case per gate, as CI systems read it. `suite` is the run's name.
std::string gate_junit(const std::string& suite, const std::vector<GateResult>& results);
void write_junit(const std::filesystem::path& path, const std::string& suite, const std::vector<GateResult>& results);

}  // namespace kompakt
