// Sign descent over the latents of one block. A step's sequences are cut into pieces that run beside each other, one a thread,
// so that no sum depends on the number of threads.
#include "quantize/block_tune.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <functional>
#include <numeric>

#include "core/random.h"
#include "core/system.h"
#include "model/parallel.h"
#include "quantize/code_price.h"
#include "quantize/latent.h"
#include "train/precision.h"

namespace kompakt {
namespace {

constexpr std::int64_t tune_piece_tokens = 2048;  // activations of a piece stay small beside the weights
constexpr double tune_rounding = 0.05;            // share of a block's error that bfloat16 may change it by
constexpr double tune_reach = 0.5;                // of a latent, in codes: a rounding can change by one
constexpr double tune_factor_low = 0.5, tune_factor_high = 1.5;

// work(0), ..., work(count - 1), each on one thread.
void tune_each(c10::Device device, std::size_t count, const std::function<void(std::size_t)>& work) {
  const auto range = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) work(static_cast<std::size_t>(i));
  };
  const auto all = static_cast<std::int64_t>(count);
  if (!device.is_cpu()) return range(0, all);
  const int threads = at::get_num_threads();
  if (count == 1) at::set_num_threads(1);  // a single task would use all of them inside
  at::parallel_for(0, all, 1, range);
  if (count == 1) at::set_num_threads(threads);
}

class BlockTuner {
 public:
  BlockTuner(Transformer& model, std::int64_t layer, const CalibrationSet& set, const BlockActivations& activations, const BlockTuneOptions& options, std::uint64_t seed)
      : model_(model), layer_(layer), set_(set), activations_(activations), options_(options), random_(seed, "block-tune/" + std::to_string(layer)) {
    for (std::size_t b = 0; b < set.inputs.size(); ++b) {
      for (std::int64_t row = 0; row < set.inputs[b].ids.size(0); ++row) sequences_.push_back({b, row});
      if (activations.weights) weights_.push_back(laid_out(b));
    }
  }

  BlockTuneResult run(const std::map<std::string, at::Tensor>& original, const QuantizationPlan& plan, std::map<std::string, Quantized>& quantized) {
    for (const BlockPart part : block_parts)
      for (Linear* linear : part_linears(model_.blocks[static_cast<std::size_t>(layer_)], part)) {
        const auto found = quantized.find(linear->name);
        if (found == quantized.end() || plan.tensors.at(linear->name).grid->levels || plan.tensors.at(linear->name).grid->kquant) continue;
        Slot slot{linear, latent_grid(plan.tensors.at(linear->name), found->second), {}, {}, &found->second};
        slot.values = latent_start(slot.grid, original.at(linear->name + ".weight"), found->second.codes, options_.margin);
        slot.base = slot.values.codes.clone();
        if (slot.grid.spec.grid->entropy_coded()) start_bytes_ += stored_bytes(slot.grid.spec, found->second);
        slots_.push_back(std::move(slot));
      }
    BlockTuneResult result;
    if (slots_.empty()) return result;
    result.before = result.after = full_loss(candidate());
    bf16_ = result.bf16 = options_.iterations > 0 && use_bf16(options_.precision, model_.device()) && rounding_is_small();
    std::vector<Quantized> best;
    for (std::int64_t i = 0; i < options_.iterations; ++i) {
      check_interrupted();
      step(i);
      if ((i + 1) % options_.evaluate_every != 0 && i + 1 != options_.iterations) continue;
      std::vector<Quantized> tried = candidate();
      if (tried.empty()) continue;
      const double loss = full_loss(tried);
      if (!(loss < result.after)) continue;
      result.after = loss, result.best_iteration = i + 1;
      best = std::move(tried);
    }
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      if (!best.empty()) *slots_[i].quantized = std::move(best[i]);
      slots_[i].linear->weight = decode(slots_[i].grid.spec, *slots_[i].quantized);
    }
    return result;
  }

 private:
  struct Slot {
    Linear* linear;
    LatentGrid grid;
    LatentValues values;
    at::Tensor base;  // latents at the start
    Quantized* quantized;
  };
  struct Sequence {
    std::size_t batch;
    std::int64_t row;
  };
  struct Piece {
    ModelInput input;
    at::Tensor x, target, weight;  // [r,T,d]; weight [r,T,1], 0 where padding is, or undefined = all 1
    double values = 0;             // scored numbers
  };

  // The tokens' weights where the tokens stand: [B,T], 0 where padding is.
  at::Tensor laid_out(std::size_t b) const {
    const at::Tensor& weights = (*activations_.weights)[b];
    const at::IntArrayRef shape = set_.inputs[b].ids.sizes();
    if (!set_.valid[b].defined()) return weights.view(shape);
    return at::zeros({shape[0] * shape[1]}, weights.options()).index_copy_(0, set_.valid[b], weights).view(shape);
  }

  // Rows of equal length side by side, at least two pieces where there are two rows.
  std::vector<Piece> pieces(std::vector<std::int64_t> rows) const {
    const auto length = [&](std::int64_t s) { return set_.inputs[sequences_[static_cast<std::size_t>(s)].batch].ids.size(1); };
    std::sort(rows.begin(), rows.end());
    std::stable_sort(rows.begin(), rows.end(), [&](std::int64_t a, std::int64_t b) { return length(a) < length(b); });
    const std::int64_t half = (static_cast<std::int64_t>(rows.size()) + 1) / 2;
    std::vector<Piece> out;
    for (std::size_t first = 0; first < rows.size();) {
      const std::int64_t columns = length(rows[first]), most = std::min(half, std::max<std::int64_t>(1, tune_piece_tokens / columns));
      std::size_t end = first;
      while (end < rows.size() && static_cast<std::int64_t>(end - first) < most && length(rows[end]) == columns) ++end;
      out.push_back(piece({rows.begin() + static_cast<std::ptrdiff_t>(first), rows.begin() + static_cast<std::ptrdiff_t>(end)}));
      first = end;
    }
    return out;
  }

  Piece piece(const std::vector<std::int64_t>& rows) const {
    std::vector<at::Tensor> ids, x, target, lengths, weights;
    bool padded = false;
    for (const std::int64_t s : rows) {
      const auto& [b, row] = sequences_[static_cast<std::size_t>(s)];
      const ModelInput& input = set_.inputs[b];
      TORCH_CHECK(!input.documents.defined() && !input.positions.defined(), "calibration sequences hold one document each");
      ids.push_back(input.ids[row]), x.push_back(activations_.input(b)[row]), target.push_back(activations_.target(b)[row]);
      padded = padded || input.lengths.defined();
      lengths.push_back(input.lengths.defined() ? input.lengths[row] : at::full({}, input.ids.size(1), input.ids.options()));
      if (!weights_.empty()) weights.push_back(weights_[b][row]);
    }
    Piece out;
    out.input.ids = at::stack(ids), out.x = at::stack(x), out.target = at::stack(target);
    out.values = static_cast<double>(out.x.numel());
    if (!weights.empty()) out.weight = at::stack(weights).unsqueeze(2);
    if (!padded) return out;
    out.input.lengths = at::stack(lengths);
    const at::Tensor valid = at::arange(out.x.size(1), lengths[0].options()).lt(out.input.lengths.unsqueeze(1)).unsqueeze(2);
    out.values = valid.sum().item<double>() * static_cast<double>(out.x.size(2));
    if (!out.weight.defined()) out.weight = valid.to(out.x.scalar_type());
    return out;
  }

  at::Tensor square_error(const Piece& piece, bool bf16) const {
    at::Tensor output;
    {
      const AutocastGuard autocast(model_.device(), bf16);
      output = model_.block_forward(layer_, piece.x, piece.input);
    }
    at::Tensor error = output - piece.target;
    error = activations_.metric.defined() ? error * at::matmul(error, activations_.metric) : error.square();
    return (piece.weight.defined() ? error * piece.weight : error).sum();
  }

  // What the latents stand for. Codes that are stored by their entropy take no more bytes together than the method's did; empty where that
  // cannot be had.
  std::vector<Quantized> candidate() const {
    std::vector<Quantized> out;
    std::vector<PricedMatrix> matrices;
    for (const Slot& slot : slots_) {
      out.push_back(latent_codes(slot.grid, slot.values));
      if (slot.grid.spec.grid->entropy_coded()) matrices.push_back({slot.grid.spec, slot.values.codes, slot.grid.scales});
    }
    if (matrices.empty()) return out;
    PricedCodes priced = codes_within(matrices, start_bytes_);
    if (priced.bytes > start_bytes_) return {};
    std::size_t next = 0;
    for (std::size_t i = 0; i < slots_.size(); ++i)
      if (slots_[i].grid.spec.grid->entropy_coded()) out[i].codes = std::move(priced.codes[next++]);
    return out;
  }

  // Of the start's codes, on the first step's sequences. Where bfloat16 rounds by about as much as the codes are wrong (those of eight bits, a few
  // enormous activations), steps would follow the noise.
  bool rounding_is_small() {
    const std::vector<Piece> some = pieces(draw(0));
    const double error = summed_error(some, false);
    return std::abs(summed_error(some, true) - error) <= tune_rounding * error;
  }

  double summed_error(const std::vector<Piece>& some, bool bf16) const {
    std::vector<double> errors(some.size());
    tune_each(model_.device(), some.size(), [&](std::size_t i) {
      at::NoGradGuard no_grad;
      errors[i] = square_error(some[i], bf16).item<double>();
    });
    return std::accumulate(errors.begin(), errors.end(), 0.0);
  }

  // Over the whole calibration set.
  double full_loss(const std::vector<Quantized>& codes) {
    for (std::size_t i = 0; i < slots_.size(); ++i) slots_[i].linear->weight = decode(slots_[i].grid.spec, codes[i]);
    std::vector<std::int64_t> all(sequences_.size());
    std::iota(all.begin(), all.end(), 0);
    // Pieces are made inside, one a thread: the set is never copied as a whole.
    const std::size_t chunk = std::max<std::size_t>(2, static_cast<std::size_t>(options_.batch));
    double error = 0, values = 0;
    for (std::size_t first = 0; first < all.size(); first += chunk) {
      const std::vector<Piece> some = pieces({all.begin() + static_cast<std::ptrdiff_t>(first), all.begin() + static_cast<std::ptrdiff_t>(std::min(all.size(), first + chunk))});
      error += summed_error(some, false);
      for (const Piece& piece : some) values += piece.values;
    }
    return error / std::max(1.0, values);
  }

  void step(std::int64_t iteration) {
    std::vector<at::Tensor> weights;
    for (Slot& slot : slots_) {
      at::NoGradGuard no_grad;
      slot.linear->weight = latent_weight(slot.grid, slot.values).requires_grad_(true);
      weights.push_back(slot.linear->weight);
    }
    const std::vector<Piece> some = pieces(draw(iteration));
    double values = 0;
    for (const Piece& piece : some) values += piece.values;
    std::vector<std::vector<at::Tensor>> gradients(some.size());
    tune_each(model_.device(), some.size(), [&](std::size_t i) {
      const at::AutoGradMode gradient(true);
      gradients[i] = torch::autograd::grad({square_error(some[i], bf16_) / std::max(1.0, values)}, weights);
    });
    const double start = options_.learning_rate > 0 ? options_.learning_rate : 1.0 / static_cast<double>(options_.iterations);
    const double rate = start * (1.0 - static_cast<double>(iteration) / static_cast<double>(options_.iterations));
    at::NoGradGuard no_grad;
    for (std::size_t s = 0; s < slots_.size(); ++s) {
      at::Tensor sum = gradients[0][s];
      for (std::size_t i = 1; i < gradients.size(); ++i) sum.add_(gradients[i][s]);
      Slot& slot = slots_[s];
      const LatentValues gradient = latent_gradients(slot.grid, slot.values, sum);
      slot.values.codes.sub_(gradient.codes.sign(), rate);
      at::maximum_out(slot.values.codes, slot.values.codes, slot.base - tune_reach);
      at::minimum_out(slot.values.codes, slot.values.codes, slot.base + tune_reach);
      slot.values.scale_factor.sub_(gradient.scale_factor.sign(), rate).clamp_(tune_factor_low, tune_factor_high);
      if (slot.values.offset_shift.defined()) slot.values.offset_shift.sub_(gradient.offset_shift.sign(), rate).clamp_(-tune_reach, tune_reach);
    }
  }

  // Sequences of a step: successive cuts of permutations, so that all are seen equally often.
  std::vector<std::int64_t> draw(std::int64_t iteration) {
    const auto count = static_cast<std::int64_t>(sequences_.size()), batch = std::min(options_.batch, count), per_round = count / batch;
    if (iteration % per_round == 0) order_ = CounterRandom(random_.key(), "round/" + std::to_string(iteration / per_round)).permutation(count);
    const std::int64_t first = iteration % per_round * batch;
    return {order_.begin() + first, order_.begin() + first + batch};
  }

  Transformer& model_;
  const std::int64_t layer_;
  const CalibrationSet& set_;
  const BlockActivations& activations_;
  const BlockTuneOptions& options_;
  const CounterRandom random_;
  std::vector<Sequence> sequences_;
  std::vector<at::Tensor> weights_;  // by batch [B,T]; empty = tokens count the same
  std::vector<Slot> slots_;
  std::vector<std::int64_t> order_;
  bool bf16_ = false;             // of the passes that learn
  std::int64_t start_bytes_ = 0;  // of the entropy-coded matrices
};

}  // namespace

void fields(FieldVisitor& visitor, BlockTuneOptions& options) {
  visitor.integer("iterations", options.iterations, "steps of sign descent per block; 0 = off", {.min = 0, .max = 100000});
  visitor.integer("batch", options.batch, "calibration sequences per step", {.min = 1});
  visitor.number("learning_rate", options.learning_rate, "first step of latents and scale factors, falling linearly to 0; 0 = 1 / iterations", {.min = 0, .max = 1});
  visitor.number("margin", options.margin, "how far from its code, in codes, a latent may start; 0.49 = almost where the float weight lies", {.min = 0, .max = 0.49});
  visitor.integer("evaluate_every", options.evaluate_every, "steps between two losses over the whole calibration set; the best codes are kept", {.min = 1});
  visitor.choice("precision", options.precision, "of the passes that learn: auto = bf16 autocast where the hardware multiplies bf16; float32 in any case where its rounding changes a block's error by more than a twentieth; the errors that codes are chosen by are float32", precision_names());
  visitor.number("fisher", options.fisher, "how much the loss's gradients say which directions of a block's output matter: 0 = all the same, 1 = they alone; needs token_weights", {.min = 0, .max = 1});
}

BlockTuneResult tune_block(Transformer& model, std::int64_t layer, const CalibrationSet& set, const BlockActivations& activations, const std::map<std::string, at::Tensor>& original,
                           const QuantizationPlan& plan, const BlockTuneOptions& options, std::uint64_t seed, std::map<std::string, Quantized>& quantized) {
  return BlockTuner(model, layer, set, activations, options, seed).run(original, plan, quantized);
}

}  // namespace kompakt
