#include "quantize/cuda/check.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>

#include "quantize/cuda/kernels.h"
#include "quantize/grid_math.h"
#include "quantize/kernels.h"

namespace kompakt::cuda {
namespace {

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
std::vector<float> weights_like(std::size_t count, std::uint32_t seed) {
  std::vector<float> out(count);
  for (float& value : out) {
    float sum = -2;
    for (int i = 0; i < 4; ++i) seed = seed * 1664525u + 1013904223u, sum += static_cast<float>(seed >> 8) / 16777216.0f;
    value = sum;
  }
  return out;
}

std::vector<std::int8_t> codes_like(std::size_t count, int low, int high) {
  std::vector<std::int8_t> out(count);
  std::uint32_t seed = 11;
  for (std::int8_t& code : out) seed = seed * 1664525u + 1013904223u, code = static_cast<std::int8_t>(low + static_cast<int>((seed >> 16) % static_cast<unsigned>(high - low + 1)));
  return out;
}

// Share of entries that are not the same bits.
template <class T>
double unequal(const std::vector<T>& a, const std::vector<T>& b) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < a.size(); ++i) count += std::memcmp(&a[i], &b[i], sizeof(T)) != 0;
  return a.empty() ? 0 : static_cast<double>(count) / static_cast<double>(a.size());
}

double relative_difference(const std::vector<float>& a, const std::vector<float>& b) {
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
  // Sums: both add floats, in different orders; a few units in the last place of some hundred summands.
  void close(const std::string& kernel, int launch, DeviceArray<float>& result, const std::vector<float>& expected) {
    const std::vector<float> host = result.host();
    add(kernel, launch, result.status(), relative_difference(host, expected), 1e-5);
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

struct CheckedLayout {
  const char* name;
  CodeLayout layout;
  std::int64_t rows, columns, group;
};

// Odd columns leave a last byte and a last group that are not full.
const CheckedLayout checked_layouts[] = {
    {"ternary, five a byte, group 64", {Packing::trits, 8, -1, 1}, 37, 203, 64},
    {"2 bit, group 64", {Packing::bits, 2, -2, 1}, 16, 256, 64},
    {"3 bit, group 32", {Packing::bits, 3, -4, 3}, 19, 101, 32},
    {"4 bit, group 128", {Packing::bits, 4, -8, 7}, 33, 300, 128},
    {"8 bit, per row", {Packing::bits, 8, -127, 127}, 8, 77, 77},
};

void check_layout(const CheckedLayout& c, Checker& checker) {
  const std::size_t count = static_cast<std::size_t>(c.rows * c.columns);
  const int packing = c.layout.packing == Packing::trits ? 1 : 0;
  const std::vector<std::int8_t> codes = codes_like(count, c.layout.code_min, c.layout.code_max);
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(c.rows * c.layout.row_bytes(c.columns)));
  cpu::pack(c.layout, codes.data(), c.rows, c.columns, bytes.data());
  const std::string name = c.name;

  DeviceArray<std::int8_t> device_codes(codes);
  DeviceArray<std::uint8_t> device_bytes(std::vector<std::uint8_t>(bytes.size(), 0xaa));
  int launch = pack(packing, c.layout.bits, c.layout.code_min, device_codes.get(), c.rows, c.columns, device_bytes.get(), nullptr);
  checker.same("pack " + name, launch, device_bytes, bytes);

  DeviceArray<std::uint8_t> stored(bytes);
  DeviceArray<std::int8_t> unpacked(std::vector<std::int8_t>(count, 99));
  launch = unpack(packing, c.layout.bits, c.layout.code_min, stored.get(), c.rows, c.columns, unpacked.get(), nullptr);
  checker.same("unpack " + name, launch, unpacked, codes);

  const std::int64_t groups = (c.columns + c.group - 1) / c.group, batch = 3;
  std::vector<std::uint16_t> scales(static_cast<std::size_t>(c.rows * groups));
  const std::uint16_t half_scales[] = {0x2c00, 0x2e66, 0xa800, 0x3000};  // 0.0625, 0.1, -0.03125, 0.125
  for (std::size_t i = 0; i < scales.size(); ++i) scales[i] = half_scales[i % 4];
  const std::vector<float> offsets = weights_like(scales.size(), 5), x = weights_like(static_cast<std::size_t>(batch * c.columns), 6);
  std::vector<float> expected(static_cast<std::size_t>(batch * c.rows));
  PackedMatrix matrix{bytes.data(), scales.data(), offsets.data(), c.rows, c.columns, c.group, c.layout};
  cpu::packed_matvec(matrix, x.data(), batch, expected.data());
  DeviceArray<std::uint16_t> device_scales(scales);
  DeviceArray<float> device_offsets(offsets), device_x(x), y(std::vector<float>(expected.size(), -1.0f));
  launch = packed_matvec(packing, c.layout.bits, c.layout.code_min, stored.get(), device_scales.get(), device_offsets.get(), c.rows, c.columns, c.group, device_x.get(), 0, batch, y.get(), nullptr);
  checker.close("packed product " + name, launch, y, expected);

  std::vector<__nv_bfloat16> x16(x.size());
  std::vector<float> rounded(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) x16[i] = __float2bfloat16(x[i]), rounded[i] = __bfloat162float(x16[i]);
  DeviceArray<__nv_bfloat16> device_x16(x16);
  launch = packed_matvec(packing, c.layout.bits, c.layout.code_min, stored.get(), device_scales.get(), nullptr, c.rows, c.columns, c.group, device_x16.get(), 1, batch, y.get(), nullptr);
  matrix.offsets = nullptr;
  cpu::packed_matvec(matrix, rounded.data(), batch, expected.data());
  checker.close("packed product, bfloat16 inputs, " + name, launch, y, expected);
}

void check_fits(Checker& checker) {
  const std::int64_t rows = 21, columns = 200, group = 64, groups = 4;
  const float smallest = 6.1035e-5f;
  std::vector<float> w = weights_like(static_cast<std::size_t>(rows * columns), 3);
  for (std::int64_t k = 0; k < group; ++k) w[static_cast<std::size_t>(k)] = 0;  // a group of zeros
  std::vector<float> expected(static_cast<std::size_t>(rows * groups));
  DeviceArray<float> device_w(w), scales(expected);

  cpu::fit_ternary(w.data(), rows, columns, group, smallest, expected.data());
  int launch = fit_ternary(device_w.get(), rows, columns, group, smallest, scales.get(), nullptr);
  checker.same("ternary fit", launch, scales, expected);

  cpu::fit_absmax(w.data(), rows, columns, group, 7, smallest, expected.data());
  launch = fit_absmax(device_w.get(), rows, columns, group, 7, smallest, scales.get(), nullptr);
  checker.same("largest-magnitude fit", launch, scales, expected);

  const std::vector<float> offsets = weights_like(expected.size(), 9);
  std::vector<float> rounded(w.size());
  DeviceArray<float> device_scales(expected), device_offsets(offsets), out(rounded);
  for (const bool with_offsets : {false, true}) {
    cpu::fake_quantize(w.data(), expected.data(), with_offsets ? offsets.data() : nullptr, rows, columns, group, -8, 7, rounded.data());
    launch = fake_quantize(device_w.get(), device_scales.get(), with_offsets ? device_offsets.get() : nullptr, rows, columns, group, -8, 7, out.get(), nullptr);
    checker.same(with_offsets ? "fake quantization with offsets" : "fake quantization", launch, out, rounded);
  }
}

}  // namespace

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver is no fault: clear it
    return 0;
  }
  return count;
}

std::vector<KernelCheck> check_kernels(int index) {
  cudaDeviceProp properties{};
  cudaError_t error = cudaSetDevice(index);
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, index);
  if (error != cudaSuccess) return {{"CUDA kernels", false, std::string("device ") + std::to_string(index) + ": " + cudaGetErrorString(error)}};
  Checker checker("cuda:" + std::to_string(index) + ", " + properties.name);
  for (const CheckedLayout& layout : checked_layouts) check_layout(layout, checker);
  check_fits(checker);
  return std::move(checker.checks);
}

}  // namespace kompakt::cuda
