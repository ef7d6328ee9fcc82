// Layer-sequential work: moments of a block's parts, the same bytes for any number of threads, after a kill, from disk.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <csignal>
#include <thread>

#include "core/error.h"
#include "core/files.h"
#include "core/random.h"
#include "core/system.h"
#include "core/text.h"
#include "model/checkpoint.h"
#include "model/paged.h"
#include "quantize/layer_report.h"
#include "quantize/stage.h"
#include "quantize/tensors.h"
#include "tests/catch_torch.h"
#include "tests/support.h"
#include "train/calibration.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;

std::unique_ptr<Transformer> sequential_llama(std::int64_t layers = 3) {
  const Json json = {{"model_type", "llama"}, {"hidden_size", 192}, {"num_hidden_layers", layers}, {"num_attention_heads", 6}, {"num_key_value_heads", 3}, {"intermediate_size", 320},
                     {"vocab_size", 90}, {"max_position_embeddings", 1024}, {"rms_norm_eps", 1e-5}, {"hidden_act", "silu"}, {"tie_word_embeddings", true}};
  auto model = std::make_unique<Transformer>(config_from_json(json, "tiny"), 3);
  for (Linear* linear : model->linears()) linear->weight = linear->weight * 4;  // N(0, 0.02) computes next to nothing
  return model;
}

// Biases and norms that are not those of a fresh model.
std::unique_ptr<Transformer> sequential_bert() {
  const Json json = {{"model_type", "bert"}, {"hidden_size", 64}, {"num_hidden_layers", 2}, {"num_attention_heads", 4}, {"intermediate_size", 128}, {"vocab_size", 60},
                     {"max_position_embeddings", 32}, {"type_vocab_size", 2}, {"layer_norm_eps", 1e-12}, {"hidden_act", "gelu"}};
  auto model = std::make_unique<Transformer>(config_from_json(json, "tiny"), 4);
  const CounterRandom random(5, "bert");
  std::uint64_t at = 0;
  for (Linear* linear : model->linears()) {
    linear->weight = linear->weight * 8;
    for (std::int64_t i = 0; i < linear->bias.numel(); ++i) linear->bias[i] = 0.3 * random.normal(at++);
  }
  for (Block& block : model->blocks)
    for (std::int64_t i = 0; i < 64; ++i) block.attention_norm.bias[i] = 0.5 * random.normal(at++);
  return model;
}

TaskData sequential_text(std::int64_t windows, std::int64_t length) {
  TaskData data;
  data.kind = TaskData::Kind::text;
  const CounterRandom random(9, "text");
  for (std::int64_t w = 0; w < windows; ++w) {
    std::vector<std::int64_t> ids;
    for (std::int64_t t = 0; t < length; ++t) ids.push_back(static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(w * length + t), 90)));
    data.calibration.push_back(ids);
  }
  return data;
}

TaskData sequential_examples(std::int64_t count = 60) {
  TaskData data;
  data.kind = TaskData::Kind::classification;
  data.labels = {"a", "b", "c"};
  const CounterRandom random(10, "examples");
  for (std::int64_t i = 0; i < count; ++i) {
    std::vector<std::int64_t> ids = {1, 3 + i % 3};
    for (std::int64_t t = 0; t < i % 7; ++t) ids.push_back(10 + static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(i * 16 + t), 50)));
    data.train.ids.push_back(ids);
    data.train.labels.push_back(i % 3);
  }
  return data;
}

// More than one batch of either kind.
TaskData sequential_data(bool encoder) { return encoder ? sequential_examples(150) : sequential_text(6, 400); }

StageContext sequential_context(const TaskData& data) {
  StageContext context;
  context.data = &data, context.title = "quantize", context.seed = 2;
  return context;
}

QuantizeOptions sequential_options(const char* weights, const char* method) {
  QuantizeOptions options;
  options.weights = weights, options.method = method, options.embedding = "int8";
  return options;
}

// Everything that the stage leaves behind, as bytes.
std::string sequential_bytes(const Transformer& model, const QuantizedModel& result) {
  const TemporaryFolder folder;
  save_quantized(result, folder.path());
  return read_text(folder.path() / "quantization.safetensors") + fingerprint(model);
}

// Inputs of a linear over the whole set in a plain forward pass, [tokens,K] float64, padding left out.
at::Tensor recorded_inputs(const Transformer& model, const CalibrationSet& set, const std::string& name, std::size_t first, std::size_t end) {
  at::NoGradGuard no_grad;
  std::vector<at::Tensor> rows;
  for (std::size_t b = first; b < end; ++b) {
    TapMap taps({"input:" + name});
    model.forward(set.inputs[b], &taps);
    const at::Tensor x = taps.at("input:" + name).to(at::kDouble);
    for (std::int64_t r = 0; r < x.size(0); ++r) rows.push_back(x[r].slice(0, 0, set.inputs[b].lengths.defined() ? set.inputs[b].lengths[r].item<std::int64_t>() : x.size(1)));
  }
  return at::cat(rows);
}

}  // namespace

TEST_CASE("moments part by part equal moments of recorded inputs, padding left out", "[quantize][sequential]") {
  at::NoGradGuard no_grad;
  for (const bool encoder : {true, false}) {
    const auto held = encoder ? sequential_bert() : sequential_llama(2);
    Transformer& model = *held;
    const TaskData data = sequential_data(encoder);
    const StageContext context = sequential_context(data);
    const CalibrationSet set = calibration_set(context, 140);
    CHECK(set.sequences == (encoder ? 140 : 6));
    CHECK(set.hash == calibration_set(context, 140).hash);
    CHECK(set.hash != calibration_set(context, 5).hash);
    REQUIRE(set.inputs.size() >= 3);
    for (const bool float64 : {false, true}) {
      // The teacher is another model: its weights of block 1 differ, those of block 0 and the embedding do not.
      SequentialCalibration calibration(model, set, {.teacher = true, .means = true, .float64 = float64});
      calibration.start();
      calibration.advance(0, {});
      Linear& up = model.blocks[1].mlp.up;
      const at::Tensor present = up.weight, other = up.weight * 0.5;
      const std::map<std::string, at::Tensor> original = {{up.name + ".weight", other}};
      for (const BlockPart part : block_parts) {
        if (part == BlockPart::output) continue;  // parts may be left out
        const std::string name = part_linears(model.blocks[1], part).front()->name;
        const SecondMoments moments = calibration.moments(1, part, original);
        const at::Tensor x = recorded_inputs(model, set, name, 0, set.inputs.size());
        up.weight = other;
        const at::Tensor teacher = recorded_inputs(model, set, name, 0, set.inputs.size());
        up.weight = present;
        const double n = static_cast<double>(x.size(0)), tolerance = float64 ? 1e-5 : 1e-4;  // the activations themselves are float32
        const auto close = [&](const at::Tensor& a, const at::Tensor& b) { return (a.to(at::kDouble) - b).norm().item<double>() <= tolerance * b.norm().item<double>(); };
        CAPTURE(encoder, float64, name);
        CHECK(moments.tokens == x.size(0));
        CHECK(close(moments.hessian, at::matmul(x.t(), x) / n));
        CHECK(at::equal(moments.hessian, moments.hessian.t()));
        CHECK(close(moments.cross, at::matmul(teacher.t(), x) / n));
        CHECK(close(moments.mean, x.mean(0)));
        CHECK(close(moments.teacher_mean, teacher.mean(0)));
        REQUIRE(moments.half.defined());
        CHECK(moments.half_tokens >= moments.tokens / 2);
        CHECK(moments.half_tokens < moments.tokens);
        const at::Tensor half = x.slice(0, 0, moments.half_tokens);
        CHECK(close(moments.half, at::matmul(half.t(), half) / static_cast<double>(moments.half_tokens)));
        SecondMoments centred = moments;
        subtract_means(centred);
        const at::Tensor deviation = x - x.mean(0, true);
        CHECK(close(centred.hessian, at::matmul(deviation.t(), deviation) / n));
        CHECK(close(centred.cross, at::matmul((teacher - teacher.mean(0, true)).t(), deviation) / n));
      }
      calibration.advance(1, original);
      for (std::size_t b = 0; b < set.inputs.size(); ++b) {
        at::Tensor y = model.embed(set.inputs[b]);
        for (std::int64_t layer = 0; layer < 2; ++layer) y = model.block_forward(layer, y, set.inputs[b]);
        CHECK(at::allclose(calibration.input(b), y, 1e-5, 1e-6));
        CHECK(!at::allclose(calibration.teacher(b), y, 1e-5, 1e-6));
      }
    }
  }
}

TEST_CASE("moments and activations of passes in bfloat16 are those of float32 but for roundings", "[quantize][sequential]") {
  at::NoGradGuard no_grad;
  for (const bool encoder : {true, false}) {
    const auto held = encoder ? sequential_bert() : sequential_llama(2);
    Transformer& model = *held;
    const TaskData data = sequential_data(encoder);
    const CalibrationSet set = calibration_set(sequential_context(data), 140);
    const std::string before = fingerprint(model);
    const CalibrationOptions exact{.teacher = true, .means = true};
    CalibrationOptions low = exact;
    low.bf16 = true;
    SequentialCalibration wide(model, set, exact), narrow(model, set, low);
    wide.start(), narrow.start();
    // Some ten roundings of 2^-9 each follow each other in a block; those of single tokens cancel in the moments.
    const auto close = [](const at::Tensor& a, const at::Tensor& b, double tolerance = 1e-2) { return (a - b).norm().item<double>() <= tolerance * b.norm().item<double>(); };
    for (std::int64_t layer = 0; layer < 2; ++layer) {
      for (const BlockPart part : block_parts) {
        std::vector<at::Tensor> weights;
        for (std::size_t b = 0; b < set.inputs.size(); ++b) weights.push_back(at::arange(1, 1 + (set.valid[b].defined() ? set.valid[b].numel() : set.inputs[b].ids.numel())).to(at::kFloat));
        const auto a = wide.moments(layer, part, {}, {nullptr, &weights}), b = narrow.moments(layer, part, {}, {nullptr, &weights});
        CAPTURE(encoder, layer);
        for (std::size_t i = 0; i < 2; ++i) {
          CHECK(b[i].hessian.scalar_type() == at::kFloat);
          CHECK(at::equal(b[i].hessian, b[i].hessian.t()));
          CHECK(close(b[i].hessian, a[i].hessian));
          CHECK(close(b[i].half, a[i].half));
          CHECK(close(b[i].cross, a[i].cross));
          CHECK(close(b[i].mean, a[i].mean));
          // Of rounded rows exactly: covariances have no negative direction, moments neither.
          SecondMoments centred = b[i];
          subtract_means(centred);
          for (const at::Tensor& h : {b[i].hessian, centred.hessian}) {
            const at::Tensor values = at::linalg_eigvalsh(h.to(at::kDouble));
            CHECK(values.min().item<double>() > -1e-6 * values.max().item<double>());
          }
          CHECK(b[i].half_share == a[i].half_share);
        }
        CHECK_FALSE(at::equal(b[0].hessian, a[0].hessian));
      }
      wide.advance(layer, {}), narrow.advance(layer, {});
      for (std::size_t b = 0; b < set.inputs.size(); ++b) {
        CHECK(narrow.input(b).scalar_type() == at::kFloat);
        CHECK(close(narrow.input(b), wide.input(b), 2e-2));
        CHECK(close(narrow.teacher(b), wide.teacher(b), 2e-2));
      }
    }
    CHECK((fingerprint(model) == before));
    CHECK(model.blocks[0].mlp.down.weight.scalar_type() == at::kFloat);
  }
}

TEST_CASE("moments of what the head reads equal those of recorded hidden states", "[quantize][sequential]") {
  const auto model = sequential_llama(2);
  const TaskData data = sequential_text(3, 40);
  const StageContext context = sequential_context(data);
  const CalibrationSet set = calibration_set(context, 3);
  SequentialCalibration calibration(*model, set, {.float64 = true});
  calibration.start();
  for (std::int64_t layer = 0; layer < 2; ++layer) calibration.advance(layer, {});
  const SecondMoments moments = calibration.moments(2, BlockPart::attention, {});
  at::NoGradGuard no_grad;
  std::vector<at::Tensor> rows;
  for (const ModelInput& input : set.inputs) rows.push_back(model->hidden(input).flatten(0, 1).to(at::kDouble));
  const at::Tensor x = at::cat(rows), expected = at::matmul(x.t(), x) / static_cast<double>(x.size(0));
  CHECK(moments.tokens == 120);
  CHECK(at::allclose(moments.hessian.to(at::kDouble), expected, 1e-5, 1e-7));
}

TEST_CASE("a teacher that goes ahead and a block that starts again", "[quantize][sequential]") {
  at::NoGradGuard no_grad;
  auto model = sequential_llama(2);
  const TaskData data = sequential_text(4, 64);
  const CalibrationSet set = calibration_set(sequential_context(data), 4);
  SequentialCalibration calibration(*model, set, {.teacher = true});
  calibration.start();
  const at::Tensor x = calibration.input(0);
  const auto original = std::map<std::string, at::Tensor>{};
  calibration.moments(0, BlockPart::down, original);
  calibration.advance_teacher(0, original);
  CHECK(at::equal(calibration.input(0), x));
  const at::Tensor target = calibration.teacher(0);
  CHECK(at::allclose(target, model->block_forward(0, x, set.inputs[0]), 1e-5, 1e-6));
  model->blocks[0].attention.value.weight = model->blocks[0].attention.value.weight * 2;
  calibration.restart_block();
  calibration.advance(0, original);
  CHECK(at::equal(calibration.teacher(0), target));
  CHECK(at::allclose(calibration.input(0), model->block_forward(0, x, set.inputs[0]), 1e-5, 1e-6));
  CHECK(!at::allclose(calibration.input(0), target, 1e-3, 1e-3));
}

TEST_CASE("one and two threads, activations on disk and weights in a file give the same bytes", "[quantize][sequential]") {
  const int before = at::get_num_threads();
  const TaskData data = sequential_text(5, 600);
  const auto original = sequential_llama(2);
  const TemporaryFolder work;
  save_model(*original, work.path() / "model");
  for (const auto& [method, precision] : {std::pair{"gptq", "float32"}, {"trifit", "float32"}, {"trifit", "bf16"}}) {
    std::string expected;
    for (const int variant : {0, 1, 2, 3}) {
      at::set_num_threads(variant == 1 ? 2 : 1);
      std::shared_ptr<Transformer> model = variant == 3 ? load_model_paged(work.path() / "model", work.path()) : original->clone();
      CHECK(is_paged(model->tokens.weight) == (variant == 3));
      StageContext context = sequential_context(data);
      QuantizeOptions options = sequential_options("four_level", method);
      options.embedding = "int4";  // calibrated as the output matrix, behind the last block
      options.calibration_precision = precision;
      if (variant == 2) options.spill = true, context.work = work.path() / "spill";
      const QuantizedModel result = quantize(*model, options, {}, context);
      const std::string bytes = sequential_bytes(*model, result);
      CAPTURE(method, precision, variant);
      if (variant == 0) expected = bytes;
      CHECK((bytes == expected));
      CHECK(is_paged(model->tokens.weight) == (variant == 3));
      CHECK(is_paged(model->blocks[1].mlp.down.weight) == (variant == 3));
    }
  }
  at::set_num_threads(before);
}

TEST_CASE("a run that is killed after a block goes on to the same bytes", "[quantize][sequential]") {
  const TaskData data = sequential_text(4, 128);
  const auto original = sequential_llama(4);
  QuantizeOptions options = sequential_options("ternary", "trifit");
  options.embedding = "int4";  // calibrated as the output matrix, behind the last block
  std::string whole;
  {
    auto model = original->clone();
    StageContext context = sequential_context(data);
    const QuantizedModel result = quantize(*model, options, {}, context);
    whole = sequential_bytes(*model, result);
  }
  const TemporaryFolder work;
  StageContext context = sequential_context(data);
  context.work = work.path();
  {
    auto model = original->clone();
    // Leaves as soon as the record of the second block is on disk.
    std::thread watcher([&] {
      for (int i = 0; i < 60000 && !std::filesystem::exists(work.path() / "block-0001"); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      request_interrupt(SIGTERM);
    });
    try {
      quantize(*model, options, {}, context);
      // Too fast to be caught: records of the last blocks are taken away instead.
      std::filesystem::remove_all(work.path() / "block-0003");
    } catch (const Error& error) {
      CHECK(error.code() == ExitCode::terminated);
    }
    watcher.join();
    request_interrupt(0);
  }
  CHECK(std::filesystem::exists(work.path() / "block-0001"));
  CHECK(!std::filesystem::exists(work.path() / "block-0003"));
  context.resume = true;
  Json details = Json::object();
  context.details = &details;
  auto model = original->clone();
  const QuantizedModel result = quantize(*model, options, {}, context);
  CHECK((sequential_bytes(*model, result) == whole));
  CHECK(details.at("layers").size() == 4 * 7 + 1);
  // Records of other options or another set are refused, and say what differs.
  auto other = original->clone();
  options.polish_rounds = 3;
  CHECK(contains_all(error_text([&] { quantize(*other, options, {}, context); }), {"another run", "options"}));
}

TEST_CASE("activations in memory and in a file", "[quantize][sequential]") {
  const TemporaryFolder folder;
  for (const bool file : {false, true}) {
    Activations values(file ? folder.path() : std::filesystem::path());
    values.resize(3);
    CHECK(!values.get(0).defined());
    const at::Tensor a = at::randn({2, 5}), b = at::randn({3, 7}), c = at::randn({0, 4});
    values.put(0, a), values.put(2, b.t()), values.put(1, c);
    CHECK(at::equal(values.get(0), a));
    CHECK(at::equal(values.get(2), b.t()));
    CHECK(values.get(1).sizes().vec() == std::vector<std::int64_t>{0, 4});
    values.put(0, a * 2), values.drop(2);
    CHECK(at::equal(values.get(0), a * 2));
    CHECK(!values.get(2).defined());
    values.put(2, a);
    CHECK(at::equal(values.get(2), a));
    CHECK(at::equal(values.get(0), a * 2));
  }
}

TEST_CASE("a bias takes the mean error of its layer", "[quantize][sequential]") {
  at::NoGradGuard no_grad;
  const TaskData data = sequential_examples(40);
  const auto original = sequential_bert();
  const CalibrationSet set = calibration_set(sequential_context(data), 40);
  double error[2];
  for (const bool correct : {false, true}) {
    auto model = original->clone();
    QuantizeOptions options = sequential_options("ternary", "gptq");
    options.bias_correction = correct, options.embedding = "none";
    Json details = Json::object();
    StageContext context = sequential_context(data);
    context.details = &details;
    quantize(*model, options, {}, context);
    const Json& row = details.at("layers")[5];  // output.dense... of the first block
    CHECK(row.contains("bias_shift") == correct);
    // The first linear sees the same inputs in both models: with the correction its mean output is that of the float model.
    const Linear &before = original->blocks[0].attention.query, &after = model->blocks[0].attention.query;
    CHECK(at::equal(before.bias, after.bias) == !correct);
    const at::Tensor mean = recorded_inputs(*original, set, before.name, 0, set.inputs.size()).mean(0).to(at::kFloat);
    const double drift = (at::linear(mean, after.weight, after.bias) - at::linear(mean, before.weight, before.bias)).norm().item<double>();
    CHECK((drift < 1e-5) == correct);
    double sum = 0;
    for (const ModelInput& input : set.inputs) sum += (model->hidden(input) - original->hidden(input)).square().mean().item<double>();
    error[correct] = sum;
  }
  std::printf("hidden states of a ternary encoder: error %.5f, with bias correction %.5f\n", error[0], error[1]);
  CHECK(error[1] < error[0]);
}

TEST_CASE("the report tells when the two halves of the calibration set disagree", "[quantize][sequential]") {
  at::NoGradGuard no_grad;
  at::manual_seed(3);
  const at::Tensor w = at::randn({40, 64});
  const GridSpec spec{find_grid("ternary"), 32};
  // The method saw one half only and the other lives in other directions.
  const auto spread = [](std::int64_t live) {
    at::Tensor scale = at::full({64}, 0.05);
    scale.slice(0, live, live + 32).fill_(1);
    const at::Tensor x = at::matmul(at::randn({4000, 8}), at::randn({8, 64})) * scale + 0.1 * at::randn({4000, 64}) * scale;
    return at::matmul(x.t(), x) / 4000;
  };
  const at::Tensor first = spread(0), second = spread(32);
  LayerOptions options;
  options.polish_rounds = 4;
  for (const bool same : {true, false}) {
    SecondMoments moments;
    moments.half = first, moments.half_tokens = 100, moments.tokens = 200, moments.half_share = 0.5;
    moments.hessian = same ? first : 0.5 * (first + 0.001 * second);
    const LayerResult result = quantize_trifit({w, first, {}, {}}, spec, options);
    Json row = describe_layer("layer", spec, w, result.quantized);
    describe_output(row, spec, w, result, moments);
    CAPTURE(row.dump());
    CHECK(row.at("output_error").get<double>() == Approx(output_error(w, decode(spec, result.quantized), moments.hessian)).epsilon(1e-4));
    CHECK(row.at("rounding_error").get<double>() == Approx(output_error(w.slice(0, 0, 40), decode(spec, encode(spec, w)), moments.hessian)).epsilon(0.3));
    CHECK(halves_disagree(row) == !same);
    CHECK(contains_all(layer_table(Json::array({row})), {"layer", "ternary", "halves"}));
  }
}

TEST_CASE("label smoothing that no loss would see is refused", "[quantize][sequential]") {
  auto model = sequential_llama(1);
  const TaskData data = sequential_text(2, 16);
  StageContext context = sequential_context(data);
  QuantizeOptions options = sequential_options("ternary", "qad");
  options.train.label_smoothing = 0.1;
  CHECK(contains_all(error_text([&] { quantize(*model, options, {label_cross_entropy()}, context); }), {"label_smoothing", "0.1", "quantize.objective"}));
}

}  // namespace kompakt
