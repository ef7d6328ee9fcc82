// Gloo (and NCCL, through nccl.h) behind Collective. Whether Gloo's headers were there is known in this file alone.
#include "distributed/collective.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "core/error.h"
#include "core/text.h"
#ifdef KOMPAKT_GLOO
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include "distributed/nccl.h"
#include "distributed/rendezvous.h"
#endif

namespace kompakt {

void Collective::check_equal(const std::string& text, const std::string& what, const std::string& hint) {
  const std::vector<std::string> all = gather(text);
  std::vector<std::string> others;
  for (std::size_t rank = 1; rank < all.size(); ++rank)
    if (all[rank] != all[0]) others.push_back(str(rank));
  if (!others.empty()) throw Error(str(others.size() == 1 ? "rank " : "ranks ", kompakt::join(others, ", "), others.size() == 1 ? " has another " : " have another ", what, " than rank 0")).hint(hint);
}

#ifdef KOMPAKT_GLOO
namespace {

// Liveness and progress are watched beside the transport, so its own limit is out of the way: rank 0 may measure for hours.
constexpr std::chrono::hours transport_timeout{24 * 7};
constexpr std::chrono::milliseconds watch_pause{1000};

bool is_loopback(const std::string& address) { return address == "localhost" || address == "::1" || starts_with(address, "127."); }

// Before the ranks meet: one that has no network is then missed by the others, not waited for.
std::shared_ptr<::gloo::transport::Device> gloo_device(const Launch& launch) {
  const char* interface = std::getenv("GLOO_SOCKET_IFNAME");
  try {
    if (interface) return c10d::ProcessGroupGloo::createDeviceForInterface(interface);
    return is_loopback(launch.address) ? c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1") : c10d::ProcessGroupGloo::createDefaultDevice();
  } catch (const std::exception& error) {
    const std::string words = error.what();
    throw Error(str("the network of this machine cannot be used: ", words.substr(0, words.find('\n')))).at("GLOO_SOCKET_IFNAME").given(interface ? interface : "").hint("set it to an interface that `ip addr` lists and that reaches the other machines");
  }
}

class GlooCollective final : public Collective {
 public:
  GlooCollective(const Launch& launch, c10::Device device, std::shared_ptr<::gloo::transport::Device> network) : Collective(launch.rank, launch.world), rendezvous_(std::make_unique<Rendezvous>(launch)) {
    // A rank that is killed between the meeting and its first connection is waited for no longer than one that never came.
    auto options = c10d::ProcessGroupGloo::Options::create(Rendezvous::patience());
    options->devices.push_back(std::move(network));
    try {
      host_ = c10::make_intrusive<c10d::ProcessGroupGloo>(rendezvous_->store("gloo"), rank(), world(), options);
      host_->setTimeout(transport_timeout);
    } catch (const std::exception& error) {  // Gloo's own are no c10::Error
      const auto* torch = dynamic_cast<const c10::Error*>(&error);
      rendezvous_->lost(torch ? torch->what_without_backtrace() : error.what());
    }
    device_ = device.is_cpu() ? host_ : nccl_group(rendezvous_->store("nccl"), launch, device, transport_timeout);
  }

  ~GlooCollective() override {
    if (left_) return;
    // A destructor would wait for operations that never end.
    host_.release();
    device_.release();
    rendezvous_.release();  // nor for its thread, which may hang in the store
  }

  std::unique_ptr<Pending> all_reduce(const at::Tensor& tensor) override {
    rendezvous_->enter();
    std::vector<at::Tensor> list{tensor};
    return std::make_unique<Operation>(*this, group(tensor).allreduce(list), tensor);
  }

  void broadcast(const at::Tensor& tensor, int root) override {
    if (!tensor.is_contiguous()) throw std::logic_error("broadcast: the tensor is not contiguous");
    if (tensor.numel() == 0) return;
    rendezvous_->enter();
    std::vector<at::Tensor> list{tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    finish(group(tensor).broadcast(list, options), tensor);
  }

  std::vector<std::string> gather(const std::string& text) override {
    const at::Tensor length = at::full({1}, static_cast<std::int64_t>(text.size()), at::kLong);
    const std::vector<at::Tensor> lengths = all_gather(length);
    std::int64_t most = 1;
    for (const at::Tensor& each : lengths) most = std::max(most, each.item<std::int64_t>());
    const at::Tensor bytes = at::zeros({most}, at::kByte);
    std::memcpy(bytes.mutable_data_ptr(), text.data(), text.size());
    const std::vector<at::Tensor> all = all_gather(bytes);
    std::vector<std::string> out;
    for (std::size_t i = 0; i < all.size(); ++i) out.emplace_back(static_cast<const char*>(all[i].const_data_ptr()), static_cast<std::size_t>(lengths[i].item<std::int64_t>()));
    return out;
  }

  std::string from_leader(const std::string& text) override {
    const at::Tensor length = at::full({1}, static_cast<std::int64_t>(text.size()), at::kLong);
    broadcast(length, 0);
    const at::Tensor bytes = at::zeros({length.item<std::int64_t>()}, at::kByte);
    if (leader()) std::memcpy(bytes.mutable_data_ptr(), text.data(), text.size());
    broadcast(bytes, 0);
    return {static_cast<const char*>(bytes.const_data_ptr()), static_cast<std::size_t>(bytes.numel())};
  }

  void fail(const std::string& reason) noexcept override { rendezvous_->fail(reason); }

  void leave() override {
    rendezvous_->leave();
    left_ = true;
  }

 private:
  class Operation final : public Pending {
   public:
    Operation(GlooCollective& owner, c10::intrusive_ptr<c10d::Work> work, at::Tensor tensor) : owner_(owner), work_(std::move(work)), tensor_(std::move(tensor)) {}
    void wait() override { owner_.finish(work_, tensor_); }

   private:
    GlooCollective& owner_;
    c10::intrusive_ptr<c10d::Work> work_;
    at::Tensor tensor_;
  };

  c10d::Backend& group(const at::Tensor& tensor) { return tensor.is_cpu() ? *host_ : *device_; }

  std::vector<at::Tensor> all_gather(const at::Tensor& tensor) {
    std::vector<std::vector<at::Tensor>> outputs(1);
    for (int rank = 0; rank < world(); ++rank) outputs[0].push_back(at::empty_like(tensor));
    std::vector<at::Tensor> inputs{tensor};
    rendezvous_->enter();
    finish(host_->allgather(outputs, inputs), tensor);
    return outputs[0];
  }

  void finish(const c10::intrusive_ptr<c10d::Work>& work, const at::Tensor& tensor) {
    if (!tensor.is_cpu()) {  // waits on the stream only; the next numbers on the host pass through Gloo
      work->wait();
      return;
    }
    for (;;) {
      try {
        work->wait(watch_pause);
        return;
      } catch (const std::exception&) {
        if (work->isCompleted()) {  // it has ended, well or badly, since the wait ran out: a second one tells which
          try {
            work->wait();
            return;
          } catch (const std::exception& error) {
            rendezvous_->lost(error.what());
          }
        }
      }
      rendezvous_->check();  // the wait ran out and the operation goes on
    }
  }

  std::unique_ptr<Rendezvous> rendezvous_;
  c10::intrusive_ptr<c10d::Backend> host_, device_;
  bool left_ = false;
};

}  // namespace

bool collectives_available() { return true; }

std::unique_ptr<Collective> Collective::join(const Launch& launch, c10::Device device) {
  if (launch.alone()) throw std::logic_error("Collective::join: one process");
  return std::make_unique<GlooCollective>(launch, device, gloo_device(launch));
}

#else

bool collectives_available() { return false; }

std::unique_ptr<Collective> Collective::join(const Launch& launch, c10::Device) {
  throw Error(str("this kompakt runs as one process only, and ", launch.world, " were started: Gloo's headers were not there when it was built")).at("WORLD_SIZE").given(str(launch.world)).hint("install libgloo-dev (scripts/bootstrap.sh does) and build again, or start one process");
}

#endif

}  // namespace kompakt
