// Text data: windows, text that is too short, calibration text that also stands in the test.
#include "core/text.h"
#include "model/checkpoint.h"
#include "pipeline/task_data.h"
#include "tests/catch_torch.h"
#include "tests/pipeline/tiny.h"
#include "tests/support.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

Recipe text_recipe(const TinySetting& tiny, const std::string& calibration, const std::string& test) {
  write_text(tiny.folder() / "calibration.txt", calibration);
  write_text(tiny.folder() / "test.txt", test);
  return recipe_from_node(parse_yaml("teacher: {path: teacher}\ndata:\n  calibration: {files: [calibration.txt], format: text, max_length: 16}\n  test: {files: [test.txt], format: text, max_length: 16}\n"
                                     "stages: [quantize]",
                                     "recipe"),
                          "recipe", tiny.folder());
}

std::string repeated(const std::string& text, int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += text;
  return out;
}

}  // namespace

TEST_CASE("text data become windows; overlap of calibration and test is refused", "[data]") {
  const TinySetting tiny;
  const ModelConfig config = load_config(tiny.folder() / "teacher");
  const auto tokenizer = load_tokenizer(tiny.folder() / "teacher");
  const std::string first = repeated("my card is lost where is the money ", 20), second = repeated("exchange rate fee high why how much ", 20);
  {
    const Recipe recipe = text_recipe(tiny, first, second);
    const LoadedData data = load_data(recipe);
    const auto out = tokenize_data(recipe, data, *tokenizer, config);
    REQUIRE(out->test_windows.size() == 140 / 16);
    CHECK(out->test_windows[0].size() == 16);
    CHECK(out->task.calibration.size() == 160 / 16);
  }
  {
    const Recipe recipe = text_recipe(tiny, first + second, second);
    const LoadedData data = load_data(recipe);
    CHECK(contains_all(error_text([&] { tokenize_data(recipe, data, *tokenizer, config); }), {"calibration", "test", "take other text"}));
  }
  {
    const Recipe recipe = text_recipe(tiny, first, "my card");
    const LoadedData data = load_data(recipe);
    CHECK(contains_all(error_text([&] { tokenize_data(recipe, data, *tokenizer, config); }), {"data set \"test\"", "too short"}));
  }
}
