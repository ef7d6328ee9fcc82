// A run folder's files to report.json, report.md, report.html and the closing table of the terminal.
//
// Reads manifest.json and metrics.jsonl, nothing else: no model is opened and nothing is measured here. What the manifest
// lacks is null in the report, with the reason. The same files give the same bytes.
#pragma once

#include <filesystem>
#include <string>

#include "core/json.h"

namespace kompakt {

// The document of report.json: teacher, stages (in order) and artifact as entries of one layout with the keys of
// report/metrics.h, "nulls" (metric -> reason), "versus_teacher", "ratio_to_teacher"; gates, totals, regressions, verdict.
// Throws Error when manifest.json is missing or a key has the wrong type.
Json build_report(const std::filesystem::path& run);
// The same from a manifest already read; `place` names it in messages.
Json report_from_manifest(const Json& manifest, const std::string& place);

// Writes report.json, report.md, report.html and junit.xml (one test case per gate) into the run folder, each atomically.
void write_report(const std::filesystem::path& run);

std::string report_markdown(const Json& report);
// One self-contained page: no request leaves it.
std::string report_html(const Json& report);
// Regressions, then an aligned table, then what was not measured and why. Where report.html lies when `run` is given.
std::string closing_table(const Json& report, const std::filesystem::path& run = {});

}  // namespace kompakt
