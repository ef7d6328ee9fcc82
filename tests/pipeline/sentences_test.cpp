// Encoders without classes: texts without labels, objectives on vectors, the held-out score, the artifact.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"

#include "core/files.h"
#include "core/json.h"
#include "distill/losses.h"
#include "model/checkpoint.h"
#include "pipeline/plan.h"
#include "pipeline/recipe.h"
#include "pipeline/run.h"
#include "pipeline/task_data.h"
#include "tests/pipeline/tiny.h"
#include "tests/support.h"
#include "train/teacher.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

constexpr const char* sentence_data = "data:\n  train: {files: [train.csv], format: sentences, text: text, max_length: 24, holdout: 0.2}\n  test: {files: [test.csv], format: sentences, text: text, max_length: 24}\n";

Recipe sentence_recipe(const TinySetting& tiny, const std::string& stages, const std::string& data = sentence_data) {
  write_text(tiny.recipe(), "name: tiny\nseed: 5\nstore: store\nteacher: {path: teacher}\n" + data + "stages:\n" + stages + "  - evaluate: {latency: false}\n");
  return read_recipe(tiny.recipe());
}

// Mean cosine of the pooled vectors of both on the texts.
double likeness(const Transformer& a, const Transformer& b, const std::vector<std::vector<std::int64_t>>& texts) {
  const at::NoGradGuard no_grad;
  double sum = 0;
  for (const auto& ids : texts) {
    TokenBatch batch;
    batch.rows = 1, batch.columns = static_cast<std::int64_t>(ids.size()), batch.ids = ids, batch.lengths = {batch.columns};
    const ModelInput input = to_input(batch, c10::Device(c10::kCPU));
    sum += 1 - hidden_cosine(a.forward(input), b.forward(input)).item<double>();
  }
  return sum / static_cast<double>(texts.size());
}

}  // namespace

TEST_CASE("an encoder without classes is distilled, quantized and exported on texts without labels") {
  TinySetting tiny;
  const std::string distill = "  - distill: {student: {keep_layers: [0, 2]}, objective: [{embedding: cosine}, {embedding: similarity, weight: 0.1}, {hidden: mse}, {relation: minilm, weight: 0.1}], epochs: 6, batch_size: 8, learning_rate: 1.0e-3, keep: best, "
                              "precision: float32, save_every_steps: 5}\n";
  const Recipe recipe = sentence_recipe(tiny, distill + "  - prune: {structured: {ffn: 0.5}, criterion: activation_norm, samples: 24}\n  - quantize: {weights: int8, group: 32, embedding: int8, method: rtn}\n  - export: {formats: [kompakt]}\n");
  const LoadedData data = load_data(recipe);
  CHECK(data.train.label_names.empty());
  CHECK(data.dev.examples.size() == 18);
  const std::vector<StagePrediction> plan = predict_stages(recipe, data);
  CHECK(run_recipe(recipe, {.out = tiny.out("a")}).code == ExitCode::ok);
  const Json manifest = read_json(tiny.out("a") / "manifest.json");
  const Json& stage = manifest.at("stages").at(0);
  CHECK(stage.at("predicted").at("bytes") == plan.at(0).bytes);
  CHECK(count_parameters(load_config(tiny.out("a") / "01-distill")).total == plan.at(0).parameters);
  // The score of held-out texts is minus what is minimised, and rises.
  const Json& curve = stage.at("details").at("dev_curve");
  REQUIRE(curve.size() == 6);
  CHECK(curve.back().at("score").get<double>() > curve.front().at("score").get<double>());
  CHECK(curve.back().at("score").get<double>() < 0);
  CHECK(stage.at("details").at("loss_curve").back().at("parts").contains("embedding_cosine"));
  CHECK(stage.at("model").at("nulls").at("accuracy") == "the texts have no labels");
  CHECK(!manifest.at("teacher").is_null());
  // What the report says of the vectors: each model against the teacher's, on the test texts.
  const auto vectors_of = [](const Json& model) { return model.at("embeddings").at("test"); };
  CHECK(vectors_of(manifest.at("teacher")).at("n") == 45);
  CHECK_FALSE(vectors_of(manifest.at("teacher")).contains("rank_correlation"));
  const Json distilled = vectors_of(stage.at("model"));
  CHECK(distilled.at("rank_correlation").at("low").get<double>() < distilled.at("rank_correlation").at("value").get<double>());
  const Json report = read_json(tiny.out("a") / "report.json");
  CHECK(report.at("stages").at(0).at("rank_correlation") == distilled.at("rank_correlation"));
  CHECK(report.at("teacher").at("nulls").at("same_nearest") == "the teacher is its own reference");
  CHECK(report.at("artifact").at("nulls").at("perplexity") == "no text is evaluated in this run");
  CHECK(contains_all(report.at("verdict").get<std::string>(), {"rank correlation"}));
  CHECK(contains_all(read_text(tiny.out("a") / "report.md"), {"rank correlation", "same nearest"}));
  CHECK(contains_all(read_text(tiny.out("a") / "report.html"), {"similarities: cosines between the vectors of 45 texts"}));
  const auto teacher = load_model(tiny.folder() / "teacher"), student = load_model(tiny.out("a") / "01-distill"), artifact = open_any_model(tiny.out("a") / "artifact");
  CHECK_FALSE(student->config().is_classifier());
  const auto tokenizer = load_tokenizer(tiny.folder() / "teacher");
  const auto test = tokenize_data(recipe, data, *tokenizer, teacher->config())->test.ids;
  REQUIRE(test.size() == 45);
  // A student of the same layers that was not trained.
  const Recipe still = sentence_recipe(tiny, "  - distill: {student: {keep_layers: [0, 2]}, steps: 1, batch_size: 8, learning_rate: 1.0e-30, precision: float32}\n");  // the default objective
  CHECK(run_recipe(still, {.out = tiny.out("b")}).code == ExitCode::ok);
  CHECK(read_json(tiny.out("b") / "manifest.json").at("stages").at(0).at("details").at("objective") == Json::parse(R"([{"embedding": "cosine"}])"));
  // The teacher's vectors come from the store here.
  const Json untrained = vectors_of(read_json(tiny.out("b") / "manifest.json").at("stages").at(0).at("model"));
  for (const char* key : {"rank_correlation", "cosine"}) CHECK(distilled.at(key).at("value").get<double>() > untrained.at(key).at("value").get<double>());
  const double before = likeness(*load_model(tiny.out("b") / "01-distill"), *teacher, test), after = likeness(*student, *teacher, test);
  CHECK(after > before + 0.2 * (1 - before));
  CHECK(distilled.at("cosine").at("value").get<double>() == Approx(after).epsilon(1e-5));
  CHECK(untrained.at("cosine").at("value").get<double>() == Approx(before).epsilon(1e-5));
  const auto pruned = load_model(tiny.out("a") / "02-prune");
  CHECK(likeness(*artifact, *pruned, test) > 0.99);
  const Json& proof = manifest.at("stages").at(3).at("details").at("reopened").at("kompakt");
  CHECK(proof.at("max_logit_difference").get<double>() <= 1e-5);
  CHECK(proof.at("checked").get<int>() > 0);
  CHECK(run_recipe(recipe, {.out = tiny.out("a")}).did_nothing);
}

TEST_CASE("texts without labels are read from tables, JSON lines and lines; what needs labels is refused by plan") {
  TinySetting tiny;
  write_text(tiny.folder() / "a.jsonl", "{\"query\": \"my card is lost\"}\n{\"query\": \"where is the money\"}\n");
  write_text(tiny.folder() / "b.txt", "my card is lost\n\nwhere is the money\n");
  DataSource source;
  source.format = "sentences", source.files = {"a.jsonl"}, source.text = "query";
  const ClassificationSet json = read_classification(source, tiny.folder());
  source.files = {"b.txt"};
  const ClassificationSet lines = read_classification(source, tiny.folder());
  REQUIRE(json.examples.size() == 2);
  CHECK(json.examples[1].text == "where is the money");
  CHECK(json.label_names.empty());
  CHECK(json.hash == lines.hash);
  source.files = {"train.csv"}, source.text = "words";
  CHECK(contains_all(error_text([&] { read_classification(source, tiny.folder()); }), {"column \"words\"", "text, category"}));

  const std::string short_distill = "  - distill: {steps: 1, batch_size: 8}\n";
  const auto refused = [&](const std::string& stages, const std::string& data = sentence_data) {
    return error_text([&] {
      const Recipe recipe = sentence_recipe(tiny, stages, data);
      predict_stages(recipe, load_data(recipe));
    });
  };
  CHECK(contains_all(refused("  - finetune: {epochs: 1}\n"), {"\"finetune\"", "labels", "sentences", "distill, prune"}));
  CHECK(contains_all(refused("  - distill: {objective: [{labels: cross_entropy}], steps: 1}\n"), {"labels: cross_entropy", "without classes", "embedding, hidden or relation"}));
  CHECK(contains_all(refused("  - distill: {objective: [{logits: forward_kl}], steps: 1}\n"), {"logits: forward_kl", "without classes"}));
  CHECK(contains_all(refused("  - prune: {structured: {ffn: 0.5}}\n"), {"criterion taylor", "without classes", "activation_norm"}));
  CHECK(contains_all(refused("  - distill: {student: {width: {ffn: 32}}, steps: 1}\n"), {"criterion taylor", "without classes"}));
  CHECK(contains_all(refused(short_distill, "data:\n  train: {files: [train.csv], format: sentences}\n  test: {files: [test.csv], text: text, label: category}\n"), {"data set \"test\"", "another kind", "sentences"}));
  CHECK(contains_all(refused(short_distill, "data:\n  train: {files: [train.csv], text: text, label: category}\n  test: {files: [test.csv], format: sentences}\n"), {"data set \"test\"", "no labels", "format: classification"}));
  const Recipe allowed = sentence_recipe(tiny, short_distill);
  CHECK(predict_stages(allowed, load_data(allowed)).size() == 2);
  // A model with classes has labels to learn.
  tiny.write_recipe("\n  - finetune: {epochs: 1, batch_size: 8}\n  - evaluate: {latency: false}\n");
  CHECK(run_recipe(read_recipe(tiny.recipe()), {.out = tiny.out("classes")}).code == ExitCode::ok);
  const std::string place = "runs/classes/01-finetune";
  write_text(tiny.recipe(), "name: tiny\nseed: 5\nstore: store\nteacher: {path: " + place + "}\n" + sentence_data + "stages:\n" + short_distill);
  CHECK(contains_all(error_text([&] {
          const Recipe recipe = read_recipe(tiny.recipe());
          predict_stages(recipe, load_data(recipe));
        }), {"without labels", "a classifier", "format: classification"}));
}
