// Learning-rate range test (Smith 2017, arXiv 1506.01186): the loss over a rate that grows exponentially from step to step, and which
// rate to take from it. A pure function of the curve; the loop makes the steps.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace kompakt {

struct RatePoint {
  double rate = 0;  // of the step
  double loss = 0;  // before it
};

class RateFinder {
 public:
  static constexpr std::int64_t steps = 80;
  static double rate(std::int64_t step);  // 10^-7 to 1, each step times the same factor

  // True: the sweep is over, because the loss has exploded (four times its best) or is no number.
  bool add(double rate, double loss);
  // Mean loss with weights 0.9^age, corrected for its start; what the rule looks at.
  const std::vector<RatePoint>& curve() const { return curve_; }
  // The rate at which the loss falls fastest per decade, before its lowest point; nothing when it never falls.
  std::optional<double> steepest() const;

 private:
  std::vector<RatePoint> curve_;
  double mean_ = 0, weight_ = 0, best_ = 0;
};

}  // namespace kompakt
