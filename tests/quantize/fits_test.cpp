// Fits in lanes against plain definitions: levels bit for bit, two-bit codes against the exact optimum.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/random.h"
#include "quantize/grid_math.h"
#include "quantize/levels.h"

namespace kompakt {
namespace {

constexpr float fits_starts[] = {1.0f, 0.92f, 0.84f, 0.76f, 0.68f, 0.6f};
constexpr float fits_twice[] = {2.0f, 1.0f, 0.5f};

void fits_group(int trial, std::vector<float>& x, std::vector<float>& weights) {
  const CounterRandom random(3, "fits");
  for (std::size_t i = 0; i < x.size(); ++i) {
    const auto at = static_cast<std::uint64_t>(trial) * 4096 + 2 * i;
    float v = 0.03f * static_cast<float>(random.normal(at)), w = std::exp(static_cast<float>(random.normal(at + 1)));
    switch (trial % 12) {
      case 0: v = std::fabs(v); break;
      case 1: v = -std::fabs(v); break;
      case 2: v = i == 3 ? v : 0; break;
      case 3: v = std::round(50 * v) / 8; break;  // ties
      case 4: v *= 1e-5f; break;
      case 5: v *= 1e5f; break;
      case 6: w = i % 2 == 0 ? w : 0; break;
      case 7: v = 0.25f; break;
      default: break;
    }
    x[i] = v, weights[i] = w;
  }
}

// The same candidates one after the other, every sum in double from the first value to the last.
float fits_levels_scalar(FitScratch& group, const LevelRule& rule) {
  if (group.largest == 0) return 0;
  const LevelTable& table = rule.table;
  const auto level_of = [&](std::size_t i, float inverse) { return table.value(table.nearest(group.values[i] * inverse)); };
  double best = std::numeric_limits<double>::infinity();
  float chosen = 0;
  for (int sign = 1; sign >= (rule.both_signs ? -1 : 1); sign -= 2) {
    const float up = sign > 0 ? group.maximum : -group.minimum, down = sign > 0 ? -group.minimum : group.maximum;
    for (const float start : rule.starts) {
      float scale = static_cast<float>(sign) * std::max(up / table.value(table.high()), down / -table.value(table.low())) * start;
      for (int turn = 0; turn < rule.iterations; ++turn) {
        double wl = 0, ll = 0;
        for (std::size_t i = 0; i < static_cast<std::size_t>(group.size); ++i) {
          const double level = level_of(i, grid::inverse_scale(scale)), d = group.weights[i];
          wl += d * level * group.values[i], ll += d * level * level;
        }
        if (ll <= 0) break;
        const float next = static_cast<float>(wl / ll);
        if (next == scale || next == 0 || (next < 0) != (sign < 0)) break;
        scale = next;
      }
      const float stored = rule.store(scale);
      double error = 0;
      for (std::size_t i = 0; i < static_cast<std::size_t>(group.size); ++i) {
        const double e = group.values[i] - stored * level_of(i, grid::inverse_scale(stored));
        error += group.weights[i] * e * e;
      }
      if (error < best) best = error, chosen = stored;
    }
  }
  return chosen;
}

double fits_error(const std::vector<float>& x, const std::vector<float>& weights, double scale, int low, int high) {
  double sum = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double e = x[i] - scale * std::clamp<double>(std::nearbyint(x[i] / scale), low, high);
    sum += weights[i] * e * e;
  }
  return sum;
}

// Least error over all scales: codes change where |x| / scale is a half or one and a half; between two such scales the best one is
// that of least squares, or an end.
double fits_exact(const std::vector<float>& x, const std::vector<float>& weights, int low, int high, bool both_signs) {
  double best = 0;
  for (std::size_t i = 0; i < x.size(); ++i) best += static_cast<double>(weights[i]) * x[i] * x[i];
  for (const float v : x)
    for (const double at : {0.5, 1.5})
      for (const double nudge : {1 - 1e-9, 1 + 1e-9})
        for (int sign = 1; sign >= (both_signs ? -1 : 1); sign -= 2) {
          const double scale = sign * std::fabs(static_cast<double>(v)) / at * nudge;
          if (scale == 0) continue;
          double product = 0, square = 0;
          for (std::size_t i = 0; i < x.size(); ++i) {
            const double q = std::clamp<double>(std::nearbyint(x[i] / scale), low, high);
            product += weights[i] * q * x[i], square += weights[i] * q * q;
          }
          if (square > 0 && (product > 0) == (sign > 0)) best = std::min(best, fits_error(x, weights, product / square, low, high));
        }
  return best;
}

}  // namespace

TEST_CASE("fits of uneven levels give the bits of the scalar ones", "[quantize][levels]") {
  const LevelRule rules[] = {{iq4_levels(), true, fits_starts, 3, store_normal_half}, {e2m1_levels(), false, fits_twice, 0, store_power}, {e2m1_levels(), false, fits_starts, 3, store_e4m3}};
  FitScratch group;
  int changed = 0;
  for (int trial = 0; trial < 1200; ++trial) {
    const std::size_t n = trial % 5 == 4 ? 13 : trial % 2 == 0 ? 32 : 16;
    std::vector<float> x(n), weights(n);
    fits_group(trial, x, weights);
    for (const float* importance : {static_cast<const float*>(nullptr), static_cast<const float*>(weights.data())})
      for (const LevelRule& rule : rules) {
        REQUIRE(group.load(x.data(), importance, static_cast<std::int64_t>(n)));
        const float ours = fit_levels(group, rule), theirs = fits_levels_scalar(group, rule);
        CAPTURE(trial, ours, theirs);
        REQUIRE(std::memcmp(&ours, &theirs, sizeof ours) == 0);
        changed += ours < 0;
      }
  }
  CHECK(changed > 0);  // negative scales won as well
}

TEST_CASE("codes of uneven levels in lanes are those of the nearest level, tails and ties included", "[quantize][levels]") {
  for (const LevelTable* table : {&iq4_levels(), &e2m1_levels()}) {
    std::vector<float> x;
    for (const float t : table->thresholds())
      for (const float v : {std::nextafter(t, -1e9f), t, std::nextafter(t, 1e9f)}) x.push_back(v);
    for (const float v : {0.0f, -0.0f, 1e30f, -1e30f, std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) x.push_back(v);
    for (std::size_t n = 0; n <= x.size(); ++n) {
      std::vector<std::int8_t> codes(x.size() + 1, 99);
      table->nearest_few(x.data(), static_cast<std::int64_t>(n), 0, 1, codes.data());
      for (std::size_t i = 0; i < n; ++i) REQUIRE(codes[i] == table->nearest(x[i]));
      CHECK(codes[n] == 99);
    }
  }
}

TEST_CASE("the fit of two-bit codes is near the exact optimum", "[quantize][grids]") {
  FitScratch group;
  for (const bool both_signs : {true, false}) {
    const int low = both_signs ? -1 : -2, high = both_signs ? 2 : 1;
    for (const bool weighted : {false, true}) {
      double ours = 0, exact = 0;
      for (int trial = 0; trial < 240; ++trial) {
        std::vector<float> x(64), weights(64);
        fits_group(12 * trial + 8 + trial % 4, x, weights);  // normal numbers
        if (!weighted) std::fill(weights.begin(), weights.end(), 1.0f);
        REQUIRE(group.load(x.data(), weights.data(), 64));
        ours += fits_error(x, weights, fit_two_bits(group, low, high, both_signs, grid::smallest_normal_half), low, high), exact += fits_exact(x, weights, low, high, both_signs);
      }
      CAPTURE(both_signs, weighted, ours / exact);
      CHECK(ours < 1.001 * exact);
      CHECK(ours > 0.999999 * exact);
    }
  }
}

TEST_CASE("the fit of two-bit codes: edges, and sums of a row longer than one go", "[quantize][grids]") {
  FitScratch group;
  const std::vector<float> zeros(64, 0.0f);
  REQUIRE(group.load(zeros.data(), nullptr, 64));
  CHECK(fit_two_bits(group, -1, 2, true, grid::smallest_normal_half) == 0);
  const float one[] = {-0.5f};
  REQUIRE(group.load(one, nullptr, 1));
  CHECK(fits_error({-0.5f}, {1.0f}, fit_two_bits(group, -1, 2, true, grid::smallest_normal_half), -1, 2) == Approx(0).margin(1e-12));
  std::vector<float> x(5000), weights(5000, 1.0f);  // on the grid of scale 0.125, no importance where it is not
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = 0.125f * static_cast<float>(static_cast<int>(i * 7 % 4) - 1);
  x[17] = 40, weights[17] = 0;
  REQUIRE(group.load(x.data(), weights.data(), 5000));
  CHECK(fit_two_bits(group, -1, 2, true, grid::smallest_normal_half) == 0.125f);
}

}  // namespace kompakt
