// Verbs that look at files or explain: report, gate, inspect, explain, doctor.
#include <cstdio>

#include "cli/verbs.h"
#include "core/files.h"
#include "core/json.h"
#include "core/text.h"
#include "pipeline/describe.h"
#include "report/gates.h"
#include "report/report.h"

namespace kompakt {
namespace {

void print(const std::string& text) { std::fputs(text.c_str(), stdout); }

}  // namespace

ExitCode verb_report(const Arguments& arguments) {
  const std::filesystem::path run = arguments.positional[0];
  write_report(run);
  const Json report = read_json(run / "report.json");
  print(arguments.has("json") ? dump_json(report) : closing_table(report));
  return ExitCode::ok;
}

ExitCode verb_gate(const Arguments& arguments) {
  const std::filesystem::path run = arguments.positional[0];
  const Json report = build_report(run);
  std::vector<std::string> gates = arguments.all("require");
  if (gates.empty()) throw Error("no condition was given").at("kompakt gate").hint("add --require 'artifact.bytes <= 3MB'");
  const std::vector<GateResult> results = evaluate_gates(report, gates);
  if (arguments.has("junit")) write_junit(arguments.get("junit"), report.value("name", run.filename().string()), results);
  print(arguments.has("json") ? dump_json(gates_to_json(results)) : gate_table(results));
  return all_met(results) ? ExitCode::ok : ExitCode::gate;
}

ExitCode verb_inspect(const Arguments& arguments) {
  const Json found = inspect(arguments.positional[0]);
  print(arguments.has("json") ? dump_json(found) : inspect_text(found));
  return ExitCode::ok;
}

ExitCode verb_explain(const Arguments& arguments) {
  const Json found = explain(arguments.positional.empty() ? "" : arguments.positional[0]);
  print(arguments.has("json") ? dump_json(found) : explain_text(found));
  return ExitCode::ok;
}

ExitCode verb_doctor(const Arguments& arguments) {
  const Json findings = doctor();
  print(arguments.has("json") ? dump_json(findings) : doctor_text(findings));
  return findings.at("healthy").get<bool>() ? ExitCode::ok : ExitCode::bug;
}

}  // namespace kompakt
