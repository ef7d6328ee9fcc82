// SIGKILL at five moments of a run, each followed by --resume: the artifact is byte-equal to that of an unbroken run. The same
// after a run that could not write any more.
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/catch_torch.h"
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "tests/pipeline/tiny.h"

using namespace kompakt;
using namespace kompakt::testing;
namespace fs = std::filesystem;

namespace {

// Starts `kompakt run`; kills it after `milliseconds` when that is not negative. With `largest_file` >= 0 no file may grow
// beyond that many bytes, which a program meets as it meets a full disk. Exit code, or -1 when it was killed.
int kill_run(const TinySetting& tiny, int milliseconds, std::int64_t largest_file = -1) {
  const char* binary = std::getenv("KOMPAKT_BINARY");
  REQUIRE(binary != nullptr);
  const std::string recipe = tiny.recipe().string(), out = tiny.out("a").string();
  const std::string store = "store=" + (tiny.out("a").parent_path() / "stages").string();  // one of its own: where stages are kept leaves no trace in the artifact
  std::fflush(nullptr);  // what stands in the buffers is this process's to print, not the child's
  const pid_t child = ::fork();
  if (child == 0) {
    if (largest_file >= 0) {
      const rlimit limit{static_cast<rlim_t>(largest_file), static_cast<rlim_t>(largest_file)};
      ::signal(SIGXFSZ, SIG_IGN);  // write() then fails with EFBIG
      ::setrlimit(RLIMIT_FSIZE, &limit);
    }
    ::execl(binary, binary, "run", recipe.c_str(), "--out", out.c_str(), "--set", store.c_str(), "--resume", "--quiet", static_cast<char*>(nullptr));
    ::_exit(127);
  }
  REQUIRE(child > 0);
  if (milliseconds >= 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
    ::kill(child, SIGKILL);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace

TEST_CASE("a run killed five times gives the bytes of an unbroken one", "[kill]") {
  TinySetting whole, broken;
  // More steps than elsewhere, so that the kills fall into the middle of training.
  for (TinySetting* tiny : {&whole, &broken})
    tiny->write_recipe(
        "\n  - finetune: {epochs: 12, batch_size: 4, learning_rate: 1.0e-3, save_every_steps: 5}\n  - distill: {student: {keep_layers: [0, 2]}, epochs: 8, batch_size: 4, save_every_steps: 5}\n"
        "  - quantize: {weights: ternary, group: 0, embedding: int8, method: qad, epochs: 8, batch_size: 4, save_every_steps: 5}\n  - export: {}\n  - evaluate: {latency: false}\n");
  REQUIRE(kill_run(whole, -1) == 0);
  int killed = 0;
  for (const int milliseconds : {900, 1300, 1700, 1500, 2100}) killed += kill_run(broken, milliseconds) == -1;
  CHECK(killed >= 1);  // a fast machine may finish before the later ones
  REQUIRE(kill_run(broken, -1) == 0);
  CHECK(folder_bytes(whole.out("a") / "artifact") == folder_bytes(broken.out("a") / "artifact"));
  CHECK_FALSE(fs::exists(broken.out("a") / "work"));
}

TEST_CASE("a run that cannot write ends with code 4, leaves no artifact, and goes on when it can", "[kill]") {
  TinySetting tiny, whole;
  REQUIRE(kill_run(tiny, -1, 6000) == 4);  // reports and configurations fit, tensors do not
  CHECK_FALSE(fs::exists(tiny.out("a") / "artifact"));
  REQUIRE(kill_run(tiny, -1) == 0);
  REQUIRE(kill_run(whole, -1) == 0);
  CHECK(folder_bytes(whole.out("a") / "artifact") == folder_bytes(tiny.out("a") / "artifact"));
}
