// Runs that go on from what an earlier one left: where its model lies, labels that stay and labels that are new, the task before and after,
// and gates on it.
#include <ATen/ATen.h>

#include "tests/catch_torch.h"

#include "core/error.h"
#include "core/json.h"
#include "core/text.h"
#include "export/exporters.h"
#include "model/checkpoint.h"
#include "pipeline/earlier_task.h"
#include "pipeline/plan.h"
#include "pipeline/run.h"
#include "tests/pipeline/tiny.h"
#include "tests/support.h"

using namespace kompakt;
using namespace kompakt::testing;
namespace fs = std::filesystem;

namespace {

// A run that has learned the three labels of the tiny setting, packed to few bits; then new data with one more label.
struct Continual {
  TinySetting tiny;
  Json first;

  Continual() {
    tiny.write_recipe("\n  - finetune: {epochs: 6, batch_size: 8, learning_rate: 3.0e-3, precision: float32}\n  - quantize: {weights: int8, group: 0, embedding: int8, method: rtn}\n  - export: {}\n  - evaluate: {latency: false}\n");
    REQUIRE(run_recipe(read_recipe(tiny.recipe()), {.out = tiny.out("first")}).code == ExitCode::ok);
    first = read_json(tiny.out("first") / "report.json");
    rows("new", "account", "why is the account not the same", 60, 0);
    rows("newtest", "account", "where is my account money", 20, 3);
    fs::copy_file(tiny.folder() / "test.csv", tiny.folder() / "old.csv");
    fs::copy_file(tiny.folder() / "train.csv", tiny.folder() / "old_train.csv");
  }

  void rows(const std::string& file, const std::string& label, const std::string& text, int count, int shift) const {
    std::string out = "text,category\n";
    for (int i = 0; i < count; ++i) out += str(text, std::string(static_cast<std::size_t>(i % 5), 'x'), " ", std::string(1, static_cast<char>('a' + (i + shift) % 26)), ",", label, "\n");
    out += "my card is lost,card\nwhy is the exchange rate high,rate\n";
    write_text(tiny.folder() / (file + ".csv"), out);
  }

  Recipe recipe(const std::string& teacher, const std::string& stages, const std::string& more_data = "", const std::string& gates = "") const {
    write_text(tiny.recipe(), str("name: on\nseed: 5\nstore: store\nteacher: {path: ", teacher, "}\ndata:\n  train: {files: [new.csv], text: text, label: category, max_length: 24}\n",
                                  "  test: {files: [newtest.csv], text: text, label: category, max_length: 24}\n", more_data, "stages:\n", stages, "  - evaluate: {latency: false}\n", gates));
    return read_recipe(tiny.recipe());
  }
};

const char* const previous = "  previous: {files: [old.csv], text: text, label: category, max_length: 24}\n";
const char* const rehearsal = "  rehearsal: {files: [old_train.csv], text: text, label: category, share: 0.5}\n";
// Float32, as bfloat16 where the machine has it learns so small a task by another way.
const char* const tune = "  - finetune: {epochs: 4, batch_size: 8, learning_rate: 3.0e-3, precision: float32}\n";

double figure(const Json& report, const char* entry, const char* name) { return report.at(entry).at(name).at("value").get<double>(); }

}  // namespace

TEST_CASE("a teacher given as a classifier is measured before what is compared with it, example by example", "[continual]") {
  const Continual setting;
  for (const char* stages : {"  - prune: {structured: {ffn: 0.5}, criterion: magnitude}\n  - export: {}\n", "  - export: {}\n"}) {
    const fs::path out = setting.tiny.out(stages[4] == 'p' ? "cut" : "as-it-is");
    write_text(setting.tiny.recipe(), str("name: given\nseed: 5\nstore: store\nteacher: {path: runs/first/01-finetune}\ndata:\n  train: {files: [old_train.csv], text: text, label: category, max_length: 24}\n",
                                          "  test: {files: [old.csv], text: text, label: category, max_length: 24}\nstages:\n", stages, "  - evaluate: {latency: false}\n"));
    const Json report = run_recipe(read_recipe(setting.tiny.recipe()), {.out = out}).report;
    CHECK(report.at("teacher").at("accuracy").at("value").get<double>() > 0);
    CHECK_FALSE(contains_all(report.at("verdict").get<std::string>(), {"unpaired"}));
    CHECK_FALSE(report.at("artifact").at("agreement").is_null());
    CHECK_FALSE(contains_all(read_text(out / "report.md"), {"same label: not measured"}));
  }
}

TEST_CASE("a run goes on from an artifact: new labels get rows, old and new task are measured before and after", "[continual]") {
  const Continual setting;
  const std::string stages = str(tune, "  - export: {}\n");
  const Recipe recipe = setting.recipe("runs/first", stages, previous);
  CHECK(recipe.teacher.path == "runs/first/artifact");
  CHECK(predict_stages(recipe, load_data(recipe)).size() == 3);
  const fs::path out = setting.tiny.out("on");
  const RunOutcome outcome = run_recipe(recipe, {.out = out});
  const Json& report = outcome.report;
  // Before: the packed artifact itself, as its own run measured it. It cannot know the new label.
  CHECK(figure(report, "start", "previous_accuracy") == figure(setting.first, "artifact", "accuracy"));
  CHECK(figure(report, "start", "accuracy") < 0.2);
  CHECK(figure(report, "artifact", "accuracy") > 0.8);
  const Json& versus = report.at("artifact").at("versus_start");
  for (const char* name : {"accuracy", "previous_accuracy"}) {
    const double difference = versus.at(str(name, "_difference")).at("value").get<double>();
    CHECK(difference == Approx(figure(report, "artifact", name) - figure(report, "start", name)).margin(1e-12));
  }
  // F1 is a mean over labels that occur: the old data have three of the four.
  CHECK(figure(report, "start", "previous_macro_f1") == Approx(figure(setting.first, "artifact", "macro_f1")).margin(1e-12));
  for (const char* name : {"previous_accuracy", "previous_macro_f1", "accuracy", "macro_f1"}) {
    INFO(name);
    const Json& difference = versus.at(str(name, "_difference"));
    CHECK(difference.at("low").get<double>() <= difference.at("value").get<double>());
    CHECK(difference.at("high").get<double>() >= difference.at("value").get<double>());
  }
  const ModelConfig config = load_config(out / "01-finetune");
  CHECK(config.labels == std::vector<std::string>{"card", "rate", "transfer", "account"});
  CHECK(report.at("stages")[0].at("details").at("new_labels") == Json{"account"});
  const std::string page = read_text(out / "report.md");
  CHECK(contains_all(page, {"Before and after", "task before", "new task", "better"}));
  CHECK(contains_all(read_text(out / "report.html"), {"id=\"before-after\""}));

  // Training on the new label alone forgets; with half of old data it forgets less. A gate on the task before tells, by exit code.
  const double forgot = figure(report, "artifact", "previous_accuracy");
  CHECK(forgot < figure(report, "start", "previous_accuracy") - 0.1);
  REQUIRE(report.at("regressions").size() >= 1);
  CHECK(contains_all(report.at("regressions")[0].get<std::string>(), {"accuracy of the task before"}));
  const std::string gate = "gates: [\"previous_accuracy >= start.previous_accuracy - 0.05 @ 95%\"]\n";
  const RunOutcome gated = run_recipe(setting.recipe("runs/first", stages, previous, gate), {.out = setting.tiny.out("gated")});
  CHECK(gated.code == ExitCode::gate);
  CHECK(contains_all(gated.report.at("gates")[0].at("note").get<std::string>(), {"lower 95% bound", "artifact.previous_accuracy", "at the start"}));
  CHECK(gated.report.at("stages")[0].at("reused").get<bool>());

  const RunOutcome rehearsed = run_recipe(setting.recipe("runs/first", stages, str(previous, rehearsal), gate), {.out = setting.tiny.out("rehearsed")});
  CHECK(figure(rehearsed.report, "artifact", "previous_accuracy") > forgot + 0.1);
  CHECK(figure(rehearsed.report, "artifact", "accuracy") > 0.8);
  CHECK(rehearsed.report.at("data").at("train").at("rehearsed") == 62);
  CHECK(run_recipe(setting.recipe("runs/first", stages, str(previous, rehearsal), gate), {.out = setting.tiny.out("rehearsed")}).did_nothing);
}

TEST_CASE("rows of labels that stay are kept to the byte before training, and the old task is still done", "[continual]") {
  const Continual setting;
  const Recipe recipe = setting.recipe("runs/first/01-finetune", "  - finetune: {steps: 1, batch_size: 8, learning_rate: 1.0e-9, weight_decay: 0, dropout: 0}\n", previous);
  const RunOutcome outcome = run_recipe(recipe, {.out = setting.tiny.out("on")});
  const auto before = load_model(setting.tiny.out("first") / "01-finetune"), after = load_model(setting.tiny.out("on") / "01-finetune");
  CHECK((after->classifier.weight.narrow(0, 0, 3) - before->classifier.weight).abs().max().item<double>() < 1e-7);
  CHECK((after->classifier.bias.narrow(0, 0, 3) - before->classifier.bias).abs().max().item<double>() < 1e-7);
  const auto length = [](const at::Tensor& rows) { return at::linalg_vector_norm(rows, 2, at::IntArrayRef{1}).mean().item<double>(); };
  CHECK(length(after->classifier.weight.narrow(0, 3, 1)) == Approx(length(before->classifier.weight)).epsilon(1e-3));
  CHECK(figure(outcome.report, "teacher", "previous_accuracy") >= figure(outcome.report, "start", "previous_accuracy") - 0.35);
  // Without data.previous a finetune stage makes a classifier of its own.
  const RunOutcome fresh = run_recipe(setting.recipe("runs/first/01-finetune", tune), {.out = setting.tiny.out("fresh")});
  CHECK(load_config(setting.tiny.out("fresh") / "01-finetune").labels == std::vector<std::string>{"account", "card", "rate"});
  CHECK(!fresh.report.contains("start"));
  CHECK(fresh.report.at("artifact").is_null());
}

TEST_CASE("the old model is the teacher of a distillation on new data with its labels", "[continual]") {
  const Continual setting;
  write_text(setting.tiny.folder() / "new.csv", "text,category\nmy card is lost now,card\nthe rate is high,rate\nwhere is my lost card,card\nwhy is the rate not the same,rate\n");
  write_text(setting.tiny.folder() / "newtest.csv", "text,category\nis my card lost,card\nthe exchange rate is high,rate\n");
  const Recipe recipe = setting.recipe("runs/first/artifact", "  - distill: {objective: [{labels: cross_entropy}, {logits: forward_kl}], steps: 5, batch_size: 4}\n", previous);
  const RunOutcome outcome = run_recipe(recipe, {.out = setting.tiny.out("on")});
  // The order of labels is the model's, though the data name two of them.
  CHECK(load_config(setting.tiny.out("on") / "01-distill").labels == std::vector<std::string>{"card", "rate", "transfer"});
  CHECK(figure(outcome.report, "start", "accuracy") == 1.0);
  CHECK(outcome.report.at("stages")[0].at("versus_start").contains("previous_accuracy_difference"));
  CHECK(outcome.report.at("start").at("path") == "teacher");
}

TEST_CASE("what cannot go on is refused before any compute, with what to do", "[continual]") {
  const Continual setting;
  const auto refused = [&](const std::string& teacher, const std::string& stages, const std::string& data = "", const std::string& gates = "") {
    return error_text([&] {
      const Recipe recipe = setting.recipe(teacher, stages, data, gates);
      predict_stages(recipe, load_data(recipe));
    });
  };
  const char* distill = "  - distill: {steps: 1, batch_size: 4}\n";
  CHECK(contains_all(refused("runs/first", distill, previous), {"does not know the label account", "begin the stages with finetune"}));
  CHECK(contains_all(refused("runs/first", distill), {"does not know the label account"}));
  CHECK(contains_all(refused("teacher", tune, previous), {"data.previous", "has no classifier", "earlier run"}));
  CHECK(contains_all(refused("runs/first", tune, "  previous: {files: [new.csv], text: text, label: category}\n"), {"data set \"previous\"", "does not know the label account"}));
  CHECK(contains_all(refused("runs/first", tune, "  previous: {files: [old.csv], format: text}\n"), {"previous", "another kind"}));
  CHECK(contains_all(refused("runs/first", tune, str(previous, "  rehearsal: {files: [old.csv], text: text, label: category}\n")), {"same files"}));
  CHECK(contains_all(refused("runs/first", tune, str(previous, "  rehearsal: {files: [old_train.csv], text: text, label: category, share: 1.5}\n")), {"share", "0.95"}));
  CHECK(contains_all(refused("runs/first", tune, str(previous, "  rehearsal: {files: [old_train.csv], text: text, label: category, max_length: 9}\n")), {"max_length", "rehearsal"}));
  CHECK(contains_all(refused("runs/first", tune, "", "gates: [\"previous_accuracy >= 0.5\"]\n"), {"task before", "previous"}));
  fs::create_directories(setting.tiny.folder() / "runs/empty");
  write_text(setting.tiny.folder() / "runs/empty/manifest.json", "{\"stages\": [], \"artifact\": null}");
  CHECK(contains_all(refused("runs/empty", tune), {"holds no model"}));
  // Another program's manifest, or a damaged one.
  write_text(setting.tiny.folder() / "runs/empty/manifest.json", "{\"stages\": [1, \"two\", {\"name\": 3}]}");
  CHECK(contains_all(refused("runs/empty", tune), {"manifest.json", "name"}));
  write_text(setting.tiny.folder() / "runs/empty/manifest.json", "{\"artifact\": {\"format\": [1]}}");
  CHECK(contains_all(refused("runs/empty", tune), {"manifest.json", "format"}));
}

TEST_CASE("rehearsed examples: as many as the share says, the same for the same seed", "[continual]") {
  ClassificationSet train, old;
  train.label_names = old.label_names = {"a", "b"};
  train.hash = "t", old.hash = "o";
  for (int i = 0; i < 30; ++i) train.examples.push_back({str("new ", i), 0});
  for (int i = 0; i < 50; ++i) old.examples.push_back({str("old ", i), 1});
  CHECK(with_rehearsal(train, old, 0, 1).examples.size() == 80);
  CHECK(with_rehearsal(train, old, 0.25, 1).examples.size() == 40);
  CHECK(with_rehearsal(train, old, 0.9, 1).examples.size() == 80);  // there are no more
  const ClassificationSet one = with_rehearsal(train, old, 0.25, 1), again = with_rehearsal(train, old, 0.25, 1), other = with_rehearsal(train, old, 0.25, 2);
  CHECK(one.hash == again.hash);
  CHECK(one.hash != train.hash);
  bool same = true, all_same = true;
  for (std::size_t i = 0; i < 40; ++i) same = same && one.examples[i].text == again.examples[i].text, all_same = all_same && one.examples[i].text == other.examples[i].text;
  CHECK(same);
  CHECK_FALSE(all_same);
}
