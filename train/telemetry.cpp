// Events, bar and curves of a training.
#include "train/telemetry.h"

#include <algorithm>
#include <cmath>

#include "core/system.h"
#include "core/text.h"
#include "model/device_memory.h"

namespace kompakt {
namespace {

constexpr std::int64_t curve_points = 250;
constexpr std::int64_t event_steps = 10;
constexpr std::int64_t watched_points = 20, watched_steps = 10;

Json telemetry_parts(const std::vector<std::pair<std::string, double>>& parts) {
  Json out = Json::object();
  for (const auto& [name, value] : parts) out[name] = value;
  return out;
}

double telemetry_since(std::chrono::steady_clock::time_point start) { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); }

}  // namespace

Telemetry::Telemetry(std::string title, std::int64_t steps, const Json& saved, c10::Device device)
    : title_(title), device_(device), steps_(steps), curve_every_((steps + curve_points - 1) / curve_points), event_every_(std::min(event_steps, curve_every_)), watch_every_(std::max(watched_steps, (steps + watched_points - 1) / watched_points)),
      start_(std::chrono::steady_clock::now()), event_start_(start_), progress_(title, steps) {
  if (saved.is_null()) return;
  loss_curve_ = saved.at("loss_curve");
  dev_curve_ = saved.at("dev_curve");
  watched_curve_ = saved.value("watched_curve", Json::array());
  for (const auto& [name, value] : saved.at("sums").items()) sums_.emplace_back(name, value.get<double>());
  summed_ = saved.at("summed").get<std::int64_t>();
  seconds_before_ = saved.at("seconds").get<double>();
  empty_steps_ = saved.value("empty_steps", std::int64_t{0});
  empty_micro_batches_ = saved.value("empty_micro_batches", std::int64_t{0});
}

double Telemetry::seconds() const { return seconds_before_ + telemetry_since(start_); }

void Telemetry::step(const StepRecord& record) {
  empty_micro_batches_ += record.empty_micro_batches, empty_steps_ += record.empty();
  const auto point = [&] {
    Json parts = Json::object();
    for (std::size_t i = 1; i < sums_.size(); ++i) parts[sums_[i].first] = sums_[i].second / static_cast<double>(summed_);
    loss_curve_.push_back({{"step", record.step}, {"loss", sums_.front().second / static_cast<double>(summed_)}, {"learning_rate", record.learning_rate}, {"parts", parts}});
    summed_ = 0;
  };
  if (record.empty()) {
    if (summed_ > 0 && record.step == steps_) point();
    return progress_.update(record.step, note_);
  }
  if (summed_ == 0) {
    sums_.clear();
    sums_.emplace_back("loss", 0.0);
    for (const auto& [name, value] : record.parts) sums_.emplace_back(name, 0.0);
  }
  sums_.front().second += record.loss;
  for (std::size_t i = 0; i < record.parts.size() && i + 1 < sums_.size(); ++i) sums_[i + 1].second += record.parts[i].second;
  ++summed_;
  event_tokens_ += record.tokens;
  if (record.step % curve_every_ == 0 || record.step == steps_) point();
  if (record.step % event_every_ == 0 || record.step == steps_) {
    const double seconds = std::max(1e-9, telemetry_since(event_start_));
    Json event{{"stage", title_}, {"step", record.step}, {"loss", record.loss}, {"parts", telemetry_parts(record.parts)}, {"gradient_norm", record.gradient_norm},
                        {"learning_rate", record.learning_rate}, {"tokens_per_second", static_cast<double>(event_tokens_) / seconds}, {"memory_bytes", current_memory_bytes()}};
    if (const auto bytes = device_memory_bytes(device_)) event["device_memory_bytes"] = *bytes;
    if (empty_micro_batches_ > 0) event["empty_micro_batches"] = empty_micro_batches_, event["empty_steps"] = empty_steps_;
    log_metric("step", event);
    event_tokens_ = 0;
    event_start_ = std::chrono::steady_clock::now();
  }
  progress_.update(record.step, "loss " + fixed(record.loss, 3) + note_);
}

void Telemetry::dev(double epoch, std::int64_t step, double score) {
  dev_curve_.push_back({{"epoch", epoch}, {"step", step}, {"score", score}});
  log_metric("dev", {{"stage", title_}, {"epoch", epoch}, {"step", step}, {"score", score}});
  note_ = ", dev " + fixed(score, 4);
  // Scoring is not training: it must not look like a slow step.
  event_start_ = std::chrono::steady_clock::now();
  event_tokens_ = 0;
}

void Telemetry::watched(std::int64_t step, const std::vector<std::pair<std::string, double>>& parts) {
  watched_curve_.push_back({{"step", step}, {"parts", telemetry_parts(parts)}});
  log_metric("watched", {{"stage", title_}, {"step", step}, {"parts", telemetry_parts(parts)}});
}

void Telemetry::finish() { progress_.finish("in " + human_seconds(seconds()) + note_); }

Json Telemetry::save() const {
  return {{"loss_curve", loss_curve_}, {"dev_curve", dev_curve_}, {"watched_curve", watched_curve_}, {"sums", telemetry_parts(sums_)}, {"summed", summed_}, {"seconds", seconds()}, {"empty_steps", empty_steps_}, {"empty_micro_batches", empty_micro_batches_}};
}

}  // namespace kompakt
