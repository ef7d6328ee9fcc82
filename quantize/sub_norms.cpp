#include "quantize/sub_norms.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/log.h"
#include "core/text.h"
#include "train/calibration.h"

namespace kompakt {
namespace {

// Of one site over tokens, float64. a = sum x^2 / r, b = sum x^2 / r^2, c = sum x^2; every one [channels].
struct SubNormSums {
  at::Tensor a, b, c;
  void add(const SubNormSums& other) {
    a = a.defined() ? a + other.a : other.a;
    b = b.defined() ? b + other.b : other.b;
    c = c.defined() ? c + other.c : other.c;
  }
  at::Tensor gain() const {
    const double all = b.sum().item<double>(), shared = all > 0 ? a.sum().item<double>() / all : 1;
    return at::where(b.gt(0), a / at::where(b.gt(0), b, at::ones_like(b)), at::full_like(a, shared));
  }
  // sum (x - g x / r)^2 / sum x^2
  double change(const at::Tensor& gain) const {
    const double energy = c.sum().item<double>();
    return energy > 0 ? (c - 2 * gain * a + gain.square() * b).sum().item<double>() / energy : 0;
  }
};

SubNormSums sub_norm_sums(const at::Tensor& x, const at::Tensor& valid, double eps) {
  at::Tensor rows = x.reshape({-1, x.size(-1)});
  if (valid.defined()) rows = rows.index_select(0, valid);
  const at::Tensor square = rows.to(at::kDouble).square(), r = (square.mean(1, true) + eps).sqrt();
  return {(square / r).sum(0), (square / r.square()).sum(0), square.sum(0)};
}

constexpr std::array<const char*, 2> sub_norm_taps = {"context", "ffn"};  // what the two projections see

// Sums of every site as its values pass: no activation outlives its layer.
class SubNormSink final : public TapSink {
 public:
  SubNormSink(std::int64_t layers, const at::Tensor& valid, double eps) : sums(static_cast<std::size_t>(layers) * sub_norm_taps.size()), valid_(valid), eps_(eps) {
    std::size_t place = 0;
    for (std::int64_t i = 0; i < layers; ++i)
      for (const char* what : sub_norm_taps) places_[str("layer.", i, ".", what)] = place++;
  }
  bool wants(const std::string& name) const override { return places_.count(name) > 0; }
  void put(const std::string& name, const at::Tensor& value) override { sums[places_.at(name)] = sub_norm_sums(value, valid_, eps_); }
  std::vector<SubNormSums> sums;

 private:
  std::map<std::string, std::size_t> places_;
  at::Tensor valid_;
  double eps_;
};

// Windows of the training text where the run has no calibration text.
TaskData sub_norm_windows(const TaskData& data, std::int64_t sequences, std::int64_t length) {
  TaskData out;
  out.kind = TaskData::Kind::text;
  std::vector<std::int64_t> window;
  std::vector<std::vector<std::int64_t>>& windows = out.calibration;
  for (const auto& document : data.train_documents)
    for (const std::int64_t id : document) {
      if (static_cast<std::int64_t>(windows.size()) == sequences) return out;
      window.push_back(id);
      if (static_cast<std::int64_t>(window.size()) == length) windows.push_back(std::move(window)), window.clear();
    }
  if (windows.empty() && window.size() > 1) windows.push_back(std::move(window));
  return out;
}

}  // namespace

Json insert_sub_norms(Transformer& model, std::int64_t sequences, std::int64_t window, StageContext& context) {
  if (model.config().sub_norms) throw Error("the model has sub-norms already").at(context.title).given("subln: true").hint("leave subln out: those of the earlier stage stay");
  const at::NoGradGuard no_grad;
  if (model.device() != context.device) model.to(context.device);
  StageContext inner = context;
  TaskData own;
  if (context.data && context.data->kind == TaskData::Kind::text && context.data->calibration.empty()) {
    own = sub_norm_windows(*context.data, sequences, model.config().max_positions > 0 ? std::min(window, model.config().max_positions) : window);
    inner.data = &own;
  }
  const CalibrationSet set = calibration_set(inner, sequences, "subln: false");
  const auto layers = static_cast<std::int64_t>(model.blocks.size());
  const double eps = model.config().norm_eps;
  // One row of sums a batch: batches run beside each other and are added in their order.
  std::vector<std::vector<SubNormSums>> sums(set.inputs.size());
  for_each_batch(model.device(), set.inputs.size(), [&](std::size_t b) {
    SubNormSink sink(layers, set.valid[b], eps);
    model.hidden(set.inputs[b], &sink);
    sums[b] = std::move(sink.sums);
  });
  model.add_sub_norms();
  Json changes = Json::array();
  double worst = 0;
  for (std::int64_t i = 0; i < layers; ++i) {
    Json row = {{"layer", i}};
    Block& block = model.blocks[static_cast<std::size_t>(i)];
    for (std::size_t site = 0; site < sub_norm_taps.size(); ++site) {
      SubNormSums total;
      for (const auto& batch : sums) total.add(batch[static_cast<std::size_t>(i) * sub_norm_taps.size() + site]);
      Norm& norm = site == 0 ? block.attention.sub_norm : block.mlp.sub_norm;
      const at::Tensor gain = total.gain();
      norm.weight.copy_(norm.plus_one ? gain - 1 : gain);
      const double change = total.change(gain);
      row[site == 0 ? "attention" : "mlp"] = change;
      worst = std::max(worst, change);
    }
    changes.push_back(std::move(row));
  }
  log_info(str(context.title, ": sub-norms in front of ", 2 * layers, " projections, gains from ", set.tokens, " tokens; largest relative squared change of what a projection sees ", fixed(worst, 4)));
  return Json{{"tokens", set.tokens}, {"sha256", set.hash}, {"changes", std::move(changes)}};
}

}  // namespace kompakt
