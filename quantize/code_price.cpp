#include "quantize/code_price.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

namespace kompakt {
namespace {

constexpr double price_largest = 2;
constexpr int price_halvings = 9, price_corrections = 4;
constexpr std::int64_t price_sample = 8;  // every so many rows tell how the size falls with the price

std::vector<double> price_counts(const at::Tensor& codes) {
  const at::Tensor flat = codes.to(at::kCPU).contiguous();
  std::vector<double> counts(256, 0.0);
  std::vector<std::int64_t> whole(256, 0);
  const std::int8_t* code = flat.const_data_ptr<std::int8_t>();
  for (std::int64_t i = 0; i < flat.numel(); ++i) ++whole[static_cast<std::size_t>(code[i] + 128)];
  for (std::size_t i = 0; i < counts.size(); ++i) counts[i] = static_cast<double>(whole[i]);
  return counts;
}

double price_entropy(const std::vector<double>& counts) {
  double all = 0, bits = 0;
  for (const double n : counts) all += n;
  for (const double n : counts)
    if (n > 0) bits += n * std::log2(all / n);
  return bits;
}

// Where one code ends and the next begins. With (x - c)^2 + p L(c) equal on both sides of a border, it lies at
// c + 1/2 + p (L(c+1) - L(c)) / 2; codes that nothing rounds to count as half an occurrence.
at::Tensor price_borders(const Grid& grid, const at::Tensor& latents, double price) {
  const auto nearest = [&](const at::Tensor& x) { return x.clamp(grid.code_min, grid.code_max).round().to(at::kChar); };
  const std::vector<double> counts = price_counts(nearest(latents));
  const std::int64_t codes = grid.code_max - grid.code_min + 1;
  at::Tensor borders = at::empty({codes - 1}, at::kFloat);
  float* border = borders.data_ptr<float>();
  const auto bits = [&](std::int64_t code) { return -std::log2(std::max(counts[static_cast<std::size_t>(code + 128)], 0.5)); };  // up to a constant
  for (std::int64_t i = 0; i + 1 < codes; ++i) {
    const std::int64_t code = grid.code_min + i;
    // Not beyond the next code: counts of rare codes are noise.
    border[i] = static_cast<float>(static_cast<double>(code) + 0.5 + std::clamp(price * (bits(code + 1) - bits(code)) / 2, -0.49, 0.49));
  }
  return borders.to(latents.device());
}

at::Tensor price_codes(const Grid& grid, const at::Tensor& latents, double price) {
  if (price <= 0) return latents.clamp(grid.code_min, grid.code_max).round().to(at::kChar);
  return at::bucketize(latents.contiguous(), price_borders(grid, latents, price), true).add_(grid.code_min).to(at::kChar);
}

}  // namespace

at::Tensor codes_at_price(const Grid& grid, const at::Tensor& latents, double price) {
  const at::NoGradGuard no_grad;
  return price_codes(grid, latents, price);
}

double ideal_bits(const at::Tensor& codes) { return price_entropy(price_counts(codes)); }

PricedCodes codes_within(const std::vector<PricedMatrix>& matrices, std::int64_t bytes) {
  const at::NoGradGuard no_grad;
  const auto at_price = [&](double price) {
    PricedCodes out;
    out.price = price;
    for (const PricedMatrix& matrix : matrices) {
      out.codes.push_back(price_codes(*matrix.spec.grid, matrix.latents, price));
      out.bytes += stored_bytes(matrix.spec, {out.codes.back(), matrix.scales, {}});
    }
    return out;
  };
  PricedCodes out = at_price(0);
  if (out.bytes <= bytes) return out;
  // What the size falls by from price to price, on a part of the rows; the whole decides.
  const auto sampled = [&](double price) {
    double bits = 0;
    for (const PricedMatrix& matrix : matrices) {
      const std::int64_t step = std::min(price_sample, std::max<std::int64_t>(1, matrix.latents.size(0) / 64));
      bits += static_cast<double>(step) * ideal_bits(price_codes(*matrix.spec.grid, matrix.latents.slice(0, 0, matrix.latents.size(0), step), price));
    }
    return bits / 8;
  };
  const double start = sampled(0);
  double wanted = start - static_cast<double>(out.bytes - bytes);
  for (int attempt = 0; attempt < price_corrections && out.bytes > bytes; ++attempt) {
    double low = out.price, high = price_largest;
    for (int i = 0; i < price_halvings; ++i) {
      const double middle = (low + high) / 2;
      (sampled(middle) > wanted ? low : high) = middle;
    }
    out = at_price(high);
    wanted -= 1.05 * static_cast<double>(out.bytes - bytes);
  }
  if (out.bytes > bytes) out = at_price(price_largest);
  return out;
}

}  // namespace kompakt
