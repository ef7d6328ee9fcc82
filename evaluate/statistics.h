// Statistics of an evaluation: scores with intervals, paired comparisons of two models on the same examples, corrections.
//
// Pure functions over plain numbers: no model, no torch. Every random draw comes from CounterRandom, so that an interval
// is a function of its inputs and the seed.
// All functions throw Error for an empty sample, sizes that differ, labels out of range and values that are not finite.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace kompakt {

struct Interval {
  double value = 0, low = 0, high = 0;
};

// How bootstrap intervals are drawn: percentile interval of `resamples` draws with replacement.
struct Bootstrap {
  std::int64_t resamples = 2000;
  std::uint64_t seed = 17;
  double level = 0.95;  // inside (0, 1)
};

using Labels = std::span<const std::int64_t>;
using Values = std::span<const double>;

// Half-width factor of a two-sided normal interval: 0.95 -> 1.95996.
double normal_factor(double level);

// Wilson (1927) score interval of a proportion; value = right / n. Stays inside [0, 1], is sensible for right = 0 and n.
Interval wilson_interval(std::int64_t right, std::int64_t n, double level = 0.95);
// sqrt(p (1 - p) / (n - 1)): the sample standard deviation over sqrt(n), as lm-eval prints it. 0 for n = 1.
double accuracy_standard_error(std::int64_t right, std::int64_t n);
std::int64_t count_right(Labels predicted, Labels truth);
// Wilson interval of the share of equal labels.
Interval accuracy(Labels predicted, Labels truth, double level = 0.95);

struct ClassScore {
  double precision = 0, recall = 0, f1 = 0;  // 0 where undefined
  std::int64_t n = 0;                        // examples whose true label this is
};
// One row per class 0 .. classes-1.
std::vector<ClassScore> class_scores(Labels predicted, Labels truth, std::int64_t classes);
// Mean over all classes of 2PR/(P+R), 0 where undefined.
double macro_f1(Labels predicted, Labels truth, std::int64_t classes);
// A class that occurs in the sample but neither as truth nor as prediction in a resample is left out of that resample's
// mean: counting it as 0 would push the interval below the score for rare classes.
Interval macro_f1_interval(Labels predicted, Labels truth, std::int64_t classes, const Bootstrap& bootstrap = {});

// Sum over equal-width bins (lower, upper] of |B|/n * |accuracy(B) - mean confidence(B)| (Guo et al. 2017).
// `confidence` in [0, 1]: probability of the predicted label; `right`: 1 where the prediction is right, else 0.
double expected_calibration_error(Values confidence, Labels right, std::int64_t bins = 15);

struct Discordant {
  std::int64_t first_only = 0, second_only = 0;  // examples that only one of the two got right
  std::int64_t agree = 0;                        // same prediction, right or wrong
};
Discordant discordant(Labels first, Labels second, Labels truth);
// Exact two-sided McNemar test: 2 * sum over k <= min(b, c) of C(b + c, k) / 2^(b + c), at most 1. No discordant pair: 1.
double mcnemar_exact(std::int64_t b, std::int64_t c);

// Paired bootstrap of first - second: both models are resampled with the same examples.
Interval accuracy_difference(Labels first, Labels second, Labels truth, const Bootstrap& bootstrap = {});
Interval macro_f1_difference(Labels first, Labels second, Labels truth, std::int64_t classes, const Bootstrap& bootstrap = {});
// Mean NLL, KL or any other value per example (or per document: resampling follows the unit that is given).
Interval mean_difference(Values first, Values second, const Bootstrap& bootstrap = {});
Interval mean_interval(Values values, const Bootstrap& bootstrap = {});

// Perplexity exp(sum nll / sum tokens) by block bootstrap: windows are drawn whole, as tokens of a window depend on each other.
// `nll` holds the summed negative log-likelihood of a window in nats, `tokens` how many positions it scores.
Interval perplexity_interval(Values nll, Labels tokens, const Bootstrap& bootstrap = {});
// Ratio perplexity(first) / perplexity(second) over the same windows.
Interval perplexity_ratio(Values first, Values second, Labels tokens, const Bootstrap& bootstrap = {});

struct Spread {
  double mean = 0, median = 0, p99 = 0;
};
// Quantiles interpolate linearly between order statistics (type 7 of Hyndman & Fan, numpy's default).
Spread spread(Values values);
double quantile(std::vector<double> values, double share);

// Holm (1979) step-down adjusted p-values, in the order given; reject where adjusted <= alpha.
std::vector<double> holm(Values p_values);

}  // namespace kompakt
