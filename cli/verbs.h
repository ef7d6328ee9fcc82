// Table of verbs: what `kompakt VERB` does. main.cpp dispatches on it and holds the one catch.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cli/arguments.h"
#include "core/error.h"

namespace kompakt {

struct Verb {
  std::string_view name;
  std::string_view arguments;  // "RECIPE [--out DIR] ..."
  std::string_view summary;
  std::string_view example;
  std::size_t least, most;     // number of positional arguments
  const std::vector<OptionSpec>& (*options)();
  ExitCode (*run)(const Arguments& arguments);
};

std::span<const Verb> verbs();
const Verb* find_verb(std::string_view name);
// Names that later versions will use: an Error that says so instead of "unknown".
std::span<const std::string_view> reserved_verbs();
std::string general_help();
std::string verb_help(const Verb& verb);

// One function per verb, grouped by file.
ExitCode verb_run(const Arguments& arguments);
ExitCode verb_plan(const Arguments& arguments);
ExitCode verb_report(const Arguments& arguments);
ExitCode verb_gate(const Arguments& arguments);
ExitCode verb_inspect(const Arguments& arguments);
ExitCode verb_explain(const Arguments& arguments);
ExitCode verb_classify(const Arguments& arguments);
ExitCode verb_generate(const Arguments& arguments);
ExitCode verb_doctor(const Arguments& arguments);
template <int stage>
ExitCode verb_stage(const Arguments& arguments);

}  // namespace kompakt
