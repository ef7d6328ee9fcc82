// The one way to at::parallel_for: its loops are in a header, and in a unit compiled without OpenMP they run on one thread
// without a word. Loop bodies must not depend on how the range is split: same bytes for any number of threads.
#pragma once

#include <ATen/Parallel.h>

#ifndef _OPENMP
#error "compile this unit with OpenMP (CMakeLists.txt, KOMPAKT_PARALLEL_FOLDERS): its parallel loops would be serial"
#endif

namespace kompakt {

// The library's threads are switched off while one of these lives: a factorization must give the same bits for any number.
class SingleThread {
 public:
  SingleThread() : before_(at::get_num_threads()) {
    if (before_ != 1) at::set_num_threads(1);
  }
  ~SingleThread() {
    if (before_ != 1) at::set_num_threads(before_);
  }
  SingleThread(const SingleThread&) = delete;
  SingleThread& operator=(const SingleThread&) = delete;

 private:
  int before_;
};

}  // namespace kompakt
