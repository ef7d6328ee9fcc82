// Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): y = x W' + alpha / rank (x A') B', W frozen. Only A and B have gradients and
// moments; when training ends W becomes W + alpha / rank B A, so that what is saved is a plain model.
// With `dora` (Liu et al. 2024, arXiv 2402.09353) every row of V = W + alpha / rank B A is scaled to a trained length m, which starts as
// that of W: W' = m V / |V|, no gradient through |V| (section 4.3 there).
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "train/constraint.h"
#include "train/options.h"

namespace kompakt {

class LoraAdapters final : public Constraint {
 public:
  // A from CounterRandom(seed, linear's name), uniform in +-1/sqrt(in); B zero: the first forward pass is the model's own.
  LoraAdapters(LoraOptions options, std::uint64_t seed) : options_(std::move(options)), seed_(seed) {}
  std::string name() const override { return "lora"; }
  void attach(Transformer& model) override;  // Error: a pattern that matches no linear layer
  void detach(Transformer& model) override;  // merges
  std::vector<std::pair<std::string, at::Tensor>> parameters() override;

 private:
  struct Adapter {
    Linear* linear;
    std::string name;
    at::Tensor a, b;  // [rank, in], [out, rank]
    at::Tensor magnitude;  // [out]; undefined without dora
  };
  double scale() const { return options_.alpha / static_cast<double>(options_.rank); }
  LoraOptions options_;
  std::uint64_t seed_;
  std::vector<Adapter> adapters_;
};

}  // namespace kompakt
