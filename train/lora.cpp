#include "train/lora.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/random.h"
#include "core/text.h"
#include "train/optimizer.h"

namespace kompakt {
namespace {

// W [out,in], A [rank,in], B [out,rank], m [out] -> m V / |V| by rows. A row of zeros stays zero.
at::Tensor dora_weight(const at::Tensor& weight, const at::Tensor& a, const at::Tensor& b, const at::Tensor& magnitude, double scale) {
  const at::Tensor direction = weight.detach() + at::mm(b, a) * scale;
  const at::Tensor length = at::linalg_vector_norm(direction.detach(), 2, at::IntArrayRef{1}).clamp_min(1e-12);
  return direction * (magnitude / length).unsqueeze(1);
}

}  // namespace

void LoraAdapters::attach(Transformer& model) {
  std::vector<std::string> names;
  for (const Linear* linear : model.linears()) names.push_back(linear->name);
  Problems problems;
  for (const std::string& pattern : options_.targets)
    if (std::none_of(names.begin(), names.end(), [&](const std::string& name) { return matches_pattern(name, pattern); }))
      problems.add(Error(str("no linear layer matches the pattern \"", pattern, "\"", did_you_mean(pattern, names))).at("lora.targets").given(pattern).allowed(str("names such as ", names.front(), " and ", names.back(), "; * stands for anything")));
  problems.throw_if_any("patterns of adapted layers");
  for (Linear* linear : model.linears()) {
    const bool chosen = options_.targets.empty() || std::any_of(options_.targets.begin(), options_.targets.end(), [&](const std::string& pattern) { return matches_pattern(linear->name, pattern); });
    if (!chosen) continue;
    const std::int64_t in = linear->in_features(), out = linear->out_features(), rank = std::min({options_.rank, in, out});
    const CounterRandom random(seed_, "lora/" + linear->name);
    at::Tensor a = at::empty({rank, in}, at::kFloat);
    float* values = a.mutable_data_ptr<float>();
    for (std::int64_t i = 0; i < a.numel(); ++i) values[i] = static_cast<float>((2 * random.uniform(static_cast<std::uint64_t>(i)) - 1) / std::sqrt(static_cast<double>(in)));
    Adapter adapter{linear, linear->name, a.to(linear->weight.device()), at::zeros({out, rank}, linear->weight.options().dtype(at::kFloat).requires_grad(false))};
    // The tensors are shared with the optimizer, which changes them in place.
    if (options_.dora) {
      adapter.magnitude = at::linalg_vector_norm(linear->weight.detach().to(at::kFloat), 2, at::IntArrayRef{1});
      linear->transform = [a = adapter.a, b = adapter.b, m = adapter.magnitude, scale = scale()](const at::Tensor& weight) { return dora_weight(weight, a, b, m, scale); };
    } else {
      linear->side = [a = adapter.a, b = adapter.b, scale = scale()](const at::Tensor& x) { return at::linear(at::linear(x, a), b) * scale; };
    }
    adapters_.push_back(std::move(adapter));
  }
}

void LoraAdapters::detach(Transformer&) {
  const at::NoGradGuard no_grad;
  for (Adapter& adapter : adapters_) {
    adapter.linear->side = {}, adapter.linear->transform = {};
    if (adapter.magnitude.defined()) adapter.linear->weight.copy_(dora_weight(adapter.linear->weight, adapter.a, adapter.b, adapter.magnitude, scale()));
    else adapter.linear->weight.addmm_(adapter.b, adapter.a, 1, scale());
  }
  adapters_.clear();
}

std::vector<std::pair<std::string, at::Tensor>> LoraAdapters::parameters() {
  std::vector<std::pair<std::string, at::Tensor>> out;
  for (const Adapter& adapter : adapters_) {
    out.emplace_back(adapter.name + ".lora_A", adapter.a);
    out.emplace_back(adapter.name + ".lora_B", adapter.b);
    if (adapter.magnitude.defined()) out.emplace_back(adapter.name + ".lora_magnitude", adapter.magnitude);
  }
  return out;
}

}  // namespace kompakt
