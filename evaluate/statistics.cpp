// Intervals, paired tests and corrections. Resample r draws its i-th example with counter r * n + i of the stream
// "bootstrap", so that any subset of resamples can be repeated alone.
#include "evaluate/statistics.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "core/error.h"
#include "core/random.h"
#include "core/text.h"

namespace kompakt {
namespace {

void statistics_need(std::size_t n, const char* what) {
  if (n == 0) throw Error(str("no examples: ", what, " of an empty sample is undefined")).allowed("at least 1 example").hint("check the data set and its split");
}

void statistics_same(std::size_t a, std::size_t b, const char* what) {
  if (a != b) throw Error(str(what, " needs samples of one length, not ", a, " and ", b)).hint("score both models on the same examples in the same order");
}

void statistics_level(double level) {
  if (!(level > 0 && level < 1)) throw Error(str("confidence level ", level, " is out of range")).allowed("a number inside (0, 1), such as 0.95");
}

void statistics_finite(Values values, const char* what) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i])) throw Error(str(what, " of example ", i, " is ", values[i])).allowed("finite numbers").hint("a model with NaN or infinite outputs cannot be scored");
  }
}

void statistics_labels(Labels labels, std::int64_t classes, const char* what) {
  if (classes < 1) throw Error(str(classes, " classes")).allowed("at least 1 class");
  for (std::size_t i = 0; i < labels.size(); ++i) {
    if (labels[i] < 0 || labels[i] >= classes) throw Error(str(what, " of example ", i, " is ", labels[i])).allowed(str("0 to ", classes - 1));
  }
}

// `draw(index)` fills `index` with one resample; `statistic(index)` is evaluated on each.
std::pair<double, double> statistics_bootstrap(std::size_t n, const Bootstrap& b, const std::function<double(std::span<const std::uint32_t>)>& statistic) {
  statistics_level(b.level);
  if (b.resamples < 1) throw Error(str(b.resamples, " bootstrap resamples")).allowed("at least 1; 1000 or more for a report");
  if (n > 0xFFFFFFFFull) throw Error(str(n, " examples are too many for a bootstrap")).allowed("up to 2^32 - 1");
  const CounterRandom random(b.seed, "bootstrap");
  std::vector<std::uint32_t> index(n);
  std::vector<double> draws(static_cast<std::size_t>(b.resamples));
  for (std::size_t r = 0; r < draws.size(); ++r) {
    for (std::size_t i = 0; i < n; ++i) index[i] = static_cast<std::uint32_t>(random.below(r * n + i, n));
    draws[r] = statistic(index);
  }
  std::sort(draws.begin(), draws.end());
  const double tail = (1 - b.level) / 2;
  return {quantile(draws, tail), quantile(draws, 1 - tail)};
}

struct StatisticsCounts {
  std::vector<std::int64_t> truth, predicted, both;
  explicit StatisticsCounts(std::int64_t classes) : truth(static_cast<std::size_t>(classes)), predicted(truth.size()), both(truth.size()) {}
  void clear() {
    for (auto* counts : {&truth, &predicted, &both}) std::fill(counts->begin(), counts->end(), 0);
  }
  void add(std::int64_t p, std::int64_t t) {
    ++truth[static_cast<std::size_t>(t)];
    ++predicted[static_cast<std::size_t>(p)];
    if (p == t) ++both[static_cast<std::size_t>(t)];
  }
  bool occurs(std::size_t k) const { return truth[k] + predicted[k] > 0; }
  double f1(std::size_t k) const { return occurs(k) ? 2.0 * static_cast<double>(both[k]) / static_cast<double>(truth[k] + predicted[k]) : 0.0; }
  // Mean over all classes but those which `whole` has and this resample lost.
  double macro_f1(const StatisticsCounts& whole) const {
    double sum = 0;
    std::size_t counted = 0;
    for (std::size_t k = 0; k < truth.size(); ++k) {
      if (whole.occurs(k) && !occurs(k)) continue;
      sum += f1(k);
      ++counted;
    }
    return counted ? sum / static_cast<double>(counted) : 0.0;
  }
};

StatisticsCounts statistics_count(Labels predicted, Labels truth, std::int64_t classes) {
  statistics_need(truth.size(), "macro-F1");
  statistics_same(predicted.size(), truth.size(), "macro-F1");
  statistics_labels(predicted, classes, "the predicted label");
  statistics_labels(truth, classes, "the true label");
  StatisticsCounts counts(classes);
  for (std::size_t i = 0; i < truth.size(); ++i) counts.add(predicted[i], truth[i]);
  return counts;
}

double statistics_mean(Values values) { return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size()); }

std::vector<double> statistics_minus(Values first, Values second) {
  std::vector<double> difference(first.size());
  for (std::size_t i = 0; i < first.size(); ++i) difference[i] = first[i] - second[i];
  return difference;
}

// exp(sum nll / sum tokens) over drawn windows.
Interval statistics_windows(Values nll, Labels tokens, const Bootstrap& bootstrap, const char* what) {
  statistics_need(nll.size(), what);
  statistics_same(nll.size(), tokens.size(), what);
  statistics_finite(nll, "the log-likelihood");
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 1) throw Error(str("window ", i, " scores ", tokens[i], " tokens")).allowed("at least 1");
  }
  std::vector<std::uint32_t> all(nll.size());
  std::iota(all.begin(), all.end(), 0u);
  const auto perplexity = [&](std::span<const std::uint32_t> index) {
    double sum = 0, count = 0;
    for (const std::uint32_t i : index) {
      sum += nll[i];
      count += static_cast<double>(tokens[i]);
    }
    return std::exp(sum / count);
  };
  const auto [low, high] = statistics_bootstrap(nll.size(), bootstrap, perplexity);
  return {perplexity(all), low, high};
}

}  // namespace

double normal_factor(double level) {
  statistics_level(level);
  double low = 0, high = 40;  // erfc(40 / sqrt 2) underflows: every representable level lies between
  for (int step = 0; step < 200; ++step) {
    const double middle = (low + high) / 2;
    (std::erfc(middle / std::sqrt(2.0)) > 1 - level ? low : high) = middle;
  }
  return (low + high) / 2;
}

Interval wilson_interval(std::int64_t right, std::int64_t n, double level) {
  statistics_need(static_cast<std::size_t>(std::max<std::int64_t>(n, 0)), "accuracy");
  if (right < 0 || right > n) throw Error(str(right, " right answers of ", n)).allowed(str("0 to ", n));
  const double z = normal_factor(level), count = static_cast<double>(n), p = static_cast<double>(right) / count;
  const double middle = (p + z * z / (2 * count)) / (1 + z * z / count);
  const double half = z / (1 + z * z / count) * std::sqrt(p * (1 - p) / count + z * z / (4 * count * count));
  // At the ends one bound is exactly 0 or 1; rounding may not carry it past them.
  return {p, right == 0 ? 0.0 : std::max(0.0, middle - half), right == n ? 1.0 : std::min(1.0, middle + half)};
}

double accuracy_standard_error(std::int64_t right, std::int64_t n) {
  statistics_need(static_cast<std::size_t>(std::max<std::int64_t>(n, 0)), "the standard error");
  if (right < 0 || right > n) throw Error(str(right, " right answers of ", n)).allowed(str("0 to ", n));
  if (n == 1) return 0;
  const double p = static_cast<double>(right) / static_cast<double>(n);
  return std::sqrt(p * (1 - p) / static_cast<double>(n - 1));
}

std::int64_t count_right(Labels predicted, Labels truth) {
  statistics_same(predicted.size(), truth.size(), "accuracy");
  std::int64_t right = 0;
  for (std::size_t i = 0; i < truth.size(); ++i) right += predicted[i] == truth[i];
  return right;
}

Interval accuracy(Labels predicted, Labels truth, double level) {
  return wilson_interval(count_right(predicted, truth), static_cast<std::int64_t>(truth.size()), level);
}

std::vector<ClassScore> class_scores(Labels predicted, Labels truth, std::int64_t classes) {
  const StatisticsCounts counts = statistics_count(predicted, truth, classes);
  std::vector<ClassScore> scores(counts.truth.size());
  for (std::size_t k = 0; k < scores.size(); ++k) {
    const double both = static_cast<double>(counts.both[k]);
    scores[k].n = counts.truth[k];
    scores[k].precision = counts.predicted[k] ? both / static_cast<double>(counts.predicted[k]) : 0;
    scores[k].recall = counts.truth[k] ? both / static_cast<double>(counts.truth[k]) : 0;
    scores[k].f1 = counts.f1(k);
  }
  return scores;
}

double macro_f1(Labels predicted, Labels truth, std::int64_t classes) {
  const StatisticsCounts counts = statistics_count(predicted, truth, classes);
  return counts.macro_f1(counts);
}

Interval macro_f1_interval(Labels predicted, Labels truth, std::int64_t classes, const Bootstrap& bootstrap) {
  const StatisticsCounts whole = statistics_count(predicted, truth, classes);
  StatisticsCounts counts(classes);
  const auto [low, high] = statistics_bootstrap(truth.size(), bootstrap, [&](std::span<const std::uint32_t> index) {
    counts.clear();
    for (const std::uint32_t i : index) counts.add(predicted[i], truth[i]);
    return counts.macro_f1(whole);
  });
  return {whole.macro_f1(whole), low, high};
}

double expected_calibration_error(Values confidence, Labels right, std::int64_t bins) {
  statistics_need(confidence.size(), "calibration error");
  statistics_same(confidence.size(), right.size(), "calibration error");
  if (bins < 1) throw Error(str(bins, " bins")).allowed("at least 1");
  std::vector<double> gap(static_cast<std::size_t>(bins), 0.0);  // sum of right - confidence in a bin
  for (std::size_t i = 0; i < confidence.size(); ++i) {
    const double c = confidence[i];
    if (!(c >= 0 && c <= 1)) throw Error(str("confidence of example ", i, " is ", c)).allowed("0 to 1");
    const double bin = std::ceil(c * static_cast<double>(bins)) - 1;
    gap[static_cast<std::size_t>(std::clamp(bin, 0.0, static_cast<double>(bins - 1)))] += (right[i] != 0 ? 1.0 : 0.0) - c;
  }
  double sum = 0;
  for (const double g : gap) sum += std::abs(g);
  return sum / static_cast<double>(confidence.size());
}

Discordant discordant(Labels first, Labels second, Labels truth) {
  statistics_same(first.size(), truth.size(), "a paired comparison");
  statistics_same(second.size(), truth.size(), "a paired comparison");
  Discordant result;
  for (std::size_t i = 0; i < truth.size(); ++i) {
    const bool a = first[i] == truth[i], b = second[i] == truth[i];
    result.first_only += a && !b;
    result.second_only += b && !a;
    result.agree += first[i] == second[i];
  }
  return result;
}

double mcnemar_exact(std::int64_t b, std::int64_t c) {
  if (b < 0 || c < 0) throw Error(str("discordant counts ", b, " and ", c)).allowed("0 or more");
  const double n = static_cast<double>(b) + static_cast<double>(c);
  if (b == c) return 1;  // the two tails overlap in the middle term
  const double most = static_cast<double>(std::min(b, c));
  // From the largest term downwards: each is the one before times k / (n - k + 1), so nothing overflows.
  double term = std::exp(std::lgamma(n + 1) - std::lgamma(most + 1) - std::lgamma(n - most + 1) - n * std::log(2.0)), sum = 0;
  for (double k = most; k >= 0; --k) {
    sum += term;
    term *= k / (n - k + 1);
    if (term < sum * 1e-17) break;
  }
  return std::min(1.0, 2 * sum);
}

Interval accuracy_difference(Labels first, Labels second, Labels truth, const Bootstrap& bootstrap) {
  statistics_need(truth.size(), "an accuracy difference");
  statistics_same(first.size(), truth.size(), "an accuracy difference");
  statistics_same(second.size(), truth.size(), "an accuracy difference");
  std::vector<double> difference(truth.size());
  for (std::size_t i = 0; i < truth.size(); ++i) difference[i] = static_cast<double>(first[i] == truth[i]) - static_cast<double>(second[i] == truth[i]);
  return mean_interval(difference, bootstrap);
}

Interval macro_f1_difference(Labels first, Labels second, Labels truth, std::int64_t classes, const Bootstrap& bootstrap) {
  const StatisticsCounts whole_a = statistics_count(first, truth, classes), whole_b = statistics_count(second, truth, classes);
  StatisticsCounts a(classes), b(classes);
  const auto [low, high] = statistics_bootstrap(truth.size(), bootstrap, [&](std::span<const std::uint32_t> index) {
    a.clear();
    b.clear();
    for (const std::uint32_t i : index) {
      a.add(first[i], truth[i]);
      b.add(second[i], truth[i]);
    }
    return a.macro_f1(whole_a) - b.macro_f1(whole_b);
  });
  return {whole_a.macro_f1(whole_a) - whole_b.macro_f1(whole_b), low, high};
}

Interval mean_difference(Values first, Values second, const Bootstrap& bootstrap) {
  statistics_need(first.size(), "a mean difference");
  statistics_same(first.size(), second.size(), "a mean difference");
  statistics_finite(first, "the first value");
  statistics_finite(second, "the second value");
  return mean_interval(statistics_minus(first, second), bootstrap);
}

Interval mean_interval(Values values, const Bootstrap& bootstrap) {
  statistics_need(values.size(), "a mean");
  statistics_finite(values, "the value");
  const auto [low, high] = statistics_bootstrap(values.size(), bootstrap, [&](std::span<const std::uint32_t> index) {
    double sum = 0;
    for (const std::uint32_t i : index) sum += values[i];
    return sum / static_cast<double>(index.size());
  });
  return {statistics_mean(values), low, high};
}

Interval perplexity_interval(Values nll, Labels tokens, const Bootstrap& bootstrap) { return statistics_windows(nll, tokens, bootstrap, "perplexity"); }

Interval perplexity_ratio(Values first, Values second, Labels tokens, const Bootstrap& bootstrap) {
  statistics_same(first.size(), second.size(), "a perplexity ratio");
  statistics_finite(first, "the first log-likelihood");
  statistics_finite(second, "the second log-likelihood");
  // exp(a/t) / exp(b/t) = exp((a - b)/t) for windows drawn together
  return statistics_windows(statistics_minus(first, second), tokens, bootstrap, "a perplexity ratio");
}

Spread spread(Values values) {
  statistics_need(values.size(), "a spread");
  statistics_finite(values, "the value");
  std::vector<double> sorted(values.begin(), values.end());
  std::sort(sorted.begin(), sorted.end());
  return {statistics_mean(values), quantile(sorted, 0.5), quantile(sorted, 0.99)};
}

double quantile(std::vector<double> values, double share) {
  statistics_need(values.size(), "a quantile");
  if (!(share >= 0 && share <= 1)) throw Error(str("quantile ", share)).allowed("0 to 1");
  if (!std::is_sorted(values.begin(), values.end())) std::sort(values.begin(), values.end());
  const double place = share * static_cast<double>(values.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (place - static_cast<double>(below)) * (values[above] - values[below]);
}

std::vector<double> holm(Values p_values) {
  for (std::size_t i = 0; i < p_values.size(); ++i) {
    if (!(p_values[i] >= 0 && p_values[i] <= 1)) throw Error(str("p-value ", i, " is ", p_values[i])).allowed("0 to 1");
  }
  std::vector<std::size_t> order(p_values.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return p_values[a] < p_values[b]; });
  std::vector<double> adjusted(p_values.size());
  double largest = 0;
  for (std::size_t rank = 0; rank < order.size(); ++rank) {
    largest = std::max(largest, std::min(1.0, p_values[order[rank]] * static_cast<double>(order.size() - rank)));
    adjusted[order[rank]] = largest;
  }
  return adjusted;
}

}  // namespace kompakt
