#include "prune/unstructured.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <set>

#include "core/error.h"
#include "core/log.h"
#include "core/system.h"
#include "core/text.h"
#include "model/paged.h"
#include "model/parallel.h"
#include "train/precision.h"

namespace kompakt {

namespace {

using at::Tensor;

SparseMatrix unstructured_masked(const Tensor& weight, const Tensor& mask) { return {weight.masked_fill(mask.logical_not(), 0), mask, 0}; }

SparseMatrix unstructured_magnitude(const Tensor& weight, const SecondMoments&, const InputMetric&, const SparsityPattern& pattern, const UnstructuredOptions&) {
  return unstructured_masked(weight, magnitude_mask(weight, pattern));
}

SparseMatrix unstructured_wanda(const Tensor& weight, const SecondMoments& moments, const InputMetric&, const SparsityPattern& pattern, const UnstructuredOptions&) {
  const Tensor square = moments.square.defined() ? moments.square : moments.hessian.diagonal();
  return unstructured_masked(weight, wanda_mask(weight, square.to(at::kCPU), pattern));
}

SparseMatrix unstructured_sparsegpt(const Tensor& weight, const SecondMoments&, const InputMetric& metric, const SparsityPattern& pattern, const UnstructuredOptions& options) {
  return sparsegpt(weight, metric, pattern, options.block);
}

constexpr std::array<WeightCriterion, 3> unstructured_table{{
    {"magnitude", "the smallest weights of every row go; needs no data", InputStatistics::none, unstructured_magnitude},
    {"wanda", "weight times the norm of its input, compared inside a row (Wanda); one forward pass", InputStatistics::squares, unstructured_wanda},
    {"sparsegpt", "column by column, the rest of the row makes up for what goes (SparseGPT)", InputStatistics::moments, unstructured_sparsegpt},
}};

class UnstructuredRun {
 public:
  UnstructuredRun(Transformer& model, const UnstructuredOptions& options, StageContext& context)
      : model_(model), options_(options), context_(context), criterion_(*find_weight_criterion(options.criterion)), pattern_(chosen_pattern(options, "unstructured")), dense_(dense_linears(model, options, "unstructured")),
        needs_(options.refit == "exact" ? InputStatistics::moments : criterion_.needs) {
    for (const Linear* linear : model.linears())
      if (linear->transform || linear->input_transform) throw std::logic_error(str("prune: a transform is attached to ", linear->name));
  }

  void run(std::int64_t sequences) {
    const at::NoGradGuard no_grad;
    const auto started = std::chrono::steady_clock::now();
    Progress progress(context_.title, static_cast<std::int64_t>(model_.linears().size() - dense_.size()), "tensor");
    progress_ = &progress;
    Json calibration;
    if (needs_ == InputStatistics::none) {
      for (Linear* linear : model_.linears()) prune(*linear, {}, {});
    } else {
      const CalibrationSet set = calibration_set(context_, sequences, "criterion: magnitude");
      check_size(set);
      calibration = Json{{"sequences", set.sequences}, {"tokens", set.tokens}, {"sha256", set.hash}};
      walk(set);
    }
    progress.finish(str(zeros_, " of ", weights_, " weights are zero"));
    log_info(str(context_.title, ": ", fixed(100.0 * static_cast<double>(zeros_) / static_cast<double>(std::max<std::int64_t>(1, weights_)), 2), "% of ", rows_.size(), " matrices is zero (", criterion_.name, ", ", pattern_.text(), ")"));
    if (!context_.details) return;
    (*context_.details)["sparsity"] = Json{{"criterion", std::string(criterion_.name)}, {"pattern", pattern_.text()}, {"refit", options_.refit}, {"weights", weights_}, {"zeros", zeros_}, {"layers", rows_}, {"dense", dense_},
                                           {"calibration", calibration}, {"seconds", std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count()}};
  }

 private:
  void check_size(const CalibrationSet& set) const {
    std::int64_t widest = 0;
    for (const Linear* linear : model_.linears()) widest = std::max(widest, linear->in_features());
    if (needs_ == InputStatistics::moments && set.tokens < 4 * widest)
      log_warning(str(context_.title, ": ", set.tokens, " calibration tokens are few for layers of ", widest, " inputs; 20 tokens an input are a good rule (", 20 * widest, ")"));
  }

  void walk(const CalibrationSet& set) {
    CalibrationOptions options;
    options.squares_only = needs_ == InputStatistics::squares;
    options.bf16 = use_bf16(options_.calibration_precision, model_.device());
    SequentialCalibration calibration(model_, set, options);
    calibration.start();
    const auto blocks = static_cast<std::int64_t>(model_.blocks.size());
    for (std::int64_t layer = 0; layer < blocks; ++layer) {
      Block& block = model_.blocks[static_cast<std::size_t>(layer)];
      std::map<BlockPart, SecondMoments> before;  // of the block as it came
      if (!options_.true_sequential) {
        for (const BlockPart part : block_parts)
          if (!sparse_linears(block, part).empty()) before[part] = calibration.moments(layer, part, {});
        calibration.restart_block();
      }
      for (const BlockPart part : block_parts) {
        check_interrupted();
        const std::vector<Linear*> linears = sparse_linears(block, part);
        if (linears.empty()) continue;
        const SecondMoments moments = options_.true_sequential ? calibration.moments(layer, part, {}) : std::move(before.at(part));
        const InputMetric metric = needs_ == InputStatistics::moments ? input_metric(moments.hessian, options_.damping, criterion_.needs == InputStatistics::moments) : InputMetric{};
        if (const std::string& path = metric.factor.path; path.find(',') != std::string::npos || path == "diagonal")
          log_warning(str(context_.title, ": ", linears.front()->name, ": ", path, " (damping ", shortest(metric.factor.damping), ")"));
        for (Linear* linear : linears) prune(*linear, moments, metric);
      }
      if (layer + 1 < blocks) calibration.advance(layer, {});
      for (const NamedParameter& parameter : block_parameters(block)) release_pages(*parameter.value);
    }
  }

  std::vector<Linear*> sparse_linears(Block& block, BlockPart part) const {
    std::vector<Linear*> linears = part_linears(block, part);
    std::erase_if(linears, [&](const Linear* linear) { return dense_.count(linear->name) > 0; });
    return linears;
  }

  void prune(Linear& linear, const SecondMoments& moments, const InputMetric& metric) {
    if (dense_.count(linear.name)) return;
    const Tensor weight = linear.weight.detach().to(at::kCPU, at::kFloat).contiguous();
    SparseMatrix result;
    try {
      result = criterion_.prune(weight, moments, metric, pattern_, options_);
    } catch (Error& error) {
      throw error.place().empty() ? error.at(linear.name) : error;
    }
    if (const auto earlier = context_.masks.find(linear.name); earlier != context_.masks.end()) {
      result.mask = result.mask.logical_and(earlier->second.to(at::kCPU));
      result.weight = result.weight.masked_fill(result.mask.logical_not(), 0);
    }
    if (options_.refit == "exact") result.weight = refit_support(weight, result.mask, metric.hessian, options_.damping);
    const std::int64_t zeros = result.mask.numel() - result.mask.sum().item<std::int64_t>();
    Json row{{"layer", linear.name}, {"sparsity", static_cast<double>(zeros) / static_cast<double>(result.mask.numel())}, {"output_error", output_error(weight, result.weight, moments, metric)}};
    progress_->update(static_cast<std::int64_t>(rows_.size()) + 1, str(linear.name, " error ", fixed(row.at("output_error").get<double>(), 4)));
    rows_.push_back(std::move(row));
    zeros_ += zeros;
    weights_ += result.mask.numel();
    // Weights that lie in a file stay there.
    if (is_paged(linear.weight)) linear.weight.copy_(result.weight);
    else linear.weight = result.weight.to(linear.weight.device(), linear.weight.scalar_type());
    context_.masks[linear.name] = std::move(result.mask);
  }

  // tr(E M E^T) / tr(W M W^T), M = what is known about the inputs: second moments (of at most 128 rows, evenly spread, as in the report of
  // quantize), their diagonal, or nothing.
  static double output_error(const Tensor& weight, const Tensor& pruned, const SecondMoments& moments, const InputMetric& metric) {
    const auto energy = [&](const Tensor& w) {
      if (metric.hessian.defined()) return (at::matmul(w, metric.hessian) * w).sum(at::kDouble).item<double>();
      if (moments.square.defined()) return (w.square() * moments.square.to(at::kCPU, at::kFloat).unsqueeze(0)).sum(at::kDouble).item<double>();
      return w.square().sum(at::kDouble).item<double>();
    };
    const SingleThread single;
    const std::int64_t count = weight.size(0), few = metric.hessian.defined() ? std::min<std::int64_t>(count, 128) : count;
    const Tensor chosen = (at::arange(few, at::kLong) * count).floor_divide(few), w = few < count ? weight.index_select(0, chosen) : weight, p = few < count ? pruned.index_select(0, chosen) : pruned;
    const double all = energy(w);
    return all > 0 ? energy(w - p) / all : 0;
  }

  Transformer& model_;
  const UnstructuredOptions& options_;
  StageContext& context_;
  const WeightCriterion& criterion_;
  const SparsityPattern pattern_;
  const std::set<std::string> dense_;
  const InputStatistics needs_;
  Progress* progress_ = nullptr;
  Json rows_ = Json::array();
  std::int64_t zeros_ = 0, weights_ = 0;
};

}  // namespace

void fields(FieldVisitor& visitor, UnstructuredOptions& options) {
  visitor.number("sparsity", options.sparsity, "share of the weights that become zero; 0 = the pattern says it", {.min = 0.0, .max = 0.99});
  visitor.text("pattern", options.pattern, "N:M, for example \"2:4\": of every M weights in a row N stay");
  visitor.choice("criterion", options.criterion, "which weights go", weight_criterion_names());
  visitor.choice("refit", options.refit, "best weights on the chosen places, by least squares (exact), or as the criterion leaves them", {"none", "exact"});
  visitor.number("damping", options.damping, "sparsegpt and refit: share of the mean input energy added to every input's", {.min = 0.0, .max = 1.0});
  visitor.integer("block", options.block, "sparsegpt: columns whose places are chosen together", {.min = 1.0});
  visitor.flag("true_sequential", options.true_sequential, "inputs of a matrix come through the pruned matrices of its own block too, as in kompakt's other methods; false: as the authors of Wanda and SparseGPT do");
  calibration_precision_field(visitor, options.calibration_precision);
  visitor.texts("skip", options.skip, "patterns of linears that stay dense (* = anything)");
}

std::span<const WeightCriterion> weight_criteria() { return unstructured_table; }

const WeightCriterion* find_weight_criterion(std::string_view name) {
  for (const WeightCriterion& row : unstructured_table)
    if (row.name == name) return &row;
  return nullptr;
}

std::vector<std::string> weight_criterion_names() {
  std::vector<std::string> names;
  for (const WeightCriterion& row : unstructured_table) names.emplace_back(row.name);
  return names;
}

void prune_unstructured(Transformer& model, const UnstructuredOptions& options, std::int64_t sequences, StageContext& context) { UnstructuredRun(model, options, context).run(sequences); }

}  // namespace kompakt
