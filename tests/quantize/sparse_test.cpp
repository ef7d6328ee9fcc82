// Pruning and quantization in one sweep, and the polish that leaves zeros where they are.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "tests/catch_torch.h"

#include <cmath>

#include "core/json.h"
#include "core/random.h"
#include "quantize/masked.h"
#include "quantize/methods.h"
#include "quantize/stage.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;

at::Tensor sparse_random(std::int64_t rows, std::int64_t columns, const char* stream) {
  const CounterRandom random(31, stream);
  at::Tensor w = at::empty({rows, columns});
  for (std::int64_t i = 0; i < w.numel(); ++i) w.data_ptr<float>()[i] = static_cast<float>(random.normal(static_cast<std::uint64_t>(i)));
  return w;
}

// Inputs with strong correlations and columns of different energy.
at::Tensor sparse_hessian(std::int64_t columns) {
  const at::Tensor mix = at::matmul(sparse_random(columns, columns / 4, "a"), sparse_random(columns / 4, columns, "b")) / std::sqrt(columns / 4.0) + 0.5 * at::eye(columns);
  const at::Tensor x = at::matmul(sparse_random(4 * columns, columns, "tokens"), mix) * (0.5 * sparse_random(1, columns, "energy")).exp();
  return (at::matmul(x.t(), x) / static_cast<double>(4 * columns)).to(at::kDouble);
}

at::Tensor sparse_tensor(const Json& values, std::int64_t rows, std::int64_t columns) {
  std::vector<double> flat = values.get<std::vector<double>>();
  return at::from_blob(flat.data(), {rows, columns}, at::kDouble).clone();
}

std::int64_t alive(const at::Tensor& decoded, const at::Tensor& mask) { return decoded.masked_select(mask.logical_not()).ne(0).sum().item<std::int64_t>(); }

// Every m columns of a row keep n.
bool holds(const at::Tensor& mask, std::int64_t n, std::int64_t m) { return mask.reshape({-1, m}).sum(1).eq(n).all().item<bool>(); }

LayerOptions sparse_options(SparsityPattern pattern) {
  LayerOptions options;
  options.sparsity = pattern;
  return options;
}

}  // namespace

TEST_CASE("one sweep that prunes and rounds gives zeros, codes and scales of an independent implementation", "[quantize][sparse]") {
  const Json golden = read_json(testing::source_folder() / "tests" / "goldens" / "gptq.json");
  std::int64_t cases = 0;
  for (const Json& item : golden.at("sparse")) {
    ++cases;
    const std::int64_t rows = item.at("rows"), columns = item.at("columns");
    const GridSpec spec{find_grid(item.at("grid").get<std::string>()), item.at("group").get<std::int64_t>()};
    LayerOptions options = sparse_options({item.at("sparsity"), item.at("n"), item.at("m")});
    options.float64 = true, options.act_order = item.at("act_order"), options.damping = item.at("damping"), options.block = item.at("block");
    const LayerResult result = quantize_gptq({sparse_tensor(item.at("weight"), rows, columns).to(at::kFloat), sparse_tensor(item.at("hessian"), columns, columns), {}}, spec, options);
    CAPTURE(cases, item.at("grid").get<std::string>(), options.sparsity->text());
    CHECK(at::equal(result.mask.to(at::kDouble), sparse_tensor(item.at("kept"), rows, columns)));
    CHECK(at::equal(result.quantized.codes.to(at::kDouble), sparse_tensor(item.at("codes"), rows, columns)));
    CHECK(at::equal(result.quantized.scales.to(at::kDouble), sparse_tensor(item.at("scales"), rows, spec.scale_count(columns))));
    CHECK(result.sweep_loss == Approx(item.at("loss").get<double>()).epsilon(1e-6));
  }
  CHECK(cases == 6);
}

TEST_CASE("with an identity for second moments the smallest go and the rest is rounded to nearest", "[quantize][sparse]") {
  const at::Tensor w = sparse_random(70, 96, "identity");
  for (const char* grid : {"int4", "ternary", "int4_asym"}) {
    CAPTURE(grid);
    const GridSpec spec{find_grid(grid), 32};
    const LayerResult result = quantize_gptq({w, at::eye(96, at::kDouble), {}}, spec, sparse_options({0, 2, 4}));
    const at::Tensor sorted = std::get<0>(w.abs().reshape({-1, 4}).sort(1));
    CHECK(at::equal(result.mask, w.abs().reshape({-1, 4}).ge(sorted.slice(1, 2, 3)).reshape({70, 96})));
    const Quantized expected = encode(spec, w.masked_fill(result.mask.logical_not(), 0));
    CHECK(at::equal(result.quantized.codes, expected.codes));
    CHECK(at::equal(result.quantized.scales, expected.scales));
  }
}

TEST_CASE("one sweep beats pruning first, which beats knowing nothing of each other", "[quantize][sparse]") {
  const at::Tensor w = sparse_random(96, 192, "compare"), h = sparse_hessian(192);
  for (const auto& pattern : {SparsityPattern{0, 2, 4}, SparsityPattern{0.5}}) {
    for (const char* grid : {"int4", "int3"}) {
      const GridSpec spec{find_grid(grid), 32};
      const LayerResult joint = quantize_gptq({w, h, {}}, spec, sparse_options(pattern));
      if (pattern.grouped()) CHECK(holds(joint.mask, 2, 4));
      CHECK(std::abs(joint.mask.to(at::kDouble).mean().item<double>() - 0.5) < 0.01);
      CHECK(alive(decode(spec, joint.quantized), joint.mask) == 0);
      // Pruned first (eight bits hardly round), then GPTQ that keeps the zeros; and GPTQ, whose smallest weights are taken out.
      const LayerResult pruned = quantize_gptq({w, h, {}}, {find_grid("int8"), 32}, sparse_options(pattern));
      LayerInput after{decode({find_grid("int8"), 32}, pruned.quantized), h, {}};
      after.mask = pruned.mask;
      const Quantized apart = quantize_gptq(after, spec, LayerOptions()).quantized;
      Quantized blind = quantize_gptq({w, h, {}}, spec, LayerOptions()).quantized;
      keep_zeros(spec, joint.mask, blind);
      const double a = output_error(w, decode(spec, joint.quantized), h), b = output_error(w, decode(spec, apart), h), c = output_error(w, decode(spec, blind), h);
      CAPTURE(grid, pattern.text(), a, b, c);
      CHECK(a < b);
      CHECK(b < 0.7 * c);
    }
  }
}

TEST_CASE("polish leaves zeros where they are and never makes the result worse", "[quantize][sparse]") {
  const at::Tensor w = sparse_random(130, 256, "polish"), h = sparse_hessian(256);
  for (const char* grid : {"ternary", "int4", "int4_asym", "four_level", "q4_0", "q6_k", "ecq3"}) {
    CAPTURE(grid);
    const GridSpec spec{find_grid(grid), find_grid(grid)->default_group};
    LayerOptions options = sparse_options({0, 2, 4});
    const LayerResult swept = quantize_trifit({w, h, {}}, spec, options);
    options.polish_rounds = 3;
    const LayerResult polished = quantize_trifit({w, h, {}}, spec, options);
    CHECK(at::equal(polished.mask, swept.mask));
    CHECK(alive(decode(spec, polished.quantized), polished.mask) == 0);
    const double before = output_error(w, decode(spec, swept.quantized), h), after = output_error(w, decode(spec, polished.quantized), h);
    // A polish that may use pruned places, which are emptied afterwards.
    Quantized blind = swept.quantized;
    std::vector<double> objective;
    at::Tensor damped = h.to(at::kFloat).clone();
    damped.diagonal().add_(0.01 * damped.diagonal().mean().item<double>());
    blind = {blind.codes.clone(), blind.scales.clone(), blind.offsets.defined() ? blind.offsets.clone() : at::Tensor()};
    polish(w, damped, spec, 3, blind, objective);
    CHECK(alive(decode(spec, blind), swept.mask) > 0);
    keep_zeros(spec, swept.mask, blind);
    const double emptied = output_error(w, decode(spec, blind), h);
    CAPTURE(before, after, emptied);
    CHECK(after < before);
    CHECK(after < 0.8 * emptied);
    for (std::size_t i = 1; i < polished.objective.size(); ++i) CHECK(polished.objective[i] <= polished.objective[i - 1] * (1 + 1e-5));
  }
}

TEST_CASE("sparse sweeps: threads, empty and odd matrices, zeros of before", "[quantize][sparse]") {
  const at::Tensor w = sparse_random(150, 200, "edges"), h = sparse_hessian(200);
  const GridSpec spec{find_grid("int4"), 64};  // the last group has 8 columns
  for (const auto& pattern : {SparsityPattern{0, 1, 4}, SparsityPattern{0.3}}) {
    const int threads = at::get_num_threads();
    at::set_num_threads(1);
    const LayerResult one = quantize_gptq({w, h, {}}, spec, sparse_options(pattern));
    at::set_num_threads(2);
    const LayerResult two = quantize_gptq({w, h, {}}, spec, sparse_options(pattern));
    at::set_num_threads(threads);
    CHECK(at::equal(one.mask, two.mask));
    CHECK(at::equal(one.quantized.codes, two.quantized.codes));
    CHECK(alive(decode(spec, one.quantized), one.mask) == 0);
    if (pattern.grouped()) CHECK(holds(one.mask, 1, 4));
    // What an earlier stage has pruned counts and stays.
    LayerInput input{w, h, {}};
    input.mask = at::ones({150, 200}, at::kBool);
    input.mask.slice(1, 0, 1).zero_();
    const LayerResult more = quantize_gptq(input, spec, sparse_options(pattern));
    CHECK(!more.mask.slice(1, 0, 1).any().item<bool>());
    CHECK(std::abs(more.mask.to(at::kDouble).mean().item<double>() - one.mask.to(at::kDouble).mean().item<double>()) < 1e-3);
    const LayerResult none = quantize_gptq({at::zeros({3, 200}), h, {}}, spec, sparse_options(pattern));
    CHECK(!decode(spec, none.quantized).any().item<bool>());
    CHECK(quantize_gptq({at::zeros({0, 200}), h, {}}, spec, sparse_options(pattern)).mask.size(0) == 0);
    LayerInput kept{w, h, {}};
    kept.dense = true;
    const LayerResult dense = quantize_gptq(kept, spec, sparse_options(pattern));
    CHECK(!dense.mask.defined());
    CHECK(decode(spec, dense.quantized).ne(0).to(at::kDouble).mean().item<double>() > 0.85);
  }
  CHECK(contains_all(error_text([&] { quantize_gptq({w, h, {}}, spec, sparse_options({0, 2, 3})); }), {"2:3"}));
  CHECK(contains_all(error_text([&] { quantize_gptq({w, h, {}}, {find_grid("int4"), 20}, sparse_options({0, 4, 8})); }), {"groups of 20", "4:8"}));
  CHECK(contains_all(error_text([&] { quantize_gptq({w, h, {}}, {find_grid("int4"), 0}, sparse_options({0, 2, 5})); }), {"by 128 columns", "2:5"}));
}

namespace {

struct SparseStage {
  TaskData data = testing::tiny_text();
  StageContext context;
  Json details = Json::object();
  QuantizeOptions options;
  std::filesystem::path work = std::filesystem::temp_directory_path() / "kompakt-sparse";
  SparseStage() {
    std::filesystem::remove_all(work);
    std::filesystem::create_directories(work);
    context.title = "02-quantize", context.work = work, context.seed = 4, context.data = &data, context.details = &details;
    options.weights = "int4", options.method = "gptq", options.group = 8, options.embedding = "int4", options.embedding_group = 8;
    options.has_sparse = true, options.sparse.pattern = "2:4";
  }
  ~SparseStage() { std::filesystem::remove_all(work); }
};

}  // namespace

TEST_CASE("a stage that prunes while it quantizes: masks for later stages, the same after a kill", "[quantize][sparse]") {
  SparseStage stage;
  stage.options.sparse.skip = {"*.q_proj"};
  const auto model = testing::tiny_decoder(3);
  const QuantizedModel result = quantize(*model, stage.options, {}, stage.context);
  std::int64_t zeros = 0, weights = 0;
  for (const Linear* linear : model->linears()) {
    CAPTURE(linear->name);
    const auto mask = stage.context.masks.find(linear->name);
    if (linear->name.find("q_proj") != std::string::npos) {
      CHECK(mask == stage.context.masks.end());
      continue;
    }
    REQUIRE(mask != stage.context.masks.end());
    CHECK(holds(mask->second, 2, 4));
    CHECK(alive(linear->weight, mask->second) == 0);
    CHECK(at::equal(decode(result.plan.tensors.at(linear->name), result.tensors.at(linear->name)), linear->weight));
    zeros += mask->second.numel() / 2, weights += mask->second.numel();
  }
  CHECK(!stage.context.masks.count(model->tokens.name));  // the head, which is the embedding, stays dense
  CHECK(stage.details.at("sparsity").at("zeros") == zeros);
  CHECK(stage.details.at("sparsity").at("weights") == weights);
  CHECK(stage.details.at("sparsity").at("pattern") == "2:4");
  CHECK(stage.details.at("sparsity").at("dense").size() == 3);
  // The records of the first two blocks are there, that of the last is not.
  std::filesystem::remove_all(stage.work / "block-0002");
  StageContext again = stage.context;
  again.masks.clear();
  again.resume = true;
  const auto second = testing::tiny_decoder(3);
  quantize(*second, stage.options, {}, again);
  CHECK(testing::same_parameters(testing::copy_of(*model), testing::copy_of(*second)));
  REQUIRE(again.masks.size() == stage.context.masks.size());
  for (const auto& [name, mask] : stage.context.masks) CHECK(at::equal(again.masks.at(name), mask));
}

TEST_CASE("what a sparse quantization cannot be is refused with what can", "[quantize][sparse]") {
  SparseStage stage;
  const ModelConfig config = testing::tiny_decoder(3)->config();
  const auto refused = [&](const std::function<void(QuantizeOptions&)>& change) {
    QuantizeOptions options = stage.options;
    change(options);
    return error_text([&] { plan_quantization(config, options); });
  };
  CHECK_NOTHROW(plan_quantization(config, stage.options));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.method = "rtn"; }), {"quantize.sparse", "rtn", "gptq or trifit"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.tune = "scales"; }), {"quantize.sparse", "tune", "fill the zeros"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.has_block_tune = true; }), {"quantize.sparse", "block_tune"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.sparse.sparsity = 0.5; }), {"quantize.sparse", "two different things"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.sparse.pattern = ""; }), {"quantize.sparse", "a sparsity or a pattern"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.sparse.pattern = "4:4"; }), {"quantize.sparse.pattern", "N below M"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.sparse.pattern = "2:3"; }), {"2:3", "1:2"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.sparse.skip = {"*.k_porj"}; }), {"quantize.sparse.skip", "k_porj"}));
  CHECK(contains_all(refused([](QuantizeOptions& o) { o.weights = "q4_1", o.group = -1; }), {"q4_1", "no zero", "int4"}));
}

}  // namespace kompakt
