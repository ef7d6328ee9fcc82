// Cuts that must change nothing, refits that must be exact, rules of grouped heads, importance against brute force.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "tests/catch_torch.h"
#include <cmath>
#include <numeric>

#include "prune/criteria.h"
#include "prune/depth.h"
#include "prune/structured.h"
#include "tests/support.h"
#include "tests/tiny_models.h"
#include "train/teacher.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

std::vector<std::int64_t> numbers(std::int64_t from, std::int64_t to) {
  std::vector<std::int64_t> out(static_cast<std::size_t>(to - from));
  std::iota(out.begin(), out.end(), from);
  return out;
}

std::vector<KeptUnits> keep_everything(const Transformer& model) {
  const ModelConfig& c = model.config();
  return std::vector<KeptUnits>(static_cast<std::size_t>(c.layers), {numbers(0, c.ffn), numbers(0, c.heads), numbers(0, c.kv_heads)});
}

at::Tensor logits_of(const Transformer& model) {
  const at::NoGradGuard no_grad;
  return model.forward(tiny_input({{4, 9, 17, 30, 5, 44}, {11, 12, 13, 14, 15, 16}}));
}

double apart(const at::Tensor& a, const at::Tensor& b) { return (a - b).abs().max().item<double>(); }

// Model loss of one example, with unit u of a layer scaled by `gate` through the weights that read it.
double gated_loss(const Transformer& model, const TokenBatch& batch, std::int64_t row, std::int64_t layer, std::int64_t unit, bool head, double gate) {
  const auto changed = model.clone();
  const at::NoGradGuard no_grad;
  Block& block = changed->blocks[static_cast<std::size_t>(layer)];
  const std::int64_t size = head ? block.attention.head_dim : 1;
  (head ? block.attention.output : block.mlp.down).weight.narrow(1, unit * size, size).mul_(gate);
  const at::Tensor logits = changed->forward(to_input(batch, c10::Device(c10::kCPU))).to(at::kDouble);
  if (!batch.labels.empty()) return -at::log_softmax(logits[row], -1)[batch.labels[static_cast<std::size_t>(row)]].item<double>();
  double sum = 0;
  for (std::int64_t t = 0; t + 1 < batch.columns; ++t) sum -= at::log_softmax(logits[row][t], -1)[batch.ids[static_cast<std::size_t>(row * batch.columns + t + 1)]].item<double>();
  return sum / static_cast<double>(batch.columns - 1);
}

}  // namespace

TEST_CASE("keeping all units changes no byte") {
  for (const bool decoder : {false, true}) {
    const auto model = decoder ? tiny_decoder(3) : tiny_encoder(3);
    const auto before = copy_of(*model);
    cut_units(*model, keep_everything(*model));
    CHECK(same_parameters(copy_of(*model), before));
    cut_units_with_refit(*model, keep_everything(*model), measuring_batches(decoder ? tiny_text() : tiny_classification(), 8, 1));
    CHECK(same_parameters(copy_of(*model), before));
  }
}

TEST_CASE("units that nothing reads can go without a change of the logits") {
  for (const bool decoder : {false, true}) {
    INFO((decoder ? "decoder" : "encoder"));
    const auto model = decoder ? tiny_decoder(3) : tiny_encoder(3);
    const at::NoGradGuard no_grad;
    auto kept = keep_everything(*model);
    for (std::size_t i = 0; i < kept.size(); ++i) {
      Block& block = model->blocks[i];
      // Other units in every layer: neurons i, i+3, i+9; the key/value group i (one head in the encoder).
      const auto layer = static_cast<std::int64_t>(i);
      for (const std::int64_t n : {layer, layer + 3, layer + 9}) {
        block.mlp.down.weight.select(1, n).zero_();
        std::erase(kept[i].ffn, n);
      }
      const std::int64_t group = block.attention.heads / block.attention.kv_heads, hd = block.attention.head_dim;
      block.attention.output.weight.narrow(1, layer * group * hd, group * hd).zero_();
      std::erase(kept[i].kv_heads, layer);
      std::erase_if(kept[i].heads, [&](std::int64_t h) { return h / group == layer; });
    }
    const at::Tensor before = logits_of(*model);
    cut_units(*model, kept);
    CHECK(apart(logits_of(*model), before) < 1e-5);
    const ModelConfig& c = model->config();
    CHECK(c.ffn == (decoder ? 37 : 45));
    CHECK(c.heads == (decoder ? 4 : 5));
    CHECK(c.kv_heads == (decoder ? 2 : 5));
    CHECK(c.head_dim == 4);
    CHECK(model->blocks[0].attention.query.weight.sizes() == at::IntArrayRef({c.heads * 4, 24}));
    CHECK(model->blocks[0].attention.output.weight.sizes() == at::IntArrayRef({24, c.heads * 4}));
    CHECK(model->blocks[0].mlp.down.weight.sizes() == at::IntArrayRef({24, c.ffn}));
    // The shape is one that the family can be built in, parameter by parameter.
    const Transformer fresh(config_from_json(config_to_json(c), "pruned"));
    REQUIRE(fresh.parameters().size() == std::as_const(*model).parameters().size());
    for (std::size_t i = 0; i < fresh.parameters().size(); ++i) CHECK(fresh.parameters()[i].second.sizes() == std::as_const(*model).parameters()[i].second.sizes());
  }
}

TEST_CASE("units that are zero can go from under a sub-norm without a change of the logits") {
  const auto model = tiny_decoder(3);
  const at::NoGradGuard no_grad;
  model->add_sub_norms();
  stir(*model, 5);
  auto kept = keep_everything(*model);
  for (std::size_t i = 0; i < kept.size(); ++i) {
    Block& block = model->blocks[i];
    block.attention.sub_norm.eps = block.mlp.sub_norm.eps = 0;  // added to a mean, it weighs more the fewer units there are
    for (const std::int64_t n : {2, 7, 30}) {
      block.mlp.up.weight.select(0, n).zero_();
      std::erase(kept[i].ffn, n);
    }
    block.attention.value.weight.narrow(0, 4, 4).zero_();  // the group 1
    std::erase(kept[i].kv_heads, 1);
    std::erase_if(kept[i].heads, [](std::int64_t h) { return h / 2 == 1; });
  }
  const at::Tensor before = logits_of(*model);
  cut_units(*model, kept);
  CHECK(model->blocks[0].attention.sub_norm.weight.numel() == 16);
  CHECK(model->blocks[0].mlp.sub_norm.weight.numel() == 37);
  CHECK(apart(logits_of(*model), before) < 1e-5);
}

TEST_CASE("one query head of every group can go where the groups stay") {
  const auto model = tiny_decoder(3);
  const at::NoGradGuard no_grad;
  auto kept = keep_everything(*model);
  for (std::size_t i = 0; i < kept.size(); ++i) {
    kept[i].heads = {0, 3, 5};  // one of (0,1), (2,3), (4,5)
    for (const std::int64_t h : {1, 2, 4}) model->blocks[i].attention.output.weight.narrow(1, h * 4, 4).zero_();
  }
  const at::Tensor before = logits_of(*model);
  cut_units(*model, kept);
  CHECK(apart(logits_of(*model), before) < 1e-5);
  CHECK(model->config().heads == 3);
  CHECK(model->config().kv_heads == 3);
}

TEST_CASE("cut_units refuses shapes that no checkpoint can hold") {
  const auto model = tiny_decoder(3);
  const auto with = [&](const auto& change) {
    auto kept = keep_everything(*model);
    change(kept);
    return kept;
  };
  CHECK_THROWS_AS(cut_units(*model, with([](auto& k) { k[1].ffn.pop_back(); })), std::logic_error);
  CHECK_THROWS_AS(cut_units(*model, with([](auto& k) { k.pop_back(); })), std::logic_error);
  CHECK_THROWS_AS(cut_units(*model, with([](auto& k) { for (auto& u : k) u.heads = {0, 1, 2}; })), std::logic_error);  // 1 and 0: groups lose their heads
  CHECK_THROWS_AS(cut_units(*model, with([](auto& k) { for (auto& u : k) u.ffn.clear(); })), std::logic_error);
  model->blocks[0].mlp.up.transform = [](const at::Tensor& w) { return w; };
  CHECK_THROWS_AS(cut_units(*model, keep_everything(*model)), std::logic_error);
}

TEST_CASE("counts of heads: whole groups, else equally many of each, else the nearest valid shares") {
  const auto plan = [](std::int64_t heads, std::int64_t kv, double share) {
    const HeadPlan p = plan_heads(heads, kv, share);
    return std::pair{p.heads, p.kv_heads};
  };
  CHECK(plan(12, 12, 0.667) == std::pair<std::int64_t, std::int64_t>{8, 8});
  CHECK(plan(12, 12, 0.67) == std::pair<std::int64_t, std::int64_t>{8, 8});
  CHECK(plan(12, 12, 1) == std::pair<std::int64_t, std::int64_t>{12, 12});
  CHECK(plan(9, 3, 2.0 / 3) == std::pair<std::int64_t, std::int64_t>{6, 2});
  CHECK(plan(14, 2, 0.5) == std::pair<std::int64_t, std::int64_t>{7, 1});
  CHECK(plan(14, 2, 6.0 / 7) == std::pair<std::int64_t, std::int64_t>{12, 2});
  CHECK(plan(8, 1, 0.25) == std::pair<std::int64_t, std::int64_t>{2, 1});
  CHECK(contains_all(error_text([&] { plan(12, 12, 0.6); }), {"0.6", "12 attention heads", "0.5833 (7 heads)", "0.6667 (8 heads)"}));
  CHECK(contains_all(error_text([&] { plan(9, 3, 0.5); }), {"3 groups of 3", "0.6667 (6 heads)", "0.3333 (3 heads)"}));
  CHECK(contains_all(error_text([&] { plan(4, 4, 0.01); }), {"0.2500 (1 heads)"}));
}

TEST_CASE("widths are rounded to a multiple and must remove and leave something") {
  CHECK(plan_width(1536, 0.5, 32) == 768);
  CHECK(plan_width(1536, 0.51, 32) == 768);
  CHECK(plan_width(4864, 0.75, 256) == 3584);
  CHECK(plan_width(48, 1, 32) == 48);
  CHECK(plan_width(50, 0.9, 32) == 32);
  CHECK(contains_all(error_text([] { plan_width(1536, 0.001, 32); }), {"leave no", "0.0208 (32 neurons)"}));
  CHECK(contains_all(error_text([] { plan_width(64, 0.9, 32); }), {"remove no", "0.5000 (32 neurons)", "multiple_of"}));
  CHECK(contains_all(error_text([] { plan_width(16, 0.5, 32); }), {"multiple of 32", "multiple_of"}));
}

TEST_CASE("the best units by score stay, ties to the lower number, groups as a whole") {
  const auto model = tiny_decoder(3);
  UnitScores scores;
  for (int i = 0; i < 3; ++i) {
    scores.ffn.push_back(at::arange(40, at::kDouble).remainder(4));
    scores.heads.push_back(at::tensor({1.0, 0.0, 5.0, 0.0, 2.0, 2.5}, at::kDouble));
  }
  const auto groups = choose_units(*model, scores, 10, {4, 2});
  CHECK(groups[0].ffn == std::vector<std::int64_t>{3, 7, 11, 15, 19, 23, 27, 31, 35, 39});
  CHECK(groups[0].kv_heads == std::vector<std::int64_t>{1, 2});
  CHECK(groups[0].heads == std::vector<std::int64_t>{2, 3, 4, 5});
  const auto queries = choose_units(*model, scores, 12, {3, 3});
  CHECK(queries[2].heads == std::vector<std::int64_t>{0, 2, 5});
  CHECK(queries[2].ffn.front() == 2);  // 10 units of score 3 and the first two of score 2
  CHECK(std::count_if(queries[2].ffn.begin(), queries[2].ffn.end(), [](std::int64_t n) { return n % 4 == 2; }) == 2);
  scores.heads[1] = at::full({6}, std::nan(""), at::kDouble);
  CHECK(contains_all(error_text([&] { choose_units(*model, scores, 10, {4, 2}); }), {"not finite"}));
}

TEST_CASE("the refit is exact where a removed input is a combination of kept ones") {
  for (const bool bias : {false, true}) {
    Linear linear;
    linear.name = "down";
    linear.weight = at::empty({3, 5});
    const CounterRandom random(4, "refit");
    for (std::int64_t i = 0; i < 15; ++i) linear.weight.data_ptr<float>()[i] = static_cast<float>(random.normal(static_cast<std::uint64_t>(i)));
    if (bias) linear.bias = at::tensor({0.5f, -1.0f, 2.0f});
    at::Tensor x = at::empty({200, 5}, at::kDouble);
    for (std::int64_t i = 0; i < x.numel(); ++i) x.data_ptr<double>()[i] = random.normal(static_cast<std::uint64_t>(100 + i)) + 0.7;
    x.select(1, 1).copy_(x.select(1, 0) * 2 - x.select(1, 4) + (bias ? 3.0 : 0.0));  // an offset needs the bias
    const at::Tensor second = at::mm(x.t(), x) / 200, mean = x.mean(0);
    const Refit refit = refit_linear(linear, {0, 2, 3, 4}, second, mean, 0);
    const at::Tensor kept = x.index_select(1, at::tensor({0, 2, 3, 4}, at::kLong));
    at::Tensor y = at::mm(x, linear.weight.to(at::kDouble).t()), z = at::mm(kept, refit.weight.to(at::kDouble).t());
    if (bias) y = y + linear.bias, z = z + refit.bias;
    CHECK(apart(y, z) < 1e-5);
    CHECK(refit.bias.defined() == bias);
    // With any ridge the refit is at least as good as a plain cut, and an uncorrelated removed input changes no kept weight.
    const Refit damped = refit_linear(linear, {0, 2, 3, 4}, second, mean);
    at::Tensor plain = at::mm(kept, linear.weight.to(at::kDouble).index_select(1, at::tensor({0, 2, 3, 4}, at::kLong)).t()), soft = at::mm(kept, damped.weight.to(at::kDouble).t());
    if (bias) plain = plain + linear.bias, soft = soft + damped.bias;
    CHECK((y - soft).square().mean().item<double>() < 0.1 * (y - plain).square().mean().item<double>());
    const Refit apart_inputs = refit_linear(linear, {0, 1, 2}, at::eye(5, at::kDouble), at::zeros({5}, at::kDouble));
    CHECK(apart(apart_inputs.weight, linear.weight.narrow(1, 0, 3)) < 1e-6);
  }
  Linear zero;
  zero.name = "dead";
  zero.weight = at::ones({2, 3});
  CHECK(at::equal(refit_linear(zero, {0, 1}, at::zeros({3, 3}, at::kDouble), at::zeros({3}, at::kDouble), 0).weight, at::ones({2, 2})));  // nothing ever active
}

TEST_CASE("the refit keeps more of a model than a plain cut") {
  for (const bool decoder : {false, true}) {
    INFO((decoder ? "decoder" : "encoder"));
    const auto model = decoder ? tiny_decoder(3) : tiny_encoder(3);
    const auto batches = measuring_batches(decoder ? tiny_text() : tiny_classification(128), 128, 1);
    const UnitScores scores = measure_units(*find_criterion("activation_norm"), *model, batches, 1);
    const auto kept = choose_units(*model, scores, model->config().ffn * 3 / 4, plan_heads(6, model->config().kv_heads, 2.0 / 3));
    const auto plain = model->clone(), refitted = model->clone();
    cut_units(*plain, kept);
    cut_units_with_refit(*refitted, kept, batches);
    const at::NoGradGuard no_grad;
    double plain_error = 0, refit_error = 0;
    for (const TokenBatch& batch : batches) {
      const ModelInput input = to_input(batch, c10::Device(c10::kCPU));
      const at::Tensor truth = model->forward(input);
      plain_error += (plain->forward(input) - truth).square().sum().item<double>();
      refit_error += (refitted->forward(input) - truth).square().sum().item<double>();
    }
    CHECK(refit_error < 0.9 * plain_error);
  }
}

TEST_CASE("Taylor importance is the mean square of the derivative at a gate") {
  for (const bool decoder : {false, true}) {
    INFO((decoder ? "decoder" : "encoder"));
    const auto model = decoder ? tiny_decoder(5, false, 2) : tiny_encoder(5, 2);
    const auto batches = measuring_batches(decoder ? tiny_text() : tiny_classification(5), 5, 1, 3);
    const auto before = copy_of(*model);
    const UnitScores scores = measure_units(*find_criterion("taylor"), *model, batches, 1);
    CHECK(same_parameters(copy_of(*model), before));
    for (const auto& [name, value] : std::as_const(*model).parameters()) {
      CHECK(!value.requires_grad());
      CHECK(!value.grad().defined());
    }
    const double step = 3e-2;  // weights are float32: a large step and a centred difference
    for (const std::int64_t layer : {0, 1}) {
      for (const bool head : {false, true}) {
        const double largest = (head ? scores.heads : scores.ffn)[static_cast<std::size_t>(layer)].max().item<double>();
        for (const std::int64_t unit : {0, 3, 5}) {
          double sum = 0, count = 0;
          for (const TokenBatch& batch : batches) {
            for (std::int64_t row = 0; row < batch.rows; ++row, ++count) {
              const double slope = (gated_loss(*model, batch, row, layer, unit, head, 1 + step) - gated_loss(*model, batch, row, layer, unit, head, 1 - step)) / (2 * step);
              sum += slope * slope;
            }
          }
          const double score = (head ? scores.heads : scores.ffn)[static_cast<std::size_t>(layer)][unit].item<double>();
          CHECK(std::abs(score - sum / count) < 0.02 * largest);
          CHECK(score > 0);
        }
      }
    }
  }
}

TEST_CASE("every criterion scores every unit, repeatably, and finds a dead neuron") {
  for (const bool decoder : {false, true}) {
    const auto model = decoder ? tiny_decoder(3) : tiny_encoder(3);
    const at::NoGradGuard no_grad;
    Block& block = model->blocks[1];
    for (Linear* linear : {&block.mlp.gate, &block.mlp.up}) {
      if (!linear->weight.defined()) continue;
      linear->weight.select(0, 7).zero_();
      if (linear->bias.defined()) linear->bias.select(0, 7).zero_();
    }
    block.mlp.down.weight.select(1, 7).zero_();
    const auto batches = measuring_batches(decoder ? tiny_text() : tiny_classification(), 16, 1);
    for (const Criterion& row : criteria()) {
      INFO(row.name);
      const UnitScores scores = measure_units(row, *model, batches, 4);
      REQUIRE(scores.ffn.size() == model->blocks.size());
      for (std::size_t i = 0; i < scores.ffn.size(); ++i) {
        CHECK(scores.ffn[i].numel() == model->config().ffn);
        CHECK(scores.heads[i].numel() == 6);
        CHECK(scores.heads[i].isfinite().all().item<bool>());
        CHECK(scores.ffn[i].min().item<double>() >= 0);
      }
      const UnitScores again = measure_units(row, *model, batches, 4);
      CHECK(at::equal(again.ffn[1], scores.ffn[1]));
      if (row.name == "random") CHECK(!at::equal(measure_units(row, *model, batches, 5).ffn[1], scores.ffn[1]));
      else CHECK(scores.ffn[1].argmin().item<std::int64_t>() == 7);
      CHECK(find_criterion(row.name) == &row);
    }
  }
}

TEST_CASE("criteria refuse what they cannot measure") {
  const auto model = tiny_encoder(3);
  CHECK(contains_all(error_text([&] { measure_units(*find_criterion("taylor"), *model, {}, 1); }), {"taylor", "needs data", "magnitude"}));
  model->blocks[0].mlp.up.transform = [](const at::Tensor& w) { return w; };
  CHECK(contains_all(error_text([&] { measure_units(*find_criterion("taylor"), *model, measuring_batches(tiny_classification(), 4, 1), 1); }), {"needs gradients", "quantized"}));
}

TEST_CASE("activation norm by hand: padding does not count") {
  const auto model = tiny_encoder(3, 1);
  const TokenBatch batch = measuring_batches(tiny_classification(6), 6, 1).at(0);
  const UnitScores scores = measure_units(*find_criterion("activation_norm"), *model, {batch}, 1);
  const at::NoGradGuard no_grad;
  TapMap taps({"layer.0.ffn", "layer.0.context"});
  model->hidden(to_input(batch, c10::Device(c10::kCPU)), &taps);
  double neuron = 0, head = 0;
  for (std::int64_t b = 0; b < batch.rows; ++b) {
    const std::int64_t n = batch.lengths[static_cast<std::size_t>(b)];
    neuron += std::pow(taps.at("layer.0.ffn")[b].narrow(0, 0, n).select(1, 11).abs().mean().item<double>(), 2);
    head += std::pow(taps.at("layer.0.context")[b].narrow(0, 0, n).narrow(1, 8, 4).norm(2, -1).mean().item<double>(), 2);
  }
  CHECK(scores.ffn[0][11].item<double>() == Approx(std::sqrt(neuron)).epsilon(1e-5));
  CHECK(scores.heads[0][2].item<double>() == Approx(std::sqrt(head)).epsilon(1e-5));
}

TEST_CASE("layers go by block influence: one that does nothing goes first") {
  const auto model = tiny_decoder(3);
  const at::NoGradGuard no_grad;
  model->blocks[1].attention.output.weight.zero_();
  model->blocks[1].mlp.down.weight.zero_();
  const auto batches = measuring_batches(tiny_text(), 4, 1);
  CHECK(block_influence(*model, batches)[1] == Approx(0).margin(1e-6));
  const at::Tensor before = logits_of(*model);
  CHECK(remove_layers(*model, 1, batches) == std::vector<std::int64_t>{1});
  CHECK(apart(logits_of(*model), before) < 1e-6);
  CHECK(model->config().layers == 2);
  CHECK(model->blocks[1].mlp.up.name.find(".1.") != std::string::npos);
  CHECK(contains_all(error_text([&] { remove_layers(*model, 2, batches); }), {"leaves nothing", "0 to 1"}));
}

TEST_CASE("samples are a seeded subset with its labels") {
  const TaskData data = tiny_classification(50);
  const auto batches = measuring_batches(data, 20, 3);
  std::set<std::int64_t> seen;
  for (const TokenBatch& batch : batches) {
    for (std::int64_t b = 0; b < batch.rows; ++b) {
      const auto example = static_cast<std::size_t>(batch.examples[static_cast<std::size_t>(b)]);
      seen.insert(batch.examples[static_cast<std::size_t>(b)]);
      CHECK(data.train.labels[example] == batch.labels[static_cast<std::size_t>(b)]);
      CHECK(data.train.ids[example][0] == batch.ids[static_cast<std::size_t>(b * batch.columns)]);
    }
  }
  CHECK(seen.size() == 20);
  CHECK(measuring_batches(data, 1000, 3).size() == 4);
  TaskData nothing;
  CHECK(measuring_batches(nothing, 5, 1).empty());
  // Windows of text side by side only as far as their logits stay small; none is lost.
  TaskData text;
  text.kind = TaskData::Kind::text;
  for (const auto& [length, rows] : {std::pair<std::size_t, std::int64_t>{100, 10}, {10, 16}, {600, 1}, {5000, 1}}) {
    text.calibration.assign(21, std::vector<std::int64_t>(length, 3));
    std::int64_t windows = 0;
    for (const TokenBatch& batch : measuring_batches(text, 20, 1)) {
      CHECK(batch.rows <= rows);
      windows += batch.rows;
    }
    CHECK(windows == 20);
    CHECK(measuring_batches(text, 20, 1).front().rows == rows);
  }
}
