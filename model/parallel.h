// The one way to at::parallel_for: its loops are in a header, and in a unit compiled without OpenMP they run on one thread
// without a word. Loop bodies must not depend on how the range is split: same bytes for any number of threads.
#pragma once

#include <ATen/Parallel.h>

#ifndef _OPENMP
#error "compile this unit with OpenMP (CMakeLists.txt, KOMPAKT_PARALLEL_FOLDERS): its parallel loops would be serial"
#endif
