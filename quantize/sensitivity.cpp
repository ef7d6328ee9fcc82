#include "quantize/sensitivity.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <set>
#include <stdexcept>

#include "core/random.h"
#include "core/system.h"
#include "model/families.h"
#include "quantize/tensors.h"
#include "train/precision.h"

namespace kompakt {
namespace {

constexpr std::int64_t sensitivity_vocabulary_rows = 4096;  // of a head at a time: logits of all tokens for these

// Inputs and outputs of the linears of one block; outputs keep their gradients.
class SensitivityTaps final : public TapSink {
 public:
  explicit SensitivityTaps(const std::vector<Linear*>& linears) {
    for (const Linear* linear : linears) wanted_.insert({"input:" + linear->name, "output:" + linear->name});
  }
  bool wants(const std::string& name) const override { return wanted_.count(name) > 0; }
  void put(const std::string& name, const at::Tensor& value) override {
    if (name.front() == 'o') value.retain_grad();
    values_[name] = value;
  }
  at::Tensor input(const Linear& linear) const { return values_.at("input:" + linear.name).detach(); }
  at::Tensor gradient(const Linear& linear) const { return values_.at("output:" + linear.name).grad(); }

 private:
  std::set<std::string> wanted_;
  std::map<std::string, at::Tensor> values_;
};

class SensitivityPass {
 public:
  SensitivityPass(Transformer& model, const CalibrationSet& set, const SensitivityRequest& request) : model_(model), set_(set), request_(request) {
    TORCH_CHECK(!request.bf16 || request.formats.empty(), "sensitivities of formats are measured in float32");
    for (const auto& [name, formats] : request.formats) {
      find_quantizable(model, name);
      sums_[name].assign(formats.size(), 0.0);
      relative_[name].assign(formats.size(), 0.0);
    }
    predictions_ = model.config().is_classifier() ? set.sequences : set.tokens;
    if (model.config().family->encoder && !model.config().is_classifier()) throw std::logic_error("sensitivities need predictions: an encoder without a classifier has none");
  }

  std::map<std::string, TensorSensitivity> run() {
    model_.requires_grad(false);
    const at::AutoGradMode gradients(true);
    forward();
    if (model_.config().family->encoder)
      classifier();
    else
      vocabulary();
    for (std::int64_t layer = static_cast<std::int64_t>(model_.blocks.size()) - 1; layer >= 0; --layer) block(layer);
    embedding();
    std::map<std::string, TensorSensitivity> out;
    for (const auto& [name, sums] : sums_) {
      TensorSensitivity& tensor = out[name];
      tensor.relative_error = relative_[name];
      if (const auto rows = rows_.find(name); rows != rows_.end()) tensor.row_importance = rows->second / static_cast<double>(std::max<std::int64_t>(1, predictions_));
      for (const double sum : sums) tensor.divergence.push_back(0.5 * sum / static_cast<double>(std::max<std::int64_t>(1, predictions_)));
    }
    return out;
  }

 private:
  const std::vector<GridSpec>* formats_of(const std::string& name) const {
    const auto found = request_.formats.find(name);
    return found == request_.formats.end() ? nullptr : &found->second;
  }

  // [B,T,n] or [B*T,n] -> rows of real tokens.
  at::Tensor real(const at::Tensor& value, std::size_t batch) const {
    const at::Tensor flat = value.reshape({-1, value.size(-1)});
    return set_.valid[batch].defined() ? flat.index_select(0, set_.valid[batch]) : flat;
  }

  void forward() {
    const at::NoGradGuard no_grad;
    states_.resize(model_.blocks.size() + 1);
    for (std::size_t b = 0; b < set_.inputs.size(); ++b) {
      check_interrupted();
      const AutocastGuard autocast(model_.device(), request_.bf16);
      at::Tensor x = model_.embed(set_.inputs[b]);
      for (std::size_t layer = 0; layer < model_.blocks.size(); ++layer) {
        states_[layer].push_back(x);
        x = model_.block_forward(static_cast<std::int64_t>(layer), x, set_.inputs[b]);
      }
      states_.back().push_back(x);
    }
  }

  // A label for every row, drawn from the probabilities [n,C]: the first class at which the running sum reaches u.
  at::Tensor draw(const at::Tensor& probabilities, const CounterRandom& random, std::int64_t first) const {
    const at::Tensor running = probabilities.cumsum(1, at::kDouble), u = at::empty({probabilities.size(0), 1}, at::kDouble);
    for (std::int64_t i = 0; i < u.numel(); ++i) u.data_ptr<double>()[i] = random.uniform(static_cast<std::uint64_t>(first + i)) * (1 - 1e-9);
    return running.cpu().lt(u * running.cpu().slice(1, -1)).sum(1);
  }

  void classifier() {
    const CounterRandom random(request_.seed, "fisher-labels");
    std::vector<at::Tensor> pooler_inputs, pooler_gradients, inputs, gradients;
    std::int64_t first = 0;
    for (std::size_t b = 0; b < set_.inputs.size(); ++b) {
      const at::Tensor x = states_.back()[b].detach().requires_grad_(true);
      const at::Tensor pooled = model_.pooled(x, set_.inputs[b]);
      at::Tensor gradient;
      {
        const at::NoGradGuard no_grad;
        const at::Tensor probabilities = at::softmax(model_.head(pooled.detach()), -1);
        const at::Tensor labels = draw(probabilities, random, first).to(probabilities.device());
        gradient = probabilities - at::one_hot(labels, probabilities.size(1)).to(probabilities.scalar_type());
        inputs.push_back(pooled.detach()), gradients.push_back(gradient);
      }
      first += pooled.size(0);
      const at::Tensor back = at::matmul(gradient, model_.classifier.weight.detach());
      if (model_.pooler.weight.defined()) {
        pooler_inputs.push_back(x.detach().select(1, 0));
        pooler_gradients.push_back(back * (1 - pooled.detach().square()));  // through tanh
      }
      pooled.backward(back);
      gradients_.push_back(x.grad());
    }
    score(model_.classifier, inputs, gradients);
    if (model_.pooler.weight.defined()) score(model_.pooler, pooler_inputs, pooler_gradients);
    states_.pop_back();
  }

  // A head over the vocabulary, some rows at a time: logits of all tokens are never held.
  void vocabulary() {
    const bool tied = !model_.lm_head.weight.defined();
    const at::Tensor weight = (tied ? model_.tokens.weight : model_.lm_head.weight).detach();
    const std::string& name = tied ? model_.tokens.name : model_.lm_head.name;
    std::vector<at::Tensor> inputs, outputs;
    for (const at::Tensor& state : states_.back()) {
      inputs.push_back(state.detach().requires_grad_(true));
      outputs.push_back(model_.final_norm.forward(inputs.back()));
    }
    states_.pop_back();
    at::Tensor back, hidden;
    {
      const at::NoGradGuard no_grad;
      std::vector<at::Tensor> rows;
      for (std::size_t b = 0; b < outputs.size(); ++b) rows.push_back(real(outputs[b].detach(), b));
      hidden = at::cat(rows);
      back = head_gradients(name, weight, hidden);
    }
    std::int64_t first = 0;
    for (std::size_t b = 0; b < outputs.size(); ++b) {
      const std::int64_t count = set_.valid[b].defined() ? set_.valid[b].numel() : outputs[b].size(0) * outputs[b].size(1);
      const at::Tensor part = back.slice(0, first, first + count);
      at::Tensor spread = part;
      if (set_.valid[b].defined()) spread = at::zeros({outputs[b].size(0) * outputs[b].size(1), part.size(1)}, part.options()).index_copy(0, set_.valid[b], part);
      outputs[b].backward(spread.view_as(outputs[b]));
      gradients_.push_back(inputs[b].grad());
      first += count;
    }
  }

  // Scores the head and returns the gradient of hidden [n,d].
  at::Tensor head_gradients(const std::string& name, const at::Tensor& weight, const at::Tensor& hidden) {
    const std::int64_t n = hidden.size(0), vocabulary = weight.size(0);
    const auto wide = hidden.options().dtype(at::kDouble);
    at::Tensor normalizer = at::full({n}, -INFINITY, wide);
    for (std::int64_t row = 0; row < vocabulary; row += sensitivity_vocabulary_rows) {
      check_interrupted();
      const at::Tensor logits = at::matmul(hidden, weight.slice(0, row, row + sensitivity_vocabulary_rows).t());
      normalizer = at::logaddexp(normalizer, at::logsumexp(logits, {1}).to(at::kDouble));
    }
    const CounterRandom random(request_.seed, "fisher-labels");
    at::Tensor u = at::empty({n}, at::kDouble);
    for (std::int64_t i = 0; i < n; ++i) u.data_ptr<double>()[i] = random.uniform(static_cast<std::uint64_t>(i)) * (1 - 1e-5);  // below the sum, whose terms are rounded
    u = u.to(hidden.device());
    at::Tensor below = at::zeros({n}, wide), back = at::zeros_like(hidden);
    const std::vector<GridSpec>* formats = formats_of(name);
    std::vector<at::Tensor> products;  // per format G E [n,d]
    std::vector<double> errors(formats ? formats->size() : 0, 0.0);
    for (std::size_t f = 0; f < errors.size(); ++f) products.push_back(at::zeros_like(hidden));
    double square = 0;
    for (std::int64_t row = 0; row < vocabulary; row += sensitivity_vocabulary_rows) {
      check_interrupted();
      const at::Tensor part = weight.slice(0, row, row + sensitivity_vocabulary_rows);
      at::Tensor gradient = at::exp(at::matmul(hidden, part.t()) - normalizer.to(at::kFloat).unsqueeze(1));
      // Running sums of those tokens alone whose label lies in these rows.
      const at::Tensor end = below + gradient.sum(1, false, at::kDouble), here = below.le(u).logical_and(end.gt(u)).nonzero().squeeze(1);
      const at::Tensor running = gradient.index_select(0, here).cumsum(1, at::kDouble).add_(below.index_select(0, here).unsqueeze(1));
      const at::Tensor label = running.le(u.index_select(0, here).unsqueeze(1)).sum(1).clamp_max(part.size(0) - 1);
      gradient.index_put_({here, label}, at::full({}, -1.0f, gradient.options()), /*accumulate=*/true);
      below = end;
      back.add_(at::matmul(gradient, part));
      for (std::size_t f = 0; f < products.size(); ++f) {
        const at::Tensor error = request_.error(part, (*formats)[f], {});
        products[f].add_(at::matmul(gradient, error));
        errors[f] += error.square().sum(at::kDouble).item<double>();
      }
      square += part.square().sum(at::kDouble).item<double>();
    }
    const double reduction = formats && request_.reduction ? request_.reduction(name, hidden) : 1;
    for (std::size_t f = 0; f < products.size(); ++f) {
      const bool feeds_back = (*formats)[f].grid->code_bits < 8;
      sums_[name][f] += (feeds_back ? reduction : 1) * (products[f] * hidden).sum(1).to(at::kDouble).square().sum().item<double>();  // heads on eight bits are rounded
      relative_[name][f] = square > 0 ? errors[f] / square : 0;
    }
    if (formats) done();
    return back;
  }

  // `terms` [n] = g_t . E x_t of the real tokens of a batch. A classifier has one prediction a text, to which all tokens
  // contribute: their terms add up first. Of a decoder, tokens are taken by themselves (the smaller variance).
  double sum_of_squares(const at::Tensor& terms, std::size_t batch) const {
    const at::Tensor wide = terms.to(at::kDouble);
    if (!model_.config().is_classifier()) return wide.square().sum().item<double>();
    const at::Tensor& ids = set_.inputs[batch].ids;
    const at::Tensor positions = set_.valid[batch].defined() ? set_.valid[batch] : at::arange(ids.numel(), ids.options());
    return at::zeros({ids.size(0)}, wide.options()).index_add_(0, positions.floor_divide(ids.size(1)), wide).square().sum().item<double>();
  }

  // [N] to the sums of a matrix.
  void add_rows(const std::string& name, const at::Tensor& sums) {
    const at::Tensor host = sums.to(at::kCPU, at::kDouble);
    const auto [at, fresh] = rows_.try_emplace(name, host);
    if (!fresh) at->second = at->second + host;
  }

  // Per batch inputs [n,K] and output gradients [n,N] of one matrix.
  void score(const Linear& linear, const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& gradients) {
    const at::NoGradGuard no_grad;
    const std::vector<GridSpec>* formats = formats_of(linear.name);
    if (!formats) return;
    const at::Tensor weight = linear.weight.detach();
    const bool in_block = &linear != &model_.classifier && &linear != &model_.pooler;
    const std::size_t half = request_.split && inputs.size() > 1 ? (inputs.size() + 1) / 2 : 0;
    at::Tensor fit;
    if (in_block) fit = at::cat(std::vector<at::Tensor>(inputs.begin(), half > 0 ? inputs.begin() + static_cast<std::ptrdiff_t>(half) : inputs.end()));
    double scored = 0, all = 0;
    for (std::size_t b = 0; b < inputs.size(); ++b) {
      add_rows(linear.name, at::mv(gradients[b].square().t(), inputs[b].square().sum(1)));
      all += static_cast<double>(inputs[b].size(0));
      if (b >= half) scored += static_cast<double>(inputs[b].size(0));
    }
    const double square = weight.square().sum(at::kDouble).item<double>(), reduction = in_block && request_.reduction ? request_.reduction(linear.name, fit) : 1;
    for (std::size_t f = 0; f < formats->size(); ++f) {
      check_interrupted();
      const at::Tensor error = request_.error(weight, (*formats)[f], fit);
      double sum = 0;
      for (std::size_t b = half; b < inputs.size(); ++b) {
        const bool narrow = weight.size(0) <= weight.size(1);
        const at::Tensor product = narrow ? at::matmul(inputs[b], error.t()) * gradients[b] : at::matmul(gradients[b], error) * inputs[b];
        sum += in_block ? sum_of_squares(product.sum(1), b) : product.sum(1).to(at::kDouble).square().sum().item<double>();
      }
      sums_[linear.name][f] += scored > 0 ? reduction * sum * all / scored : 0;
      relative_[linear.name][f] = square > 0 ? error.square().sum(at::kDouble).item<double>() / square : 0;
    }
    done();
  }

  void block(std::int64_t layer) {
    const Block& part = model_.blocks[static_cast<std::size_t>(layer)];
    std::vector<Linear*> linears;
    for (Linear* linear : model_.linears())
      for (const Linear* own : {&part.attention.query, &part.attention.key, &part.attention.value, &part.attention.output, &part.mlp.gate, &part.mlp.up, &part.mlp.down})
        if (own == linear) linears.push_back(linear);
    if (request_.visit_block) {
      std::vector<at::Tensor> behind;
      for (std::size_t b = 0; b < set_.inputs.size(); ++b) behind.push_back(real(gradients_[b], b));
      request_.visit_block(layer, behind);
    }
    std::vector<std::vector<at::Tensor>> inputs(linears.size()), gradients(linears.size());
    for (std::size_t b = 0; b < set_.inputs.size(); ++b) {
      check_interrupted();
      const at::Tensor x = states_[static_cast<std::size_t>(layer)][b].detach().requires_grad_(true);
      SensitivityTaps taps(linears);
      at::Tensor y;
      {
        const AutocastGuard autocast(model_.device(), request_.bf16);
        y = model_.block_forward(layer, x, set_.inputs[b], &taps);
      }
      y.backward(gradients_[b]);
      gradients_[b] = x.grad();
      for (std::size_t i = 0; i < linears.size(); ++i) {
        inputs[i].push_back(real(taps.input(*linears[i]), b));
        gradients[i].push_back(real(taps.gradient(*linears[i]), b));
      }
    }
    states_.pop_back();
    for (std::size_t i = 0; i < linears.size(); ++i) {
      if (request_.visit) request_.visit(*linears[i], inputs[i], gradients[i]);
      score(*linears[i], inputs[i], gradients[i]);
    }
  }

  // Every token gets a row of its own, so that the gradient of the row is that of the token.
  void embedding() {
    const std::vector<GridSpec>* formats = formats_of(model_.tokens.name);
    if (!formats) return;
    const at::Tensor table = model_.tokens.weight.detach();
    std::vector<double> errors(formats->size(), 0.0);
    double square = 0;
    for (std::size_t b = 0; b < set_.inputs.size(); ++b) {
      const at::Tensor rows = table.index_select(0, set_.inputs[b].ids.reshape(-1)).requires_grad_(true);
      ModelInput input = set_.inputs[b];
      input.ids = at::arange(rows.size(0), input.ids.options()).view_as(input.ids);
      at::Tensor present = model_.tokens.weight;
      model_.tokens.weight = rows;
      at::Tensor x;
      try {
        x = model_.embed(input);
      } catch (...) {
        model_.tokens.weight = present;
        throw;
      }
      model_.tokens.weight = present;
      x.backward(gradients_[b]);
      const at::NoGradGuard no_grad;
      const at::Tensor gradient = real(rows.grad(), b), used = real(rows.detach(), b);
      square += used.square().sum(at::kDouble).item<double>();
      for (std::size_t f = 0; f < formats->size(); ++f) {
        const at::Tensor error = request_.error(used.contiguous(), (*formats)[f], {});
        sums_[model_.tokens.name][f] += sum_of_squares((gradient * error).sum(1), b);
        errors[f] += error.square().sum(at::kDouble).item<double>();
      }
    }
    const bool tied = !model_.lm_head.weight.defined() && !model_.config().family->encoder;
    for (std::size_t f = 0; f < formats->size() && !tied; ++f) relative_[model_.tokens.name][f] = square > 0 ? errors[f] / square : 0;
    if (!tied) done();
  }

  void done() {
    if (request_.progress) request_.progress(++done_);
  }

  Transformer& model_;
  const CalibrationSet& set_;
  const SensitivityRequest& request_;
  std::vector<std::vector<at::Tensor>> states_;  // [layer][batch]: inputs of blocks, and what comes after the last
  std::vector<at::Tensor> gradients_;            // per batch, of the input of the block that was last gone back through
  std::map<std::string, std::vector<double>> sums_, relative_;
  std::map<std::string, at::Tensor> rows_;  // sums for row_importance
  std::int64_t predictions_ = 0, done_ = 0;
};

}  // namespace

at::Tensor rounding_error(const at::Tensor& weight, const GridSpec& spec, const at::Tensor& inputs) {
  return weight - round_to_grid(spec, weight, inputs.defined() ? inputs.square().mean(0) : at::Tensor());
}

std::map<std::string, TensorSensitivity> measure_sensitivities(Transformer& model, const CalibrationSet& set, const SensitivityRequest& request) {
  return SensitivityPass(model, set, request).run();
}

CalibrationSet smaller_batches(const CalibrationSet& set, std::int64_t tokens) {
  CalibrationSet out;
  out.sequences = set.sequences, out.tokens = set.tokens, out.hash = set.hash;
  for (std::size_t b = 0; b < set.inputs.size(); ++b) {
    const ModelInput& from = set.inputs[b];
    const std::int64_t rows = from.ids.size(0), columns = from.ids.size(1), step = std::max<std::int64_t>(1, tokens / std::max<std::int64_t>(1, columns));
    for (std::int64_t first = 0; first < rows; first += step) {
      const std::int64_t end = std::min(rows, first + step);
      const auto cut = [&](const at::Tensor& t) { return t.defined() ? t.slice(0, first, end) : t; };
      out.inputs.push_back({cut(from.ids), cut(from.lengths), cut(from.documents), cut(from.positions)});
      at::Tensor valid = set.valid[b];
      if (valid.defined()) valid = valid.masked_select(valid.ge(first * columns).logical_and(valid.lt(end * columns))) - first * columns;
      out.valid.push_back(valid);
    }
  }
  return out;
}

}  // namespace kompakt
