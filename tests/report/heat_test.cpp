// The heat map of a prune stage and the section of a search.
#include <catch2/catch.hpp>

#include "core/text.h"
#include "report/html.h"
#include "report/masked_size.h"
#include "tests/support.h"

using namespace kompakt;
using kompakt::testing::contains_all;

namespace {

std::size_t heat_count(const std::string& text, const std::string& part) {
  std::size_t n = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

}  // namespace

TEST_CASE("the heat map puts what stays under its old layer number") {
  const Json details = parse_json(R"({"removed": {"layers": [1], "depth": [3, 2], "ffn": [[0, 40, 20], [1, 40, 20]], "heads": [[0, 4, 2], [1, 4, 2]]},
    "importance": {"ffn": [[3, 2, 1, 0.5], [2, 1, 1, 0.1]], "heads": [[4, 1, 3, 2], [1, 2, 3, 4]], "kept_heads": [[0, 2], [2, 3]], "ffn_share_kept": [0.8, 0.7], "heads_share_kept": [0.7, 0.7]}})", "test");
  const std::string svg = svg_removed(details);
  CHECK(contains_all(svg, {"<svg class=\"chart\"", "layer 1: the whole layer is gone", "layer 0: 20 of 40 neurons gone, 80.0% of the importance stays", "layer 2: 2 of 4 heads gone", "feed-forward", "class=\"legend\""}));
  CHECK(svg.find("layer 1: 20 of 40") == std::string::npos);
  CHECK(heat_count(svg, "class=\"gone\"") == 1 + 2 * 2 + 2 * 2);  // the layer; two of four parts; two of four heads, in two layers
  CHECK(heat_count(svg, "class=\"stays\"") == 2 + 2 * 2 + 2 * 2);
}

TEST_CASE("single weights are shown by matrix") {
  const std::string svg = svg_removed(parse_json(R"({"sparsity": {"layers": [{"layer": "model.layers.0.mlp.up_proj", "sparsity": 0.5, "output_error": 0.1}, {"layer": "model.layers.1.mlp.up_proj", "sparsity": 0.25}, {"layer": "model.layers.1.self_attn.q_proj", "sparsity": 1}]}})", "test"));
  CHECK(contains_all(svg, {"up_proj", "q_proj", "layer 0: 50.0% of the weights are zero, error of the outputs", "layer 1: 25.0%", "fill-opacity=\"0.50\"", "fill-opacity=\"1.00\""}));
}

TEST_CASE("nothing removed, or a report of another shape, draws nothing") {
  for (const char* text : {"{}", R"({"removed": {}})", R"({"removed": {"ffn": [], "layers": "x"}})", R"({"removed": {"ffn": [[0]], "depth": [1e9, 2]}})", R"({"sparsity": {"layers": [{"layer": "x"}]}})", R"({"removed": {"vocabulary": [10, 5]}})"})
    CHECK(svg_removed(parse_json(text, "test")).empty());
  const std::string svg = svg_removed(parse_json(R"({"removed": {"ffn": [[0, 40, 20]]}})", "test"));  // no importance: shares alone
  CHECK(heat_count(svg, "class=\"gone\"") == 8);
}

TEST_CASE("a search shows its frontier, its candidates and which of them was measured") {
  const Json report = parse_json(R"({"stages": [{"name": "02-search", "details": {"search": {"chosen": {"layers": 3, "ffn": 32, "heads": 4, "bytes": 900, "predicted_kl": 0.2, "measured_kl": 0.3},
    "candidates": [{"layers": 3, "ffn": 32, "heads": 4, "bytes": 900, "predicted_kl": 0.2, "measured_kl": 0.3}, {"layers": 2, "ffn": 64, "heads": 4, "vocabulary": "used", "bytes": 950, "predicted_kl": 0.5}],
    "frontier": [{"layers": 2, "ffn": 32, "heads": 4, "bytes": 500, "predicted_kl": 0.9}, {"layers": 3, "ffn": 32, "heads": 4, "bytes": 900, "predicted_kl": 0.2}]}}}, {"name": "x"}]})", "test");
  const std::string html = html_search(report);
  CHECK(contains_all(html, {"id=\"search\"", "02-search", "class=\"cloud\"", "<tr class=\"artifact\"><td>3 layers, ffn 32, 4 heads</td>", "used vocabulary", "measured"}));
  CHECK(html_search(parse_json(R"({"stages": [{"name": "x", "details": {}}]})", "test")).empty());
}

TEST_CASE("masked weights are told per stage that has chosen them, and per format with what they take") {
  const auto lines = [](const std::string& stages) { return masked_size_lines(parse_json("{\"stages\": [" + stages + "]}", "test")); };
  CHECK(lines(R"({"name": "01-prune", "details": {}}, {"name": "02-quantize"})").empty());
  CHECK(lines(R"({"name": "01-prune", "details": {"sparsity": {"weights": 0, "zeros": 0, "layers": []}}})").empty());
  const auto told = lines(R"({"name": "02-quantize", "details": {"sparsity": {"criterion": "sparsegpt", "pattern": "2:4", "weights": 400, "zeros": 199, "layers": [{}, {}]}}},
                             {"name": "03-export", "details": {"reopened": {"gguf": {"bytes": 1000, "zstd_bytes": 700, "masked": {"weights": 400, "zeros": 199}}, "kompakt": {"bytes": 1000}}}})");
  REQUIRE(told.size() == 2);
  CHECK(told[0] == "02-quantize: 49.8% of the weights of 2 matrices is zero (sparsegpt, 2:4)");
  CHECK(told[1] == "gguf: 1.00 kB on disk, 700 B after zstd; 49.8% of the pruned matrices is zero, stored like any weight");
}
