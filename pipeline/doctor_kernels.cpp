// The door from `kompakt doctor` to the CUDA kernels. Whether they were compiled into this program is known here alone.
#include "pipeline/doctor_kernels.h"

#include "core/text.h"
#ifdef KOMPAKT_KERNELS
#include "quantize/cuda/check.h"
#include "train/cuda/check.h"
#endif

namespace kompakt {

Json doctor_kernels() {
  Json checks = Json::array();
#ifdef KOMPAKT_KERNELS
  const int devices = cuda::device_count();
  for (int device = 0; device < devices; ++device)
    for (const auto check_folder : {cuda::check_kernels, cuda::check_row_kernels})
      for (const cuda::KernelCheck& check : check_folder(device)) checks.push_back(Json{{"check", check.kernel}, {"passed", check.passed}, {"note", check.note}});
  if (devices == 0) checks.push_back(Json{{"check", "CUDA kernels"}, {"passed", nullptr}, {"note", "compiled in, but there is no CUDA device: nothing was run on a GPU"}});
#else
  checks.push_back(Json{{"check", "CUDA kernels"}, {"passed", nullptr}, {"note", "not compiled in: nvcc was not found when kompakt was built"}});
#endif
  return checks;
}

}  // namespace kompakt
