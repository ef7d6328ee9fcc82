// Several processes as one: rendezvous, sums and copies of tensors between them, and who is to blame when one is gone.
// A thin door to c10d inside LibTorch: Gloo between CPUs, NCCL between GPUs where it was compiled in. Knows nothing of training.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <memory>
#include <string>
#include <vector>

#include "core/launch.h"

namespace kompakt {

// False where the headers of Gloo were not there when kompakt was built: then a job is one process.
bool collectives_available();

// Every rank calls the same functions in the same order; a call returns when this rank's part is done. While it waits it watches the
// others: a rank that was killed, that ended with an error, whose machine is gone, or that lives but hangs ends the wait with an Error that
// names it (exit code 4). A rank that gets on is waited for without limit: it may be measuring, or computing what the others need. It hangs
// when it is behind and no mark of activity (core/activity.h) has come from it for KOMPAKT_HANG_SECONDS (1800; 0 = never).
class Collective {
 public:
  // Meets the other ranks at launch.address:launch.port. `device` decides what carries tensors on it: Gloo or NCCL.
  // Errors: nobody answers there, or not all ranks come, within 300 s (KOMPAKT_RENDEZVOUS_SECONDS); the port is taken; two processes with one rank
  // or with different world sizes; built without Gloo, or without NCCL for a CUDA device.
  static std::unique_ptr<Collective> join(const Launch& launch, c10::Device device);
  // After a failure nothing is waited for: main() must leave with _Exit, because threads of the transport may hang.
  virtual ~Collective() = default;

  int rank() const { return rank_; }
  int world() const { return world_; }
  bool leader() const { return rank_ == 0; }

  class Pending {
   public:
    virtual ~Pending() = default;
    virtual void wait() = 0;
  };
  // Sum over ranks in place, in an order that depends on the world size alone: the same bytes on every rank and in every run.
  // `tensor` contiguous, of equal shape everywhere; must stay untouched until wait().
  virtual std::unique_ptr<Pending> all_reduce(const at::Tensor& tensor) = 0;
  // Copies `root`'s values into everyone's tensor, which must be contiguous and of equal shape and type. Any device.
  virtual void broadcast(const at::Tensor& tensor, int root) = 0;
  // One text of each rank, in order of ranks, to every rank.
  virtual std::vector<std::string> gather(const std::string& text) = 0;
  // Rank 0's text to everyone: also the way to wait until rank 0 has come here.
  virtual std::string from_leader(const std::string& text) = 0;

  // Tells the others why this rank ends; they report it instead of a lost connection.
  virtual void fail(const std::string& reason) noexcept = 0;
  // The regular end: rank 0, where the others meet, stays until they have left.
  virtual void leave() = 0;

  // Throws an Error that names every rank whose text differs from rank 0's; `what` stands in "has another <what>".
  void check_equal(const std::string& text, const std::string& what, const std::string& hint);

 protected:
  Collective(int rank, int world) : rank_(rank), world_(world) {}

 private:
  int rank_, world_;
};

}  // namespace kompakt
