// The types of super-blocks: their numbers, and their bytes by formats/ggml_pack.h.
#include "quantize/kquant.h"

#include <algorithm>
#include <cmath>

#include "formats/ggml_pack.h"
#include "formats/tensor_data.h"
#include "quantize/grid_math.h"
#include "quantize/kquant_fit.h"

namespace kompakt {
namespace {

template <class Block, void (*pack)(const Block&, std::byte*)>
void kquant_pack(const KQuantBlock& block, std::byte* out) {
  Block packed{};
  std::copy(block.codes, block.codes + kquant_span, packed.codes);
  for (std::size_t j = 0; j < std::size(packed.scales); ++j) packed.scales[j] = static_cast<std::decay_t<decltype(packed.scales[0])>>(block.steps[j]);
  packed.d = float_to_half(block.d);
  if constexpr (requires { packed.mins; }) {
    for (std::size_t j = 0; j < std::size(packed.mins); ++j) packed.mins[j] = static_cast<std::uint8_t>(block.minima[j]);
    packed.dmin = float_to_half(block.e);
  }
  pack(packed, out);
}

template <class Block, void (*unpack)(const std::byte*, Block&)>
void kquant_unpack(const std::byte* in, KQuantBlock& block) {
  Block packed;
  unpack(in, packed);
  block = {};
  std::copy(packed.codes, packed.codes + kquant_span, block.codes);
  for (std::size_t j = 0; j < std::size(packed.scales); ++j) block.steps[j] = packed.scales[j];
  block.d = half_to_float(packed.d);
  if constexpr (requires { packed.mins; }) {
    for (std::size_t j = 0; j < std::size(packed.mins); ++j) block.minima[j] = packed.mins[j];
    block.e = half_to_float(packed.dmin);
  }
}

// values[j] = factor * integers[j] with a half factor and integers low..high; the integer of largest magnitude as large as can be.
bool kquant_factor_one(const float* values, int count, int low, int high, float& factor, int* integers) {
  std::fill(integers, integers + count, 0);
  factor = 0;
  float widest = 0;
  for (int j = 0; j < count; ++j)
    if (std::fabs(values[j]) > std::fabs(widest)) widest = values[j];
  if (widest == 0) return true;
  if (!std::isfinite(widest)) return false;
  for (int magnitude = std::max(high, -low); magnitude > 0; --magnitude)
    for (const int n : {magnitude, -magnitude}) {
      if (n < low || n > high) continue;
      factor = grid::round_to_half(widest / static_cast<float>(n));
      if (factor == 0 || factor * static_cast<float>(n) != widest) continue;
      bool all = true;
      for (int j = 0; j < count && all; ++j) {
        const float ratio = std::nearbyint(values[j] / factor);
        all = ratio >= static_cast<float>(low) && ratio <= static_cast<float>(high) && factor * ratio == values[j];
        if (all) integers[j] = static_cast<int>(ratio);
      }
      if (all) return true;
    }
  return false;
}

}  // namespace

const KQuant kquant_q2_k = {"Q2_K", 16, 0, 3, 0, 15, 15, 84, kquant_fit_q2, kquant_pack<Q2KBlock, pack_q2_k>, kquant_unpack<Q2KBlock, unpack_q2_k>};
const KQuant kquant_q3_k = {"Q3_K", 16, -4, 3, -32, 31, 0, 110, kquant_fit_q3, kquant_pack<Q3KBlock, pack_q3_k>, kquant_unpack<Q3KBlock, unpack_q3_k>};
const KQuant kquant_q4_k = {"Q4_K", 32, 0, 15, 0, 63, 63, 144, kquant_fit_q4, kquant_pack<Q4KBlock, pack_q4_k>, kquant_unpack<Q4KBlock, unpack_q4_k>};
const KQuant kquant_q5_k = {"Q5_K", 32, 0, 31, 0, 63, 63, 176, kquant_fit_q5, kquant_pack<Q5KBlock, pack_q5_k>, kquant_unpack<Q5KBlock, unpack_q5_k>};
const KQuant kquant_q6_k = {"Q6_K", 16, -32, 31, -128, 127, 0, 210, kquant_fit_q6, kquant_pack<Q6KBlock, pack_q6_k>, kquant_unpack<Q6KBlock, unpack_q6_k>};
const KQuant kquant_iq4_xs = {"IQ4_XS", 32, 0, 15, -32, 31, 0, 136, kquant_fit_iq4, kquant_pack<Iq4XsBlock, pack_iq4_xs>, kquant_unpack<Iq4XsBlock, unpack_iq4_xs>};

bool kquant_factor(const KQuant& kquant, const float* scales, const float* offsets, KQuantBlock& block) {
  float negated[16] = {};
  std::fill(block.minima, block.minima + 16, 0);
  std::fill(block.steps, block.steps + 16, 0);
  block.e = 0;
  if (!kquant_factor_one(scales, kquant.groups(), kquant.step_min, kquant.step_max, block.d, block.steps)) return false;
  if (!kquant.minimum()) return true;
  for (int j = 0; j < kquant.groups(); ++j) negated[j] = -offsets[j];
  return kquant_factor_one(negated, kquant.groups(), 0, kquant.minimum_max, block.e, block.minima);
}

}  // namespace kompakt
