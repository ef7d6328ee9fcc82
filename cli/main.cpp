// kompakt: dispatches a verb of the table; the one place where errors become messages and exit codes.
#include <cstdio>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "cli/verbs.h"
#include "core/launch.h"
#include "core/log.h"
#include "core/system.h"
#include "core/text.h"
#include "pipeline/describe.h"

namespace kompakt {
namespace {

ExitCode dispatch(const std::vector<std::string>& words) {
  if (words.empty() || words[0] == "--help" || words[0] == "-h" || words[0] == "help") {
    if (words.size() > 1)
      if (const Verb* verb = find_verb(words[1])) return std::fputs(verb_help(*verb).c_str(), stdout), ExitCode::ok;
    std::fputs(general_help().c_str(), words.empty() ? stderr : stdout);
    return words.empty() ? ExitCode::user : ExitCode::ok;
  }
  if (words[0] == "--version") {
    std::fputs(version_text().c_str(), stdout);
    return ExitCode::ok;
  }
  const Verb* verb = find_verb(words[0]);
  if (!verb) {
    for (const std::string_view reserved : reserved_verbs())
      if (reserved == words[0]) throw Error(str("\"kompakt ", reserved, "\" is a name kept for a later version")).hint("kompakt --help lists what there is");
    std::vector<std::string> names;
    for (const Verb& row : verbs()) names.emplace_back(row.name);
    throw Error(str("unknown verb \"", words[0], "\"", did_you_mean(words[0], names))).allowed(join(names, ", "));
  }
  const Arguments arguments = parse_arguments(words[0], verb->options(), {words.begin() + 1, words.end()});
  if (arguments.has("help")) return std::fputs(verb_help(*verb).c_str(), stdout), ExitCode::ok;
  if (arguments.positional.size() < verb->least || arguments.positional.size() > verb->most)
    throw Error(str("kompakt ", verb->name, " takes ", verb->most == 0 ? std::string("no argument") : verb->least == verb->most ? str(verb->most, " argument", verb->most == 1 ? "" : "s") : str(verb->least, " to ", verb->most, " arguments")))
        .given(arguments.positional.empty() ? "none" : join(arguments.positional, " ")).allowed(std::string(verb->arguments)).hint(str("kompakt ", verb->name, " --help"));
  if (arguments.has("quiet")) set_verbosity(Verbosity::quiet);
  return verb->run(arguments);
}

// Of several processes, one that fails may leave threads of the transport behind that wait for a rank that is gone.
int leave(ExitCode code) {
  std::fflush(nullptr);
  if (!rank_prefix().empty()) std::_Exit(static_cast<int>(code));
  return static_cast<int>(code);
}

}  // namespace
}  // namespace kompakt

int main(int argc, char** argv) {
  using namespace kompakt;
  install_signal_handlers();
  try {
    return static_cast<int>(dispatch({argv + 1, argv + argc}));
  } catch (const Error& error) {
    std::fprintf(stderr, "%s %s%s\n", red("error:").c_str(), rank_prefix().c_str(), error.what());
    return leave(error.code());
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "%s %sout of memory\n  to do:   a smaller batch_size, or `kompakt plan` to see what a recipe needs\n", red("error:").c_str(), rank_prefix().c_str());
    return leave(ExitCode::resource);
  } catch (const std::exception& error) {
    const auto [text, code] = describe_failure(error);
    std::fprintf(stderr, "%s %s%s\n", red("error:").c_str(), rank_prefix().c_str(), text.c_str());
    return leave(code);
  }
}
