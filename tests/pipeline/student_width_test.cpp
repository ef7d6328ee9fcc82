// A student cut narrower than its teacher: the weights that the stage prune would leave, planned sizes, refusals.
#include "tests/catch_torch.h"

#include <filesystem>

#include "core/files.h"
#include "core/json.h"
#include "distill/stage.h"
#include "model/checkpoint.h"
#include "pipeline/plan.h"
#include "pipeline/recipe.h"
#include "pipeline/run.h"
#include "pipeline/student_width.h"
#include "tests/distill/tokenizers.h"
#include "tests/pipeline/tiny.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

constexpr const char* width_data = "data:\n  train: {files: [train.txt], format: text, split: line}\n  calibration: {files: [train.txt], format: text, max_length: 16}\n  test: {files: [test.txt], format: text, max_length: 16}\n";

// A decoder of 4 query heads in 2 groups, hidden size 32, 48 neurons.
void write_wide_setting(const std::filesystem::path& folder) {
  const auto tokenizer = word_tokenizer();
  const Json json = {{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"}, {"hidden_size", 32}, {"num_hidden_layers", 3}, {"num_attention_heads", 4}, {"num_key_value_heads", 2},
                     {"intermediate_size", 48}, {"vocab_size", tokenizer->vocab_size()}, {"max_position_embeddings", 64}, {"rms_norm_eps", 1e-5}, {"hidden_act", "silu"}, {"tie_word_embeddings", true}};
  Transformer model(config_from_json(json, "tiny"), 1);
  stir(model, 1);
  make_folder(folder / "teacher");
  save_model(model, folder / "teacher");
  tokenizer->save(folder / "teacher");
  std::string train, test;
  for (int i = 0; i < 12; ++i) train += "the cat sat on the mat and saw the other cat " + std::to_string(i) + "\n", test += "a cat that sat there saw the hat " + std::to_string(i * 7) + "\n";
  write_text(folder / "train.txt", train);
  write_text(folder / "test.txt", test);
}

Recipe width_recipe(const std::filesystem::path& folder, const std::string& stages, const std::string& data = width_data) {
  write_text(folder / "recipe.yaml", "name: wide\nseed: 5\nstore: store\nteacher: {path: teacher}\n" + data + "stages:\n" + stages + "  - evaluate: {latency: false}\n");
  return read_recipe(folder / "recipe.yaml");
}

}  // namespace

TEST_CASE("a narrower student is what the stage prune makes of the teacher, with the chosen layers of it") {
  const TemporaryFolder folder;
  write_wide_setting(folder.path());
  // A learning rate of zero leaves the student as it was made.
  const std::string still = ", steps: 1, batch_size: 2, sequence_length: 24, precision: float32, learning_rate: 1.0e-30, weight_decay: 0";
  for (const char* how : {"criterion: taylor", "criterion: magnitude, compensate: ls", "hidden_by: rotate, untie: true, compensate: stream"}) {
    INFO(how);
    const std::string rest = std::string(how) + ", samples: 6";
    const std::filesystem::path sliced = folder.path() / "sliced", pruned = folder.path() / "pruned";
    CHECK(run_recipe(width_recipe(folder.path(), "  - distill: {student: {keep_layers: [0, 2], width: {hidden: 24, ffn: 30, heads: 2, " + rest + "}}, objective: [{logits: forward_kl}]" + still + "}\n"), {.out = sliced}).code == ExitCode::ok);
    std::string structured = "ffn: 0.625, heads: 0.5, hidden: 0.75", others = rest;
    if (const auto at = others.find("compensate: stream"); at != std::string::npos) structured += ", hidden_by: rotate, untie: true", others = others.substr(at);
    CHECK(run_recipe(width_recipe(folder.path(), "  - prune: {structured: {" + structured + "}, multiple_of: 1, " + others + "}\n"), {.out = pruned}).code == ExitCode::ok);
    const auto student = load_model(sliced / "01-distill"), whole = load_model(pruned / "01-prune");
    CHECK(student->config().hidden == 24);
    CHECK(student->config().ffn == 30);
    CHECK(student->config().heads == 2);
    CHECK(student->config().layers == 2);
    const auto expected = make_student(*whole, {.keep_layers = {0, 2}});
    CHECK(same_parameters(copy_of(*student), copy_of(*expected)));
    const Json stage = read_json(sliced / "manifest.json").at("stages").at(0);
    CHECK(stage.at("layer_map") == Json({1, 2}));
    CHECK(stage.at("details").at("removed").at("hidden") == Json({32, 24}));
    CHECK(stage.at("details").at("keep_layers") == Json({0, 2}));
  }
}

TEST_CASE("a narrower student is planned: its size, the valid ones, and what is refused before any compute") {
  const TemporaryFolder folder;
  write_wide_setting(folder.path());
  const auto plan = [&](const std::string& student, const std::string& more = "", const std::string& data = width_data) {
    const Recipe recipe = width_recipe(folder.path(), "  - distill: {student: {" + student + "}, steps: 1, batch_size: 2, sequence_length: 24}\n" + more, data);
    return predict_stages(recipe, load_data(recipe));
  };
  const auto refused = [&](const std::string& student, const std::string& more = "", const std::string& data = width_data) { return error_text([&] { plan(student, more, data); }); };
  const StagePrediction planned = plan("keep_layers: [0, 2], width: {hidden: 16, ffn: 32, heads: 2}").at(0);
  ModelConfig shape = load_config(folder.path() / "teacher");
  shape.layers = 2, shape.hidden = 16, shape.ffn = 32, shape.heads = 2, shape.kv_heads = 1;
  CHECK(planned.parameters == count_parameters(shape).total);
  CHECK(planned.bytes == 4 * count_parameters(shape).total);
  REQUIRE(planned.shapes.size() == 3);
  CHECK(planned.shapes.at(0).at("key") == "student.width.ffn");
  CHECK(contains_all(refused("width: {}"), {"names no size", "hidden, ffn, heads"}));
  CHECK(contains_all(refused("width: {ffn: 96}"), {"student of 96 neurons", "distill.student.width.ffn", "nearest: 48"}));
  CHECK(contains_all(refused("width: {heads: 3}"), {"student of 3 heads", "2 key/value groups", "nearest: 4 or 2"}));
  CHECK(contains_all(refused("width: {hidden: 32}"), {"as wide as the teacher"}));
  CHECK(contains_all(refused("width: {hidden: 16, criterion: obs}"), {"measures no channels", "obs", "taylor"}));
  CHECK(contains_all(refused("width: {hidden: 16, hidden_by: rotate}"), {"cannot be rotated", "untie: true"}));
  CHECK(contains_all(refused("width: {criterion: tailor, ffn: 24}"), {"tailor", "did you mean \"taylor\""}));
  write_text(folder.path() / "small.json", "{}");
  CHECK(contains_all(refused("config: small.json, width: {ffn: 24}"), {"cut from the teacher"}));
  // What the recipe exports decides which rows can be stored.
  const std::string quantized = "  - quantize: {weights: q8_0, embedding: none, method: rtn}\n  - export: {formats: [gguf]}\n";
  CHECK(contains_all(refused("width: {ffn: 24}", quantized), {"student of 24 neurons", "cannot be stored as gguf with q8_0", "nearest: 32"}));
  // Importance is never guessed: without data for it only the weights themselves can say.
  const std::string bare = "data:\n  train: {files: [train.txt], format: text, split: line}\n  test: {files: [test.txt], format: text, max_length: 16}\n";
  CHECK(contains_all(refused("width: {ffn: 24}", "", bare), {"measured on data", "criterion: taylor", "data.calibration", "criterion: magnitude"}));
  CHECK(contains_all(refused("width: {hidden: 16, criterion: magnitude}", "", bare), {"measured on data", "hidden", "data.calibration"}));
  CHECK(plan("width: {ffn: 24, criterion: magnitude}", "", bare).at(0).parameters < count_parameters(load_config(folder.path() / "teacher")).total);
}

TEST_CASE("a classifier's narrower student: heads and neurons go, the hidden size stays") {
  TinySetting tiny;
  tiny.write_recipe("\n  - finetune: {epochs: 1, batch_size: 8, precision: float32}\n  - distill: {student: {keep_layers: [0, 2], width: {ffn: 40, heads: 2, samples: 24}}, epochs: 1, batch_size: 8, precision: float32}\n"
                    "  - export: {formats: [kompakt]}\n  - evaluate: {latency: false}\n");
  CHECK(run_recipe(read_recipe(tiny.recipe()), {.out = tiny.out("a")}).code == ExitCode::ok);
  const ModelConfig config = load_config(tiny.out("a") / "02-distill");
  CHECK(config.ffn == 40);
  CHECK(config.heads == 2);
  CHECK(config.hidden == 32);
  CHECK(read_json(tiny.out("a") / "manifest.json").at("stages").at(1).at("details").at("loss_curve").back().at("parts").contains("hidden_mse"));
  tiny.write_recipe("\n  - finetune: {epochs: 1, batch_size: 8}\n  - distill: {student: {width: {hidden: 16}}, epochs: 1, batch_size: 8}\n  - evaluate: {latency: false}\n");
  const Recipe recipe = read_recipe(tiny.recipe());
  CHECK(contains_all(error_text([&] { predict_stages(recipe, load_data(recipe)); }), {"cannot be made narrower", "distill.student.width"}));
}
