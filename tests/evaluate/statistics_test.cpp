// Statistics against hand-sized cases, against scipy, scikit-learn and numpy (goldens), and at the edges.
#include "evaluate/statistics.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

#include "core/files.h"
#include "core/json.h"
#include "tests/support.h"

using namespace kompakt;
using kompakt::testing::contains_all;
using kompakt::testing::error_text;
using Ints = std::vector<std::int64_t>;
using Doubles = std::vector<double>;

namespace {

const Json& statistics_golden() {
  static const Json golden = read_json(kompakt::testing::source_folder() / "tests/goldens/statistics.json");
  return golden;
}
Ints golden_ints(const char* key) { return statistics_golden().at(key).get<Ints>(); }
Doubles golden_doubles(const char* key) { return statistics_golden().at(key).get<Doubles>(); }
Bootstrap golden_bootstrap() { return {statistics_golden().at("resamples").get<std::int64_t>(), statistics_golden().at("seed").get<std::uint64_t>(), 0.95}; }

void check_interval(const Interval& ours, const char* key) {
  const Doubles golden = golden_doubles(key);
  INFO(key);
  CHECK(ours.value == Approx(golden[0]).epsilon(1e-12));
  CHECK(ours.low == Approx(golden[1]).epsilon(1e-12));
  CHECK(ours.high == Approx(golden[2]).epsilon(1e-12));
}

}  // namespace

TEST_CASE("scores by hand", "[statistics]") {
  const Ints truth = {0, 0, 1, 1, 2}, predicted = {0, 1, 1, 1, 0};
  CHECK(accuracy(predicted, truth).value == Approx(0.6));
  const auto rows = class_scores(predicted, truth, 4);
  REQUIRE(rows.size() == 4);
  CHECK(rows[0].precision == Approx(0.5));
  CHECK(rows[0].recall == Approx(0.5));
  CHECK(rows[1].precision == Approx(2.0 / 3));
  CHECK(rows[1].recall == Approx(1.0));
  CHECK(rows[1].f1 == Approx(0.8));
  CHECK(rows[2].f1 == 0);  // never predicted
  CHECK(rows[3].f1 == 0);  // does not occur at all: undefined counts as 0
  CHECK(rows[3].n == 0);
  CHECK(macro_f1(predicted, truth, 4) == Approx((0.5 + 0.8) / 4));
  CHECK(accuracy_standard_error(3, 5) == Approx(std::sqrt(0.6 * 0.4 / 4)));

  const Discordant pairs = discordant(predicted, Ints{0, 0, 1, 0, 0}, truth);
  CHECK(pairs.first_only == 1);
  CHECK(pairs.second_only == 1);
  CHECK(pairs.agree == 3);
  CHECK(mcnemar_exact(1, 3) == Approx(2.0 * (1 + 4) / 16));
  CHECK(normal_factor(0.95) == Approx(1.959963984540054).epsilon(1e-12));
  CHECK(expected_calibration_error(Doubles{0.9, 0.9, 0.3}, Ints{1, 0, 0}, 2) == Approx((0.8 + 0.3) / 3));
  CHECK(perplexity_interval(Doubles{4 * std::log(2.0), 2 * std::log(2.0)}, Ints{4, 2}).value == Approx(2.0));
}

TEST_CASE("statistics equal scipy, scikit-learn and numpy", "[statistics]") {
  const Ints truth = golden_ints("truth"), first = golden_ints("first"), second = golden_ints("second"), tokens = golden_ints("tokens");
  const Doubles kl_first = golden_doubles("kl_first"), kl_second = golden_doubles("kl_second"), nll = golden_doubles("nll");
  const auto classes = statistics_golden().at("classes").get<std::int64_t>();
  const Bootstrap bootstrap = golden_bootstrap();
  for (const Json& row : statistics_golden().at("wilson")) {
    const Interval ours = wilson_interval(row[0].get<std::int64_t>(), row[1].get<std::int64_t>());
    CHECK(ours.low == Approx(row[2].get<double>()).margin(1e-12));
    CHECK(ours.high == Approx(row[3].get<double>()).margin(1e-12));
  }
  for (const Json& row : statistics_golden().at("mcnemar")) {
    CHECK(mcnemar_exact(row[0].get<std::int64_t>(), row[1].get<std::int64_t>()) == Approx(row[2].get<double>()).epsilon(1e-7));
  }
  CHECK(accuracy_standard_error(count_right(first, truth), static_cast<std::int64_t>(truth.size())) == Approx(statistics_golden().at("standard_error").get<double>()));
  check_interval(macro_f1_interval(first, truth, classes, bootstrap), "macro_f1");
  check_interval(macro_f1_difference(first, second, truth, classes, bootstrap), "macro_f1_difference");
  check_interval(accuracy_difference(first, second, truth, bootstrap), "accuracy_difference");
  check_interval(mean_difference(kl_first, kl_second, bootstrap), "kl_difference");
  check_interval(perplexity_interval(nll, tokens, bootstrap), "perplexity");
  check_interval(perplexity_ratio(nll, golden_doubles("nll_second"), tokens, bootstrap), "perplexity_ratio");
  const Spread ours = spread(kl_first);
  const Doubles golden = golden_doubles("spread");
  CHECK(ours.mean == Approx(golden[0]));
  CHECK(ours.median == Approx(golden[1]));
  CHECK(ours.p99 == Approx(golden[2]));
  Ints right(truth.size());
  for (std::size_t i = 0; i < truth.size(); ++i) right[i] = first[i] == truth[i];
  CHECK(expected_calibration_error(golden_doubles("confidence"), right) == Approx(statistics_golden().at("ece").get<double>()));
  const Doubles adjusted = holm(golden_doubles("p_values")), expected = golden_doubles("holm");
  REQUIRE(adjusted.size() == expected.size());
  for (std::size_t i = 0; i < adjusted.size(); ++i) CHECK(adjusted[i] == Approx(expected[i]));
  const Discordant pairs = discordant(first, second, truth);
  CHECK(pairs.agree == statistics_golden().at("agree").get<std::int64_t>());
  CHECK(Ints{pairs.first_only, pairs.second_only} == golden_ints("discordant"));
}

TEST_CASE("statistics at the edges", "[statistics]") {
  const Ints none, one = {0}, other = {1};
  SECTION("empty samples are errors that name the score") {
    CHECK(contains_all(error_text([&] { accuracy(none, none); }), {"accuracy", "at least 1 example"}));
    CHECK(contains_all(error_text([&] { accuracy_standard_error(0, 0); }), {"empty sample"}));
    CHECK(contains_all(error_text([&] { macro_f1(none, none, 3); }), {"macro-F1"}));
    CHECK(contains_all(error_text([&] { mean_interval(Doubles{}); }), {"empty sample"}));
    CHECK(contains_all(error_text([&] { perplexity_interval(Doubles{}, none); }), {"perplexity"}));
    CHECK(contains_all(error_text([&] { spread(Doubles{}); }), {"empty sample"}));
    CHECK(contains_all(error_text([&] { expected_calibration_error(Doubles{}, none); }), {"calibration"}));
    CHECK(contains_all(error_text([&] { accuracy_difference(none, none, none); }), {"accuracy difference"}));
    CHECK(holm(Doubles{}).empty());
    CHECK(mcnemar_exact(0, 0) == 1);
  }
  SECTION("one example") {
    CHECK(accuracy(one, one).value == 1);
    CHECK(accuracy(one, one).high == 1);
    CHECK(accuracy(one, one).low == Approx(0.2065).margin(1e-4));
    CHECK(accuracy_standard_error(1, 1) == 0);
    const Interval f1 = macro_f1_interval(one, one, 1);
    CHECK(f1.low == 1);
    CHECK(f1.high == 1);
    CHECK(accuracy_difference(one, other, one).value == 1);
    CHECK(spread(Doubles{2.5}).p99 == 2.5);
  }
  SECTION("all right and all wrong") {
    const Ints truth = {0, 1, 2, 0, 1, 2}, wrong = {1, 2, 0, 1, 2, 0};
    CHECK(accuracy(truth, truth).high == 1);
    CHECK(accuracy(truth, truth).low < 1);
    CHECK(accuracy(wrong, truth).low == 0);
    CHECK(accuracy(wrong, truth).high > 0);
    CHECK(macro_f1_interval(truth, truth, 3).low == 1);  // lost classes do not count as wrong
    CHECK(macro_f1_interval(wrong, truth, 3).high == 0);
    CHECK(accuracy_difference(wrong, truth, truth).high == -1);
    CHECK(mcnemar_exact(0, 6) == Approx(2.0 / 64));
  }
  SECTION("mistakes") {
    CHECK(contains_all(error_text([&] { accuracy(Ints{0, 1}, one); }), {"2 and 1"}));
    CHECK(contains_all(error_text([&] { macro_f1(other, one, 1); }), {"the predicted label of example 0 is 1"}));
    CHECK(contains_all(error_text([&] { macro_f1(Ints{-1}, one, 2); }), {"-1"}));
    CHECK(contains_all(error_text([&] { mean_interval(Doubles{1, std::nan("")}); }), {"example 1", "nan"}));
    CHECK(contains_all(error_text([&] { mean_interval(Doubles{1}, {100, 1, 1.0}); }), {"level"}));
    CHECK(contains_all(error_text([&] { mean_interval(Doubles{1}, {0, 1, 0.95}); }), {"resamples"}));
    CHECK(contains_all(error_text([&] { perplexity_interval(Doubles{1}, Ints{0}); }), {"window 0"}));
    CHECK(contains_all(error_text([&] { wilson_interval(4, 3); }), {"4 right answers of 3"}));
    CHECK(contains_all(error_text([&] { expected_calibration_error(Doubles{1.5}, one); }), {"1.5"}));
    CHECK(contains_all(error_text([&] { holm(Doubles{2}); }), {"p-value 0"}));
    CHECK(contains_all(error_text([&] { mcnemar_exact(-1, 2); }), {"-1"}));
  }
}

TEST_CASE("bootstrap intervals repeat and cover", "[statistics]") {
  const Ints truth = golden_ints("truth"), first = golden_ints("first");
  const Interval once = macro_f1_interval(first, truth, 6), again = macro_f1_interval(first, truth, 6);
  CHECK(once.low == again.low);
  CHECK(once.high == again.high);
  CHECK(once.low < once.value);
  CHECK(once.value < once.high);
  CHECK(macro_f1_interval(first, truth, 6, {2000, 18, 0.95}).low != once.low);
  // A wider level encloses a narrower one.
  const Interval wide = macro_f1_interval(first, truth, 6, {2000, 17, 0.99});
  CHECK(wide.low <= once.low);
  CHECK(wide.high >= once.high);
}
