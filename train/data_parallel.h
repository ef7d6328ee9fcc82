// One training on several ranks: every rank computes some micro batches of a step, gradients are summed in buckets while the last
// backward pass still runs, each rank keeps the optimizer's state of its share of the parameters (ZeRO stage 1, Rajbhandari et al.
// 2020, arXiv 1910.02054) and sends the updated weights to the others. With one process everything here does nothing.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "train/optimizer.h"
#include "train/state.h"

namespace kompakt {

class Collective;

// What a rank adds to the numbers of a step.
struct StepShare {
  double loss = 0;  // sum over its micro batches of loss x share of targets; so are the parts
  std::vector<std::pair<std::string, double>> parts;
  bool interrupted = false;  // a signal has come to this rank
};

class DataParallel {
 public:
  // `ranks` null: one process. Parameters in the same order everywhere; their values are those of rank 0 afterwards.
  DataParallel(Collective* ranks, const std::vector<TrainableParameter>& parameters);
  ~DataParallel();
  DataParallel(const DataParallel&) = delete;
  DataParallel& operator=(const DataParallel&) = delete;

  bool several() const { return ranks_ != nullptr; }
  bool leader() const;
  // True where this rank computes the i-th of a step's micro batches.
  bool takes(std::size_t i) const;
  // Whose optimizer state is here: the largest parameters first, each to the rank that has least. Empty = all (one process).
  std::vector<bool> mine() const;

  // Around the last backward pass of a step on this rank: buckets that are complete leave while it goes on. A rank that computes
  // none leaves this call out; finish_step is for every rank.
  void before_last_backward();
  // Waits until gradients are sums over ranks, identical everywhere; a parameter that no rank has a gradient for has none.
  // Gives the sum of all shares. Gradients are views of the buckets: they live until the next step.
  StepShare finish_step(const StepShare& mine);
  // Sums over ranks, in their order: the same bits everywhere.
  std::vector<double> sum(const std::vector<double>& mine) const;
  // After the update: every parameter from the rank that owns it.
  void share_parameters();

  // Optimizer state, whole on rank 0 (elsewhere an empty list), for saving; and back from there to the owners.
  NamedTensors whole_state(const AdamW& optimizer) const;
  void give_state(const NamedTensors& whole, const AdamW& optimizer) const;
  // Rank 0's values to everyone.
  void from_leader(const NamedTensors& tensors) const;
  double from_leader(double value) const;
  std::string from_leader(const std::string& text) const;

 private:
  struct Bucket;
  void accumulated(std::size_t parameter);
  void launch(Bucket& bucket);
  void launch_ready();
  Collective* const ranks_;
  std::vector<at::Tensor> values_;
  std::vector<int> owner_;
  std::vector<std::unique_ptr<Bucket>> buckets_;
  std::vector<std::size_t> bucket_of_;
  std::vector<int> fires_, expected_;  // how often a gradient grew in the last backward pass; how often it does as a rule
  std::size_t next_ = 0;               // bucket that leaves next: the same order on every rank
  bool armed_ = false, learned_ = false;
};

// `work` on rank 0, then on the others: for what leaves a file which the others then find. null: one process.
void leader_first(Collective* ranks, const std::function<void()>& work);
bool leads(const Collective* ranks);  // also true of one process
// What `count` pieces of work give, each done by one rank, in turns; everyone has all of it. null: one process.
std::vector<std::string> by_turns(Collective* ranks, std::size_t count, const std::function<std::string(std::size_t)>& work);
// Rank 0's parameters to everyone, after a check that all have the same names and shapes.
void share_weights(Collective& ranks, Transformer& model);

// Error unless the micro batches of a step can be dealt out evenly: accumulate must be a multiple of `world`.
void check_world_fits(std::int64_t batch_size, std::int64_t accumulate, int world, const std::string& place);

}  // namespace kompakt
