#include "quantize/cuda/check.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "core/cuda_check.h"
#include "quantize/cuda/kernels.h"
#include "quantize/grid_math.h"
#include "quantize/kernels.h"

namespace kompakt::cuda {
namespace {

std::vector<std::int8_t> codes_like(std::size_t count, int low, int high) {
  std::vector<std::int8_t> out(count);
  std::uint32_t seed = 11;
  for (std::int8_t& code : out) seed = seed * 1664525u + 1013904223u, code = static_cast<std::int8_t>(low + static_cast<int>((seed >> 16) % static_cast<unsigned>(high - low + 1)));
  return out;
}

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
  std::string device;
  if (const int error = select_device(index, device); error != 0) return {{"CUDA kernels", false, device + ": " + cudaGetErrorString(static_cast<cudaError_t>(error))}};
  Checker checker(device);
  for (const CheckedLayout& layout : checked_layouts) check_layout(layout, checker);
  check_fits(checker);
  return std::move(checker.checks);
}

}  // namespace kompakt::cuda
