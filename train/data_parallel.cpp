// Buckets, their order on the wire, and who owns what.
#include "train/data_parallel.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "core/error.h"
#include "core/json.h"
#include "core/text.h"
#include "distributed/collective.h"
#include "formats/tensor_data.h"

namespace kompakt {
namespace {

constexpr std::int64_t bucket_bytes = 25 << 20;  // as in PyTorch: long enough for the wire, short enough to leave early

// In order, runs of one type and at most bucket_bytes each.
std::vector<std::vector<std::size_t>> parallel_runs(const std::vector<std::size_t>& order, const std::vector<at::Tensor>& values) {
  std::vector<std::vector<std::size_t>> out;
  std::int64_t bytes = 0;
  for (const std::size_t i : order) {
    const auto size = static_cast<std::int64_t>(values[i].nbytes());
    const bool fits = !out.empty() && bytes + size <= bucket_bytes && values[out.back().front()].scalar_type() == values[i].scalar_type() && values[out.back().front()].device() == values[i].device();
    if (!fits) out.emplace_back(), bytes = 0;
    out.back().push_back(i);
    bytes += size;
  }
  return out;
}

std::int64_t parallel_numel(const std::vector<std::size_t>& members, const std::vector<at::Tensor>& values) {
  return std::accumulate(members.begin(), members.end(), std::int64_t{0}, [&](std::int64_t sum, std::size_t i) { return sum + values[i].numel(); });
}

struct ParallelHook final : torch::autograd::PostAccumulateGradHook {
  explicit ParallelHook(std::function<void()> f) : call(std::move(f)) {}
  void operator()(const at::Tensor&) override { call(); }
  std::function<void()> call;
};

// Numbers as text that reads back to the same bits, NaN and infinity included, which JSON itself has no word for.
std::string share_text(const StepShare& share, const std::string& has_gradient, const std::string& stale) {
  Json parts = Json::array();
  for (const auto& [name, value] : share.parts) parts.push_back({name, shortest(value)});
  return Json{{"loss", shortest(share.loss)}, {"parts", parts}, {"interrupted", share.interrupted}, {"gradients", has_gradient}, {"stale", stale}}.dump();
}

double share_number(const Json& json) { return std::strtod(json.get_ref<const std::string&>().c_str(), nullptr); }

// Rank 0's values into everyone's tensor, whatever its strides.
void parallel_copy(Collective& ranks, const at::Tensor& tensor) {
  const at::NoGradGuard no_grad;
  const at::Tensor value = tensor.detach(), whole = value.contiguous();
  ranks.broadcast(whole, 0);
  if (!value.is_same(whole)) value.copy_(whole);
}

}  // namespace

struct DataParallel::Bucket {
  std::vector<std::size_t> members;  // in the order in which gradients appear as a rule: last parameter first
  at::Tensor flat;                   // their gradients side by side
  int waiting = 0;                   // members whose gradient is not final yet
  bool stale = false;                // a gradient grew after the bucket had left
  std::unique_ptr<Collective::Pending> pending;
};

DataParallel::DataParallel(Collective* ranks, const std::vector<TrainableParameter>& parameters) : ranks_(ranks) {
  if (!ranks_) return;
  for (const TrainableParameter& parameter : parameters) values_.push_back(parameter.value);
  const std::size_t count = values_.size();
  // Longest-processing-time rule; ties by position, so that every rank comes to the same split.
  std::vector<std::size_t> order(count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return values_[a].numel() > values_[b].numel(); });
  owner_.assign(count, 0);
  std::vector<std::int64_t> load(static_cast<std::size_t>(ranks_->world()), 0);
  for (const std::size_t i : order) {
    const auto least = std::min_element(load.begin(), load.end());
    owner_[i] = static_cast<int>(least - load.begin());
    *least += values_[i].numel();
  }
  std::vector<std::size_t> backward(count);
  std::iota(backward.rbegin(), backward.rend(), std::size_t{0});
  bucket_of_.assign(count, 0);
  for (auto& members : parallel_runs(backward, values_)) {
    for (const std::size_t i : members) bucket_of_[i] = buckets_.size();
    auto bucket = std::make_unique<Bucket>();
    bucket->members = std::move(members);
    buckets_.push_back(std::move(bucket));
  }
  fires_.assign(count, 0), expected_.assign(count, 0);
  for (std::size_t i = 0; i < count; ++i) torch::autograd::impl::set_post_acc_grad_hooks(values_[i], std::make_unique<ParallelHook>([this, i] { accumulated(i); }));
  NamedTensors named;
  for (const TrainableParameter& parameter : parameters) named.emplace_back(parameter.name, parameter.value);
  from_leader(named);
}

DataParallel::~DataParallel() {
  for (const at::Tensor& value : values_) torch::autograd::impl::set_post_acc_grad_hooks(value, nullptr);
}

bool DataParallel::leader() const { return !ranks_ || ranks_->leader(); }

bool DataParallel::takes(std::size_t i) const { return !ranks_ || i % static_cast<std::size_t>(ranks_->world()) == static_cast<std::size_t>(ranks_->rank()); }

std::vector<bool> DataParallel::mine() const {
  std::vector<bool> out;
  for (const int owner : owner_) out.push_back(owner == ranks_->rank());
  return out;
}

void DataParallel::before_last_backward() {
  if (!ranks_) return;
  std::fill(fires_.begin(), fires_.end(), 0);
  for (const auto& bucket : buckets_) bucket->waiting = static_cast<int>(std::count_if(bucket->members.begin(), bucket->members.end(), [&](std::size_t i) { return expected_[i] > 0; }));
  armed_ = true;
}

// Called by autograd, one parameter at a time, when its gradient has grown.
void DataParallel::accumulated(std::size_t parameter) {
  if (!armed_) return;
  Bucket& bucket = *buckets_[bucket_of_[parameter]];
  const int fires = ++fires_[parameter];
  if (bucket.pending) bucket.stale = true;  // copied too early; sent again at the end
  // A first step tells how often each gradient grows (recomputed blocks run backward passes of their own).
  if (!learned_ || fires != expected_[parameter]) return;
  --bucket.waiting;
  launch_ready();
}

void DataParallel::launch_ready() {
  while (next_ < buckets_.size() && buckets_[next_]->waiting == 0) launch(*buckets_[next_++]);
}

void DataParallel::launch(Bucket& bucket) {
  const at::NoGradGuard no_grad;
  if (!bucket.flat.defined()) bucket.flat = at::empty({parallel_numel(bucket.members, values_)}, values_[bucket.members.front()].options().requires_grad(false));
  std::int64_t offset = 0;
  for (const std::size_t i : bucket.members) {
    const at::Tensor place = bucket.flat.narrow(0, offset, values_[i].numel());
    if (const at::Tensor& gradient = values_[i].grad(); gradient.defined()) place.copy_(gradient.reshape({-1}));
    else place.zero_();
    offset += values_[i].numel();
  }
  // Everybody gets the sums, though with ZeRO stage 1 an owner alone would do: c10d's Gloo builds reduce-scatter from a copy and an
  // all-reduce, so it would save nothing between CPUs, and the clipping norm needs all gradients on every rank. NCCL's would save half of the
  // bytes; it waits for a machine with several GPUs that shows it.
  bucket.pending = ranks_->all_reduce(bucket.flat);
}

StepShare DataParallel::finish_step(const StepShare& mine) {
  if (!ranks_) return mine;
  armed_ = false;
  while (next_ < buckets_.size()) launch(*buckets_[next_++]);
  next_ = 0;
  std::string has_gradient, stale;
  for (const at::Tensor& value : values_) has_gradient += value.grad().defined() ? '1' : '0';
  for (const auto& bucket : buckets_) bucket->pending->wait();
  for (const auto& bucket : buckets_) stale += bucket->stale ? '1' : '0';

  StepShare all;
  for (const std::string& text : ranks_->gather(share_text(mine, has_gradient, stale))) {
    const Json json = parse_json(text, "numbers of a rank");
    all.loss += share_number(json.at("loss"));
    for (const Json& part : json.at("parts")) {
      const auto name = part.at(0).get<std::string>();
      auto found = std::find_if(all.parts.begin(), all.parts.end(), [&](const auto& entry) { return entry.first == name; });
      if (found == all.parts.end()) found = all.parts.emplace(all.parts.end(), name, 0.0);
      found->second += share_number(part.at(1));
    }
    all.interrupted = all.interrupted || json.at("interrupted").get<bool>();
    const auto join = [](std::string& into, const std::string& flags) {
      for (std::size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], flags.at(i));
    };
    join(has_gradient, json.at("gradients").get<std::string>());
    join(stale, json.at("stale").get<std::string>());
  }

  const at::NoGradGuard no_grad;
  for (std::size_t b = 0; b < buckets_.size(); ++b) {
    Bucket& bucket = *buckets_[b];
    if (stale[b] == '1') {  // of one rank: all send again what they have now
      launch(bucket);
      bucket.pending->wait();
    }
    std::int64_t offset = 0;
    for (const std::size_t i : bucket.members) {
      const at::Tensor place = bucket.flat.narrow(0, offset, values_[i].numel());
      values_[i].mutable_grad() = has_gradient[i] == '1' ? place.view(values_[i].sizes()) : at::Tensor();
      offset += values_[i].numel();
    }
    bucket.pending.reset();
    bucket.stale = false;
  }
  for (std::size_t i = 0; i < fires_.size(); ++i) expected_[i] = std::max(expected_[i], fires_[i]);
  learned_ = learned_ || std::any_of(fires_.begin(), fires_.end(), [](int fires) { return fires > 0; });
  return all;
}

void DataParallel::share_parameters() {
  if (!ranks_) return;
  const at::NoGradGuard no_grad;
  for (int owner = 0; owner < ranks_->world(); ++owner) {
    std::vector<std::size_t> owned;
    for (std::size_t i = 0; i < values_.size(); ++i)
      if (owner_[i] == owner) owned.push_back(i);
    for (const auto& members : parallel_runs(owned, values_)) {
      const at::Tensor flat = at::empty({parallel_numel(members, values_)}, values_[members.front()].options().requires_grad(false));
      const auto each = [&](const auto& copy) {
        std::int64_t offset = 0;
        for (const std::size_t i : members) {
          copy(flat.narrow(0, offset, values_[i].numel()).view(values_[i].sizes()), values_[i].detach());
          offset += values_[i].numel();
        }
      };
      const bool sends = owner == ranks_->rank();
      if (sends) each([](const at::Tensor& place, const at::Tensor& value) { place.copy_(value); });
      ranks_->broadcast(flat, owner);
      if (!sends) each([](const at::Tensor& place, const at::Tensor& value) { value.copy_(place); });
    }
  }
}

NamedTensors DataParallel::whole_state(const AdamW& optimizer) const {
  if (!ranks_) return optimizer.state();
  NamedTensors out;
  for (std::size_t i = 0; i < values_.size(); ++i)
    for (auto& [name, tensor] : optimizer.state_of(i)) {
      const at::Tensor host = tensor.to(at::kCPU).contiguous();
      if (owner_[i] != 0) ranks_->broadcast(host, owner_[i]);
      if (ranks_->leader()) out.emplace_back(std::move(name), host);
    }
  return out;
}

void DataParallel::give_state(const NamedTensors& whole, const AdamW& optimizer) const {
  const at::NoGradGuard no_grad;
  std::size_t next = 0;
  for (std::size_t i = 0; i < values_.size(); ++i)
    for (auto& [name, tensor] : optimizer.state_of(i)) {
      const at::Tensor host = ranks_->leader() ? whole.at(next++).second : at::empty_like(tensor, tensor.options().device(at::kCPU));
      if (owner_[i] != 0) ranks_->broadcast(host, 0);
      if (owner_[i] == ranks_->rank()) tensor.copy_(host);
    }
}

void DataParallel::from_leader(const NamedTensors& tensors) const {
  if (!ranks_) return;
  for (const auto& [name, tensor] : tensors) parallel_copy(*ranks_, tensor);
}

std::vector<double> DataParallel::sum(const std::vector<double>& mine) const {
  if (!ranks_) return mine;
  Json words = Json::array();
  for (const double value : mine) words.push_back(shortest(value));
  std::vector<double> out(mine.size(), 0);
  for (const std::string& text : ranks_->gather(words.dump())) {
    const Json share = parse_json(text, "numbers of a rank");
    for (std::size_t i = 0; i < out.size(); ++i) out[i] += share_number(share.at(i));
  }
  return out;
}

double DataParallel::from_leader(double value) const { return ranks_ ? std::strtod(ranks_->from_leader(shortest(value)).c_str(), nullptr) : value; }
std::string DataParallel::from_leader(const std::string& text) const { return ranks_ ? ranks_->from_leader(text) : text; }

void leader_first(Collective* ranks, const std::function<void()>& work) {
  if (!ranks || ranks->leader()) work();
  if (!ranks) return;
  ranks->from_leader("");
  if (!ranks->leader()) work();
}

bool leads(const Collective* ranks) { return !ranks || ranks->leader(); }

std::vector<std::string> by_turns(Collective* ranks, std::size_t count, const std::function<std::string(std::size_t)>& work) {
  std::vector<std::string> out(count);
  const std::size_t world = ranks ? static_cast<std::size_t>(ranks->world()) : 1, first = ranks ? static_cast<std::size_t>(ranks->rank()) : 0;
  Json mine = Json::array();
  for (std::size_t i = first; i < count; i += world) mine.push_back(out[i] = work(i));
  if (world == 1) return out;
  const std::vector<std::string> all = ranks->gather(mine.dump());
  for (std::size_t rank = 0; rank < world; ++rank) {
    const Json theirs = parse_json(all[rank], "work of a rank");
    for (std::size_t i = rank, at = 0; i < count; i += world, ++at) out[i] = theirs.at(at).get<std::string>();
  }
  return out;
}

void share_weights(Collective& ranks, Transformer& model) {
  std::string shapes;
  for (const NamedParameter& parameter : model.parameters()) shapes += str(parameter.name, " ", shape_text(parameter.value->sizes().vec()), "\n");
  ranks.check_equal(shapes, "model", "all ranks need the same recipe and data");
  for (const NamedParameter& parameter : model.parameters()) parallel_copy(ranks, *parameter.value);
}

void check_world_fits(std::int64_t batch_size, std::int64_t accumulate, int world, const std::string& place) {
  if (accumulate % world == 0) return;
  const std::int64_t sequences = batch_size * accumulate;
  std::int64_t fitting = world;
  while (fitting <= sequences && sequences % fitting != 0) fitting += world;
  throw Error(str("the ", accumulate, accumulate == 1 ? " micro batch" : " micro batches", " of a step cannot be dealt out evenly to ", world, " ranks")).at(place).given(str("accumulate: ", accumulate)).allowed(str("a multiple of ", world))
      .hint(fitting <= sequences ? str("the same ", sequences, " sequences a step: batch_size: ", sequences / fitting, ", accumulate: ", fitting) : str("a step of ", sequences, " sequences is too small for ", world, " ranks: start fewer, or make it larger"));
}

}  // namespace kompakt
