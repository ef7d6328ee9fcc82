// Scale (and offset) of one group of weights: exact ternary least squares, multi-start least squares for uniform grids,
// clip search for grids with a zero point. Raw pointers, one thread, a fixed order of operations: the same bits everywhere.
// Does not round scales to their stored type except where the choice between candidates needs it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace kompakt {

struct GroupScale {
  float scale = 0, offset = 0;  // w = scale * code + offset
};

// Reused buffers of one thread.
class FitScratch {
 public:
  // Loads a group: values padded with zeros to whole vectors, importance (ones when null, zeros in the padding).
  // Returns false when a value is NaN or infinite. An importance without any positive entry counts as ones.
  bool load(const float* w, const float* importance, std::int64_t n);

  std::vector<float> values, magnitudes, weights, active, active_weights;
  std::vector<std::pair<float, float>> sorted;
  std::int64_t size = 0, padded = 0;
  bool weighted = false;
  double magnitude_sum = 0, weight_sum = 0;  // sum of d |w|, sum of d
  float largest = 0, minimum = 0, maximum = 0;
};

// The minimiser over alpha and t in {-1,0,1}^n of sum d (w - alpha t)^2; alpha >= 0.
// For a support S the best alpha is mean_d |w| over S, and the best S for alpha is |w| > alpha/2: a prefix of the magnitudes
// in descending order. alpha -> mean(|w| > alpha/2) is monotone, so iterating it from below and from above brackets the
// optimum; only the magnitudes between the brackets are sorted and tried with prefix sums. Exact, about ten times faster
// than sorting a whole row.
float fit_ternary(FitScratch& group);

// mean |w|: the rule of BitNet b1.58, kept as a control.
float fit_absmean(const FitScratch& group);

struct UniformRule {
  int low, high;                    // codes
  bool both_signs;                  // a negative scale gives the longer side of the codes to the other tail
  std::span<const float> starts;
  int iterations;                   // alternations of codes and least-squares scale per start
  float smallest;                   // smallest stored scale
};
// The best candidate by weighted squared error after rounding the scale to half.
float fit_uniform(FitScratch& group, const UniformRule& rule);
// The same for codes of two bits: eight starts of either sign side by side, as multiples of the root mean square, one alternation
// each; the better sign of every start goes on for two more. Per group as near to the exact optimum as five starts with eight
// alternations each, in a fifth of the time.
float fit_two_bits(FitScratch& group, int low, int high, bool both_signs, float smallest);
// The scale that just covers the largest magnitude.
float fit_absmax(const FitScratch& group, int high);

struct OffsetRule {
  int high;                         // codes 0..high
  bool integer_zero;                // offset = -scale * z with z an integer in 0..high; else a half-precision minimum
  std::span<const float> starts;    // shrinkage of each end of the range, tried in pairs when `pairs`
  bool pairs;
  int iterations;                   // least-squares alternations, only without integer_zero
  float smallest;
};
GroupScale fit_offset(FitScratch& group, const OffsetRule& rule);

}  // namespace kompakt
