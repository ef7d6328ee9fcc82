// Unstructured pruning of whole models: every criterion, masks that later stages and a resumed run keep, their file, refusals.
#include "prune/unstructured.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"
#include <filesystem>
#include <fstream>

#include "core/files.h"
#include "core/node.h"
#include "core/system.h"
#include "prune/stage.h"
#include "tests/support.h"
#include "tests/tiny_models.h"
#include "train/mask.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

PruneOptions sparse_options(const std::string& yaml) {
  PruneOptions options;
  Problems problems;
  read_fields(parse_yaml(yaml, "recipe.yaml"), "stage \"prune\"", problems, [&](FieldVisitor& v) { fields(v, options); });
  problems.throw_if_any("mistakes");
  return options;
}

struct SparseStage {
  TaskData data;
  Json details = Json::object();
  StageContext context;
  SparseStage(const std::string& name, TaskData with) : data(std::move(with)) {
    context.title = "02-prune";
    context.work = std::filesystem::temp_directory_path() / ("kompakt-sparse-" + name);
    std::filesystem::remove_all(context.work);
    std::filesystem::create_directories(context.work);
    context.seed = 9;
    context.data = &data;
    context.details = &details;
  }
  ~SparseStage() { std::filesystem::remove_all(context.work); }
};

// Every masked weight is exactly zero; the number of zeros of the masks.
std::int64_t check_masked(Transformer& model, const WeightMasks& masks) {
  std::int64_t zeros = 0;
  for (const auto& [name, mask] : masks) {
    CAPTURE(name);
    CHECK(model.find_linear(name)->weight.masked_select(mask.logical_not()).ne(0).sum().item<std::int64_t>() == 0);
    zeros += mask.numel() - mask.sum().item<std::int64_t>();
  }
  return zeros;
}

// Interrupts the n-th step.
class Interrupter final : public Constraint {
 public:
  explicit Interrupter(int at) : left_(at) {}
  std::string name() const override { return "interrupter"; }
  void attach(Transformer&) override {}
  void detach(Transformer&) override {}
  void after_step(Transformer&) override {
    if (--left_ == 0) request_interrupt(2);
  }

 private:
  int left_;
};

}  // namespace

TEST_CASE("every criterion prunes decoders and encoders to the pattern") {
  for (const bool decoder : {true, false})
    for (const WeightCriterion& row : weight_criteria())
      for (const std::string refit : {"none", "exact"})
        for (const std::string share : {"sparsity: 0.5", "pattern: \"2:4\"", "pattern: \"4:8\""}) {
          CAPTURE(decoder, std::string(row.name), refit, share);
          SparseStage stage("criteria", decoder ? tiny_text() : tiny_classification());
          const auto model = decoder ? tiny_decoder(3) : tiny_encoder(3);
          const auto before = copy_of(*model);
          prune(*model, sparse_options("{unstructured: {" + share + ", criterion: " + std::string(row.name) + ", refit: " + refit + "}, samples: 40}"), {}, stage.context);
          CHECK(stage.context.masks.size() == model->linears().size());
          const std::int64_t zeros = check_masked(*model, stage.context.masks);
          const Json& report = stage.details.at("sparsity");
          CHECK(report.at("zeros") == zeros);
          CHECK(2 * zeros == report.at("weights").get<std::int64_t>());  // all widths are even
          CHECK(report.at("layers").size() == model->linears().size());
          CHECK(report.at("layers").at(0).at("output_error").get<double>() > 0);
          CHECK((report.at("calibration").is_null()) == (row.needs == InputStatistics::none && refit == "none"));
          for (const auto& [name, mask] : stage.context.masks)
            if (share.find("2:4") != std::string::npos) CHECK(mask.reshape({-1, 4}).sum(1).eq(2).all().item<bool>());
          const auto after = copy_of(*model);
          for (std::size_t i = 0; i < after.size(); ++i)  // nothing else was touched
            if (after[i].second.dim() != 2 || !stage.context.masks.count(after[i].first.substr(0, after[i].first.size() - 7))) CHECK(at::equal(after[i].second, before[i].second));
        }
}

TEST_CASE("compensation lowers the output error, the refit lowers it further") {
  const auto error_of = [](const std::string& yaml) {
    SparseStage stage("error", tiny_text());
    stage.data.calibration.clear();
    const CounterRandom random(3, "windows");
    for (std::uint64_t w = 0; w < 40; ++w) {
      std::vector<std::int64_t> ids;
      for (std::uint64_t t = 0; t < 16; ++t) ids.push_back(3 + static_cast<std::int64_t>(random.below(w * 16 + t, 47)));
      stage.data.calibration.push_back(std::move(ids));
    }
    const auto model = tiny_decoder(3);
    prune(*model, sparse_options(yaml), {}, stage.context);
    double sum = 0;
    for (const Json& row : stage.details.at("sparsity").at("layers")) sum += row.at("output_error").get<double>();
    return sum;
  };
  const double plain = error_of("{unstructured: {sparsity: 0.5, criterion: magnitude, damping: 1e-6}}"), wanda = error_of("{unstructured: {sparsity: 0.5, criterion: wanda}}");
  const double swept = error_of("{unstructured: {sparsity: 0.5, criterion: sparsegpt, damping: 1e-4}}"), refit = error_of("{unstructured: {sparsity: 0.5, criterion: sparsegpt, refit: exact, damping: 1e-4}}");
  const double rounded = error_of("{unstructured: {sparsity: 0.5, criterion: sparsegpt, damping: 1e-4, calibration_precision: bf16}}");
  CAPTURE(plain, wanda, swept, refit, rounded);
  CHECK(rounded == Approx(swept).epsilon(0.05));
  CHECK(rounded != swept);
  CHECK(swept < wanda);
  CHECK(refit < swept);
}

TEST_CASE("true_sequential: off, the matrices of a block see the inputs of the block as it came") {
  const auto masks_of = [](bool sequential) {
    SparseStage stage("order", tiny_text());
    const auto model = tiny_decoder(3);
    prune(*model, sparse_options(std::string("{unstructured: {sparsity: 0.5, criterion: wanda, true_sequential: ") + (sequential ? "true" : "false") + "}, samples: 40}"), {}, stage.context);
    return stage.context.masks;
  };
  const auto together = masks_of(false), sequential = masks_of(true);
  SparseStage stage("order", tiny_text());
  const auto model = tiny_decoder(3);
  const CalibrationSet set = calibration_set(stage.context, 40);
  CalibrationOptions options;
  options.squares_only = true;
  SequentialCalibration calibration(*model, set, options);
  calibration.start();
  int differ = 0;
  for (const BlockPart part : block_parts) {
    const SecondMoments moments = calibration.moments(0, part, {});
    for (Linear* linear : part_linears(model->blocks[0], part)) {
      CHECK(at::equal(together.at(linear->name), wanda_mask(linear->weight.detach(), moments.square, SparsityPattern{0.5})));
      if (part == BlockPart::attention) CHECK(at::equal(together.at(linear->name), sequential.at(linear->name)));
      else differ += !at::equal(together.at(linear->name), sequential.at(linear->name));
    }
  }
  CHECK(differ > 0);
}

TEST_CASE("masks stay exactly zero through training, an interruption and its resume, to the same bytes") {
  TrainOptions options;
  options.steps = 8;
  options.batch_size = 8;
  options.learning_rate = 1e-2;
  options.precision = "float32";
  SparseStage stage("training", tiny_classification());
  const auto start = tiny_encoder(3);
  prune(*start, sparse_options("{unstructured: {pattern: \"2:4\", criterion: magnitude}}"), {}, stage.context);
  const std::vector<std::shared_ptr<Objective>> losses = {std::shared_ptr<Objective>(label_cross_entropy())};
  const auto unbroken = start->clone();
  train(*unbroken, options, losses, {std::make_shared<Interrupter>(100)}, stage.context);
  check_masked(*unbroken, stage.context.masks);
  CHECK(!same_parameters(copy_of(*unbroken), copy_of(*start)));
  for (const auto& [name, mask] : stage.context.masks) CHECK(unbroken->find_linear(name)->weight.masked_select(mask).ne(0).all().item<bool>());

  std::filesystem::remove_all(stage.context.work);
  std::filesystem::create_directories(stage.context.work);
  const auto killed = start->clone();
  CHECK_THROWS_AS(train(*killed, options, losses, {std::make_shared<Interrupter>(3)}, stage.context), Error);
  request_interrupt(0);
  REQUIRE_FALSE(interrupted());
  stage.context.resume = true;
  const auto resumed = start->clone();
  train(*resumed, options, losses, {std::make_shared<Interrupter>(100)}, stage.context);
  CHECK(same_parameters(copy_of(*resumed), copy_of(*unbroken)));
  check_masked(*resumed, stage.context.masks);
  // The state belongs to these masks.
  stage.context.masks.begin()->second = stage.context.masks.begin()->second.logical_not();
  const auto other = start->clone();
  CHECK(contains_all(error_text([&] { train(*other, options, losses, {std::make_shared<Interrupter>(100)}, stage.context); }), {"constraints"}));
}

TEST_CASE("recovery inside the stage keeps the masks; a second pruning keeps the first one's zeros") {
  SparseStage stage("twice", tiny_classification());
  const auto model = tiny_encoder(3);
  prune(*model, sparse_options("{unstructured: {sparsity: 0.25}, samples: 40, recover: {steps: 4, batch_size: 8, precision: float32, learning_rate: 1e-2}}"), {}, stage.context);
  const WeightMasks first = stage.context.masks;
  const std::int64_t quarter = check_masked(*model, first);
  prune(*model, sparse_options("{unstructured: {sparsity: 0.5, criterion: sparsegpt}, samples: 40}"), {}, stage.context);
  check_masked(*model, first);
  CHECK(check_masked(*model, stage.context.masks) >= 2 * quarter);
}

TEST_CASE("masks survive their file") {
  const std::filesystem::path folder = std::filesystem::temp_directory_path() / "kompakt-masks";
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(folder);
  CHECK(load_masks(folder).empty());
  save_masks({}, folder);
  CHECK(std::filesystem::is_empty(folder));
  WeightMasks masks;
  for (const std::int64_t columns : {1, 7, 8, 9, 40}) {
    at::Tensor mask = at::zeros({3, columns}, at::kBool);
    for (std::int64_t i = 0; i < mask.numel(); ++i) mask.data_ptr<bool>()[i] = (i * i + columns) % 3 == 0;
    masks["layer." + std::to_string(columns) + ".q_proj"] = mask;
  }
  save_masks(masks, folder);
  const WeightMasks loaded = load_masks(folder);
  REQUIRE(loaded.size() == masks.size());
  for (const auto& [name, mask] : masks) CHECK(at::equal(loaded.at(name), mask));
  const std::string bytes = read_text(folder / "masks.h5");
  save_masks(masks, folder);
  CHECK(read_text(folder / "masks.h5") == bytes);
  std::ofstream(folder / "masks.h5", std::ios::binary) << bytes.substr(0, bytes.size() / 2);
  CHECK_THROWS_AS(load_masks(folder), Error);
  std::filesystem::remove_all(folder);
}

TEST_CASE("masks of another model are named, with what would fit") {
  const auto model = testing::tiny_decoder(2);
  const std::string name = model->linears()[0]->name;
  const at::Tensor fits = at::ones(model->linears()[0]->weight.sizes(), at::kBool);
  CHECK_NOTHROW(check_masks_fit({{name, fits}}, *model, "folder"));
  CHECK(contains_all(error_text([&] { check_masks_fit({{name, at::ones({3, 5}, at::kBool)}}, *model, "folder"); }), {name.c_str(), "[3, 5]", "masks.h5", "another model"}));
  CHECK(contains_all(error_text([&] { check_masks_fit({{"no.such", fits}}, *model, "folder"); }), {"no.such", "names such as"}));
}

TEST_CASE("skipped matrices stay as they are") {
  SparseStage stage("skip", tiny_text());
  const auto model = tiny_decoder(3);
  const auto before = copy_of(*model);
  prune(*model, sparse_options("{unstructured: {sparsity: 0.5, skip: [\"*down_proj\", \"*layers.0.*\"]}}"), {}, stage.context);
  CHECK(stage.context.masks.size() == 2 * 6);
  const auto after = copy_of(*model);
  for (std::size_t i = 0; i < after.size(); ++i)
    if (after[i].first.find("down_proj") != std::string::npos || after[i].first.find("layers.0.") != std::string::npos) CHECK(at::equal(after[i].second, before[i].second));
  CHECK(contains_all(error_text([&] { prune(*model, sparse_options("{unstructured: {sparsity: 0.5, skip: [\"*nothing\"]}}"), {}, stage.context); }), {"*nothing", "names such as"}));
  CHECK(contains_all(error_text([&] { prune(*model, sparse_options("{unstructured: {sparsity: 0.5, skip: [\"*\"]}}"), {}, stage.context); }), {"every matrix is skipped"}));
}

TEST_CASE("unstructured pruning: what cannot be is refused before anything is computed") {
  const ModelConfig config = tiny_decoder(3)->config();  // widths 24 and 40
  const auto refusal = [&](const std::string& inner) { return error_text([&] { pruned_config(config, sparse_options("{unstructured: {" + inner + "}}")); }); };
  CHECK(contains_all(refusal("criterion: wanda"), {"needs a sparsity or a pattern"}));
  CHECK(contains_all(refusal("sparsity: 0.5, pattern: \"2:4\""), {"two different things"}));
  CHECK(contains_all(refusal("sparsity: 0.5, criterion: magnitude, calibration_precision: bf16"), {"unstructured.calibration_precision", "magnitude makes no pass", "leave the key out"}));
  CHECK(contains_all(refusal("pattern: half"), {"half", "2:4"}));
  CHECK(contains_all(refusal("pattern: \"4:4\""), {"4:4"}));
  CHECK(contains_all(refusal("pattern: \"8:16\""), {"24 weights", "groups of 16", "nearest: 6:12", "skip"}));
  CHECK(contains_all(error_text([] { sparse_options("{unstructured: {sparsity: 1}}"); }), {"sparsity", "0.99"}));
  CHECK(contains_all(error_text([] { sparse_options("{unstructured: {criterion: wandaa}}"); }), {"wandaa", "wanda"}));
  SparseStage stage("refusals", tiny_text());
  const auto model = tiny_decoder(3);
  stage.data.calibration.clear();
  CHECK(contains_all(error_text([&] { prune(*model, sparse_options("{unstructured: {sparsity: 0.5}}"), {}, stage.context); }), {"calibration", "magnitude"}));
  prune(*model, sparse_options("{unstructured: {sparsity: 0.5, criterion: magnitude}}"), {}, stage.context);
  CHECK(contains_all(error_text([&] { prune(*model, sparse_options("{structured: {ffn: 0.8}, multiple_of: 8, criterion: magnitude}"), {}, stage.context); }), {"masks", "unstructured"}));
}
