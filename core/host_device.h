// Marks inline functions that CUDA kernels and their CPU twins share. C++17, so that nvcc compiles it.
#pragma once

#if defined(__CUDACC__)
#define KOMPAKT_HD __host__ __device__ __forceinline__
#else
#define KOMPAKT_HD inline
#endif
