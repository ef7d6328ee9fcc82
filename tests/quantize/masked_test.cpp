// Pruned weights stay exactly zero on every grid that has a zero, by every method; grids and bases that cannot are refused.
#include "quantize/masked.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

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

}  // namespace kompakt
