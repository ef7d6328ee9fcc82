// Vectors of texts, and two models' similarities between them: by hand, against scipy, at the edges.
#include "evaluate/embeddings.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <cmath>

#include "core/files.h"
#include "core/json.h"
#include "evaluate/inputs.h"
#include "tests/catch_torch.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

at::Tensor rows(const std::vector<std::vector<double>>& values) {
  std::vector<at::Tensor> out;
  for (const auto& row : values) out.push_back(at::tensor(at::ArrayRef<double>(row), at::kFloat));
  return at::stack(out);
}

at::Tensor directions(const std::vector<double>& degrees) {
  std::vector<std::vector<double>> out;
  for (const double angle : degrees) out.push_back({std::cos(angle * M_PI / 180), std::sin(angle * M_PI / 180)});
  return rows(out);
}

}  // namespace

TEST_CASE("similarities of four texts by hand") {
  // From the first text: the others stand 10, 30, 60 degrees away, and 30, 10, 60 in the other model.
  const EmbeddingComparison pair = compare_embeddings(directions({0, 10, 30, 60}), directions({0, 30, 10, 60}));
  CHECK(pair.rank_correlation[0] == Approx(0.5));   // ranks 3 2 1 and 2 3 1
  CHECK(pair.rank_correlation[3] == Approx(0.5));   // from the last: 60 50 30 and 60 30 50
  CHECK(pair.same_nearest == std::vector<std::int64_t>{0, 0, 0, 0});
  CHECK(pair.cosine[0] == Approx(1));
  CHECK(pair.cosine[1] == Approx(std::cos(20 * M_PI / 180)));
}

TEST_CASE("axes do not matter: a rotation and a padding with zeros leave similarities as they are") {
  const at::Tensor a = directions({0, 10, 31, 63, 101}), turned = directions({70, 80, 101, 133, 171}), wide = at::cat({a, at::zeros({5, 3})}, 1);
  for (const at::Tensor& other : {turned, wide}) {
    const EmbeddingComparison pair = compare_embeddings(a, other);
    for (const double r : pair.rank_correlation) CHECK(r == Approx(1));
    CHECK(pair.same_nearest == std::vector<std::int64_t>(5, 1));
    CHECK(pair.cosine.empty() == (other.size(1) != 2));
  }
}

TEST_CASE("a model to which all texts are the same ranks nothing") {
  const EmbeddingComparison pair = compare_embeddings(directions({0, 10, 30, 60}), directions({5, 5, 5, 5}));
  for (const double r : pair.rank_correlation) CHECK(r == 0);
  CHECK(pair.same_nearest[0] == 1);  // the first of equals is the first text's own nearest
}

TEST_CASE("rank correlations and nearest texts of an independent implementation, on one and two threads") {
  const Json golden = read_json(source_folder() / "tests/goldens/statistics.json");
  const auto vectors = golden.at("vectors").get<std::vector<std::vector<std::vector<double>>>>();
  const int before = at::get_num_threads();
  for (const int threads : {1, 2}) {
    at::set_num_threads(threads);
    const EmbeddingComparison pair = compare_embeddings(rows(vectors[0]), rows(vectors[1]));
    const auto expected = golden.at("rank_correlation").get<std::vector<double>>();
    for (std::size_t i = 0; i < expected.size(); ++i) CHECK(pair.rank_correlation[i] == Approx(expected[i]).margin(1e-9));
    CHECK(pair.same_nearest == golden.at("same_nearest").get<std::vector<std::int64_t>>());
    CHECK(pair.cosine.empty());
  }
  at::set_num_threads(before);
}

TEST_CASE("vectors of texts: of length one, in their order, whatever the batches; what is not finite is named") {
  const at::NoGradGuard no_grad;
  ModelConfig config = tiny_encoder(3)->config();
  config.labels.clear();
  const Transformer encoder(config, 3);
  TokenizedExamples texts;
  for (std::int64_t i = 0; i < 9; ++i) texts.ids.push_back(std::vector<std::int64_t>(static_cast<std::size_t>(2 + i * 5 % 7), 3 + i)), texts.labels.push_back(0);
  const at::Tensor all = embed_texts(encoder, texts, 0, 64), single = embed_texts(encoder, texts, 0, 1);
  CHECK(at::allclose(all, single, 1e-5, 1e-6));
  CHECK(at::allclose(all.norm(2, {1}), at::ones({9}), 1e-5, 1e-6));
  TokenBatch batch;
  batch.ids = texts.ids[4], batch.rows = 1, batch.columns = static_cast<std::int64_t>(batch.ids.size()), batch.lengths = {batch.columns};
  const at::Tensor fifth = encoder.forward(batch_input(batch, c10::Device(c10::kCPU)))[0];
  CHECK(at::allclose(all[4], fifth / fifth.norm(), 1e-5, 1e-6));
  const auto broken = encoder.clone();
  broken->tokens.weight[5].fill_(INFINITY);
  CHECK(contains_all(error_text([&] { embed_texts(*broken, texts, 0); }), {"the vector of a text is not finite", "text 3"}));
  CHECK(contains_all(error_text([&] { embed_texts(*broken, texts, 0, 64, {}, [](std::int64_t text) { return 10 * text; }); }), {"text 20"}));
}
