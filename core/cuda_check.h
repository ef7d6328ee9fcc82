// What the self tests of CUDA kernels share: device memory, numbers that are the same on every machine, comparison with the CPU. For .cu files.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "core/kernel_check.h"

namespace kompakt::cuda {

// Device memory with the contents of a host vector; empty vectors give null.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& host) : size_(host.size()) {
    if (size_ == 0) return;
    status_ = cudaMalloc(&data_, size_ * sizeof(T));
    if (status_ == cudaSuccess) status_ = cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice);
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* get() { return static_cast<T*>(data_); }
  std::vector<T> host() {
    std::vector<T> out(size_);
    if (status_ == cudaSuccess && size_ > 0) status_ = cudaMemcpy(out.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost);
    return out;
  }
  cudaError_t status() const { return status_; }

 private:
  void* data_ = nullptr;
  std::size_t size_;
  cudaError_t status_ = cudaSuccess;
};

// Values that look like weights and are the same on every machine: sum of four uniform numbers of a congruential generator.
inline std::vector<float> weights_like(std::size_t count, std::uint32_t seed) {
  std::vector<float> out(count);
  for (float& value : out) {
    float sum = -2;
    for (int i = 0; i < 4; ++i) seed = seed * 1664525u + 1013904223u, sum += static_cast<float>(seed >> 8) / 16777216.0f;
    value = sum;
  }
  return out;
}

// Share of entries that are not the same bits.
template <class T>
double unequal(const std::vector<T>& a, const std::vector<T>& b) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < a.size(); ++i) count += std::memcmp(&a[i], &b[i], sizeof(T)) != 0;
  return a.empty() ? 0 : static_cast<double>(count) / static_cast<double>(a.size());
}

template <class T>
double relative_difference(const std::vector<T>& a, const std::vector<T>& b) {
  double difference = 0, square = 0;
  for (std::size_t i = 0; i < a.size(); ++i) difference += (double(a[i]) - b[i]) * (double(a[i]) - b[i]), square += double(b[i]) * b[i];
  return square > 0 ? std::sqrt(difference / square) : difference;
}

class Checker {
 public:
  explicit Checker(std::string device) : device_(std::move(device)) {}

  // Rounding and packing: the same bits as the CPU.
  template <class T>
  void same(const std::string& kernel, int launch, DeviceArray<T>& result, const std::vector<T>& expected) {
    const std::vector<T> host = result.host();  // waits for the kernel
    add(kernel, launch, result.status(), unequal(host, expected), 0);
  }
  // Sums: both add floats, in different orders or from exponentials that differ in their last bits; a few units in the last place of some
  // hundred summands.
  template <class T>
  void close(const std::string& kernel, int launch, DeviceArray<T>& result, const std::vector<T>& expected, double allowed = 1e-5) {
    const std::vector<T> host = result.host();
    add(kernel, launch, result.status(), relative_difference(host, expected), allowed);
  }

  std::vector<KernelCheck> checks;

 private:
  void add(const std::string& kernel, int launch, cudaError_t status, double difference, double allowed) {
    const cudaError_t error = launch != 0 ? static_cast<cudaError_t>(launch) : status;
    KernelCheck check{kernel, error == cudaSuccess && difference <= allowed, device_};
    if (error != cudaSuccess) check.note = device_ + ": " + cudaGetErrorString(error);
    else if (!check.passed) check.note = device_ + ": differs from the CPU by " + std::to_string(difference);
    checks.push_back(check);
  }

  std::string device_;
};

// Makes device `index` the current one; `name`: what a note calls it. Returns a cudaError_t as int.
inline int select_device(int index, std::string& name) {
  name = "cuda:" + std::to_string(index);
  cudaDeviceProp properties{};
  cudaError_t error = cudaSetDevice(index);
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, index);
  if (error == cudaSuccess) name += std::string(", ") + properties.name;
  return static_cast<int>(error);
}

}  // namespace kompakt::cuda
