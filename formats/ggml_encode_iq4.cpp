// Reference encoders of the non-linear four-bit types IQ4_NL and IQ4_XS, without and with importance.
#include <algorithm>
#include <cmath>

#include "formats/ggml_pack.h"
#include "formats/ggml_rows.h"
#include "formats/ggml_search.h"
#include "formats/tensor_data.h"

namespace kompakt::ggml_rows {
namespace {

// Index of the nearest of the 16 values; of two equally near ones the larger.
std::int8_t nearest_iq4(float x) {
  if (!(x > iq4_values[0])) return 0;
  if (x >= iq4_values[15]) return 15;
  int above = 1;
  while (x >= iq4_values[above]) ++above;
  return static_cast<std::int8_t>(x - iq4_values[above - 1] < iq4_values[above] - x ? above - 1 : above);
}

struct Iq4Sums {
  float qx = 0, q2 = 0;
};

Iq4Sums iq4_try(const float* in, const float* weights, float inverse, std::int8_t* codes) {
  Iq4Sums sums;
  for (int i = 0; i < 32; ++i) {
    codes[i] = nearest_iq4(inverse * in[i]);
    const float q = iq4_values[codes[i]];
    sums.qx += weights[i] * q * in[i];
    sums.q2 += weights[i] * q * q;
  }
  return sums;
}

// Scale of 32 values: the largest goes to the first table value (with tries > 0: its negative), then 2 tries + 1 neighbours of it.
// `codes` are those of the first scale.
float iq4_scale(const float* in, const float* weights, int tries, std::int8_t* codes) {
  float magnitude = 0, maximum = 0;
  for (int i = 0; i < 32; ++i)
    if (std::fabs(in[i]) > magnitude) {
      magnitude = std::fabs(in[i]);
      maximum = in[i];
    }
  if (magnitude < ggml_search::tiny_group) {
    std::fill(codes, codes + 32, std::int8_t{0});
    return 0;
  }
  const float start = tries > 0 ? -maximum / iq4_values[0] : maximum / iq4_values[0];
  const Iq4Sums first = iq4_try(in, weights, 1 / start, codes);
  float d = first.q2 > 0 ? first.qx / first.q2 : 0.0f, best = d * first.qx;
  std::int8_t unused[32];
  for (int step = -tries; step <= tries; ++step) {
    const Iq4Sums sums = iq4_try(in, weights, static_cast<float>(step + iq4_values[0]) / maximum, unused);
    if (sums.q2 > 0 && sums.qx * sums.qx > best * sums.q2) {
      d = sums.qx / sums.q2;
      best = d * sums.qx;
    }
  }
  return d;
}

float iq4_mean_square(const float* in, int count) {
  float sum = 0;
  for (int i = 0; i < count; ++i) sum += in[i] * in[i];
  return sum * (2.0f / static_cast<float>(count));
}

void iq4_weights(const float* in, const float* importance, float mean_square, float* weights) {
  for (int i = 0; i < 32; ++i) weights[i] = importance ? importance[i] * std::sqrt(mean_square + in[i] * in[i]) : in[i] * in[i];
}

void encode_xs(const float* in, const float* importance, std::byte* out) {
  Iq4XsBlock block;
  float scales[8], weights[32], magnitude = 0, maximum = 0;
  const float mean_square = iq4_mean_square(in, 256);
  for (int j = 0; j < 8; ++j) {
    iq4_weights(in + 32 * j, importance ? importance + 32 * j : nullptr, mean_square, weights);
    scales[j] = iq4_scale(in + 32 * j, weights, 7, block.codes + 32 * j);
    if (std::fabs(scales[j]) > magnitude) {
      magnitude = std::fabs(scales[j]);
      maximum = scales[j];
    }
  }
  // Codes are chosen for the unrounded d, as ggml does.
  const float d = -maximum / 32, inverse = d != 0 ? 1 / d : 0.0f;
  block.d = float_to_half(d);
  for (int j = 0; j < 8; ++j) {
    block.scales[j] = static_cast<std::int8_t>(std::clamp(ggml_search::nearest_int(inverse * scales[j]), -32, 31));
    const float scale = d * static_cast<float>(block.scales[j]), inverse_scale = scale != 0 ? 1 / scale : 0.0f;
    for (int i = 32 * j; i < 32 * (j + 1); ++i) block.codes[i] = nearest_iq4(inverse_scale * in[i]);
  }
  pack_iq4_xs(block, out);
}

}  // namespace

void encode_iq4_nl(const float* in, std::byte* out) {
  std::int8_t codes[32];
  float weights[32];
  iq4_weights(in, nullptr, 0, weights);
  const float d = iq4_scale(in, weights, -1, codes);
  pack_iq4_nl(codes, float_to_half(d), out);
}

void weigh_iq4_nl(const float* in, const float* weight, std::byte* out) {
  std::int8_t codes[32];
  float weights[32];
  iq4_weights(in, weight, iq4_mean_square(in, 32), weights);
  const float d = iq4_scale(in, weights, 7, codes), inverse = d != 0 ? 1 / d : 0.0f;
  for (int i = 0; i < 32; ++i) codes[i] = nearest_iq4(inverse * in[i]);
  pack_iq4_nl(codes, float_to_half(d), out);
}

void encode_iq4_xs(const float* in, std::byte* out) { encode_xs(in, nullptr, out); }
void weigh_iq4_xs(const float* in, const float* weight, std::byte* out) { encode_xs(in, weight, out); }

}  // namespace kompakt::ggml_rows
