#include "train/rate_finder.h"

#include <algorithm>
#include <cmath>

namespace kompakt {
namespace {

constexpr double rate_low = 1e-7, rate_high = 1, rate_memory = 0.9, rate_explosion = 4;
constexpr std::int64_t rate_window = 3;  // points on each side that a slope is fitted through: single steps are noise
constexpr double rate_least_fall = 0.01; // share of the first loss: less than that is noise

}  // namespace

double RateFinder::rate(std::int64_t step) { return rate_low * std::pow(rate_high / rate_low, static_cast<double>(step) / static_cast<double>(steps - 1)); }

bool RateFinder::add(double rate, double loss) {
  if (!std::isfinite(loss)) return true;
  mean_ = rate_memory * mean_ + (1 - rate_memory) * loss;
  weight_ = rate_memory * weight_ + (1 - rate_memory);
  const double smooth = mean_ / weight_;
  curve_.push_back({rate, smooth});
  best_ = curve_.size() == 1 ? smooth : std::min(best_, smooth);
  return curve_.size() > 10 && smooth > rate_explosion * best_;
}

std::optional<double> RateFinder::steepest() const {
  const auto lowest = std::min_element(curve_.begin(), curve_.end(), [](const RatePoint& a, const RatePoint& b) { return a.loss < b.loss; }) - curve_.begin();
  if (curve_.empty() || curve_.front().loss - curve_[static_cast<std::size_t>(lowest)].loss < rate_least_fall * std::abs(curve_.front().loss)) return std::nullopt;
  std::optional<double> best;
  double steepest = 0;
  for (std::int64_t i = 0; i <= lowest; ++i) {
    // Least squares over equally spaced points (in log rate): sum k y_k / sum k^2, cut at the ends alike on both sides.
    const std::int64_t width = std::min({rate_window, i, static_cast<std::int64_t>(curve_.size()) - 1 - i});
    if (width == 0) continue;
    double up = 0, down = 0;
    for (std::int64_t k = -width; k <= width; ++k) {
      up += static_cast<double>(k) * curve_[static_cast<std::size_t>(i + k)].loss;
      down += static_cast<double>(k * k);
    }
    if (up / down < steepest) steepest = up / down, best = curve_[static_cast<std::size_t>(i)].rate;
  }
  return best;
}

}  // namespace kompakt
