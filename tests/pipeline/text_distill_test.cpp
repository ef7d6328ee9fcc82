// Whole runs of text recipes: a student with another tokenizer, texts that the student writes, and the refusal that says what vocabularies share.
#include "tests/catch_torch.h"

#include <cmath>
#include <filesystem>

#include "core/files.h"
#include "core/json.h"
#include "model/checkpoint.h"
#include "pipeline/plan.h"
#include "pipeline/recipe.h"
#include "pipeline/run.h"
#include "tests/distill/tokenizers.h"
#include "tests/pipeline/tiny.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

void write_text_model(const std::filesystem::path& folder, const Tokenizer& tokenizer, std::int64_t layers, std::uint64_t seed) {
  const Json json = {{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"}, {"hidden_size", 16}, {"num_hidden_layers", layers}, {"num_attention_heads", 2}, {"num_key_value_heads", 1},
                     {"intermediate_size", 24}, {"vocab_size", tokenizer.vocab_size()}, {"max_position_embeddings", 64}, {"rms_norm_eps", 1e-5}, {"hidden_act", "silu"}, {"tie_word_embeddings", false}};
  Transformer model(config_from_json(json, "tiny"), seed);
  stir(model, seed);
  make_folder(folder);
  save_model(model, folder);
  tokenizer.save(folder);
}

std::string text_recipe(const std::string& distill) {
  return "name: text\nseed: 5\nstore: store\nteacher: {path: teacher}\ndata:\n  train: {files: [train.txt], format: text, split: line}\n  test: {files: [test.txt], format: text, max_length: 16}\n"
         "stages:\n  - distill: " + distill + "\n  - evaluate: {latency: false}\n";
}

// train.txt and test.txt of twelve lines each.
void write_cat_texts(const fs::path& folder) {
  std::string train, test;
  for (int i = 0; i < 12; ++i) train += "the cat sat on the mat and saw the other cat " + std::to_string(i) + "\n", test += "a cat that sat there saw the hat " + std::to_string(i * 7) + "\n";
  write_text(folder / "train.txt", train);
  write_text(folder / "test.txt", test);
}

}  // namespace

TEST_CASE("runs of text: a student with another tokenizer, a student that writes, the teacher's texts") {
  const TemporaryFolder folder;
  const auto path = [&](const char* name) { return folder.path() / name; };
  write_text_model(path("teacher"), *word_tokenizer(), 3, 1);
  write_text_model(path("other"), *other_tokenizer(), 2, 2);
  write_cat_texts(folder.path());
  const std::string steps = "steps: 3, batch_size: 2, sequence_length: 24, precision: float32";
  const auto run = [&](const std::string& distill, const char* out) {
    write_text(path("recipe.yaml"), text_recipe(distill));
    return run_recipe(read_recipe(path("recipe.yaml")), {.out = path(out)});
  };
  const std::string crossed = "{student: {model: other}, objective: [{cross_tokenizer: spans}, {labels: cross_entropy}], " + steps + "}";
  const RunOutcome first = run(crossed, "a");
  CHECK(first.code == ExitCode::ok);
  const Json stage = read_json(path("a") / "manifest.json").at("stages").at(0);
  CHECK(stage.at("details").at("vocabularies").at("shared").get<int>() > 250);
  CHECK(stage.at("details").at("loss_curve").back().at("parts").contains("aligned_spans"));
  CHECK(stage.at("layer_map") == Json({0, 2}));
  CHECK(stage.at("model").at("nulls").at("kl") == "the teacher has another tokenizer");
  CHECK(load_tokenizer(path("a") / "01-distill")->fingerprint() == other_tokenizer()->fingerprint());
  CHECK(run(crossed, "a").did_nothing);
  write_text_model(path("other"), *other_tokenizer(), 2, 3);  // another student: the stage is another
  CHECK_FALSE(run(crossed, "b").did_nothing);

  // Losses that compare token by token are refused before anything is computed, with the numbers.
  const std::string message = error_text([&] { run("{student: {model: other}, objective: [{logits: forward_kl}], " + steps + "}", "c"); });
  CHECK(contains_all(message, {"do not share a vocabulary", "have the same spelling", "chat template none", "cross_tokenizer: spans"}));
  CHECK_FALSE(std::filesystem::exists(path("c") / "01-distill"));
  CHECK(contains_all(error_text([&] { run("{on_policy: {max_new_tokens: 60, prompt_tokens: 6}, " + steps + "}", "d"); }), {"context", "at most 64"}));

  const RunOutcome written = run("{student: {keep_layers: [0, 2]}, on_policy: {lambda: 1, max_new_tokens: 5, prompt_tokens: 4}, " + steps + "}", "e");
  CHECK(written.code == ExitCode::ok);
  CHECK(contains_all(read_text(path("e") / "metrics.jsonl"), {"\"sampled\"", "generalized_jsd"}));
  CHECK(run("{student: {keep_layers: [0, 2]}, teacher_text: {max_new_tokens: 5, prompt_tokens: 4}, " + steps + "}", "f").code == ExitCode::ok);
  CHECK(contains_all(read_text(path("f") / "metrics.jsonl"), {"\"teacher\"", "cross_entropy"}));
}

TEST_CASE("a student that starts from random weights; mistakes that only the shapes tell are found by plan") {
  const TemporaryFolder folder;
  const auto path = [&](const char* name) { return folder.path() / name; };
  write_text_model(path("teacher"), *word_tokenizer(), 3, 1);
  write_cat_texts(folder.path());
  Json shape = read_json(path("teacher") / "config.json");
  shape["num_hidden_layers"] = 2, shape["hidden_size"] = 24, shape["intermediate_size"] = 40, shape["num_attention_heads"] = 3, shape["head_dim"] = 8;
  write_text(path("small.json"), shape.dump());
  const std::string steps = "steps: 3, batch_size: 2, sequence_length: 24, precision: float32";
  const auto recipe = [&](const std::string& distill) {
    write_text(path("recipe.yaml"), text_recipe(distill));
    return read_recipe(path("recipe.yaml"));
  };
  const std::string random = "{student: {config: small.json}, objective: [{logits: forward_kl}, {hidden: mse}], " + steps + "}";
  const RunOutcome first = run_recipe(recipe(random), {.out = path("a")});
  CHECK(first.code == ExitCode::ok);
  const auto student = load_model(path("a") / "01-distill");
  CHECK(student->config().hidden == 24);
  CHECK(student->config().layers == 2);
  CHECK(read_json(path("a") / "manifest.json").at("stages").at(0).at("layer_map") == Json({0, 2}));
  CHECK(load_tokenizer(path("a") / "01-distill")->fingerprint() == word_tokenizer()->fingerprint());
  CHECK(run_recipe(recipe(random), {.out = path("a")}).did_nothing);
  shape["intermediate_size"] = 48;  // another shape under the same name: the stage is another
  write_text(path("small.json"), shape.dump());
  CHECK_FALSE(run_recipe(recipe(random), {.out = path("b")}).did_nothing);
  CHECK(load_model(path("b") / "01-distill")->config().ffn == 48);

  const auto planned = [&](const std::string& distill) { return error_text([&] {
      const Recipe read = recipe(distill);
      predict_stages(read, load_data(read));
    }); };
  CHECK(contains_all(planned("{student: {config: none.json}, " + steps + "}"), {"no such shape", "none.json", "config.json of a decoder"}));
  CHECK(contains_all(planned("{student: {config: small.json, keep_layers: [0]}, " + steps + "}"), {"student.config", "keep one"}));
  CHECK(contains_all(planned("{student: {keep_layers: [0, 2]}, objective: [{hidden: mse, layers: [99]}], " + steps + "}"), {"no layer 99", "0 to 1"}));
  CHECK(contains_all(planned("{student: {keep_layers: [0, 2]}, objective: [{relation: minilm, heads: 5}], " + steps + "}"), {"relation heads", "5"}));
  // A head with more rows than the tokenizer has ids, to a round number: the report compares the rows of both.
  const int ids = shape.at("vocab_size").get<int>();
  shape["vocab_size"] = 512;
  write_text(path("small.json"), shape.dump());
  CHECK_FALSE(run_recipe(recipe("{student: {config: small.json}, objective: [{labels: cross_entropy}], " + steps + "}"), {.out = path("b")}).did_nothing);
  const Json padded = read_json(path("b") / "manifest.json").at("stages").at(0).at("model");
  CHECK(load_model(path("b") / "01-distill")->config().vocab == 512);
  CHECK(padded.at("language").at("test").at("kl").at("mean").get<double>() > 0);
  CHECK_FALSE(padded.value("nulls", Json::object()).contains("kl"));
  shape["vocab_size"] = ids + 700;
  write_text(path("small.json"), shape.dump());
  CHECK(contains_all(planned(random), {"do not share a vocabulary"}));
}

TEST_CASE("a run whose cache is full does without the teacher's weights, in training and in the figures") {
  const TemporaryFolder folder;
  const auto path = [&](const char* name) { return folder.path() / name; };
  write_text_model(path("teacher"), *word_tokenizer(), 3, 1);
  write_cat_texts(folder.path());
  Json shape = read_json(path("teacher") / "config.json");
  shape["num_hidden_layers"] = 2;
  write_text(path("small.json"), shape.dump());
  const auto recipe = [&](const std::string& student, const std::string& rate, const std::string& evaluate, const std::string& teacher) {
    std::string text = text_recipe("{student: " + student + ", cache: {top: 8, tail: 4}, epochs: 1, batch_size: 2, sequence_length: 24, precision: float32, learning_rate: " + rate + "}");
    text.replace(text.find("{latency: false}"), 16, "{latency: false" + evaluate + "}");
    text.replace(text.find("{path: teacher}"), 15, "{path: teacher" + teacher + "}");
    write_text(path("recipe.yaml"), text);
    return read_recipe(path("recipe.yaml"));
  };
  const auto run = [&](const std::string& student, const std::string& rate, const char* out, const std::string& evaluate = ", cache: {top: 16, tail: 8}", const std::string& teacher = "") {
    CHECK(run_recipe(recipe(student, rate, evaluate, teacher), {.out = path(out)}).code == ExitCode::ok);
    return read_json(path(out) / "manifest.json").at("stages").at(0);
  };
  const Json first = run("{config: small.json}", "1e-3", "a");
  CHECK(first.at("details").at("teacher_loaded") == true);
  const Json second = run("{config: small.json}", "2e-3", "b"), layers = run("{keep_layers: [0, 2]}", "1e-3", "c");
  CHECK_FALSE(second.at("reused").get<bool>());
  CHECK(second.at("details").at("teacher_loaded") == false);
  CHECK(layers.at("details").at("teacher_loaded") == false);
  const Json kl = second.at("model").at("language").at("test").at("kl");
  CHECK(kl.at("at_least").get<double>() <= kl.at("mean").get<double>());
  CHECK(kl.at("at_most").get<double>() >= kl.at("mean").get<double>());
  CHECK(kl.at("standard_error").get<double>() > 0);
  // The same student, measured by the teacher itself.
  const Json again = run("{config: small.json}", "2e-3", "d", "");
  CHECK(again.at("reused").get<bool>());
  const Json exact = again.at("model").at("language").at("test");
  CHECK_FALSE(exact.at("kl").contains("at_least"));
  CHECK(std::abs(exact.at("kl").at("mean").get<double>() - kl.at("mean").get<double>()) <= 4 * kl.at("standard_error").get<double>() + kl.at("code_error").get<double>());
  CHECK(exact.at("top1_agreement") == second.at("model").at("language").at("test").at("top1_agreement"));
  CHECK(exact.at("perplexity").at("value") == second.at("model").at("language").at("test").at("perplexity").at("value"));
  // A teacher in fewer bits answers otherwise: another stage, another cache; figures are of the same teacher.
  const Json held = run("{config: small.json}", "2e-3", "e", "", ", precision: int4");
  CHECK_FALSE(held.at("reused").get<bool>());
  CHECK(held.at("details").at("teacher_loaded") == true);
  CHECK(held.at("key") != second.at("key"));
  CHECK(held.at("details").at("loss_curve") != second.at("details").at("loss_curve"));
  CHECK(read_json(path("e") / "manifest.json").at("teacher").at("language") == read_json(path("d") / "manifest.json").at("teacher").at("language"));
  CHECK(contains_all(error_text([&] { recipe("{config: small.json}", "1e-3", ", cache: {tail: 3}", ", precision: int5"); }), {"cache.tail must be even", "int5", "float32, bf16, int8, int4"}));
}

TEST_CASE("a classifier's teacher in fewer bits: every stage that learns from it is another, the one that made it is not") {
  TinySetting tiny;
  const auto run = [&](const std::vector<std::string>& sets, const char* out) {
    CHECK(run_recipe(read_recipe(tiny.recipe(), sets), {.out = tiny.out(out)}).code == ExitCode::ok);
    return read_json(tiny.out(out) / "manifest.json").at("stages");
  };
  const Json plain = run({}, "plain"), held = run({"teacher.precision=int8"}, "held");
  CHECK(held.at(0).at("reused").get<bool>());
  for (std::size_t i = 1; i <= 3; ++i) CHECK(held.at(i).at("key") != plain.at(i).at("key"));  // distill, prune with recovery, quantize by qad
  CHECK(held.at(1).at("details").at("loss_curve") != plain.at(1).at("details").at("loss_curve"));
  CHECK(run({}, "plain").at(3).at("reused").get<bool>());
  tiny.write_recipe("\n  - finetune: {steps: 2}\n  - evaluate: {cache: {}}\n");
  const Recipe cached = read_recipe(tiny.recipe());
  CHECK(contains_all(error_text([&] { predict_stages(cached, load_data(cached)); }), {"evaluate", "for text"}));
}

TEST_CASE("runs of text go on from an earlier one: perplexity of the text before and after, in pairs", "[continual]") {
  const TemporaryFolder folder;
  const auto path = [&](const char* name) { return folder.path() / name; };
  write_text_model(path("teacher"), *word_tokenizer(), 2, 1);
  std::string old, fresh, old_test, fresh_test;
  for (int i = 0; i < 12; ++i) {
    old += "the cat sat on the mat and saw the other cat " + std::to_string(i) + "\n", old_test += "the cat saw the mat and the other cat sat " + std::to_string(i * 3) + "\n";
    fresh += "there that hat sat there a hat and that hat " + std::to_string(i) + "\n", fresh_test += "a hat and that hat there sat " + std::to_string(i * 5) + "\n";
  }
  write_text(path("old.txt"), old), write_text(path("new.txt"), fresh), write_text(path("old_test.txt"), old_test), write_text(path("new_test.txt"), fresh_test);
  const auto run = [&](const std::string& teacher, const std::string& train, const std::string& test, const std::string& more, const char* out, const std::string& gates = "") {
    write_text(path("recipe.yaml"), "name: text\nseed: 5\nstore: store\nteacher: {path: " + teacher + "}\ndata:\n  train: {files: [" + train + "], format: text, split: line}\n  test: {files: [" + test + "], format: text, max_length: 16}\n" + more +
                                        "stages:\n  - finetune: {steps: 30, batch_size: 2, sequence_length: 24, learning_rate: 1.0e-2, precision: float32}\n  - evaluate: {latency: false}\n" + gates);
    return run_recipe(read_recipe(path("recipe.yaml")), {.out = path(out)});
  };
  const RunOutcome first = run("teacher", "old.txt", "old_test.txt", "", "a");
  const std::string previous = "  previous: {files: [old_test.txt], format: text, max_length: 16}\n";
  const RunOutcome next = run("a", "new.txt", "new_test.txt", previous, "b", "gates: [\"teacher.previous_perplexity <= 1.05 * start.previous_perplexity @ 95%\"]\n");
  const Json& report = next.report;
  const auto figure = [&](const char* entry, const char* name) { return report.at(entry).at(name).at("value").get<double>(); };
  CHECK(figure("start", "previous_perplexity") == Approx(first.report.at("teacher").at("perplexity").at("value").get<double>()).epsilon(1e-12));
  CHECK(figure("teacher", "perplexity") < 0.5 * figure("start", "perplexity"));
  const double ratio = report.at("teacher").at("versus_start").at("previous_perplexity_ratio").at("value").get<double>();
  CHECK(ratio == Approx(figure("teacher", "previous_perplexity") / figure("start", "previous_perplexity")).epsilon(1e-9));
  CHECK(ratio > 1.1);
  CHECK(next.code == ExitCode::gate);
  CHECK(contains_all(report.at("gates").at(0).at("note").get<std::string>(), {"upper 95% bound", "over that of the model at the start"}));
  CHECK(contains_all(report.at("regressions").dump(), {"perplexity of the task before"}));
  const RunOutcome mixed = run("a", "new.txt", "new_test.txt", previous + "  rehearsal: {files: [old.txt], format: text, split: line, tokens: 120}\n", "c");
  CHECK(mixed.report.at("teacher").at("previous_perplexity").at("value").get<double>() < figure("teacher", "previous_perplexity"));
  CHECK(contains_all(error_text([&] { run("a", "new.txt", "new_test.txt", previous + "  rehearsal: {files: [old.txt], format: text, share: 0.2}\n", "d"); }), {"rehearsal.share", "tokens"}));

  // Nothing to predict, and losses against a teacher after the vocabulary was cut, are refused before any compute.
  write_text(path("single.txt"), "a\nb\nc\n");
  CHECK(contains_all(error_text([&] { run("a", "single.txt", "new_test.txt", "", "e"); }), {"nothing to predict", "data set \"train\""}));
  CHECK_FALSE(std::filesystem::exists(path("e") / "01-finetune"));
  const auto plan = [&](const std::string& stages) {
    write_text(path("recipe.yaml"), "name: text\nstore: store\nteacher: {path: a}\ndata:\n  train: {files: [new.txt], format: text, split: line}\n  calibration: {files: [old.txt], format: text, max_length: 16}\nstages:\n  - prune: {vocabulary: {first_ids: 0}}\n  - " + stages + "\n");
    const Recipe recipe = read_recipe(path("recipe.yaml"));
    return predict_stages(recipe, load_data(recipe)).size();
  };
  const std::string steps = "steps: 2, batch_size: 2, sequence_length: 24, precision: float32";
  for (const std::string& stage : {std::string("prune: {structured: {ffn: 0.5}, multiple_of: 8, criterion: magnitude, recover: {") + steps + "}}", "distill: {" + steps + "}", std::string("quantize: {weights: int8, group: 0, method: rtn, tune: scales}"),
                                  "quantize: {weights: int8, group: 0, method: qad, " + steps + "}"}) {
    INFO(stage);
    CHECK(contains_all(error_text([&] { plan(stage); }), {"not the teacher's any more", "cross_entropy"}));
  }
  CHECK(plan("quantize: {weights: int8, group: 0, method: qad, objective: [{labels: cross_entropy}], " + steps + "}") == 2);
}
