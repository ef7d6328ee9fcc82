// The sentence about the calibration set.
#include "report/calibration.h"

#include <catch2/catch.hpp>

#include <string>

namespace kompakt {
TEST_CASE("the report says what a quantization looked at", "[report]") {
  const Json set = {{"tokens", 65536}, {"sequences", 128}, {"tokens_per_input", 42.6667}, {"sha256", std::string(64, 'a')}, {"layers_whose_halves_disagree", 3},
                    {"token_weights", {{"by", "gradient_norm"}, {"least_effective_tokens", 2140.6}}}};
  Json report = {{"stages", {{{"name", "01-quantize"}, {"details", {{"calibration", set}}}}, {{"name", "02-export"}, {"details", Json::object()}}}}};
  const auto lines = calibration_lines(report);
  REQUIRE(lines.size() == 1);
  CHECK(lines[0] == "01-quantize: 65536 tokens in 128 sequences, 42.7 for each input of the widest layer, SHA-256 aaaaaaaaaaaaaaaa…; weighted by gradient_norm, worth 2141 tokens for the layer that trusts the fewest; two halves of it disagree in 3 layers.");
  report["stages"][0]["details"]["calibration"] = {{"tokens", 512}};
  CHECK(calibration_lines(report).at(0) == "01-quantize: 512 tokens in – sequences.");
  // Of another shape: nothing, and no exception.
  for (const Json& other : {Json(3), Json("x"), Json::array({1})}) {
    report["stages"][0]["details"]["calibration"] = other;
    CHECK(calibration_lines(report).empty());
  }
  CHECK(calibration_lines(Json{{"stages", 3}}).empty());
  CHECK(calibration_lines(Json::object()).empty());
}

}  // namespace kompakt
