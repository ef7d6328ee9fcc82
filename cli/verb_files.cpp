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
  Json found = explain(arguments.positional.empty() ? "" : arguments.positional[0]);
  if (arguments.positional.size() > 1) found["shapes"] = explain_shapes(arguments.positional[1]);
  print(arguments.has("json") ? dump_json(found) : explain_text(found) + (found.contains("shapes") ? explain_shapes_text(found.at("shapes")) : std::string()));
  return ExitCode::ok;
}

ExitCode verb_doctor(const Arguments& arguments) {
  if (arguments.has("latency-table")) {
    if (!arguments.has("model")) throw Error("a latency table is made for the shapes of a model").at("kompakt doctor").hint("add --model DIR");
    const auto tokens = parse_int(arguments.get("tokens", "1"));
    if (!tokens || *tokens < 1 || *tokens > 1 << 20) throw Error("tokens is a whole number").at("kompakt doctor --tokens").given(arguments.get("tokens")).allowed("1 to 1048576");
    const Json table = write_latency_table(arguments.get("model"), arguments.get("latency-table"), *tokens);
    print(arguments.has("json") ? dump_json(table) : latency_table_text(table));
    return ExitCode::ok;
  }
  for (const char* option : {"model", "tokens"})
    if (arguments.has(option)) throw Error(str("--", option, " belongs to --latency-table")).at("kompakt doctor").hint("add --latency-table FILE");
  const Json findings = doctor();
  print(arguments.has("json") ? dump_json(findings) : doctor_text(findings));
  return findings.at("healthy").get<bool>() ? ExitCode::ok : ExitCode::bug;
}

}  // namespace kompakt
