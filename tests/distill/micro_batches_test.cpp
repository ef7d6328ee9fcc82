// Micro batches of a step: their losses and gradients together are those of one batch that holds all rows, though their rows are longer and shorter.
#include <ATen/ATen.h>

#include "core/text.h"
#include "distill/stage.h"
#include "tests/catch_torch.h"
#include "tests/distill/objectives.h"
#include "tests/distill/tensors.h"
#include "tests/support.h"
#include "tests/tiny_models.h"
#include "train/batch_loss.h"
#include "train/data_parallel.h"
#include "train/teacher.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

// Rows of classes, padded to the longest of the batch.
TokenBatch class_rows(const TokenizedExamples& examples, std::size_t first, std::size_t count) {
  TokenBatch batch;
  batch.rows = static_cast<std::int64_t>(count);
  for (std::size_t r = first; r < first + count; ++r) batch.columns = std::max(batch.columns, static_cast<std::int64_t>(examples.ids[r].size()));
  for (std::size_t r = first; r < first + count; ++r) {
    std::vector<std::int64_t> row = examples.ids[r];
    batch.lengths.push_back(static_cast<std::int64_t>(row.size()));
    row.resize(static_cast<std::size_t>(batch.columns), 0);
    batch.ids.insert(batch.ids.end(), row.begin(), row.end());
    batch.labels.push_back(examples.labels[r]);
    batch.examples.push_back(static_cast<std::int64_t>(r));
  }
  return batch;
}

std::vector<at::Tensor> gradients_of(Transformer& model) {
  std::vector<at::Tensor> out;
  for (const NamedParameter& parameter : model.parameters()) {
    out.push_back(parameter.value->grad().defined() ? parameter.value->grad().clone() : at::zeros_like(*parameter.value));
    parameter.value->mutable_grad() = at::Tensor();
  }
  return out;
}

}  // namespace

TEST_CASE("micro batches of longer and shorter texts count by what an objective compares") {
  const auto student = tiny_encoder(3);
  const std::shared_ptr<Transformer> teacher = tiny_encoder(4);
  TaskData data = tiny_classification(8, 2);
  std::sort(data.train.ids.begin(), data.train.ids.end(), [](const auto& a, const auto& b) { return a.size() < b.size(); });  // short rows in one half
  StageContext context;
  context.data = &data, context.title = "distill";
  const auto source = live_teacher(teacher);
  context.teacher = source.get();
  DataParallel parallel(nullptr, {});
  ObjectiveShapes shapes = objective_shapes(*student, teacher->config(), 0);
  for (const char* list : {"[{hidden: mse}]", "[{hidden: cosine, layers: [1, 3]}]", "[{relation: minilm}]", "[{hidden: mse}, {relation: minilm, weight: 0.5}, {logits: forward_kl}, {labels: cross_entropy, weight: 0.25}]"}) {
    INFO(list);
    const auto objectives = objectives_of(list, {0, 1, 2, 3}, shapes);
    student->requires_grad(true);
    BatchLoss loss(*student, objectives, context, false);
    source->prepare(loss.teacher_taps());
    const auto step = [&](const std::vector<TokenBatch>& batches, bool counted) {
      std::vector<std::size_t> ours;
      std::vector<double> shares;
      for (std::size_t i = 0; i < batches.size(); ++i) ours.push_back(i), shares.push_back(static_cast<double>(batches[i].rows) / 8);
      const auto weights = loss.comparison_weights(batches, ours, shares, parallel);
      std::map<std::string, double> parts;
      for (std::size_t i = 0; i < batches.size(); ++i) {
        std::vector<LossPart> micro;
        const at::Tensor value = loss.evaluate(batches[i], micro, counted && !weights.empty() ? weights[i] : std::vector<double>()) * shares[i];
        value.backward();
        parts["total"] += value.item<double>();
        for (const LossPart& part : micro) parts[part.name] += part.value.item<double>() * shares[i];
      }
      return std::pair(parts, gradients_of(*student));
    };
    const auto [whole, gradients] = step({class_rows(data.train, 0, 8)}, true);
    const std::vector<TokenBatch> pieces = {class_rows(data.train, 0, 2), class_rows(data.train, 2, 3), class_rows(data.train, 5, 3)};
    REQUIRE(pieces[0].columns < pieces[2].columns);
    const auto [parts, sums] = step(pieces, true);
    for (const auto& [name, value] : whole) {
      INFO(name);
      CHECK(parts.at(name) == Approx(value).epsilon(1e-5));
    }
    for (std::size_t i = 0; i < gradients.size(); ++i) CHECK(largest_difference(sums[i], gradients[i]) < 1e-5 * std::max(1.0, gradients[i].abs().max().item<double>()));
    // By rows alone they would not.
    CHECK(std::abs(step(pieces, false).first.at("total") / whole.at("total") - 1) > 1e-4);
    student->requires_grad(false);
  }
}
