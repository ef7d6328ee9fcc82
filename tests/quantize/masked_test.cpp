// Pruned weights stay exactly zero on every grid that has a zero, by every method; grids and bases that cannot are refused.
#include "quantize/masked.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <functional>

#include "tests/catch_torch.h"

#include "quantize/methods.h"
#include "tests/support.h"
#include "tests/tiny_models.h"
#include "train/mask.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;

struct MaskedStage {
  TaskData data = testing::tiny_text();
  StageContext context;
  std::unique_ptr<Transformer> model = testing::tiny_decoder(3);
  MaskedStage() {
    context.title = "03-quantize";
    context.work = std::filesystem::temp_directory_path() / "kompakt-masked";
    std::filesystem::remove_all(context.work);
    std::filesystem::create_directories(context.work);
    context.seed = 4;
    context.data = &data;
    for (Linear* linear : model->linears()) {  // 2:4 by place
      at::Tensor mask = at::zeros(linear->weight.sizes(), at::kBool);
      for (std::int64_t r = 0; r < mask.size(0); ++r)
        for (std::int64_t k = 0; k < mask.size(1); ++k) mask[r][k] = (k + r) % 4 < 2;
      context.masks[linear->name] = mask;
    }
    apply_masks(*model, context.masks);
  }
  ~MaskedStage() { std::filesystem::remove_all(context.work); }
  QuantizeOptions options(const char* weights, const char* method) const {
    QuantizeOptions options;
    options.weights = weights, options.method = method, options.group = 8, options.embedding = "none";
    return options;
  }
  std::int64_t revived() const {
    std::int64_t count = 0;
    for (const auto& [name, mask] : context.masks) count += model->find_linear(name)->weight.masked_select(mask.logical_not()).ne(0).sum().item<std::int64_t>();
    return count;
  }
};

}  // namespace

TEST_CASE("pruned weights stay zero whatever quantizes them", "[quantize][masked]") {
  for (const QuantizationMethod& method : quantization_methods()) {
    if (method.needs_train) continue;
    for (const char* grid : {"ternary", "int4", "int4_asym", "int3_signed", "four_level"}) {
      if (method.needs_asymmetric && !find_grid(grid)->asymmetric) continue;
      CAPTURE(std::string(method.name), grid);
      MaskedStage stage;
      const QuantizedModel result = quantize(*stage.model, stage.options(grid, std::string(method.name).c_str()), {}, stage.context);
      CHECK(stage.revived() == 0);
      for (const auto& [name, mask] : stage.context.masks) {
        const at::Tensor decoded = decode(result.plan.tensors.at(name), result.tensors.at(name));
        CHECK(at::equal(decoded, stage.model->find_linear(name)->weight));
        CHECK(decoded.masked_select(mask).ne(0).sum().item<std::int64_t>() > 0);
      }
    }
  }
}

TEST_CASE("quantization-aware training keeps masks", "[quantize][masked]") {
  MaskedStage stage;
  const auto before = testing::copy_of(*stage.model);
  QuantizeOptions options = stage.options("ternary", "qad");
  options.train.steps = 4, options.train.batch_size = 2, options.train.sequence_length = 16, options.train.learning_rate = 1e-2, options.train.precision = "float32";
  quantize(*stage.model, options, {std::shared_ptr<Objective>(label_cross_entropy())}, stage.context);
  CHECK(stage.revived() == 0);
  CHECK(!testing::same_parameters(before, testing::copy_of(*stage.model)));
}

TEST_CASE("GPTQ that knows the mask beats zeroing afterwards", "[quantize][masked]") {
  MaskedStage stage;
  LayerOptions options;
  double with = 0, without = 0;
  for (Linear* linear : stage.model->linears()) {
    if (linear->in_features() != 24) continue;
    const at::Tensor x = at::matmul(stage.model->tokens.weight.detach(), linear->weight.detach().slice(0, 0, 12).t().matmul(linear->weight.detach().slice(0, 0, 12)));  // of rank 12: strongly correlated
    const at::Tensor h = (at::matmul(x.t(), x) / 50).to(at::kFloat), w = linear->weight.detach(), mask = stage.context.masks.at(linear->name);
    for (const char* grid : {"int4", "int3", "ternary"}) {
      const GridSpec spec{find_grid(grid), 8};
      LayerInput input{w, h, {}};
      Quantized blind = quantize_gptq(input, spec, options).quantized;
      keep_zeros(spec, mask, blind);
      input.mask = mask;
      const at::Tensor knowing = decode(spec, quantize_gptq(input, spec, options).quantized);
      CHECK(knowing.masked_select(mask.logical_not()).ne(0).sum().item<std::int64_t>() == 0);
      with += output_error(w, knowing, h), without += output_error(w, decode(spec, blind), h);
    }
  }
  CAPTURE(with, without);
  CHECK(with < 0.9 * without);
}

TEST_CASE("grids without a zero and bases that mix are refused", "[quantize][masked]") {
  MaskedStage stage;
  QuantizeOptions options = stage.options("int4", "rtn");
  options.basis.basis = "hadamard";
  CHECK(contains_all(error_text([&] { quantize(*stage.model, options, {}, stage.context); }), {"mixes pruned weights", "hadamard", "fold"}));
  MaskedStage other;
  QuantizationPlan plan;
  plan.tensors["model.layers.0.mlp.up_proj"] = {find_grid("q4_1"), 32};
  CHECK(contains_all(error_text([&] { check_masks(plan, other.context); }), {"q4_1", "no zero", "ternary", "int4_asym"}));
  plan.tensors["model.layers.0.mlp.up_proj"] = {find_grid("iq4_nl"), 32};
  CHECK(contains_all(error_text([&] { check_masks(plan, other.context); }), {"iq4_nl"}));
  plan.tensors["model.layers.0.mlp.up_proj"] = {find_grid("q4_k"), 32};
  CHECK(contains_all(error_text([&] { check_masks(plan, other.context); }), {"q4_k", "no zero", "q6_k"}));
  for (const char* grid : {"ternary", "int4", "int4_asym", "int2_asym", "q4_0", "q8_0", "mxfp4", "nvfp4", "fp8_e4m3", "q2_0", "tq1_0", "q6_k", "q3_k"}) {
    plan.tensors["model.layers.0.mlp.up_proj"] = {find_grid(grid), find_grid(grid)->default_group};
    CAPTURE(grid);
    CHECK_NOTHROW(check_masks(plan, other.context));
  }
}

namespace {

struct JointStage : MaskedStage {
  Json details = Json::object();
  JointStage() { model = testing::tiny_decoder(3), context.masks.clear(), context.details = &details; }
  QuantizeOptions joint(const char* grid, const char* pattern) const {
    QuantizeOptions out = options(grid, "gptq");
    out.has_sparse = true, out.sparse.pattern = pattern;
    if (!*pattern) out.sparse.sparsity = 0.5;
    return out;
  }
};

}  // namespace

TEST_CASE("a stage that prunes in its sweep: masks for later stages, zeros on the grid, its part of the report", "[quantize][masked][joint]") {
  for (const char* pattern : {"2:4", ""})
    for (const char* grid : {"int4", "ternary", "int4_asym", "q3_k"}) {
      CAPTURE(pattern, grid);
      JointStage stage;
      QuantizeOptions options = stage.joint(grid, pattern);
      if (std::string_view(grid) == "q3_k") options.group = -1, options.allow_fallback = true, options.fallback = "int8";
      options.sparse.skip = {"*layers.1.mlp.down_proj"};
      const QuantizedModel result = quantize(*stage.model, options, {}, stage.context);
      CHECK(stage.context.masks.size() == stage.model->linears().size() - 1);
      CHECK(stage.context.masks.count("model.layers.1.mlp.down_proj") == 0);
      CHECK(stage.revived() == 0);
      for (const auto& [name, mask] : stage.context.masks) {
        if (*pattern) CHECK(mask.reshape({-1, 4}).sum(1).eq(2).all().item<bool>());
        else CHECK(mask.sum().item<std::int64_t>() == mask.numel() / 2);
        CHECK(at::equal(decode(result.plan.tensors.at(name), result.tensors.at(name)), stage.model->find_linear(name)->weight));
      }
      const Json& sparsity = stage.details.at("sparsity");
      CHECK(sparsity.at("layers").size() == stage.context.masks.size());
      CHECK(sparsity.at("dense") == Json({"model.layers.1.mlp.down_proj"}));
      CHECK(sparsity.at("weights").get<std::int64_t>() == 2 * sparsity.at("zeros").get<std::int64_t>());
      CHECK(sparsity.at("layers").at(0).at("sparsity") == 0.5);
      CHECK(sparsity.at("layers").at(0).at("output_error").get<double>() > 0);
    }
}

TEST_CASE("masks of an earlier stage count in the sweep", "[quantize][masked][joint]") {
  MaskedStage stage;  // 2:4 already
  const WeightMasks before = stage.context.masks;
  QuantizeOptions options = stage.options("int4", "gptq");
  options.has_sparse = true, options.sparse.pattern = "2:4";
  quantize(*stage.model, options, {}, stage.context);
  for (const auto& [name, mask] : before) CHECK(at::equal(mask, stage.context.masks.at(name)));
  options.sparse.pattern = "1:4";
  quantize(*stage.model, options, {}, stage.context);
  for (const auto& [name, mask] : before) {
    CHECK(stage.context.masks.at(name).reshape({-1, 4}).sum(1).eq(1).all().item<bool>());
    CHECK(!stage.context.masks.at(name).logical_and(mask.logical_not()).any().item<bool>());
  }
  CHECK(stage.revived() == 0);
}

TEST_CASE("a resumed sweep has the masks of its finished blocks", "[quantize][masked][joint]") {
  JointStage again, whole;  // one work folder
  quantize(*whole.model, whole.joint("int4", "2:4"), {}, whole.context);
  std::filesystem::remove_all(whole.context.work / "block-0002");  // as if killed in the last block
  REQUIRE(std::filesystem::exists(whole.context.work / "block-0001"));
  again.context.resume = true;
  quantize(*again.model, again.joint("int4", "2:4"), {}, again.context);
  CHECK(testing::same_parameters(testing::copy_of(*again.model), testing::copy_of(*whole.model)));
  REQUIRE(again.context.masks.size() == whole.context.masks.size());
  for (const auto& [name, mask] : whole.context.masks) CHECK(at::equal(mask, again.context.masks.at(name)));
  CHECK(again.details.at("sparsity").at("zeros") == whole.details.at("sparsity").at("zeros"));
}

TEST_CASE("pruning in the sweep: what cannot be is refused before compute", "[quantize][masked][joint]") {
  JointStage stage;
  const auto refused = [&](const std::function<void(QuantizeOptions&)>& change) {
    QuantizeOptions options = stage.joint("int4", "2:4");
    change(options);
    return error_text([&] { plan_quantization(stage.model->config(), options); });
  };
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.method = "rtn"; }), {"quantize.sparse", "method: rtn", "method: gptq", "prune: {unstructured"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.sparse.sparsity = 0.5; }), {"two different things"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.sparse.pattern = ""; }), {"needs a sparsity or a pattern"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.sparse.pattern = "4:4"; }), {"4:4", "N below M"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.sparse.pattern = "2:5"; }), {"does not divide into groups of 5", "nearest: 2:4"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.sparse.pattern = "3:6", o.group = 4, o.keep_float = {"*o_proj", "*down_proj"}; }), {"scales over 4 weights", "groups of 6"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.sparse.skip = {"*nothing"}; }), {"*nothing", "names such as"}));
  QuantizationPlan plan;
  plan.tensors["model.layers.0.mlp.up_proj"] = {find_grid("q4_1"), 32};
  Problems problems;
  check_joint_plan(stage.joint("q4_1", "2:4"), plan, {{"model.layers.0.mlp.up_proj", 64}}, problems);
  CHECK(contains_all(error_text([&] { problems.throw_if_any("refused"); }), {"q4_1", "no zero", "ternary", "int4_asym"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.sparse.skip = {"*"}; }), {"no matrix is left"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.tune = "scales"; }), {"tuning would fill"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.has_budget = true, o.budget.bytes = 1; }), {"budget"}));
}

}  // namespace kompakt
