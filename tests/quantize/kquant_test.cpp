// Super-blocks of 256 (GGUF's k-quants and IQ4_XS): two levels of scales, bytes, edges, the fit beside ggml's own, the methods.
#include "quantize/kquant.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "core/files.h"
#include "core/random.h"
#include "formats/ggml_blocks.h"
#include "formats/tensor_data.h"
#include "quantize/budget.h"
#include "quantize/code_rule.h"
#include "quantize/grid_math.h"
#include "quantize/methods.h"
#include "quantize/stage.h"
#include "quantize/tensors.h"
#include "tests/catch_torch.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;

const char* const kquant_names[] = {"q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "iq4_xs"};

GridSpec kquant_spec(const char* name) {
  const Grid* grid = find_grid(name);
  REQUIRE(grid != nullptr);
  REQUIRE(grid->kquant != nullptr);
  return {grid, grid->default_group};
}

at::Tensor kquant_normal(std::int64_t rows, std::int64_t columns, const char* stream) {
  const CounterRandom random(29, stream);
  at::Tensor w = at::empty({rows, columns});
  for (std::int64_t i = 0; i < w.numel(); ++i) w.data_ptr<float>()[i] = static_cast<float>(random.normal(static_cast<std::uint64_t>(i)));
  return w;
}

// Weights as models have them: small, with longer tails than a normal distribution's.
at::Tensor kquant_weights(std::int64_t rows, std::int64_t columns, const char* stream) {
  const CounterRandom random(31, stream);
  at::Tensor w = kquant_normal(rows, columns, stream) * 0.03;
  for (std::int64_t i = 0; i < w.numel(); ++i) w.data_ptr<float>()[i] *= static_cast<float>(std::exp(0.35 * random.normal(static_cast<std::uint64_t>(i))));
  return w;
}

at::Tensor kquant_hessian(std::int64_t columns, const char* stream) {
  const at::Tensor x = at::matmul(kquant_normal(1200, columns, stream), kquant_normal(columns, columns, "mix") * (0.4 / std::sqrt(static_cast<double>(columns))) + 0.5 * at::eye(columns)) + 0.2 * kquant_normal(1200, 1, "common");
  return at::matmul(x.t(), x) / 1200;
}

at::Tensor kquant_decoded(const Grid& grid, const std::vector<std::byte>& bytes, std::int64_t rows, std::int64_t columns) {
  const GgmlType& type = *find_ggml_type(grid.ggml_type);
  at::Tensor out = at::empty({rows, columns});
  for (std::int64_t b = 0; b < rows * columns / 256; ++b) type.decode(bytes.data() + b * type.bytes, out.data_ptr<float>() + b * 256);
  return out;
}

bool kquant_same(const Quantized& a, const Quantized& b) {
  return at::equal(a.codes, b.codes) && at::equal(a.scales, b.scales) && a.offsets.defined() == b.offsets.defined() && (!a.offsets.defined() || at::equal(a.offsets, b.offsets));
}

double kquant_error(const at::Tensor& w, const at::Tensor& v, const at::Tensor& importance = {}) {
  const at::Tensor e = (w - v).to(at::kDouble).square();
  return (importance.defined() ? e * importance.to(at::kDouble) : e).sum().item<double>();
}

}  // namespace

TEST_CASE("the rows of super-blocks agree with ggml's table", "[quantize][kquant]") {
  for (const char* name : kquant_names) {
    CAPTURE(name);
    const Grid& grid = *kquant_spec(name).grid;
    const GgmlType* type = find_ggml_type(grid.ggml_type);
    REQUIRE(type != nullptr);
    CHECK(grid.kquant->type == grid.ggml_type);
    CHECK(grid.kquant->bytes == type->bytes);
    CHECK(type->block == 256);
    CHECK(grid.code_min == grid.kquant->code_min);
    CHECK(grid.code_max == grid.kquant->code_max);
    CHECK(grid.asymmetric == grid.kquant->minimum());
    CHECK(grid.default_group == grid.kquant->group);
    CHECK(kquant_spec(name).packed_bytes(3, 512) == 6 * type->bytes);
    CHECK(kquant_spec(name).bits_per_weight(256) == Approx(static_cast<double>(type->bytes) / 32));
  }
}

TEST_CASE("random super-blocks: packing is the identity, products give their factors back, ggml decodes the same", "[quantize][kquant]") {
  for (const char* name : kquant_names) {
    CAPTURE(name);
    const Grid& grid = *kquant_spec(name).grid;
    const KQuant& k = *grid.kquant;
    const GgmlType& type = *find_ggml_type(k.type);
    const CodeRule rule(grid);
    const CounterRandom random(3, name);
    std::uint64_t draw = 0;
    std::vector<std::byte> bytes(static_cast<std::size_t>(k.bytes)), again(bytes.size());
    std::int64_t differ = 0, lost = 0;
    for (int trial = 0; trial < 12000; ++trial) {
      KQuantBlock block{}, read{}, factors{};
      for (auto& code : block.codes) code = static_cast<std::int8_t>(k.code_min + static_cast<int>(random.below(draw++, static_cast<std::uint64_t>(k.code_max - k.code_min + 1))));
      // Subnormal halves, few different integers, whole ranges; a negative d where scales are signed.
      const int width = trial % 3 == 0 ? 3 : k.step_max - k.step_min + 1;
      for (int j = 0; j < k.groups(); ++j) {
        block.steps[j] = trial % 17 == 0 ? 0 : std::min(k.step_max, k.step_min + static_cast<int>(random.below(draw++, static_cast<std::uint64_t>(width))) + (trial % 3 == 0 ? (k.step_max - k.step_min) / 2 : 0));
        if (k.minimum()) block.minima[j] = static_cast<int>(random.below(draw++, static_cast<std::uint64_t>(k.minimum_max + 1)));
      }
      const double size = std::exp2(static_cast<double>(random.below(draw++, 30)) - 22);
      block.d = grid::round_to_half(static_cast<float>(size * (1 + random.uniform(draw++)) * (k.step_min < 0 && trial % 2 ? -1 : 1)));
      if (k.minimum()) block.e = grid::round_to_half(static_cast<float>(size * random.uniform(draw++)));
      k.pack(block, bytes.data());
      k.unpack(bytes.data(), read);
      k.pack(read, again.data());
      differ += bytes != again || std::memcmp(block.codes, read.codes, 256) != 0 || block.d != read.d || block.e != read.e || std::memcmp(block.steps, read.steps, sizeof block.steps) != 0 ||
                std::memcmp(block.minima, read.minima, sizeof block.minima) != 0;
      float scales[16], offsets[16] = {}, decoded[256];
      for (int j = 0; j < k.groups(); ++j) scales[j] = block.d * static_cast<float>(block.steps[j]), offsets[j] = -(block.e * static_cast<float>(block.minima[j]));
      bool found = kquant_factor(k, scales, offsets, factors);
      for (int j = 0; found && j < k.groups(); ++j)
        found = factors.d * static_cast<float>(factors.steps[j]) == scales[j] && -(factors.e * static_cast<float>(factors.minima[j])) == offsets[j] && factors.steps[j] >= k.step_min && factors.steps[j] <= k.step_max &&
                factors.minima[j] >= 0 && factors.minima[j] <= k.minimum_max;
      type.decode(bytes.data(), decoded);
      for (int i = 0; found && i < 256; ++i) found = decoded[i] == grid::decode_value(rule.value(static_cast<float>(block.codes[i])), scales[i / k.group], offsets[i / k.group]);
      lost += !found;
    }
    CHECK(differ == 0);
    CHECK(lost == 0);
  }
}

TEST_CASE("scales that are no products of a half and small integers are refused", "[quantize][kquant]") {
  KQuantBlock block{};
  float scales[16] = {0.5f, 0.25f, 1.0f, 0.75f}, offsets[16] = {};
  CHECK(kquant_factor(kquant_q4_k, scales, offsets, block));
  scales[1] = 0.2499f;
  CHECK(!kquant_factor(kquant_q4_k, scales, offsets, block));
  scales[1] = -0.25f;  // unsigned there, signed here
  CHECK(!kquant_factor(kquant_q4_k, scales, offsets, block));
  CHECK(kquant_factor(kquant_q6_k, scales, offsets, block));
  scales[1] = 0.25f, offsets[2] = 0.1f;  // an offset above zero
  CHECK(!kquant_factor(kquant_q4_k, scales, offsets, block));
  scales[0] = INFINITY;
  CHECK(!kquant_factor(kquant_q6_k, scales, offsets, block));
  Quantized q = encode(kquant_spec("q4_k"), kquant_normal(2, 256, "refused"));
  q.scales[1][3] = q.scales[1][3].item<float>() * 1.001f;
  CHECK_THROWS_AS(kquant_blocks(*kquant_spec("q4_k").grid, q), std::logic_error);
}

TEST_CASE("encoded matrices survive as ggml's bytes, bit for bit", "[quantize][kquant]") {
  for (const char* name : kquant_names) {
    CAPTURE(name);
    const GridSpec spec = kquant_spec(name);
    const at::Tensor w = kquant_weights(24, 768, "bytes");
    const Quantized q = encode(spec, w, kquant_normal(1, 768, "importance").exp().flatten());
    const std::vector<std::byte> bytes = kquant_blocks(*spec.grid, q);
    REQUIRE(static_cast<std::int64_t>(bytes.size()) == spec.packed_bytes(24, 768));
    CHECK(at::equal(kquant_decoded(*spec.grid, bytes, 24, 768), decode(spec, q)));
    const Quantized back = kquant_values(*spec.grid, bytes, 24, 768);
    CHECK(kquant_same(back, q));
    CHECK((kquant_blocks(*spec.grid, back) == bytes));
    CHECK(contains_all(error_text([&] { kquant_values(*spec.grid, std::span(bytes).first(bytes.size() - 1), 24, 768); }), {"bytes", "damaged"}));
    CHECK(contains_all(error_text([&] { encode(spec, at::zeros({2, 384})); }), {"384", "super-blocks of 256", "multiples of 256"}));
    std::vector<std::byte> bad = bytes;
    std::fill(bad.begin(), bad.end(), std::byte{0xff});  // halves that are not numbers
    CHECK(contains_all(error_text([&] { kquant_values(*spec.grid, bad, 24, 768); }), {"not finite"}));
  }
}

TEST_CASE("edges of super-blocks: zeros, a single outlier, constants, tiny and huge weights", "[quantize][kquant]") {
  for (const char* name : kquant_names) {
    const GridSpec spec = kquant_spec(name);
    const auto check = [&](const char* what, const at::Tensor& w, double relative) {
      CAPTURE(name, what);
      const Quantized q = encode(spec, w);
      const at::Tensor decoded = decode(spec, q);
      CHECK(at::isfinite(decoded).all().item<bool>());
      CHECK(at::equal(kquant_decoded(*spec.grid, kquant_blocks(*spec.grid, q), w.size(0), w.size(1)), decoded));
      CHECK(at::equal(round_to_grid(spec, w), decoded));
      CHECK(kquant_error(w, decoded) <= relative * kquant_error(w, at::zeros_like(w)));
    };
    check("zeros", at::zeros({2, 256}), 0);
    at::Tensor outlier = at::zeros({2, 256});
    outlier[0][77] = 3.0f, outlier[1][200] = -0.5f;
    check("one outlier", outlier, 2.5e-3);  // IQ4_XS has no zero: the outlier's neighbours become 1/127 of it
    at::Tensor spike = kquant_normal(2, 256, "spike") * 0.01;
    spike[0][3] = 40.0f, spike[1][255] = -40.0f;
    check("an outlier among small ones", spike, 2e-2);
    check("constant", at::full({1, 256}, 0.37f), 1e-3);
    check("negative constant", at::full({1, 256}, -0.37f), 1e-3);
    check("two values", at::where(kquant_normal(2, 256, "two").gt(0), at::full({2, 256}, 0.25f), at::full({2, 256}, -0.25f)), 2e-3);
    check("tiny", kquant_normal(2, 256, "tiny") * 1e-12, 1.0);
    check("small", kquant_normal(2, 256, "small") * 1e-5, 1.0);
    check("huge", kquant_normal(2, 256, "huge") * 2e4, 0.12);
    check("no rows", at::zeros({0, 256}), 1);
    at::Tensor bad = kquant_normal(3, 512, "bad");
    bad[2][300] = NAN;
    CHECK(contains_all(error_text([&] { encode(spec, bad); }), {"row 2", "not finite"}));
    bad[2][300] = -INFINITY;
    CHECK(contains_all(error_text([&] { round_to_grid(spec, bad); }), {"row 2", "not finite"}));
    bad[2][300] = 1e12f;
    CHECK(contains_all(error_text([&] { encode(spec, bad); }), {"row 2", "half precision"}));
  }
}

TEST_CASE("the fit of super-blocks loses less than ggml's own search, with importance and without", "[quantize][kquant]") {
  struct Data {
    const char* name;
    at::Tensor w, importance;
  };
  at::Tensor spiky = at::full({512}, 0.05f);
  for (int k = 0; k < 512; k += 7) spiky[k] = 20.0f;
  at::Tensor holes = kquant_normal(1, 512, "holes").square().flatten();
  holes.slice(0, 100, 140).zero_();
  const Data data[] = {{"normal", kquant_normal(40, 512, "a"), {}},
                       {"tails", kquant_weights(40, 512, "b"), {}},
                       {"normal, importance", kquant_normal(40, 512, "c"), kquant_normal(1, 512, "d").exp().flatten()},
                       {"tails, importance", kquant_weights(40, 512, "e"), kquant_normal(1, 512, "f").exp().flatten()},
                       {"tails, spikes of importance", kquant_weights(40, 512, "g"), spiky},
                       {"shifted, holes in the importance", kquant_weights(40, 512, "h") + 0.02, holes}};
  for (const char* name : kquant_names) {
    const GridSpec spec = kquant_spec(name);
    const GgmlType& type = *find_ggml_type(spec.grid->ggml_type);
    for (const Data& d : data) {
      CAPTURE(name, d.name);
      std::vector<std::byte> bytes(static_cast<std::size_t>(d.w.numel() / 256 * type.bytes));
      for (std::int64_t b = 0; b < d.w.numel() / 256; ++b) {
        const float* w = d.w.const_data_ptr<float>() + b * 256;
        if (d.importance.defined()) type.encode_weighted(w, d.importance.const_data_ptr<float>() + b % 2 * 256, bytes.data() + b * type.bytes);
        else type.encode(w, bytes.data() + b * type.bytes);
      }
      const double theirs = kquant_error(d.w, kquant_decoded(*spec.grid, bytes, d.w.size(0), d.w.size(1)), d.importance), ours = kquant_error(d.w, decode(spec, encode(spec, d.w, d.importance)), d.importance);
      std::printf("%-7s %-34s error over ggml's %.3f\n", name, d.name, ours / theirs);
      CHECK(ours < theirs);
    }
  }
}

TEST_CASE("equal importance counts like none, and its unit not at all", "[quantize][kquant]") {
  const at::Tensor w = kquant_weights(6, 512, "unit"), d = kquant_normal(1, 512, "share").exp().flatten();
  for (const char* name : kquant_names) {
    CAPTURE(name);
    const GridSpec spec = kquant_spec(name);
    CHECK(kquant_same(encode(spec, w, at::full({512}, 0.3f)), encode(spec, w)));
    CHECK(kquant_same(encode(spec, w, d * 1024), encode(spec, w, d)));
    CHECK(kquant_error(w, decode(spec, encode(spec, w, d)), d) < kquant_error(w, decode(spec, encode(spec, w)), d));
    // Rows do not see each other.
    CHECK(kquant_same(encode(spec, w.slice(0, 2, 3).contiguous(), d), rows_of(encode(spec, w, d), 2, 3)));
    const int before = at::get_num_threads();
    at::set_num_threads(2);
    CHECK(kquant_same(encode(spec, w, d), encode(spec, w.clone(), d)));
    at::set_num_threads(before);
  }
}

TEST_CASE("on super-blocks GPTQ beats rounding in the metric of the Hessian, and the polish beats GPTQ", "[quantize][kquant]") {
  const at::Tensor w = kquant_weights(40, 512, "layer"), h = kquant_hessian(512, "inputs");
  for (const char* name : kquant_names) {
    CAPTURE(name);
    const GridSpec spec = kquant_spec(name);
    LayerOptions options;
    const auto error = [&](const LayerResult& r) { return output_error(w, decode(spec, r.quantized), h); };
    const double rounded = error(quantize_rtn({w, h, {}}, spec, options));
    const LayerResult swept = quantize_gptq({w, h, {}}, spec, options);
    options.act_order = false;
    const double in_order = error(quantize_gptq({w, h, {}}, spec, options));
    options.act_order = true, options.polish_rounds = 4;
    const LayerResult polished = quantize_trifit({w, h, {}}, spec, options);
    std::printf("%-7s output error: rtn %.6f  imatrix %.6f  gptq %.6f (in order %.6f)  polished %.6f\n", name, rounded, error(quantize_imatrix({w, h, {}}, spec, options)), error(swept), in_order, error(polished));
    CHECK(error(swept) < 0.8 * rounded);
    CHECK(in_order < 0.9 * rounded);
    CHECK(error(polished) < error(swept));
    REQUIRE(polished.objective.size() == 5);
    for (std::size_t i = 1; i < polished.objective.size(); ++i) CHECK(polished.objective[i] <= polished.objective[i - 1] * (1 + 1e-5));
    // Everything that a method leaves can be stored.
    for (const LayerResult& r : {swept, polished}) CHECK(at::equal(kquant_decoded(*spec.grid, kquant_blocks(*spec.grid, r.quantized), 40, 512), decode(spec, r.quantized)));
    CHECK(polished.quantized.codes.min().item<int>() >= spec.grid->code_min);
    CHECK(polished.quantized.codes.max().item<int>() <= spec.grid->code_max);
    const int before = at::get_num_threads();
    at::set_num_threads(2);
    CHECK(kquant_same(quantize_trifit({w, h, {}}, spec, options).quantized, polished.quantized));
    at::set_num_threads(before);
  }
}

TEST_CASE("with an identity Hessian GPTQ on super-blocks is round to nearest, bit for bit", "[quantize][kquant]") {
  const at::Tensor w = kquant_weights(9, 512, "identity");
  for (const char* name : kquant_names)
    for (const bool act_order : {true, false}) {
      CAPTURE(name, act_order);
      LayerOptions options;
      options.act_order = act_order;
      CHECK(kquant_same(quantize_gptq({w, at::eye(512), {}}, kquant_spec(name), options).quantized, encode(kquant_spec(name), w)));
    }
}

TEST_CASE("importance lowers the error of the outputs where inputs differ in size", "[quantize][kquant]") {
  const at::Tensor w = kquant_weights(40, 512, "imatrix"), energy = (2 * kquant_normal(1, 512, "energy")).exp().flatten(), h = at::diag(energy);
  for (const char* name : {"q4_k", "q2_k", "q3_k", "iq4_xs", "q4_0", "ternary"}) {
    CAPTURE(name);
    const GridSpec spec{find_grid(name), find_grid(name)->default_group};
    const LayerResult plain = quantize_rtn({w, h, {}}, spec, {}), weighted = quantize_imatrix({w, h, {}}, spec, {});
    CHECK(output_error(w, decode(spec, weighted.quantized), h) < 0.95 * output_error(w, decode(spec, plain.quantized), h));
  }
}

namespace {

std::unique_ptr<Transformer> kquant_model() {
  Json json = {{"model_type", "llama"}, {"hidden_size", 256}, {"num_hidden_layers", 1}, {"num_attention_heads", 4}, {"num_key_value_heads", 2}, {"intermediate_size", 512},
               {"vocab_size", 50}, {"max_position_embeddings", 64}, {"hidden_act", "silu"}, {"rms_norm_eps", 1e-5}, {"tie_word_embeddings", true}};
  auto model = std::make_unique<Transformer>(config_from_json(json, "tiny"), 7);
  testing::stir(*model, 7);
  return model;
}

}  // namespace

TEST_CASE("a model on super-blocks: every method, the stage's file, and what cannot be is said", "[quantize][kquant]") {
  const TaskData data = testing::tiny_text(2);
  StageContext context;
  context.data = &data, context.title = "quantize";
  for (const char* method : {"rtn", "imatrix", "gptq", "trifit"}) {
    CAPTURE(method);
    auto model = kquant_model();
    QuantizeOptions options;
    options.weights = "q3_k", options.embedding = "q6_k", options.method = method;
    const QuantizedModel result = quantize(*model, options, {}, context);
    CHECK(result.tensors.size() == 8);
    const TemporaryFolder folder;
    save_quantized(result, folder.path());
    const QuantizedModel loaded = load_quantized(folder.path());
    for (const auto& [name, q] : result.tensors) {
      CHECK(kquant_same(loaded.tensors.at(name), q));
      CHECK(at::equal(*find_quantizable(*model, name).weight, decode(result.plan.tensors.at(name), q)));
    }
  }
  auto model = kquant_model();
  QuantizeOptions options;
  options.weights = "q4_k", options.embedding = "q4_k", options.method = "hqq";
  CHECK(contains_all(error_text([&] { quantize(*model, options, {}, context); }), {"hqq", "q4_k", "ties its minima", "q4_1"}));
  options.method = "gptq", options.tune = "scales";
  CHECK(contains_all(error_text([&] { quantize(*model, options, {}, context); }), {"q4_k", "quantize.tune", "super-block"}));
  options.tune = "none", options.has_block_tune = true;
  CHECK(contains_all(error_text([&] { quantize(*model, options, {}, context); }), {"q4_k", "quantize.block_tune", "super-block"}));
  options.has_block_tune = false, options.group = 64;
  CHECK(contains_all(error_text([&] { quantize(*model, options, {}, context); }), {"groups of 32"}));
  auto narrow = testing::tiny_decoder(3, true);
  options.group = -1;
  CHECK(contains_all(error_text([&] { quantize(*narrow, options, {}, context); }), {"rows of 24", "super-blocks of 256", "allow_fallback"}));
}

TEST_CASE("a budget takes super-blocks where rows allow them and lists why not elsewhere", "[quantize][kquant]") {
  auto model = kquant_model();
  BudgetTarget target;
  target.format = "test", target.formats = {"q2_k", "q4_k", "q8_0"};
  target.holds = [](const GridSpec&, std::int64_t, std::string&) { return true; };
  target.tensor_bytes = [](const GridSpec& spec, std::int64_t rows, std::int64_t columns) { return spec.packed_bytes(rows, columns); };
  target.file_bytes = [&](const std::map<std::string, GridSpec>& plan) {
    std::int64_t bytes = 0;
    for (const auto& [name, spec] : plan) bytes += spec.packed_bytes(find_quantizable(*model, name).weight->size(0), find_quantizable(*model, name).weight->size(1));
    return bytes;
  };
  QuantizeOptions options;
  options.has_budget = true, options.budget.bytes = 300000, options.method = "imatrix", options.budget.tokens = 64;
  CHECK(budget_frame(model->config(), options, target).left_out.empty());
  const TaskData data = testing::tiny_text(2);
  Json details = Json::object();
  StageContext context;
  context.data = &data, context.title = "quantize", context.details = &details, context.seed = 5;
  const QuantizedModel result = quantize_within_budget(*model, options, {}, context, target);
  std::int64_t kquants = 0;
  for (const auto& [name, spec] : result.plan.tensors) kquants += spec.grid->kquant != nullptr;
  CHECK(kquants > 0);
  CHECK(details.at("budget").at("predicted_bytes").get<std::int64_t>() <= 300000);

  auto narrow = testing::tiny_decoder(3, true);
  target.formats = {"q4_k", "int8"};
  target.file_bytes = [](const std::map<std::string, GridSpec>&) { return std::int64_t{1000}; };
  const BudgetFrame frame = budget_frame(narrow->config(), options, target);
  REQUIRE(frame.left_out.size() == 1);
  CHECK(contains_all(frame.left_out[0], {"q4_k", "rows of 24", "super-blocks of 256", "more"}));
  CHECK(contains_all(frame.note(), {"not held everywhere", "q4_k"}));
}

}  // namespace kompakt
