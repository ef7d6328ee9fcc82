#include "core/log.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "core/activity.h"
#include "core/error.h"
#include "core/files.h"
#include "core/text.h"

namespace kompakt {
namespace {

struct LogState {
  Verbosity verbosity = Verbosity::normal;
  std::vector<std::string> warnings;
  int metrics = -1;
  std::function<void(const std::string&, const Json&)> listener;
  std::mutex mutex;
};

LogState& state() {
  static LogState instance;
  return instance;
}

std::string coloured(const char* code, const std::string& text) {
  static const bool use = stderr_is_terminal() && !std::getenv("NO_COLOR");
  return use ? str("\033[", code, "m", text, "\033[0m") : text;
}

}  // namespace

void set_verbosity(Verbosity verbosity) { state().verbosity = verbosity; }
bool stderr_is_terminal() { return ::isatty(STDERR_FILENO) == 1; }
std::string bold(const std::string& text) { return coloured("1", text); }
std::string green(const std::string& text) { return coloured("32", text); }
std::string yellow(const std::string& text) { return coloured("33", text); }
std::string red(const std::string& text) { return coloured("31", text); }

void log_info(const std::string& line) {
  if (state().verbosity != Verbosity::normal) return;
  std::fprintf(stderr, "%s\n", line.c_str());
}

void log_warning(const std::string& line) {
  {
    const std::lock_guard lock(state().mutex);
    auto& list = state().warnings;
    if (std::find(list.begin(), list.end(), line) != list.end()) return;  // once is enough
    list.push_back(line);
  }
  if (state().verbosity != Verbosity::silent) std::fprintf(stderr, "%s %s\n", yellow("warning:").c_str(), line.c_str());
  log_metric("warning", Json{{"text", line}});
}

const std::vector<std::string>& warnings() { return state().warnings; }

void open_metrics(const std::filesystem::path& file) {
  close_metrics();
  if (file.has_parent_path()) make_folder(file.parent_path());
  state().metrics = ::open(file.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (state().metrics < 0) throw Error("cannot open the metrics file for writing").at(file.string()).hint("check the permissions, or choose another folder with --out");
  // A line cut short by a kill must not swallow the next one.
  char last = '\n';
  const off_t size = ::lseek(state().metrics, 0, SEEK_END);
  if (size > 0 && ::pread(state().metrics, &last, 1, size - 1) == 1 && last != '\n' && ::write(state().metrics, "\n", 1) != 1) close_metrics();
}

void close_metrics() {
  if (state().metrics >= 0) ::close(state().metrics);
  state().metrics = -1;
}

void log_metric(const std::string& event, const Json& fields) {
  if (state().metrics < 0) return;
  Json line{{"event", event}};
  for (const auto& [key, value] : fields.items()) line[key] = value;
  const std::string text = line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  const std::lock_guard lock(state().mutex);
  if (::write(state().metrics, text.data(), text.size()) != static_cast<ssize_t>(text.size())) throw Error("cannot write to metrics.jsonl", ExitCode::resource).hint("free some space and run again with --resume");
  if (state().listener) state().listener(event, fields);
}

void set_metric_listener(std::function<void(const std::string&, const Json&)> listener) { state().listener = std::move(listener); }

Progress::Progress(std::string title, std::int64_t total, std::string unit)
    : title_(std::move(title)), unit_(std::move(unit)), total_(std::max<std::int64_t>(total, 0)), start_(std::chrono::steady_clock::now()), drawn_(start_) {}

Progress::~Progress() {
  if (!finished_ && stderr_is_terminal() && state().verbosity == Verbosity::normal && first_ >= 0) std::fprintf(stderr, "\n");
}

void Progress::update(std::int64_t done, const std::string& note) {
  mark_activity();
  if (first_ < 0) {
    first_ = done > 0 ? done - 1 : 0;  // a resumed run starts in the middle: the rate counts only what was done now
  }
  done_ = done;
  note_ = note;
  const double since = std::chrono::duration<double>(std::chrono::steady_clock::now() - drawn_).count();
  if (since >= (stderr_is_terminal() ? 0.1 : 60.0)) draw(false);
}

void Progress::finish(const std::string& note) {
  if (finished_) return;
  finished_ = true;
  note_ = note;
  done_ = std::max(done_, total_);
  draw(true);
}

void Progress::draw(bool last) {
  drawn_ = std::chrono::steady_clock::now();
  if (state().verbosity != Verbosity::normal) return;
  const double seconds = std::chrono::duration<double>(drawn_ - start_).count();
  const double rate = seconds > 0 ? static_cast<double>(done_ - std::max<std::int64_t>(first_, 0)) / seconds : 0;
  std::string line = title_;
  if (last) {
    line += str("  ", done_, " ", unit_, done_ == 1 ? "" : "s", " in ", human_seconds(seconds));
  } else {
    const double share = total_ > 0 ? std::min(1.0, static_cast<double>(done_) / static_cast<double>(total_)) : 0;
    if (stderr_is_terminal()) {
      const int filled = static_cast<int>(share * 24);
      line += " [" + std::string(static_cast<std::size_t>(filled), '#') + std::string(static_cast<std::size_t>(24 - filled), '.') + "]";
    }
    line += str(" ", fixed(share * 100, 0), "%  ", done_, "/", total_);
    if (rate > 0) line += str("  ", fixed(rate, rate < 10 ? 2 : 0), " ", unit_, "s/s  ", human_seconds(static_cast<double>(total_ - done_) / rate), " left");
  }
  if (!note_.empty()) line += "  " + note_;
  if (stderr_is_terminal()) std::fprintf(stderr, "\r\033[K%s%s", line.c_str(), last ? "\n" : "");
  else std::fprintf(stderr, "%s\n", line.c_str());
}

}  // namespace kompakt
