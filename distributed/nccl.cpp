#ifdef KOMPAKT_GLOO
#include "distributed/nccl.h"

#include "core/error.h"
#include "core/text.h"
#ifdef KOMPAKT_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

namespace kompakt {

#ifdef KOMPAKT_NCCL
c10::intrusive_ptr<c10d::Backend> nccl_group(const c10::intrusive_ptr<c10d::Store>& store, const Launch& launch, c10::Device device, std::chrono::milliseconds timeout) {
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  auto group = c10::make_intrusive<c10d::ProcessGroupNCCL>(store, launch.rank, launch.world, options);
  group->setBoundDeviceId(device);
  return group;
}
#else
c10::intrusive_ptr<c10d::Backend> nccl_group(const c10::intrusive_ptr<c10d::Store>&, const Launch& launch, c10::Device device, std::chrono::milliseconds) {
  throw Error(str("this kompakt cannot use several GPUs, and ", launch.world, " ranks were started on ", device.str(), ": NCCL was not there when it was built")).at("--device").given(device.str())
      .hint("scripts/bootstrap.sh --cuda installs LibTorch with NCCL; build again, or use --device cpu");
}
#endif

}  // namespace kompakt
#endif
