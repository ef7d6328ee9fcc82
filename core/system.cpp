#include "core/system.h"

#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <csignal>
#include <fstream>
#include <string>

#include "core/activity.h"
#include "core/error.h"
#include "core/text.h"

namespace kompakt {
namespace {

volatile std::sig_atomic_t pending_signal = 0;

extern "C" void remember_signal(int signal) {
  if (pending_signal != 0) {  // a second one means: now
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  }
  pending_signal = signal;
}

std::int64_t status_kilobytes(const char* key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (starts_with(line, key)) return std::stoll(line.substr(std::string(key).size() + 1)) * 1024;
  return 0;
}

}  // namespace

std::int64_t peak_memory_bytes() { return status_kilobytes("VmHWM"); }
std::int64_t current_memory_bytes() { return status_kilobytes("VmRSS"); }

void release_free_memory() {
#ifdef __GLIBC__
  ::malloc_trim(0);
#endif
}

bool reset_peak_memory() {
  release_free_memory();  // else what an earlier stage freed counts as this one's
  std::ofstream file("/proc/self/clear_refs");
  file << "5" << std::flush;
  return static_cast<bool>(file);
}

std::int64_t physical_memory_bytes() { return static_cast<std::int64_t>(::sysconf(_SC_PHYS_PAGES)) * ::sysconf(_SC_PAGE_SIZE); }

std::int64_t free_disk_bytes(const std::filesystem::path& folder) {
  std::error_code code;
  const auto info = std::filesystem::space(folder, code);
  return code ? 0 : static_cast<std::int64_t>(info.available);
}

int core_count() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (::sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(::sysconf(_SC_NPROCESSORS_ONLN));
}

std::string processor_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (starts_with(line, "model name")) return trim(line.substr(line.find(':') + 1));
  return "unknown processor";
}

double cpu_seconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) { return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec); };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

std::string executable_path() {
  std::error_code code;
  return std::filesystem::read_symlink("/proc/self/exe", code).string();
}

void install_signal_handlers() {
  struct sigaction action {};
  action.sa_handler = remember_signal;
  sigemptyset(&action.sa_mask);
  ::sigaction(SIGINT, &action, nullptr);
  ::sigaction(SIGTERM, &action, nullptr);
}

bool interrupted() { return pending_signal != 0; }
void request_interrupt(int signal) { pending_signal = signal; }

void check_interrupted() {
  mark_activity();
  if (pending_signal == 0) return;
  const bool terminated = pending_signal == SIGTERM;
  throw Error(terminated ? "stopped by SIGTERM" : "interrupted", terminated ? ExitCode::terminated : ExitCode::interrupted)
      .hint("everything finished so far is saved; the same command with --resume goes on from there");
}

}  // namespace kompakt
