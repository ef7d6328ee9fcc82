// What a running training tells: events for metrics.jsonl, the progress bar, and the curves of the report.
#pragma once

#include <c10/core/Device.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/json.h"
#include "core/log.h"

namespace kompakt {

struct StepRecord {
  std::int64_t step = 0;  // from 1
  double loss = 0;
  std::vector<std::pair<std::string, double>> parts;
  double gradient_norm = 0;  // before clipping
  double learning_rate = 0;  // peak rate x schedule, without per-group rates
  std::int64_t tokens = 0;   // without padding
  std::int64_t micro_batches = 0, empty_micro_batches = 0;  // empty: nothing to predict, not computed
  bool empty() const { return micro_batches > 0 && empty_micro_batches == micro_batches; }  // then there are no numbers
};

class Telemetry {
 public:
  // `saved`: what save() gave in an earlier process, or null.
  // `device`: where the training runs; its memory is logged beside the program's where it has one of its own.
  Telemetry(std::string title, std::int64_t steps, const Json& saved, c10::Device device = c10::Device(c10::kCPU));
  void step(const StepRecord& record);
  void dev(double epoch, std::int64_t step, double score);
  // Of the first step, about twenty times a training but never more often than every ten steps, and of the last. Step from 1.
  bool watches(std::int64_t step) const { return step == 1 || step % watch_every_ == 0 || step == steps_; }
  void watched(std::int64_t step, const std::vector<std::pair<std::string, double>>& parts);
  void finish();
  double seconds() const;  // over all processes of this training
  std::int64_t empty_steps() const { return empty_steps_; }  // likewise
  std::int64_t empty_micro_batches() const { return empty_micro_batches_; }

  Json save() const;
  // At most about 250 points; a point is the mean over the steps since the last one:
  // [{"step":..,"loss":..,"learning_rate":..,"parts":{..}}]
  const Json& loss_curve() const { return loss_curve_; }
  const Json& dev_curve() const { return dev_curve_; }  // [{"epoch":..,"step":..,"score":..}]
  const Json& watched_curve() const { return watched_curve_; }  // [{"step":..,"parts":{..}}], of single steps

 private:
  std::string title_;
  c10::Device device_;
  std::int64_t steps_, curve_every_, event_every_, watch_every_;
  Json loss_curve_ = Json::array(), dev_curve_ = Json::array(), watched_curve_ = Json::array();
  std::vector<std::pair<std::string, double>> sums_;  // since the last point of the curve: loss first, then parts
  std::int64_t summed_ = 0;
  double seconds_before_ = 0;
  std::chrono::steady_clock::time_point start_, event_start_;
  std::int64_t event_tokens_ = 0;
  std::int64_t empty_steps_ = 0, empty_micro_batches_ = 0;  // so far
  Progress progress_;
  std::string note_;
};

}  // namespace kompakt
