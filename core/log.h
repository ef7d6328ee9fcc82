// Lines for people on stderr, events for machines in metrics.jsonl, and the progress bar.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>

#include "core/json.h"

namespace kompakt {

enum class Verbosity { silent, quiet, normal };  // silent: errors alone, for all but one of several processes
void set_verbosity(Verbosity verbosity);
bool stderr_is_terminal();
// Colour codes only when stderr is a terminal and NO_COLOR is not set.
std::string bold(const std::string& text);
std::string green(const std::string& text);
std::string yellow(const std::string& text);
std::string red(const std::string& text);

void log_info(const std::string& line);     // silent with --quiet
void log_warning(const std::string& line);  // always; counted, and kept for the report
const std::vector<std::string>& warnings(); // in order, this process

// Appends events as JSON lines. One writer per run folder; every line is flushed whole.
// `event` gives the kind, `fields` the rest: {"event":"step","stage":"01-distill","step":20,"loss":1.3}.
void open_metrics(const std::filesystem::path& file);  // appends to an existing file
void close_metrics();
void log_metric(const std::string& event, const Json& fields);
// Also told of every event while metrics are open; empty = nobody.
void set_metric_listener(std::function<void(const std::string& event, const Json& fields)> listener);

// A bar with rate and time left on a terminal, one line a minute otherwise. Nothing with --quiet.
class Progress {
 public:
  Progress(std::string title, std::int64_t total, std::string unit = "step");
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  // `done` units so far (absolute); `note` stands at the end of the line, e.g. "loss 0.52".
  void update(std::int64_t done, const std::string& note = {});
  void finish(const std::string& note = {});

 private:
  void draw(bool last);
  std::string title_, unit_, note_;
  std::int64_t total_, done_ = 0, first_ = -1;
  std::chrono::steady_clock::time_point start_, drawn_;
  bool finished_ = false;
};

}  // namespace kompakt
