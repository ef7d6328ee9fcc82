// The stage with recovery, the vocabulary cut, masks that stay zero while training, shapes and refusals.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"
#include <cmath>
#include <filesystem>

#include "core/node.h"
#include "prune/masks.h"
#include "prune/stage.h"
#include "tests/support.h"
#include "tests/tiny_models.h"
#include "train/mask.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

// Words are numbers: enough of a tokenizer to decide which ids stay.
class NumberTokenizer final : public Tokenizer {
 public:
  NumberTokenizer() { special_.pad = 0, special_.unk = 1, special_.eos = 2; }
  std::vector<std::int64_t> encode(std::string_view, bool, bool) const override { return {}; }
  std::string decode(std::span<const std::int64_t>, bool) const override { return ""; }
  std::int64_t vocab_size() const override { return 50; }
  std::string_view token(std::int64_t) const override { return "t"; }
  std::optional<std::int64_t> id_of(std::string_view) const override { return std::nullopt; }
  const SpecialTokens& special() const override { return special_; }
  std::string_view kind() const override { return "numbers"; }
  std::vector<std::int64_t> indispensable() const override { return {5, 49}; }
  std::unique_ptr<Tokenizer> restrict_to(std::span<const std::int64_t>) const override { return nullptr; }
  void save(const std::filesystem::path&) const override {}
  std::string chat_template() const override { return ""; }
  std::string fingerprint() const override { return "numbers"; }

 private:
  SpecialTokens special_;
};

PruneOptions options_of(const std::string& yaml) {
  PruneOptions options;
  Problems problems;
  read_fields(parse_yaml(yaml, "recipe.yaml"), "stage \"prune\"", problems, [&](FieldVisitor& v) { fields(v, options); });
  problems.throw_if_any("mistakes");
  return options;
}

struct Stage {
  TaskData data = tiny_classification(64);
  Json details = Json::object();
  StageContext context;
  explicit Stage(const std::string& name) {
    context.title = "02-prune";
    context.work = std::filesystem::temp_directory_path() / ("kompakt-prune-" + name);
    std::filesystem::remove_all(context.work);
    context.seed = 9;
    context.data = &data;
    context.details = &details;
  }
  ~Stage() { std::filesystem::remove_all(context.work); }
};

}  // namespace

TEST_CASE("the stage cuts, reports and recovers") {
  Stage stage("recover");
  const auto model = tiny_encoder(3);
  const PruneOptions options = options_of("{structured: {ffn: 0.5, heads: 0.667, layers: 1}, multiple_of: 8, samples: 40, compensate: ls, recover: {steps: 5, batch_size: 8, precision: float32}}");
  const ModelConfig shape = pruned_config(model->config(), options);
  prune(*model, options, {}, stage.context);
  CHECK(model->config().layers == 3);
  CHECK(model->config().ffn == 24);
  CHECK(model->config().heads == 4);
  CHECK(shape.layers == 3);
  CHECK(shape.ffn == 24);
  CHECK(shape.heads == 4);
  CHECK(count_parameters(shape).total == count_parameters(model->config()).total);
  const Json& removed = stage.details.at("removed");
  CHECK(removed.at("ffn") == Json({{0, 48, 24}, {1, 48, 24}, {2, 48, 24}}));
  CHECK(removed.at("heads").at(2) == Json({2, 6, 4}));
  CHECK(removed.at("layers").size() == 1);
  const Json& importance = stage.details.at("importance");
  CHECK(importance.at("criterion") == "taylor");
  CHECK(importance.at("samples") == 40);
  CHECK(importance.at("ffn").size() == 3);
  CHECK(importance.at("ffn").at(0).size() == 32);
  CHECK(importance.at("ffn").at(0).at(0).get<double>() >= importance.at("ffn").at(0).at(31).get<double>());
  CHECK(importance.at("kept_heads").at(0).size() == 4);
  CHECK(importance.at("ffn_share_kept").at(0).get<double>() > 0.5);
  CHECK(stage.details.at("recovery").at("steps") == 5);
}

TEST_CASE("the stage without a recovery only cuts, and the same seed gives the same bytes") {
  std::vector<std::vector<std::pair<std::string, at::Tensor>>> runs;
  for (const std::string seed : {"a", "b"}) {
    Stage stage("cut-" + seed);
    const auto model = tiny_encoder(3);
    prune(*model, options_of("{structured: {ffn: 0.5}, multiple_of: 8, criterion: taylor, samples: 30}"), {}, stage.context);
    CHECK(!stage.details.contains("recovery"));
    runs.push_back(copy_of(*model));
  }
  CHECK(same_parameters(runs[0], runs[1]));
}

TEST_CASE("a grouped decoder is pruned by whole groups") {
  Stage stage("decoder");
  stage.data = tiny_text();
  const auto model = tiny_decoder(3);
  prune(*model, options_of("{structured: {ffn: 0.8, heads: 0.667}, multiple_of: 8, criterion: activation_norm}"), {}, stage.context);
  CHECK(model->config().heads == 4);
  CHECK(model->config().kv_heads == 2);
  CHECK(model->config().ffn == 32);
  CHECK(stage.details.at("removed").at("kv_heads") == Json({3, 2}));
}

TEST_CASE("removing layers carries the layer map along") {
  Stage stage("map");
  const auto model = tiny_encoder(3);
  {
    const at::NoGradGuard no_grad;  // layer 1 does next to nothing: it goes
    for (at::Tensor* weight : {&model->blocks[1].attention.output.weight, &model->blocks[1].mlp.down.weight}) weight->mul_(1e-3);
    for (at::Tensor* bias : {&model->blocks[1].attention.output.bias, &model->blocks[1].mlp.down.bias, &model->blocks[1].attention_norm.bias, &model->blocks[1].mlp_norm.bias}) bias->zero_();
    for (at::Tensor* weight : {&model->blocks[1].attention_norm.weight, &model->blocks[1].mlp_norm.weight}) weight->fill_(1);
  }
  stage.context.layer_map = {1, 3, 5, 7};
  prune(*model, options_of("{structured: {layers: 1}}"), {}, stage.context);
  CHECK(stage.details.at("removed").at("layers") == Json({1}));
  CHECK(stage.context.layer_map == std::vector<std::int64_t>{3, 5, 7});
}

TEST_CASE("prune refuses shapes and options that cannot be met") {
  Stage stage("refuse");
  const auto model = tiny_encoder(3);
  const auto before = copy_of(*model);
  const auto refused = [&](const std::string& yaml) { return error_text([&] { prune(*model, options_of(yaml), {}, stage.context); }); };
  CHECK(contains_all(refused("{structured: {heads: 0.6}, multiple_of: 8}"), {"6 attention heads", "0.6667 (4 heads)"}));
  CHECK(contains_all(refused("{structured: {ffn: 0.9}, multiple_of: 16}"), {"remove no", "0.6667 (32 neurons)"}));
  CHECK(contains_all(refused("{structured: {layers: 4}}"), {"leaves nothing", "0 to 3"}));
  CHECK(contains_all(refused("{structured: {ffn: 0}}"), {"out of range", "recipe.yaml:1:"}));
  CHECK(contains_all(refused("{structured: {fnn: 0.5}}"), {"did you mean \"ffn\""}));
  CHECK(contains_all(refused("{structured: {ffn: 0.5}, criterion: tailor}"), {"did you mean \"taylor\""}));
  CHECK(contains_all(refused("{structured: {ffn: 0.5}, multiple_of: 8, objective: [{labels: cross_entropy}]}"), {"no recovery"}));
  stage.data.train = {};
  CHECK(contains_all(refused("{structured: {ffn: 0.5}, multiple_of: 8, samples: 4}"), {"needs data"}));
  CHECK(model->config().layers == 4);
  model->blocks[2].mlp.up.transform = [](const at::Tensor& w) { return w; };
  CHECK_THROWS_AS(prune(*model, options_of("{structured: {ffn: 0.5}, multiple_of: 8}"), {}, stage.context), std::logic_error);
}

TEST_CASE("kept vocabulary: what texts use, what the tokenizer needs, the first ids") {
  const NumberTokenizer tokenizer;
  CHECK(kept_vocabulary(tokenizer, {{7, 9}, {9, 30}}, {}) == std::vector<std::int64_t>{0, 1, 2, 5, 7, 9, 30, 49});
  CHECK(kept_vocabulary(tokenizer, {}, {4}) == std::vector<std::int64_t>{0, 1, 2, 3, 5, 49});
  CHECK(kept_vocabulary(tokenizer, {}, {50}).size() == 50);
  CHECK(contains_all(error_text([&] { kept_vocabulary(tokenizer, {}, {51}); }), {"51", "0 to 50"}));
  CHECK_THROWS_AS(kept_vocabulary(tokenizer, {{50}}, {}), std::logic_error);
}

TEST_CASE("the vocabulary cut changes no logit of texts that use kept pieces") {
  const at::NoGradGuard no_grad;
  const std::vector<std::int64_t> kept{0, 1, 2, 5, 7, 9, 30, 49};
  const ModelInput old_ids = tiny_input({{5, 7, 30, 49}, {9, 9, 2, 0}}), new_ids = tiny_input({{3, 4, 6, 7}, {5, 5, 2, 0}});
  const auto encoder = tiny_encoder(3);
  const at::Tensor before = encoder->forward(old_ids);
  restrict_vocabulary(*encoder, kept);
  CHECK(at::equal(encoder->forward(new_ids), before));
  CHECK(encoder->config().vocab == 8);
  CHECK(encoder->config().pad == 0);
  for (const bool tied : {false, true}) {
    const auto decoder = tiny_decoder(3, tied);
    const at::Tensor logits = decoder->forward(old_ids).index_select(2, at::tensor(at::ArrayRef<std::int64_t>(kept), at::kLong));
    restrict_vocabulary(*decoder, kept);
    CHECK(at::allclose(decoder->forward(new_ids), logits, 1e-6, 1e-6));
    CHECK(decoder->config().bos == 1);
    CHECK(decoder->config().eos == 2);
    const Json written = config_to_json(decoder->config());
    CHECK(written.at("vocab_size") == 8);
    CHECK(config_from_json(written, "cut").eos == 2);
    CHECK(decoder->config().source.at("eos_token_id") == Json({2, 4}));  // 2 and 7 of old
  }
  CHECK_THROWS_AS(restrict_vocabulary(*encoder, {0, 8}), std::logic_error);
  CHECK_THROWS_AS(restrict_vocabulary(*encoder, {1, 1}), std::logic_error);
  CHECK_THROWS_AS(restrict_vocabulary(*encoder, {}), std::logic_error);
}

TEST_CASE("learned positions are cut to the longest text") {
  const at::NoGradGuard no_grad;
  const auto encoder = tiny_encoder(3);
  const ModelInput input = tiny_input({{5, 7, 30, 49}});
  const at::Tensor before = encoder->forward(input);
  restrict_positions(*encoder, 0);
  CHECK(encoder->config().max_positions == 16);
  restrict_positions(*encoder, 4);
  CHECK(at::equal(encoder->forward(input), before));
  CHECK(encoder->positions.size(0) == 4);
  CHECK(config_to_json(encoder->config()).at("max_position_embeddings") == 4);
  CHECK(contains_all(error_text([&] { restrict_positions(*encoder, 5); }), {"4 positions", "1 to 4"}));
  CHECK(contains_all(error_text([&] { restrict_positions(*tiny_decoder(3), 8); }), {"no learned position"}));
}

TEST_CASE("masks: patterns by hand, ties, refusals") {
  const at::Tensor w = at::tensor({1.0f, -4.0f, 2.0f, 3.0f, 0.0f, 0.0f, 0.0f, 0.0f}).reshape({1, 8});
  const auto bits = [](const at::Tensor& mask) {
    std::string out;
    for (std::int64_t i = 0; i < mask.numel(); ++i) out += mask.flatten()[i].item<bool>() ? '1' : '0';
    return out;
  };
  CHECK(bits(magnitude_mask(w, {0.5, 2, 4})) == "01011100");
  CHECK(bits(magnitude_mask(w, {0.5})) == "11110000");
  CHECK(bits(magnitude_mask(w, {0.9})) == "01000000");
  CHECK(bits(magnitude_mask(w, {0})) == "11111111");
  CHECK(bits(wanda_mask(w, at::tensor({100.0f, 0.01f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f}), {0.5, 2, 4})) == "10011100");
  CHECK(contains_all(error_text([&] { magnitude_mask(w, {0.5, 1, 3}); }), {"8 weights", "groups of 3"}));
  CHECK(contains_all(error_text([&] { magnitude_mask(w, {0.5, 5, 4}); }), {"5:4"}));
  CHECK(contains_all(error_text([&] { magnitude_mask(w, {1}); }), {"leaves nothing"}));
}

TEST_CASE("masked weights are exactly zero after training steps, the others move") {
  Stage stage("masks");
  const auto model = tiny_encoder(3);
  const auto before = copy_of(*model);
  std::map<std::string, at::Tensor> masks;
  for (const Linear* linear : model->linears()) masks[linear->name] = magnitude_mask(linear->weight, {0.5, 2, 4});
  TrainOptions options;
  options.steps = 8;
  options.batch_size = 8;
  options.learning_rate = 1e-2;
  options.precision = "float32";
  train(*model, options, {std::shared_ptr<Objective>(label_cross_entropy())}, {mask_constraint(masks)}, stage.context);
  for (const Linear* linear : model->linears()) {
    const at::Tensor& mask = masks.at(linear->name);
    CHECK(linear->weight.masked_select(mask.logical_not()).abs().max().item<double>() == 0);
    CHECK(linear->weight.masked_select(mask).ne(0).all().item<bool>());
  }
  CHECK(!same_parameters(copy_of(*model), before));
  CHECK_THROWS_AS(mask_constraint({{"no.such.linear", at::ones({1, 1}, at::kBool)}})->attach(*model), std::logic_error);
}

TEST_CASE("options of the stage are read and written") {
  const PruneOptions options = options_of("{structured: {ffn: 0.5}, vocabulary: {first_ids: 10}, recover: {epochs: 1}}");
  CHECK(options.has_structured);
  CHECK(options.structured.heads == 1);
  CHECK(options.vocabulary.first_ids == 10);
  CHECK(options.has_recover);
  PruneOptions copy = options;
  const Node written = write_fields([&](FieldVisitor& v) { fields(v, copy); });
  CHECK(written.find("structured")->find("ffn")->scalar == "0.5");
  CHECK(written.find("criterion")->scalar == "taylor");
}
