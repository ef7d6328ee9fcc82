// Optimizer moments in 8 bits: block-wise dynamic quantization (Dettmers et al. 2022, arXiv 2110.02861), blocks of 256 as in bitsandbytes.
// A value is code x largest magnitude of its block; codes are dense near zero, where most moments are: within a factor of 10^-6 to 1
// each decade has twice as many codes as the one below it. Two moments take 2.03 bytes a parameter instead of 8.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

namespace kompakt {

constexpr std::int64_t moment_block = 256;

// Ascending values in [-1, 1] (signed) or [0, 1]: Dettmers' dynamic tree type with 7 exponent bits, 0 and 1 among them.
const std::array<float, 256>& moment_codes(bool is_signed);

struct QuantizedMoment {
  at::Tensor codes;   // [n] uint8, index into moment_codes
  at::Tensor scales;  // [ceil(n / 256)] float32: largest magnitude of a block
  bool is_signed = true;
};
QuantizedMoment zero_moment(std::int64_t count, bool is_signed, c10::Device device);

// [n] float32.
at::Tensor read_moment(const QuantizedMoment& moment);
// Nearest code; ties to the larger. Of an unsigned moment nothing above zero becomes zero: a vanished second moment
// would make the next step as large as 1 / epsilon allows.
void write_moment(const at::Tensor& values, QuantizedMoment& moment);

struct AdamStep {
  double learning_rate, beta1, beta2, weight_decay, epsilon;
  double step = 1;     // from 1, for the correction of the start
  double divisor = 1;  // of the gradient: clipping
};
// One AdamW update of `value` (float32, in place) with moments that are read, moved and written back block by block. On the CPU in
// one pass on all threads with the same bytes for any number of them; on other devices by the functions above.
void adamw_8bit_step(const at::Tensor& value, const at::Tensor& gradient, QuantizedMoment& first, QuantizedMoment& second, const AdamStep& step);
// The same by ATen alone: the reference, and the way on other devices.
void adamw_8bit_reference(const at::Tensor& value, const at::Tensor& gradient, QuantizedMoment& first, QuantizedMoment& second, const AdamStep& step);

}  // namespace kompakt
