// Changes of basis: Hadamard matrices against SciPy and Paley's definitions, the same function before and after in double on
// every family, what is refused, and bases made bad on purpose that the right change repairs.
#include "quantize/basis.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"
#include <cmath>

#include "core/files.h"
#include "core/random.h"
#include "core/text.h"
#include "model/families.h"
#include "quantize/hadamard.h"
#include "model/invariance.h"
#include "quantize/stage.h"
#include "tests/support.h"
#include "tests/tiny_models.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;

// Every parameter random, norms around their neutral value, biases everywhere, in double.
std::unique_ptr<Transformer> basis_model(const std::string& family, bool tied, std::uint64_t seed = 5) {
  const Family& row = *find_family(family);
  Json json = {{"model_type", std::string(row.model_types.front())}, {"vocab_size", 67}, {"hidden_size", 24}, {"intermediate_size", 44}, {"num_hidden_layers", 4}, {"num_attention_heads", 4},
               {"max_position_embeddings", 64}, {"tie_word_embeddings", tied}};
  if (!row.encoder) json["num_key_value_heads"] = 2, json["head_dim"] = 10;  // no Hadamard matrix has order 10
  if (family == "mistral" || family == "gemma3") json["sliding_window"] = 5;
  ModelConfig config = config_from_json(json, "tiny");
  config.qkv_bias = config.out_bias = config.mlp_bias = true;
  auto model = std::make_unique<Transformer>(config, seed);
  for (const NamedParameter& parameter : model->parameters()) {
    const CounterRandom random(seed, parameter.name);
    at::Tensor values = at::empty(parameter.value->sizes(), at::kDouble);
    const bool norm = values.dim() == 1 && !ends_with(parameter.name, ".bias") && !row.norm_plus_one;
    for (std::int64_t i = 0; i < values.numel(); ++i) values.data_ptr<double>()[i] = (norm ? 1 : 0) + 0.3 * random.normal(static_cast<std::uint64_t>(i));
    *parameter.value = values;
  }
  return model;
}

at::Tensor basis_output(const Transformer& model) {
  const at::NoGradGuard no_grad;
  const CounterRandom random(1, "ids");
  ModelInput input;
  input.ids = at::empty({3, 17}, at::kLong);
  for (std::int64_t i = 0; i < input.ids.numel(); ++i) input.ids.data_ptr<std::int64_t>()[i] = static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(i), static_cast<std::uint64_t>(model.config().vocab)));
  return model.config().family->encoder ? model.hidden(input) : model.forward(input);
}

double basis_difference(const at::Tensor& a, const at::Tensor& b) { return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>() / b.abs().max().item<double>(); }

void basis_rotate_values(Transformer& model) {
  rotate_values(model, [&](std::int64_t layer, std::int64_t head) { return random_rotation(model.config().head_dim, 3, str(layer, ".", head)).matrix; });
}

}  // namespace

TEST_CASE("Hadamard matrices equal SciPy's and Paley's definitions", "[quantize][basis][golden]") {
  const Json golden = read_json(testing::source_folder() / "tests" / "goldens" / "hadamard.json");
  for (const auto& [order, rows] : golden.items()) {
    const std::int64_t n = std::stoll(order);
    INFO("order " << n << "; python3 scripts/make_goldens_hadamard.py");
    const at::Tensor h = hadamard_matrix(n);
    REQUIRE(h.sizes() == at::IntArrayRef({n, n}));
    std::int64_t wrong = 0;
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t j = 0; j < n; ++j) wrong += h.data_ptr<double>()[i * n + j] != (rows[static_cast<std::size_t>(i)].get<std::string>()[static_cast<std::size_t>(j)] == '+' ? 1 : -1);
    CHECK(wrong == 0);
  }
}

TEST_CASE("the widths of small models have a Hadamard matrix", "[quantize][basis]") {
  for (const std::int64_t n : {4, 24, 60, 64, 80, 384, 576, 640, 896, 960, 1152}) {
    INFO(n);
    const at::Tensor h = hadamard_matrix(n);
    REQUIRE(h.defined());
    CHECK(h.abs().eq(1).all().item<bool>());
    CHECK(at::equal(at::matmul(h, h.t()), static_cast<double>(n) * at::eye(n, at::kDouble)));
  }
  for (const std::int64_t n : {3, 6, 10, 18, 92}) CHECK(!hadamard_matrix(n).defined());
  CHECK(random_rotation(576, 1, "a").construction == "2^4 x Paley II 36");
  CHECK(random_rotation(64, 1, "a").construction == "Sylvester 64");
  CHECK(random_rotation(12, 1, "a").construction == "Paley I 12");
  CHECK(random_rotation(10, 1, "a").construction == "random orthogonal");
}

TEST_CASE("rotations are orthogonal and a function of seed and stream", "[quantize][basis]") {
  for (const std::int64_t n : {1, 2, 7, 10, 12, 36, 50, 64}) {
    INFO(n);
    const at::Tensor r = random_rotation(n, 7, "x").matrix;
    CHECK((at::matmul(r, r.t()) - at::eye(n, at::kDouble)).abs().max().item<double>() < 1e-13);
    CHECK(at::equal(r, random_rotation(n, 7, "x").matrix));
    if (n < 7) continue;
    CHECK(!at::equal(r, random_rotation(n, 8, "x").matrix));
    CHECK(!at::equal(r, random_rotation(n, 7, "y").matrix));
  }
  // Signs before the mixing: an outlier channel is spread evenly, and every row has the same magnitudes.
  CHECK((random_rotation(36, 7, "x").matrix.abs() - 1.0 / 6).abs().max().item<double>() < 1e-15);
}

TEST_CASE("folding by hand", "[quantize][basis]") {
  auto model = testing::tiny_decoder(2);
  Block& block = model->blocks[1];
  block.attention_norm.weight = at::ones({24});
  block.attention_norm.weight.index_put_({at::tensor({3}, at::kLong)}, at::tensor({2.5f}));
  const at::Tensor query = block.attention.query.weight.clone(), output = block.attention.output.weight.clone();
  const auto gains = fold_norms(*model);
  CHECK(gains.size() == 7);  // two norms in each of three blocks, and the one before the untied head
  CHECK(at::equal(block.attention.query.weight.select(1, 3), query.select(1, 3) * 2.5));
  CHECK(at::equal(block.attention.query.weight.select(1, 4), query.select(1, 4)));
  CHECK(at::equal(block.attention.output.weight, output));
  CHECK(block.attention_norm.weight.eq(1).all().item<bool>());
  CHECK(model->final_norm.weight.eq(1).all().item<bool>());
  CHECK(gains.at(block.attention_norm.name).select(0, 3).item<double>() == 2.5);
}

TEST_CASE("every family computes the same after every legal change", "[quantize][basis]") {
  for (const Family& family : families()) {
    for (const bool tied : {true, false}) {
      if (family.encoder && tied) continue;
      INFO(family.name << (tied ? " tied" : ""));
      auto model = basis_model(std::string(family.name), tied);
      const at::Tensor expected = basis_output(*model);
      REQUIRE(expected.scalar_type() == at::kDouble);
      basis_rotate_values(*model);  // legal everywhere
      CHECK(basis_difference(basis_output(*model), expected) < 1e-9);
      if (!fold_obstacle(model->config()).empty()) {
        CHECK(family.encoder);
        CHECK_THROWS_AS(fold_norms(*model), std::logic_error);
        CHECK_THROWS_AS(rotate_residual(*model, random_rotation(24, 1, "r").matrix), std::logic_error);
        continue;
      }
      const at::Tensor final_norm = model->final_norm.weight.clone();
      fold_norms(*model);
      CHECK(basis_difference(basis_output(*model), expected) < 1e-9);
      CHECK(model->blocks[2].attention_norm.weight.eq(family.norm_plus_one ? 0 : 1).all().item<bool>());
      CHECK(at::equal(model->final_norm.weight, final_norm) == tied);
      if (family.qk_norm) CHECK(!model->blocks[2].attention.query_norm.weight.eq(family.norm_plus_one ? 0 : 1).all().item<bool>());
      if (family.sandwich_norms) {
        CHECK(contains_all(residual_rotation_obstacle(*model), {"norms", "stream"}));
        CHECK_THROWS_AS(rotate_residual(*model, random_rotation(24, 1, "r").matrix), std::logic_error);
        continue;
      }
      if (tied) {
        CHECK(contains_all(residual_rotation_obstacle(*model), {"embedding", "untie"}));
        CHECK_THROWS_AS(rotate_residual(*model, random_rotation(24, 1, "r").matrix), std::logic_error);
        untie_head(*model);
        fold_norms(*model);
        CHECK(model->parameters().back().name == "lm_head.weight");
      }
      REQUIRE(residual_rotation_obstacle(*model).empty());
      const at::Tensor before = model->tokens.weight;
      rotate_residual(*model, random_rotation(24, 1, "r").matrix);
      CHECK(!at::equal(model->tokens.weight, before));
      CHECK(basis_difference(basis_output(*model), expected) < 1e-9);
    }
  }
}

TEST_CASE("a tied head with one gain for all channels takes any rotation", "[quantize][basis]") {
  auto model = basis_model("llama", true);
  model->final_norm.weight = at::full({24}, 1.7, at::kDouble);
  const at::Tensor expected = basis_output(*model);
  CHECK_THROWS_AS(rotate_residual(*model, random_rotation(24, 1, "r").matrix), std::logic_error);  // the other norms are not folded
  model = basis_model("llama", true);
  model->final_norm.weight = at::full({24}, 1.7, at::kDouble);
  fold_norms(*model);
  rotate_residual(*model, random_rotation(24, 1, "r").matrix);
  CHECK(basis_difference(basis_output(*model), expected) < 1e-9);
  CHECK(!model->lm_head.weight.defined());
}

namespace {

QuantizeOptions basis_options(const char* basis, const char* weights = "int4", const char* method = "rtn") {
  QuantizeOptions options;
  options.weights = weights, options.method = method, options.group = 8, options.embedding = "none";
  options.basis.basis = basis;
  return options;
}

}  // namespace

TEST_CASE("the stage changes the basis first and says what it did", "[quantize][basis][stage]") {
  const TaskData data = testing::tiny_text();
  Json details = Json::object();
  StageContext context;
  context.title = "quantize", context.data = &data, context.details = &details;
  auto model = testing::tiny_decoder(4, true);
  QuantizeOptions options = basis_options("fold");
  quantize(*model, options, {}, context);
  CHECK(model->blocks[0].mlp_norm.weight.eq(1).all().item<bool>());
  CHECK(details["basis"]["name"] == "fold");
  CHECK(details["basis"]["largest_relative_logit_difference"].get<double>() < 1e-5);
  CHECK(details["basis"]["notes"].size() == 1);

  model = testing::tiny_decoder(4, true);
  quantize(*model, basis_options("hadamard"), {}, context);
  CHECK(contains_all(details["basis"].dump(), {"untie: true", "values of every key/value head rotated: Sylvester 4"}));
  CHECK(!model->lm_head.weight.defined());

  model = testing::tiny_decoder(4, true);
  options = basis_options("hadamard");
  options.basis.untie = true, options.head = "int8";
  const QuantizationPlan planned = plan_quantization(model->config(), options);
  CHECK(planned.tensors.count("lm_head") == 1);
  CHECK(!basis_config(model->config(), options.basis).tied);
  const QuantizedModel quantized = quantize(*model, options, {}, context);
  CHECK(quantized.plan.tensors.size() == planned.tensors.size());
  CHECK(!model->config().tied);
  CHECK(contains_all(details["basis"].dump(), {"residual stream rotated: 2^1 x Paley I 12", "1200 weights"}));

  options.basis.basis = "fold";
  CHECK(contains_all(error_text([&] { plan_quantization(model->config(), options); }), {"quantize.untie", "hadamard"}));
  auto encoder = testing::tiny_encoder(1);
  CHECK(contains_all(error_text([&] { quantize(*encoder, basis_options("fold"), {}, context); }), {"bert", "residual", "hadamard"}));
  quantize(*encoder, basis_options("hadamard"), {}, context);
  CHECK(contains_all(details["basis"].dump(), {"norms not folded", "residual stream not rotated"}));
  CHECK(contains_all(error_text([&] { quantize(*encoder, basis_options("hadamrd"), {}, context); }), {"hadamrd", "did you mean", "hadamard"}));
}

namespace {

class BasisTapLoss final : public Objective {
 public:
  void request_taps(std::set<std::string>& student, std::set<std::string>&) const override { student.insert("layer.0.output"); }
  at::Tensor loss(const ObjectiveInput& input, std::vector<LossPart>&) override { return input.logits.sum() * 0; }
};

}  // namespace

TEST_CASE("losses on inner states are refused when the stream is rotated", "[quantize][basis][stage]") {
  const TaskData data = testing::tiny_text();
  StageContext context;
  context.data = &data;
  auto model = testing::tiny_decoder(4, false);
  CHECK(contains_all(error_text([&] { change_basis(*model, basis_options("hadamard"), {std::make_shared<BasisTapLoss>()}, context); }), {"layer.0.output", "rotates", "fold"}));
  model = testing::tiny_decoder(4, false);
  change_basis(*model, basis_options("fold"), {std::make_shared<BasisTapLoss>()}, context);
  CHECK(model->final_norm.weight.eq(1).all().item<bool>());
}

namespace {

// Divergence of the model after the stage from what it was before, over the text of tiny_text.
double basis_divergence(const Transformer& model, const QuantizeOptions& options) {
  const at::NoGradGuard no_grad;
  const TaskData data = testing::tiny_text();
  StageContext context;
  context.data = &data;
  const auto copy = model.clone();
  quantize(*copy, options, {}, context);
  const ModelInput input = testing::tiny_input({data.calibration[0], data.calibration[1], data.calibration[2]});
  const at::Tensor p = at::log_softmax(model.forward(input).to(at::kDouble), -1), q = at::log_softmax(copy->forward(input).to(at::kDouble), -1);
  return (p.exp() * (p - q)).sum(-1).mean().item<double>();
}

std::vector<Linear*> basis_readers(Block& block) { return {&block.attention.query, &block.attention.key, &block.attention.value, &block.mlp.gate, &block.mlp.up}; }

}  // namespace

TEST_CASE("log-normal factors between norms and linears are repaired by folding", "[quantize][basis][stage]") {
  auto model = testing::tiny_decoder(9);
  QuantizeOptions options = basis_options("none", "int8");  // fine enough that divergence is in proportion to the error
  options.group = 0;
  const double clean = basis_divergence(*model, options);
  const CounterRandom random(4, "tear");
  for (Block& block : model->blocks) {
    at::Tensor factor = at::empty({24}, at::kFloat);
    for (std::int64_t i = 0; i < 24; ++i) factor.data_ptr<float>()[i] = static_cast<float>(std::exp(random.normal(static_cast<std::uint64_t>(i))) * (i % 11 == 3 ? 20 : 1));
    block.attention_norm.weight = block.attention_norm.weight * factor;
    block.mlp_norm.weight = block.mlp_norm.weight * factor;
    for (Linear* linear : basis_readers(block)) linear->weight = linear->weight / factor;
  }
  const double torn = basis_divergence(*model, options);
  options.basis.basis = "fold";
  const double folded = basis_divergence(*model, options);
  INFO(clean << " torn " << torn << " folded " << folded);
  CHECK(torn > 4 * clean);
  CHECK(folded < 1.5 * clean);  // the gains of the clean model lie within 10% of one
}

}  // namespace kompakt
