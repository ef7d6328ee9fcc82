#include "train/quantized_moments.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "model/parallel.h"

namespace kompakt {
namespace {

constexpr int exponent_bits = 7;
constexpr std::int64_t blocks_per_task = 64;

// For decade i = 0..6 below 1: the middles of 2^i (signed, each with its negative) or 2^(i+1) (unsigned) equal parts of [0.1, 1],
// times 10^(i-6); then 0 and 1.
std::array<float, 256> dynamic_codes(bool is_signed) {
  std::vector<double> values{0, 1};
  for (int i = 0; i < exponent_bits; ++i) {
    const int parts = 1 << (is_signed ? i : i + 1);
    const double decade = std::pow(10.0, i - (exponent_bits - 1));
    for (int k = 0; k < parts; ++k) {
      const double middle = decade * (0.1 + 0.9 * (k + 0.5) / parts);
      values.push_back(middle);
      if (is_signed) values.push_back(-middle);
    }
  }
  std::sort(values.begin(), values.end());
  std::array<float, 256> out{};
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(values.at(i));
  return out;
}

// bounds[i]: from here on code i + 1 is nearer than code i.
const std::array<float, 255>& code_bounds(bool is_signed) {
  static const auto make = [](bool sign) {
    std::array<float, 255> out{};
    const auto& codes = moment_codes(sign);
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>((static_cast<double>(codes[i]) + codes[i + 1]) / 2);
    return out;
  };
  static const std::array<float, 255> with_sign = make(true), without = make(false);
  return is_signed ? with_sign : without;
}

std::uint8_t nearest_code(float x, const std::array<float, 255>& bounds) {
  int at = 0;  // bounds below or at x: a search in eight steps without a branch
  for (int half = 128; half > 0; half /= 2) at += at + half <= 255 && bounds[static_cast<std::size_t>(at + half - 1)] <= x ? half : 0;
  return static_cast<std::uint8_t>(at);
}

at::Tensor moment_table(const float* values, std::int64_t count, c10::Device device) { return at::from_blob(const_cast<float*>(values), {count}, at::kFloat).clone().to(device); }

struct MomentBlock {  // one block of one moment while it is worked on
  std::uint8_t* codes;
  float* scale;
  const std::array<float, 256>& table;
  const std::array<float, 255>& bounds;
  bool is_signed;
  float read(std::int64_t i) const { return table[codes[i]] * *scale; }
  void write(const float* values, std::int64_t count) {
    float largest = 0;
    for (std::int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(values[i]));
    *scale = largest;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::uint8_t code = nearest_code(largest > 0 ? values[i] / largest : 0.0f, bounds);
      codes[i] = !is_signed && values[i] > 0 ? std::max<std::uint8_t>(code, 1) : code;
    }
  }
};

}  // namespace

const std::array<float, 256>& moment_codes(bool is_signed) {
  static const std::array<float, 256> with_sign = dynamic_codes(true), without = dynamic_codes(false);
  return is_signed ? with_sign : without;
}

QuantizedMoment zero_moment(std::int64_t count, bool is_signed, c10::Device device) {
  const std::uint8_t zero = nearest_code(0, code_bounds(is_signed));
  return {at::full({count}, zero, at::TensorOptions(device).dtype(at::kByte)), at::zeros({(count + moment_block - 1) / moment_block}, at::TensorOptions(device).dtype(at::kFloat)), is_signed};
}

at::Tensor read_moment(const QuantizedMoment& moment) {
  const at::Tensor codes = moment_table(moment_codes(moment.is_signed).data(), 256, moment.codes.device());
  return codes.index_select(0, moment.codes.to(at::kLong)) * moment.scales.repeat_interleave(moment_block).narrow(0, 0, moment.codes.size(0));
}

void write_moment(const at::Tensor& values, QuantizedMoment& moment) {
  const std::int64_t count = values.size(0), blocks = moment.scales.size(0);
  const at::Tensor padded = at::constant_pad_nd(values, {0, blocks * moment_block - count}).view({blocks, moment_block});
  const at::Tensor largest = padded.abs().amax(1);
  const at::Tensor unit = at::where(largest.unsqueeze(1) > 0, padded / largest.unsqueeze(1), at::zeros_like(padded)).view({-1}).narrow(0, 0, count);
  at::Tensor codes = at::bucketize(unit.contiguous(), moment_table(code_bounds(moment.is_signed).data(), 255, values.device()), /*out_int32=*/false, /*right=*/true);
  if (!moment.is_signed) codes = at::where(values > 0, codes.clamp_min(1), codes);
  moment.codes.copy_(codes);
  moment.scales.copy_(largest);
}

void adamw_8bit_reference(const at::Tensor& value, const at::Tensor& gradient, QuantizedMoment& first, QuantizedMoment& second, const AdamStep& step) {
  const at::NoGradGuard no_grad;
  const at::Tensor g = gradient.reshape({-1}) / step.divisor;
  const at::Tensor m = read_moment(first) * step.beta1 + g * (1 - step.beta1);
  const at::Tensor v = read_moment(second) * step.beta2 + g.square() * (1 - step.beta2);
  const double rate = step.learning_rate / (1 - std::pow(step.beta1, step.step)), root = std::sqrt(1 - std::pow(step.beta2, step.step));
  at::Tensor flat = value.detach().view({-1});
  flat.mul_(1 - step.learning_rate * step.weight_decay).sub_(m / (v.sqrt() / root + step.epsilon) * rate);
  write_moment(m, first);
  write_moment(v, second);
}

void adamw_8bit_step(const at::Tensor& value, const at::Tensor& gradient, QuantizedMoment& first, QuantizedMoment& second, const AdamStep& step) {
  if (!value.is_cpu()) return adamw_8bit_reference(value, gradient, first, second, step);
  const at::NoGradGuard no_grad;
  const at::Tensor dense = gradient.contiguous();
  float* const x = value.detach().mutable_data_ptr<float>();
  const float* const g = dense.const_data_ptr<float>();
  std::uint8_t* const first_codes = first.codes.mutable_data_ptr<std::uint8_t>();
  std::uint8_t* const second_codes = second.codes.mutable_data_ptr<std::uint8_t>();
  float* const first_scales = first.scales.mutable_data_ptr<float>();
  float* const second_scales = second.scales.mutable_data_ptr<float>();
  const std::int64_t total = value.numel();
  const auto beta1 = static_cast<float>(step.beta1), beta2 = static_cast<float>(step.beta2), epsilon = static_cast<float>(step.epsilon);
  const auto rate = static_cast<float>(step.learning_rate / (1 - std::pow(step.beta1, step.step))), root = static_cast<float>(std::sqrt(1 - std::pow(step.beta2, step.step)));
  const auto shrink = static_cast<float>(1 - step.learning_rate * step.weight_decay), divisor = static_cast<float>(step.divisor);
  at::parallel_for(0, first.scales.size(0), blocks_per_task, [&](std::int64_t begin, std::int64_t end) {
    std::array<float, moment_block> m{}, v{};
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t start = block * moment_block, count = std::min(moment_block, total - start);
      MomentBlock one{first_codes + start, first_scales + block, moment_codes(true), code_bounds(true), true};
      MomentBlock two{second_codes + start, second_scales + block, moment_codes(false), code_bounds(false), false};
      for (std::int64_t i = 0; i < count; ++i) {
        const auto at = static_cast<std::size_t>(i);
        const float gradient_i = g[start + i] / divisor;
        m[at] = one.read(i) * beta1 + gradient_i * (1 - beta1);
        v[at] = two.read(i) * beta2 + gradient_i * gradient_i * (1 - beta2);
        x[start + i] = x[start + i] * shrink - m[at] / (std::sqrt(v[at]) / root + epsilon) * rate;
      }
      one.write(m.data(), count);
      two.write(v.data(), count);
    }
  });
}

}  // namespace kompakt
