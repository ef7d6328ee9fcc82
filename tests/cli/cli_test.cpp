// The command line as its users see it: exit codes, messages, help, the frozen list of options. Runs the real binary.
#include <sys/wait.h>

#include <catch2/catch.hpp>
#include <cstdio>
#include <cstdlib>

#include "core/files.h"
#include "core/json.h"
#include "core/text.h"
#include "tests/support.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

struct Outcome {
  int code = -1;
  std::string text;  // stdout and stderr
};

Outcome kompakt_command(const std::string& arguments, const std::string& redirect = "2>&1") {
  const char* binary = std::getenv("KOMPAKT_BINARY");
  REQUIRE(binary != nullptr);
  FILE* pipe = ::popen(str("'", binary, "' ", arguments, " ", redirect, " < /dev/null").c_str(), "r");
  REQUIRE(pipe != nullptr);
  Outcome outcome;
  char buffer[4096];
  while (const std::size_t count = std::fread(buffer, 1, sizeof buffer, pipe)) outcome.text.append(buffer, count);
  const int status = ::pclose(pipe);
  outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return outcome;
}

}  // namespace

TEST_CASE("help names every verb and shows an example", "[cli]") {
  const Outcome help = kompakt_command("--help");
  CHECK(help.code == 0);
  CHECK(contains_all(help.text, {"run RECIPE", "plan RECIPE", "inspect", "explain", "classify", "generate", "doctor", "example:", "exit codes"}));
  for (const char* verb : {"run", "plan", "finetune", "distill", "prune", "quantize", "export", "evaluate", "report", "gate", "inspect", "explain", "classify", "generate", "doctor"}) {
    const Outcome one = kompakt_command(str(verb, " --help"));
    INFO(one.text);
    CHECK(one.code == 0);
    CHECK(contains_all(one.text, {"usage: kompakt", "example:", verb}));
  }
  CHECK(kompakt_command("").code == 2);
}

TEST_CASE("the options of `run` are frozen: new knobs go into the recipe", "[cli][promise]") {
  const Outcome help = kompakt_command("run --help");
  std::vector<std::string> options;
  for (const std::string& line : split(help.text, '\n'))
    if (starts_with(line, "  --")) options.push_back(line.substr(2, line.find(' ', 2) - 2));
  CHECK(options == std::vector<std::string>{"--out", "--set", "--device", "--resume", "--until", "--quiet", "--json", "--help"});
}

TEST_CASE("KOMPAKT_DEVICE is the device where the command line names none", "[cli]") {
  const std::string recipe = (source_folder() / "recipes" / "quickstart.yaml").string();
  ::setenv("KOMPAKT_DEVICE", "tpu", 1);
  const Outcome unknown = kompakt_command("run " + recipe), named = kompakt_command("run " + recipe + " --device gpu");
  ::unsetenv("KOMPAKT_DEVICE");
  CHECK(unknown.code == 2);
  // Where the teacher or the data are not there, the recipe is refused before the device is looked at.
  if (unknown.text.find("device") == std::string::npos) return skip("the quickstart's teacher is not there");
  CHECK(contains_all(unknown.text, {"unknown device", "tpu", "cpu, cuda, cuda:N"}));
  CHECK(contains_all(named.text, {"unknown device", "gpu"}));
}

TEST_CASE("mistakes on the command line are exit code 2 with what to do", "[cli]") {
  const struct {
    const char* arguments;
    std::initializer_list<const char*> parts;
  } rows[] = {
      {"rnu", {"unknown verb \"rnu\"", "did you mean \"run\""}},
      {"compare a b", {"kept for a later version"}},
      {"run", {"takes 1 argument", "kompakt run --help"}},
      {"run a.yaml b.yaml", {"takes 1 argument"}},
      {"run nowhere.yaml", {"nowhere.yaml"}},
      {"run x.yaml --sed a=1", {"unknown option --sed", "did you mean \"--set\""}},
      {"run x.yaml --device", {"--device needs a value"}},
      {"inspect nowhere", {"nowhere"}},
      {"classify nowhere --text hi", {"nowhere"}},
      {"generate nowhere", {"--prompt"}},
      {"generate nowhere --prompt x --tokens many", {"--tokens", "many"}},
      {"quantize", {"--model is missing"}},
      {"explain quantize.gruop", {"quantize.gruop", "did you mean \"quantize.group\""}},
  };
  for (const auto& row : rows) {
    const Outcome outcome = kompakt_command(row.arguments);
    INFO(row.arguments << "\n" << outcome.text);
    CHECK(outcome.code == 2);
    CHECK(contains_all(outcome.text, row.parts));
    CHECK(outcome.text.find("terminate") == std::string::npos);
  }
}

TEST_CASE("explain and doctor answer, as text and as JSON", "[cli]") {
  CHECK(contains_all(kompakt_command("explain").text, {"stage", "grid", "ternary", "forward_kl"}));
  CHECK(contains_all(kompakt_command("explain temperature").text, {"temperature"}));
  CHECK(contains_all(kompakt_command("explain quantize").text, {"quantize", "group", "embedding"}));
  const Outcome json = kompakt_command("explain quantize.weights --json", "2>/dev/null");
  CHECK(parse_json(json.text, "explain").at("fields").size() == 1);
  const Outcome doctor = kompakt_command("doctor --json", "2>/dev/null");
  CHECK(doctor.code == 0);
  CHECK(parse_json(doctor.text, "doctor").at("healthy").get<bool>());
  CHECK(contains_all(kompakt_command("--version").text, {"kompakt ", "torch ", "HDF5 "}));
}

TEST_CASE("inspect tells apart what it can read and what not", "[cli]") {
  const TemporaryFolder folder;
  write_text(folder.path() / "x.txt", "hello");
  const Outcome outcome = kompakt_command(str("inspect '", (folder.path() / "x.txt").string(), "'"));
  CHECK(outcome.code == 2);
  CHECK(contains_all(outcome.text, {"x.txt", "safetensors, GGUF, HDF5"}));
  write_text(folder.path() / "x.safetensors", "12345678");
  CHECK(kompakt_command(str("inspect '", (folder.path() / "x.safetensors").string(), "'")).code == 2);
}
