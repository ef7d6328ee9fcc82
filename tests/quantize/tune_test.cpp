// Tuning by gradients on the grid: latents and their gradients, and blocks tuned towards the float block's output.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include "tests/catch_torch.h"
#include <cmath>
#include <map>

#include "core/files.h"
#include "quantize/block_tune.h"
#include "quantize/latent.h"
#include "tests/tiny_models.h"

namespace kompakt {
namespace {

at::Tensor tune_normal(std::initializer_list<std::int64_t> shape, const char* stream, double scale = 1) {
  at::Tensor out = at::empty(shape, at::kFloat);
  const CounterRandom random(5, stream);
  for (std::int64_t i = 0; i < out.numel(); ++i) out.data_ptr<float>()[i] = static_cast<float>(scale * random.normal(static_cast<std::uint64_t>(i)));
  return out;
}

bool tune_same(const Quantized& a, const Quantized& b) {
  return at::equal(a.codes, b.codes) && at::equal(a.scales, b.scales) && a.offsets.defined() == b.offsets.defined() && (!a.offsets.defined() || at::equal(a.offsets, b.offsets));
}

// The first block of a small llama, rounded to `spec`, with what flows into it and what should come out.
struct TuneProblem {
  std::unique_ptr<Transformer> model;
  CalibrationSet set;
  std::vector<at::Tensor> inputs, targets;
  std::map<std::string, at::Tensor> original;
  QuantizationPlan plan;
  std::map<std::string, Quantized> quantized;
};

TuneProblem tune_problem(const GridSpec& spec, std::uint64_t seed = 3, bool encoder = false) {
  at::NoGradGuard no_grad;
  TuneProblem p;
  p.model = encoder ? testing::tiny_encoder(seed) : testing::tiny_decoder(seed);
  TaskData data = encoder ? testing::tiny_classification(24, seed) : testing::tiny_text(seed);
  StageContext context;
  context.data = &data;
  p.set = calibration_set(context, 24);
  for (const ModelInput& input : p.set.inputs) {
    p.inputs.push_back(p.model->embed(input));
    p.targets.push_back(p.model->block_forward(0, p.inputs.back(), input));
  }
  const std::size_t count = p.model->linears().size() / p.model->blocks.size();
  for (std::size_t i = 0; i < count; ++i) {
    Linear* linear = p.model->linears()[i];
    p.original[linear->name + ".weight"] = linear->weight;
    p.plan.tensors[linear->name] = spec;
    p.quantized[linear->name] = encode(spec, linear->weight);
    linear->weight = decode(spec, p.quantized[linear->name]);
  }
  return p;
}

BlockTuneResult tune_run(TuneProblem& p, const BlockTuneOptions& options, const std::vector<at::Tensor>* weights = nullptr, const at::Tensor& metric = {}) {
  const BlockActivations activations{[&](std::size_t b) { return p.inputs[b]; }, [&](std::size_t b) { return p.targets[b]; }, weights, metric};
  return tune_block(*p.model, 0, p.set, activations, p.original, p.plan, options, 11, p.quantized);
}

}  // namespace

TEST_CASE("a latent starts exactly on its codes, whatever grid, method and margin", "[quantize][tune]") {
  for (const Grid& grid : grids()) {
    if (grid.levels || grid.kquant) continue;  // uneven levels have no latents, tied scales neither
    CAPTURE(grid.name);
    const GridSpec spec{&grid, grid.default_group};
    at::Tensor weight = tune_normal({6, 256}, "latent", 0.1);
    weight[2].zero_();
    Quantized start = encode(spec, weight);
    // Codes of another method: not the nearest ones.
    const at::Tensor moved = (start.codes.to(at::kFloat) + tune_normal({6, 256}, "moved", 0.4).round()).clamp(grid.code_min, grid.code_max);
    for (const bool nearest : {true, false}) {
      if (!nearest) start.codes = moved.to(at::kChar);
      for (const double margin : {0.0, 0.3, 0.49}) {
        const LatentGrid latent = latent_grid(spec, start);
        const LatentValues values = latent_start(latent, weight, start.codes, margin);
        CHECK(tune_same(latent_codes(latent, values), start));
        CHECK(at::equal(latent_weight(latent, values), decode(spec, start)));
      }
    }
  }
}

TEST_CASE("what a latent computes is what is stored, also after it has moved", "[quantize][tune]") {
  for (const Grid& grid : grids()) {
    if (grid.levels || grid.kquant) continue;  // uneven levels have no latents, tied scales neither
    CAPTURE(grid.name);
    const GridSpec spec{&grid, grid.default_group};
    const at::Tensor weight = tune_normal({4, 256}, "stored", 0.1);
    const Quantized start = encode(spec, weight);
    const LatentGrid latent = latent_grid(spec, start);
    LatentValues values = latent_start(latent, weight, start.codes, 0.3);
    values.codes += tune_normal({4, 256}, "walk", 1.0);
    values.scale_factor += tune_normal({4, start.scales.size(1)}, "factor", 0.05);
    if (values.offset_shift.defined()) values.offset_shift += tune_normal({4, start.scales.size(1)}, "shift", 0.2);
    QuantizedModel model;
    model.plan.tensors["w"] = spec;
    model.tensors["w"] = latent_codes(latent, values);
    CHECK(at::equal(decode(spec, model.tensors["w"]), latent_weight(latent, values)));
    const TemporaryFolder folder;
    save_quantized(model, folder.path());  // refuses scales that are not halves and offsets that are no multiples
    CHECK(tune_same(load_quantized(folder.path()).tensors.at("w"), model.tensors["w"]));
  }
}

TEST_CASE("straight-through gradients: exact in scales and offsets, the scale in codes, a wall at the ends", "[quantize][tune]") {
  for (const char* name : {"ternary", "q2_0", "int4_asym", "q4_1"}) {
    CAPTURE(name);
    const GridSpec spec{find_grid(name), find_grid(name)->default_group};
    const at::Tensor weight = tune_normal({3, 128}, "double").to(at::kDouble), outer = tune_normal({3, 128}, "outer").to(at::kDouble);
    LatentGrid grid = latent_grid(spec, encode(spec, weight.to(at::kFloat)));
    for (at::Tensor* t : {&grid.scales, &grid.zeros, &grid.minima})
      if (t->defined()) *t = t->to(at::kDouble);
    LatentValues values = latent_start(grid, weight, encode(spec, weight.to(at::kFloat)).codes, 0.3);
    values.scale_factor += 0.05 * tune_normal({3, grid.scales.size(1)}, "factor").to(at::kDouble);
    const auto loss = [&] { return (latent_weight(grid, values) * outer).sum(); };

    const LatentValues gradient = latent_gradients(grid, values, outer);
    for (const bool shift : {false, true}) {
      at::Tensor& value = shift ? values.offset_shift : values.scale_factor;
      if (!value.defined()) continue;
      for (std::int64_t r = 0; r < value.size(0); ++r)
        for (std::int64_t g = 0; g < value.size(1); ++g) {
          const double step = 1e-5, here = value[r][g].item<double>();
          value[r][g] = here + step;
          const double up = loss().item<double>();
          value[r][g] = here - step;
          const double down = loss().item<double>();
          value[r][g] = here;
          CHECK((shift ? gradient.offset_shift : gradient.scale_factor)[r][g].item<double>() == Approx((up - down) / (2 * step)).epsilon(1e-7).margin(1e-9));
        }
    }
    // In the codes: the gradient of the same function without rounding, finite differences of s c - s z (+ m), inside of the walls.
    const std::int64_t group = 128 / grid.scales.size(1);
    const double low = spec.grid->code_min, high = spec.grid->code_max;
    std::int64_t stopped = 0;
    for (std::int64_t r = 0; r < 3; ++r)
      for (std::int64_t k = 0; k < 128; ++k) {
        const double latent = values.codes[r][k].item<double>(), slope = (grid.scales * values.scale_factor)[r][k / group].item<double>() * outer[r][k].item<double>();
        const bool out = (latent < low && slope > 0) || (latent > high && slope < 0);
        stopped += out;
        CHECK(gradient.codes[r][k].item<double>() == Approx(out ? 0.0 : slope).epsilon(1e-12));
      }
    CHECK(stopped > 0);
    // The autograd function gives the same, and nothing for what does not learn.
    for (at::Tensor* t : {&values.codes, &values.scale_factor, &values.offset_shift})
      if (t->defined()) t->requires_grad_(true);
    std::vector<at::Tensor> inputs = {values.codes, values.scale_factor};
    if (values.offset_shift.defined()) inputs.push_back(values.offset_shift);
    const auto automatic = torch::autograd::grad({loss()}, inputs);
    CHECK(at::equal(automatic[0], gradient.codes));
    CHECK(at::equal(automatic[1], gradient.scale_factor));
    if (values.offset_shift.defined()) CHECK(at::equal(automatic[2], gradient.offset_shift));
    values.codes = values.codes.detach();
    CHECK(at::equal(torch::autograd::grad({loss()}, {values.scale_factor})[0], gradient.scale_factor));
  }
}

TEST_CASE("block tuning lowers the block's error on every grid and stays on it", "[quantize][tune]") {
  bool differs = false, guarded = false;
  for (const Grid& grid : grids()) {
    if (grid.levels || grid.kquant || (grid.group_fixed && grid.default_group > 8)) continue;  // rows of 24 and 40; the same code as their free twins
    CAPTURE(grid.name);
    const GridSpec spec{&grid, 8};
    TuneProblem p = tune_problem(spec);
    BlockTuneOptions options;
    options.iterations = 40, options.batch = 4, options.evaluate_every = 10;
    const BlockTuneResult result = tune_run(p, options);
    CHECK(result.after <= result.before);
    TuneProblem low = tune_problem(spec);  // passes under autocast: another path to an error as small, scored in float32
    options.precision = "bf16";
    const BlockTuneResult rounded = tune_run(low, options);
    // Codes of eight bits are wrong by as little as bfloat16 is: those blocks learn in float32, to the same result.
    if (!rounded.bf16) CHECK(rounded.after == result.after);
    if (grid.name == "int8") CHECK_FALSE(rounded.bf16);
    guarded = guarded || !rounded.bf16;
    if (grid.code_max - grid.code_min < 16) CHECK(rounded.bf16);
    CHECK(rounded.before == result.before);
    if (grid.code_max - grid.code_min < 16) CHECK(rounded.after < 0.9 * rounded.before);
    differs = differs || rounded.after != result.after;
    if (grid.code_max - grid.code_min < 16) CHECK(result.after < 0.9 * result.before);
    QuantizedModel saved;
    saved.plan = p.plan, saved.tensors = p.quantized;
    const TemporaryFolder folder;
    save_quantized(saved, folder.path());
    const QuantizedModel loaded = load_quantized(folder.path());
    double error = 0, values = 0;
    for (const auto& [name, q] : loaded.tensors) CHECK(at::equal(p.model->find_linear(name)->weight, decode(spec, q)));
    at::NoGradGuard no_grad;
    for (std::size_t b = 0; b < p.set.inputs.size(); ++b) {
      const at::Tensor difference = p.model->block_forward(0, p.inputs[b], p.set.inputs[b]) - p.targets[b];
      error += difference.square().sum(at::kDouble).item<double>(), values += static_cast<double>(difference.numel());
    }
    CHECK(error / values == Approx(result.after).epsilon(1e-4));
  }
  CHECK(differs);
  CHECK(guarded);
}

TEST_CASE("tokens count by their weights: all one as without, padded or not, and those that count nothing do not matter", "[quantize][tune]") {
  const GridSpec spec{find_grid("ternary"), 8};
  BlockTuneOptions options;
  options.iterations = 40, options.batch = 4, options.evaluate_every = 10;
  for (const bool encoder : {false, true}) {
    CAPTURE(encoder);
    TuneProblem plain = tune_problem(spec, 3, encoder), same = tune_problem(spec, 3, encoder), some = tune_problem(spec, 3, encoder);
    std::vector<at::Tensor> ones, half;
    for (std::size_t b = 0; b < plain.set.inputs.size(); ++b) {
      const std::int64_t tokens = plain.set.valid[b].defined() ? plain.set.valid[b].numel() : plain.set.inputs[b].ids.numel();
      ones.push_back(at::ones({tokens}));
      half.push_back(at::arange(tokens).remainder(2).to(at::kFloat) * 2);
    }
    const BlockTuneResult without = tune_run(plain, options), with = tune_run(same, options, &ones), odd = tune_run(some, options, &half);
    CHECK(with.after == Approx(without.after).epsilon(1e-5));
    for (const auto& [name, q] : plain.quantized) CHECK(tune_same(q, same.quantized.at(name)));
    // On the tokens that count, codes chosen for them do better than codes chosen for all.
    const auto error_of_odd = [&](const TuneProblem& p) {
      at::NoGradGuard no_grad;
      double error = 0, values = 0;
      for (std::size_t b = 0; b < p.set.inputs.size(); ++b) {
        at::Tensor squares = (p.model->block_forward(0, p.inputs[b], p.set.inputs[b]) - p.targets[b]).square().sum(2).flatten();
        if (p.set.valid[b].defined()) squares = squares.index_select(0, p.set.valid[b]);
        error += (squares * half[b]).sum(at::kDouble).item<double>(), values += static_cast<double>(squares.numel() * p.inputs[b].size(2));
      }
      return error / values;
    };
    CHECK(odd.after == Approx(error_of_odd(some)).epsilon(1e-4));
    CHECK(odd.after < error_of_odd(plain));
  }
}

TEST_CASE("errors count by the metric of the block's output: the identity as without, and directions that cost nothing do not matter", "[quantize][tune]") {
  const GridSpec spec{find_grid("ternary"), 8};
  BlockTuneOptions options;
  options.iterations = 40, options.batch = 4, options.evaluate_every = 10;
  for (const bool encoder : {false, true}) {
    CAPTURE(encoder);
    TuneProblem plain = tune_problem(spec, 3, encoder), same = tune_problem(spec, 3, encoder), some = tune_problem(spec, 3, encoder);
    const std::int64_t width = plain.inputs[0].size(2);
    const at::Tensor half = tune_normal({width, width / 2}, "directions"), metric = at::matmul(half, half.t()) / static_cast<double>(width);
    const BlockTuneResult without = tune_run(plain, options), with = tune_run(same, options, nullptr, at::eye(width)), low = tune_run(some, options, nullptr, metric);
    CHECK(with.after == Approx(without.after).epsilon(1e-5));
    const auto error = [&](const TuneProblem& p) {
      at::NoGradGuard no_grad;
      double sum = 0, values = 0;
      for (std::size_t b = 0; b < p.set.inputs.size(); ++b) {
        at::Tensor e = (p.model->block_forward(0, p.inputs[b], p.set.inputs[b]) - p.targets[b]).reshape({-1, width}).to(at::kDouble);
        if (p.set.valid[b].defined()) e = e.index_select(0, p.set.valid[b]);
        sum += at::matmul(e, half.to(at::kDouble)).square().sum().item<double>() / static_cast<double>(width), values += static_cast<double>(e.numel());
      }
      return sum / values;
    };
    CHECK(low.after == Approx(error(some)).epsilon(1e-4));
    CHECK(low.after < error(plain));
  }
}

TEST_CASE("no step and no better codes leave the start as it was", "[quantize][tune]") {
  const GridSpec spec{find_grid("ternary"), 8};
  for (const std::int64_t iterations : {0, 3}) {
    TuneProblem p = tune_problem(spec);
    const auto before = p.quantized;
    BlockTuneOptions options;
    options.iterations = iterations;
    if (iterations > 0) options.learning_rate = 1;  // leaps from wall to wall
    options.evaluate_every = 1;
    const BlockTuneResult result = tune_run(p, options);
    if (iterations == 0 || result.best_iteration == 0) {
      CHECK(result.after == result.before);
      for (const auto& [name, q] : before) CHECK(tune_same(q, p.quantized.at(name)));
    }
    CHECK(result.after <= result.before);
  }
}

TEST_CASE("block tuning does not depend on threads, nor on what stands in the padding", "[quantize][tune]") {
  const GridSpec spec{find_grid("four_level"), 8};
  BlockTuneOptions options;
  options.iterations = 12, options.batch = 5, options.evaluate_every = 4;
  std::vector<std::map<std::string, Quantized>> results;
  for (const int variant : {1, 2, 3}) {
    at::set_num_threads(variant == 2 ? 2 : 1);
    TuneProblem p = tune_problem(spec, 3, true);
    if (variant == 3) {
      at::NoGradGuard no_grad;
      for (std::size_t b = 0; b < p.set.inputs.size(); ++b) {
        if (!p.set.inputs[b].lengths.defined()) continue;
        const at::Tensor padding = at::arange(p.inputs[b].size(1)).ge(p.set.inputs[b].lengths.unsqueeze(1)).unsqueeze(2);
        for (at::Tensor* t : {&p.inputs[b], &p.targets[b]}) *t = t->masked_fill(padding, 7.0);
      }
    }
    tune_run(p, options);
    results.push_back(p.quantized);
  }
  at::set_num_threads(1);
  for (const auto& [name, q] : results[0]) {
    CHECK(tune_same(q, results[1].at(name)));
    CHECK(tune_same(q, results[2].at(name)));
  }
}

}  // namespace kompakt
