// The whole chain on a tiny model: it runs, reuses, resumes to the same bytes, and refuses to share a folder.
#include <ATen/ATen.h>

#include "tests/catch_torch.h"

#include <csignal>
#include <cstdio>

#include "core/error.h"
#include "core/json.h"
#include "core/system.h"
#include "core/text.h"
#include "export/exporters.h"
#include "model/checkpoint.h"
#include "pipeline/answer.h"
#include "pipeline/plan.h"
#include "pipeline/run.h"
#include "tests/pipeline/tiny.h"
#include "tests/support.h"
#include "train/mask.h"

using namespace kompakt;
using namespace kompakt::testing;
namespace fs = std::filesystem;

TEST_CASE("the chain runs from teacher to proven artifact, and a second run does nothing", "[run]") {
  TinySetting tiny;
  const Recipe recipe = read_recipe(tiny.recipe());
  const RunOutcome first = run_recipe(recipe, {.out = tiny.out("a")});
  CHECK(first.code == ExitCode::ok);
  CHECK_FALSE(first.did_nothing);
  for (const char* file : {"recipe.yaml", "manifest.json", "metrics.jsonl", "report.json", "report.md", "report.html", "junit.xml", "artifact/model.safetensors", "artifact/config.json", "artifact/vocab.txt", "artifact/lineage.json",
                           "02-distill/model.safetensors", "02-distill/config.json"}) {
    INFO(file);
    CHECK(fs::exists(tiny.out("a") / file));
  }
  const Json manifest = read_json(tiny.out("a") / "manifest.json");
  CHECK(manifest.at("stages").size() == 5);
  CHECK(manifest.at("artifact").at("tasks").at("test").at("n") == 45);
  CHECK(manifest.at("stages").at(4).at("details").at("reopened_max_logit_difference").get<double>() <= 1e-5);
  CHECK(manifest.at("artifact").at("bytes").get<std::int64_t>() < manifest.at("teacher").at("bytes").get<std::int64_t>());

  const RunOutcome second = run_recipe(recipe, {.out = tiny.out("a")});
  CHECK(second.did_nothing);
  CHECK(second.report.at("artifact").at("tasks") == first.report.at("artifact").at("tasks"));

  // Another run that changes only the quantization reuses what came before.
  const RunOutcome other = run_recipe(read_recipe(tiny.recipe(), {"stages.quantize.weights=int8", "stages.quantize.method=rtn"}), {.out = tiny.out("b")});
  const Json stages = read_json(tiny.out("b") / "manifest.json").at("stages");
  CHECK(stages.at(0).at("reused").get<bool>());
  CHECK(stages.at(2).at("reused").get<bool>());
  CHECK_FALSE(stages.at(3).at("reused").get<bool>());
  CHECK(other.code == ExitCode::ok);

  // The artifact answers for itself.
  const auto ranked = Classifier(tiny.out("a") / "artifact").classify("where is my card");
  REQUIRE(ranked.size() == 3);
  CHECK(ranked[0].probability >= ranked[1].probability);
  double sum = 0;
  for (const RankedLabel& label : ranked) sum += label.probability;
  CHECK(sum == Approx(1.0).epsilon(1e-9));
}

TEST_CASE("same recipe and seed give the same artifact bytes; another seed does not", "[run]") {
  TinySetting one, two;
  run_recipe(read_recipe(one.recipe()), {.out = one.out("a")});
  run_recipe(read_recipe(two.recipe()), {.out = two.out("a")});
  CHECK(folder_bytes(one.out("a") / "artifact") == folder_bytes(two.out("a") / "artifact"));
  run_recipe(read_recipe(two.recipe(), {"seed=6"}), {.out = two.out("b")});
  CHECK(folder_bytes(two.out("a") / "artifact") != folder_bytes(two.out("b") / "artifact"));
}

TEST_CASE("an interrupted run goes on to the same bytes", "[run]") {
  TinySetting whole, broken;
  run_recipe(read_recipe(whole.recipe()), {.out = whole.out("a")});
  request_interrupt(SIGTERM);
  try {
    run_recipe(read_recipe(broken.recipe()), {.out = broken.out("a")});
    FAIL("the run should have stopped");
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::terminated);
  }
  CHECK_FALSE(fs::exists(broken.out("a") / "artifact"));
  request_interrupt(0);
  run_recipe(read_recipe(broken.recipe()), {.out = broken.out("a"), .resume = true});
  CHECK(folder_bytes(whole.out("a") / "artifact") == folder_bytes(broken.out("a") / "artifact"));
}

TEST_CASE("two runs in one folder at once are refused", "[run]") {
  TinySetting tiny;
  const FolderLock lock(tiny.out("a"));
  CHECK(contains_all(error_text([&] { run_recipe(read_recipe(tiny.recipe()), {.out = tiny.out("a")}); }), {"another kompakt", "--out"}));
}

TEST_CASE("pruned weights stay zero through every later stage of a run, and in one that takes them from the store", "[run]") {
  TinySetting tiny;
  const auto chain = [&](const char* quantize) {
    tiny.write_recipe(str("\n  - finetune: {epochs: 1, batch_size: 8}\n  - prune: {unstructured: {pattern: \"2:4\", criterion: sparsegpt}, samples: 24}\n",
                          "  - distill: {epochs: 1, batch_size: 8, learning_rate: 1.0e-3}\n  - quantize: ", quantize, "\n  - export: {}\n  - evaluate: {latency: false}\n"));
    return read_recipe(tiny.recipe());
  };
  const auto zeros_of = [](const fs::path& folder, const WeightMasks& masks) {
    const auto model = load_model(folder);
    std::int64_t revived = 0;
    for (const auto& [name, mask] : masks) revived += model->find_linear(name)->weight.masked_select(mask.logical_not()).ne(0).sum().item<std::int64_t>();
    return revived;
  };
  for (const char* quantize : {"{weights: ternary, group: 32, method: qad, epochs: 1, batch_size: 8, learning_rate: 1.0e-3}", "{weights: int4, group: 32, method: gptq}"}) {
    const fs::path out = tiny.out(quantize[10] == 't' ? "a" : "b");
    CHECK(run_recipe(chain(quantize), {.out = out}).code == ExitCode::ok);
    const WeightMasks masks = load_masks(out / "02-prune");
    CHECK(masks.size() == 18);
    for (const char* stage : {"02-prune", "03-distill", "04-quantize"}) {
      CAPTURE(quantize, stage);
      CHECK(read_text(out / stage / "masks.h5") == read_text(out / "02-prune" / "masks.h5"));
      CHECK(zeros_of(out / stage, masks) == 0);
    }
    const Json stages = read_json(out / "manifest.json").at("stages");
    CHECK(stages.at(1).at("details").at("sparsity").at("pattern") == "2:4");
    // Zeros are stored like any weight: what they save shows after zstd alone.
    const Json proof = stages.at(4).at("details").at("reopened").begin().value();
    CHECK(proof.at("masked").at("matrices") == 18);
    CHECK(proof.at("masked").at("weights").get<std::int64_t>() == 2 * proof.at("masked").at("zeros").get<std::int64_t>());
    CHECK(proof.at("zstd_bytes").get<std::int64_t>() > 0);
    CHECK(proof.at("zstd_bytes").get<std::int64_t>() < proof.at("bytes").get<std::int64_t>());
    for (const char* report : {"report.md", "report.html"}) CHECK(contains_all(read_text(out / report), {"Masked weights", "after zstd", "50.0%"}));
  }
  CHECK(read_json(tiny.out("b") / "manifest.json").at("stages").at(2).at("reused").get<bool>());
  CHECK(contains_all(error_text([&] {
          tiny.write_recipe("\n  - finetune: {epochs: 1, batch_size: 8}\n  - prune: {unstructured: {pattern: \"2:4\", criterion: magnitude}}\n  - distill: {student: {keep_layers: [0, 2]}, epochs: 1, batch_size: 8}\n  - export: {}\n");
          run_recipe(read_recipe(tiny.recipe()), {.out = tiny.out("c")});
        }), {"keep_layers", "masks", "unstructured"}));
}

TEST_CASE("a stage that prunes while it quantizes: planned, exported with its zeros, reported", "[run]") {
  TinySetting tiny;
  tiny.write_recipe("\n  - finetune: {epochs: 1, batch_size: 8}\n  - quantize: {weights: int4, group: 32, method: trifit, sparse: {pattern: \"2:4\", skip: [\"*.query\"]}}\n  - export: {}\n  - evaluate: {latency: false}\n");
  const Recipe recipe = read_recipe(tiny.recipe());
  CHECK(contains_all(plan_table(recipe, predict_stages(recipe, load_data(recipe))), {"2:4 of the weights", "same sweep"}));
  const fs::path out = tiny.out("a");
  CHECK(run_recipe(recipe, {.out = out}).code == ExitCode::ok);
  const WeightMasks masks = load_masks(out / "02-quantize");
  CHECK(masks.size() == 15);
  const auto model = open_any_model(out / "artifact");
  for (const auto& [name, mask] : masks) {
    CHECK(mask.reshape({-1, 4}).sum(1).eq(2).all().item<bool>());
    CHECK(!model->find_linear(name)->weight.masked_select(mask.logical_not()).any().item<bool>());
  }
  const Json stages = read_json(out / "manifest.json").at("stages");
  CHECK(stages.at(1).at("details").at("sparsity").at("layers").size() == 15);
  CHECK(stages.at(2).at("details").at("reopened").begin().value().at("masked").at("matrices") == 15);
  CHECK(contains_all(read_text(out / "report.md"), {"Masked weights", "after zstd", "50.0%"}));
}

TEST_CASE("gates decide the exit code", "[run]") {
  TinySetting tiny;
  tiny.write_recipe("\n  - finetune: {epochs: 0.1, batch_size: 8}\n  - export: {}\n  - evaluate: {latency: false}\n", "gates: [\"artifact.bytes <= 1\"]\n");
  const RunOutcome outcome = run_recipe(read_recipe(tiny.recipe()), {.out = tiny.out("a")});
  CHECK(outcome.code == ExitCode::gate);
  CHECK(fs::exists(tiny.out("a") / "report.html"));
}

TEST_CASE("--until stops after a stage and leaves no artifact", "[run]") {
  TinySetting tiny;
  run_recipe(read_recipe(tiny.recipe()), {.out = tiny.out("a"), .until = "distill"});
  CHECK(fs::exists(tiny.out("a") / "02-distill"));
  CHECK_FALSE(fs::exists(tiny.out("a") / "03-prune"));
  CHECK(contains_all(error_text([&] { run_recipe(read_recipe(tiny.recipe()), {.out = tiny.out("b"), .until = "prunee"}); }), {"prunee", "did you mean \"prune\""}));
}

TEST_CASE("a run that stops early leaves its gates unchecked; one that stops after its last stage does not", "[run]") {
  TinySetting tiny;
  tiny.write_recipe("\n  - finetune: {epochs: 0.1, batch_size: 8}\n  - export: {}\n", "gates: [\"artifact.bytes <= 1\"]\n");
  const RunOutcome early = run_recipe(read_recipe(tiny.recipe()), {.out = tiny.out("a"), .until = "finetune"});
  CHECK(early.code == ExitCode::ok);
  CHECK(early.report.at("gates").empty());
  CHECK(run_recipe(read_recipe(tiny.recipe()), {.out = tiny.out("b"), .until = "export"}).code == ExitCode::gate);
}

TEST_CASE("plan carries shapes through all stages and computes nothing", "[plan]") {
  TinySetting tiny;
  const Recipe recipe = read_recipe(tiny.recipe());
  const auto stages = predict_stages(recipe, load_data(recipe));
  REQUIRE(stages.size() == 6);
  CHECK(stages[1].parameters < stages[0].parameters);
  CHECK(stages[2].parameters < stages[1].parameters);
  CHECK(stages[4].bytes < stages[3].bytes / 2);
  CHECK_FALSE(stages[3].formats.empty());
  CHECK_FALSE(fs::exists(tiny.folder() / "store"));
  // The predicted size is that of the artifact, tokenizer included; how many digits the offsets of float tensors take in the header, which is
  // padded, is not known before.
  run_recipe(recipe, {.out = tiny.out("a")});
  const auto real = static_cast<std::int64_t>(bytes_on_disk(tiny.out("a") / "artifact") - fs::file_size(tiny.out("a") / "artifact" / "lineage.json"));
  CHECK(std::abs(stages[4].bytes - real) <= 64);
}

TEST_CASE("bad data is refused before any stage runs", "[run]") {
  TinySetting tiny;
  write_text(tiny.folder() / "test.csv", "text,category\nhello,unheard\n");
  CHECK(contains_all(error_text([&] { run_recipe(read_recipe(tiny.recipe()), {.out = tiny.out("a")}); }), {"test.csv:2", "unheard"}));
  write_text(tiny.folder() / "test.csv", "text,category\n");
  CHECK(contains_all(error_text([&] { run_recipe(read_recipe(tiny.recipe()), {.out = tiny.out("a")}); }), {"test.csv"}));
  CHECK_FALSE(fs::exists(tiny.out("a") / "artifact"));
}

TEST_CASE("a byte budget: refused when too small before anything runs, kept to the byte by the artifact", "[run][budget]") {
  TinySetting tiny;
  const auto recipe = [&](const std::string& budget) {
    tiny.write_recipe(str("\n  - finetune: {epochs: 1, batch_size: 8}\n  - quantize: {method: rtn, budget: {", budget, ", formats: [\"ternary:32\", q4_0, q8_0], tokens: 200}}\n  - export: {formats: [kompakt]}\n  - evaluate: {latency: false}\n"));
    return read_recipe(tiny.recipe());
  };
  const std::string small = error_text([&] {
    const Recipe r = recipe("bytes: 9kB");
    predict_stages(r, load_data(r));
  });
  CHECK(contains_all(small, {"smallest kompakt file", "quantize.budget", "to do"}));
  CHECK(contains_all(error_text([&] { recipe("bytes: 40kB, bits_per_weight: 3"); }), {"a budget is one size", "several"}));
  CHECK(contains_all(error_text([&] { recipe("not_larger_than: nowhere.gguf"); }), {"nowhere.gguf", "no file to compare"}));
  std::int64_t low = 0, high = 0;
  REQUIRE(std::sscanf(small.substr(small.find("allowed")).c_str(), "allowed: %ld to %ld", &low, &high) == 2);
  const std::int64_t limit = (low + high) / 2;
  write_text(tiny.folder() / "other.bin", std::string(static_cast<std::size_t>(limit), 'x'));
  const Recipe chosen = recipe("not_larger_than: other.bin");
  CHECK(chosen.stages[1].options.find("budget")->find("bytes")->scalar == std::to_string(limit));
  const std::vector<StagePrediction> plan = predict_stages(chosen, load_data(chosen));
  CHECK(contains_all(plan_table(chosen, plan), {"decided in the run", human_bytes(static_cast<double>(limit)).c_str(), "q4_0"}));
  CHECK(run_recipe(chosen, {.out = tiny.out("budget")}).code == ExitCode::ok);
  const Json manifest = read_json(tiny.out("budget") / "manifest.json");
  const Json& budget = manifest.at("stages").at(1).at("details").at("budget");
  const auto artifact = static_cast<std::int64_t>(bytes_on_disk(tiny.out("budget") / "artifact") - bytes_on_disk(tiny.out("budget") / "artifact" / "lineage.json"));
  CHECK(budget.at("predicted_bytes").get<std::int64_t>() == artifact);
  CHECK(artifact <= limit);
  CHECK(artifact > low);
  CHECK(contains_all(read_text(tiny.out("budget") / "report.md"), {"Byte budget of 02-quantize", "predicted divergence"}));
  CHECK(contains_all(read_text(tiny.out("budget") / "report.html"), {"Byte budget", "predicted divergence against size"}));
}

TEST_CASE("a decoder tuned on its grid by blocks and as a whole: planned, reported, exported", "[run][tune]") {
  TinySetting tiny;
  std::int64_t vocabulary = 0;
  for (const char c : read_text(tiny.folder() / "teacher" / "vocab.txt")) vocabulary += c == '\n';
  const std::string pieces = read_text(tiny.folder() / "teacher" / "vocab.txt");
  fs::remove_all(tiny.folder() / "teacher");
  const Json config = {{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"}, {"vocab_size", vocabulary}, {"hidden_size", 32}, {"num_hidden_layers", 2}, {"num_attention_heads", 4}, {"num_key_value_heads", 2},
                       {"intermediate_size", 64}, {"hidden_act", "silu"}, {"max_position_embeddings", 64}, {"rms_norm_eps", 1e-5}, {"tie_word_embeddings", true}};
  Transformer teacher(config_from_json(config, "tiny"), 3);
  for (Linear* linear : teacher.linears()) linear->weight = linear->weight * 8;
  save_model(teacher, tiny.folder() / "teacher");
  write_text(tiny.folder() / "teacher" / "vocab.txt", pieces);
  const auto text = [](int first, const char* joint) {
    constexpr const char* nouns[] = {"card", "money", "rate", "fee", "transfer", "exchange"};
    std::string out;
    for (int i = first; i < first + 160; ++i) out += str(nouns[i * 5 % 6], " ", joint, " ", nouns[i / 6 % 6], i % 7 ? " " : " my ");
    return out + "\n";
  };
  write_text(tiny.folder() / "calibration.txt", text(0, "is"));
  write_text(tiny.folder() / "test.txt", text(3, "has not"));
  const auto recipe = [&](const std::string& options) {
    write_text(tiny.recipe(), str("name: tiny\nseed: 5\nstore: store\nteacher: {path: teacher}\ndata:\n  calibration: {files: [calibration.txt], format: text, max_length: 16}\n  test: {files: [test.txt], format: text, max_length: 16}\n"
                                  "stages:\n  - quantize: {weights: ternary, group: 32, method: gptq, ", options, "}\n  - export: {formats: [kompakt]}\n  - evaluate: {latency: false}\n"));
    return read_recipe(tiny.recipe());
  };
  CHECK(contains_all(error_text([&] { recipe("tune: scale"); }), {"tune", "scale", "scales"}));
  const Recipe chosen = recipe("block_tune: {iterations: 10, batch: 4, evaluate_every: 5}, tune: scales, tuning: {steps: 12, batch: 4, evaluations: 3, holdout: 0.2}");
  const std::vector<StagePrediction> plan = predict_stages(chosen, load_data(chosen)), untuned = predict_stages(recipe("tune: none"), load_data(chosen));
  CHECK(plan[0].memory_bytes > untuned[0].memory_bytes);
  REQUIRE(run_recipe(chosen, {.out = tiny.out("tuned")}).code == ExitCode::ok);
  const Json details = read_json(tiny.out("tuned") / "report.json").at("stages").at(0).at("details");
  CHECK(details.at("blocks").size() == 2);
  const Json& tuning = details.at("tuning");
  CHECK(tuning.at("candidates").size() == 4);
  CHECK(tuning.at("heldout_kl").get<double>() <= tuning.at("untuned_heldout_kl").get<double>());
  CHECK(contains_all(read_text(tiny.out("tuned") / "report.md"), {"Tuning of 01-quantize", "Whole model (scales): kept", "| untuned |", "Blocks: "}));
  CHECK(contains_all(read_text(tiny.out("tuned") / "report.html"), {"Tuning on the grid", "divergence on held-out text", "untuned"}));

  // As a stage of its own: the method's work is taken from the store when only the tuning changes, and both models are measured.
  const auto staged = [&](const std::string& sequences, const std::string& tune, const std::string& before = "") {
    write_text(tiny.recipe(), str("name: tiny\nseed: 5\nstore: store\nteacher: {path: teacher}\ndata:\n  calibration: {files: [calibration.txt], format: text, max_length: 16}\n  test: {files: [test.txt], format: text, max_length: 16}\n"
                                  "stages:\n", before, "  - quantize: {weights: ternary, group: 32, method: gptq", sequences, "}\n  - tune: ", tune, "\n  - export: {formats: [kompakt]}\n  - evaluate: {latency: false}\n"));
    return read_recipe(tiny.recipe());
  };
  const auto planned = [](const Recipe& r) { return error_text([&] { predict_stages(r, load_data(r)); }); };
  const std::string seen = planned(staged("", "{steps: 12, batch: 4, evaluations: 3, holdout: 0.2}"));
  CHECK(contains_all(seen, {"calibration windows choose among the checkpoints", "01-quantize", "calibration_sequences: 128", "at most "}));
  CHECK(contains_all(error_text([&] { staged("", "{mode: none}"); }), {"mode", "none", "scales, weights"}));
  for (const char* steps : {"12", "16"}) {
    const Recipe recipe_of_two = staged(", calibration_sequences: 8", str("{steps: ", steps, ", batch: 4, evaluations: 3, holdout: 0.2}"));
    CHECK(predict_stages(recipe_of_two, load_data(recipe_of_two))[1].memory_bytes > 0);
    REQUIRE(run_recipe(recipe_of_two, {.out = tiny.out(str("staged", steps))}).code == ExitCode::ok);
    const Json manifest = read_json(tiny.out(str("staged", steps)) / "manifest.json"), report = read_json(tiny.out(str("staged", steps)) / "report.json");
    CHECK(manifest.at("stages").at(0).at("reused") == (std::string(steps) == "16"));
    const Json& tune = report.at("stages").at(1);
    CHECK(tune.at("name") == "02-tune");
    CHECK(tune.at("details").at("tuning").at("planned_steps") == std::stoi(steps));
    CHECK(contains_all(read_text(tiny.out(str("staged", steps)) / "report.md"), {"Tuning of 02-tune", "01-quantize"}));
  }
  CHECK(contains_all(planned(staged("", "{steps: 12}", "  - tune: {steps: 1}\n")), {"no codes to tune", "behind quantize"}));
  CHECK(contains_all(planned(staged(", tune: scales, tuning: {holdout: 0.1}", "{steps: 12, holdout: 0.2}")), {"01-quantize", "tunes on some of them", "holdout: 0.2", "at most 0.1"}));
  const Recipe twice = staged(", tune: scales, tuning: {holdout: 0.2}", "{steps: 12, holdout: 0.2}");
  CHECK_NOTHROW(predict_stages(twice, load_data(twice)));
}

TEST_CASE("a budget foresees the whole floats that norms need once they are tuned", "[run][tune][budget]") {
  TinySetting tiny;
  std::int64_t vocabulary = 0;
  for (const char c : read_text(tiny.folder() / "teacher" / "vocab.txt")) vocabulary += c == '\n';
  const std::string pieces = read_text(tiny.folder() / "teacher" / "vocab.txt");
  fs::remove_all(tiny.folder() / "teacher");
  // Many norms beside small matrices, all of them halves as the teacher comes.
  const Json config = {{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"}, {"vocab_size", vocabulary}, {"hidden_size", 32}, {"num_hidden_layers", 6}, {"num_attention_heads", 2}, {"num_key_value_heads", 1},
                       {"intermediate_size", 32}, {"hidden_act", "silu"}, {"max_position_embeddings", 64}, {"rms_norm_eps", 1e-5}, {"tie_word_embeddings", true}};
  Transformer teacher(config_from_json(config, "tiny"), 3);
  for (const NamedParameter& parameter : teacher.parameters()) *parameter.value = (parameter.value->detach() * (parameter.value->dim() > 1 ? 8 : 1)).to(at::kHalf).to(at::kFloat);
  save_model(teacher, tiny.folder() / "teacher");
  write_text(tiny.folder() / "teacher" / "vocab.txt", pieces);
  std::string text;
  for (int i = 0; i < 400; ++i) text += str(i % 3 ? "card " : "money ", i % 5 ? "is " : "has not ");
  write_text(tiny.folder() / "text.txt", text + "\n");
  std::string other;
  for (int i = 0; i < 80; ++i) other += str(i % 4 ? "fee " : "rate ", i % 7 ? "has not " : "exchange ");
  write_text(tiny.folder() / "other.txt", other + "\n");
  const auto run = [&](const std::string& tune, std::int64_t bytes, const char* out) {
    write_text(tiny.recipe(), str("name: tiny\nseed: 5\nstore: store\nteacher: {path: teacher}\ndata:\n  calibration: {files: [text.txt], format: text, max_length: 16}\n  test: {files: [other.txt], format: text, max_length: 16}\n"
                                  "stages:\n  - quantize: {method: rtn, calibration_sequences: 8, budget: {bytes: ", bytes, ", formats: [\"ternary:32\", q4_0, q8_0], tokens: 200}", tune, "  - export: {formats: [kompakt]}\n  - evaluate: {latency: false}\n"));
    const Recipe recipe = read_recipe(tiny.recipe());
    if (!*out) return std::pair<std::int64_t, std::string>{0, error_text([&] { predict_stages(recipe, load_data(recipe)); })};
    REQUIRE(run_recipe(recipe, {.out = tiny.out(out)}).code == ExitCode::ok);
    return std::pair<std::int64_t, std::string>{static_cast<std::int64_t>(bytes_on_disk(tiny.out(out) / "artifact") - bytes_on_disk(tiny.out(out) / "artifact" / "lineage.json")), ""};
  };
  const auto smallest = [&](const std::string& tune) {
    std::int64_t low = 0;
    const std::string error = run(tune, 1000, "").second;
    CAPTURE(error);
    REQUIRE(contains_all(error, {"allowed: "}));
    REQUIRE(std::sscanf(error.substr(error.find("allowed")).c_str(), "allowed: %ld", &low) == 1);
    return low;
  };
  const std::string inside = ", tune: scales, tuning: {steps: 8, batch: 4, evaluations: 2, learning_rate: 0.01}}\n", behind = "}\n  - tune: {steps: 8, batch: 4, evaluations: 2, learning_rate: 0.01}\n";
  const std::int64_t plain = smallest("}\n"), tuned = smallest(inside);
  constexpr std::int64_t more = 2 * 13 * 32;  // two bytes for every norm's value; and a few digits of offsets in the header
  CHECK(tuned >= plain + more);
  CHECK(tuned <= plain + more + 64);
  CHECK(smallest(behind) == tuned);
  CHECK(run(inside, tuned, "inside").first == tuned);
  CHECK(run(behind, tuned, "behind").first == tuned);
}
