// The learning-rate sweep: its rule on made curves, and in a training.
#include "train/rate_finder.h"

#include <ATen/ATen.h>

#include "tests/catch_torch.h"
#include <cmath>
#include <limits>

#include "tests/support.h"
#include "tests/train/fixtures.h"

using namespace kompakt;
using namespace kompakt::testing;

TEST_CASE("rates grow from 1e-7 to 1 by one factor") {
  CHECK(RateFinder::rate(0) == Approx(1e-7));
  CHECK(RateFinder::rate(RateFinder::steps - 1) == Approx(1));
  CHECK(RateFinder::rate(11) / RateFinder::rate(10) == Approx(RateFinder::rate(41) / RateFinder::rate(40)));
}

TEST_CASE("the steepest fall is found, explosions and flat curves are noticed") {
  // A logistic fall around 10^-3, an explosion above 10^-1: the smoothing lags by a few points, less than a decade.
  const auto curve = [](double rate) {
    const double decade = std::log10(rate);
    return 2 + 3 / (1 + std::exp(4 * (decade + 3))) + (decade > -1 ? std::pow(10, 3 * (decade + 1)) : 0);
  };
  RateFinder finder;
  std::int64_t steps = 0;
  bool over = false;
  for (; steps < RateFinder::steps && !over; ++steps) over = finder.add(RateFinder::rate(steps), curve(RateFinder::rate(steps)));
  CHECK(over);
  CHECK(steps < RateFinder::steps);
  REQUIRE(finder.steepest());
  CHECK(*finder.steepest() > 1e-3);
  CHECK(*finder.steepest() < 1e-2);
  CHECK(finder.curve().front().loss == Approx(5).epsilon(1e-3));  // corrected for the start

  RateFinder flat;
  for (std::int64_t i = 0; i < 30; ++i) CHECK(!flat.add(RateFinder::rate(i), 2));
  CHECK(!flat.steepest());
  RateFinder rising;
  for (std::int64_t i = 0; i < 30; ++i) rising.add(RateFinder::rate(i), 2 + static_cast<double>(i));
  CHECK(!rising.steepest());
  RateFinder none;
  CHECK(none.add(1, std::numeric_limits<double>::quiet_NaN()));
  CHECK(!none.steepest());
  CHECK(none.curve().empty());
}

TEST_CASE("a training that looks for its rate: found, recorded, weights and moments as if nothing had been before") {
  const TaskData data = tiny_data();
  const TemporaryFolder work;
  TrainOptions options = tiny_options();
  options.learning_rate = 1e-6;  // far too low
  options.find_learning_rate = true;
  options.epochs = 4;
  Json details = Json::object();
  StageContext context = tiny_context(data, work.path() / "a", &details);
  const auto model = tiny_bert();
  train_labels(*model, options, context);
  const Json& found = details["learning_rate_finder"];
  const double rate = found["learning_rate"].get<double>();
  INFO(found.dump());
  CHECK(found["falls"].get<bool>());
  CHECK(rate > 1e-4);
  CHECK(found["curve"].size() > 20);
  CHECK(details["loss_curve"].front()["learning_rate"].get<double>() <= rate * 1.0001);

  // The same with that rate in the recipe: the sweep leaves no trace.
  TrainOptions plain = options;
  plain.find_learning_rate = false;
  plain.learning_rate = rate;
  Json other = Json::object();
  StageContext second = tiny_context(data, work.path() / "b", &other);
  const auto twin = tiny_bert();
  train_labels(*twin, plain, second);
  CHECK(other.count("learning_rate_finder") == 0);
  REQUIRE(other["loss_curve"].size() == details["loss_curve"].size());
  for (std::size_t i = 0; i < other["loss_curve"].size(); ++i) CHECK(other["loss_curve"][i]["loss"].get<double>() == Approx(details["loss_curve"][i]["loss"].get<double>()).epsilon(1e-4));
}
