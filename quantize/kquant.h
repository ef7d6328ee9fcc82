// Super-blocks of 256 weights, as GGUF's Q2_K to Q6_K and IQ4_XS store them. A group of 16 or 32 has the scale d * n, with a half
// d for the super-block and a small integer n; types with minima likewise: w = d * n * code - e * m. In `Quantized` (grids.h) a
// scale is the product d * n and an offset -(e * m), which float32 holds exactly, so decode() needs to know nothing of this.
// Raw pointers, one thread, a fixed order of operations: the same bits everywhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kompakt {

constexpr int kquant_span = 256;  // weights of a super-block

// One super-block in the numbers of the formula.
struct KQuantBlock {
  std::int8_t codes[kquant_span];
  int steps[16], minima[16];  // n and m; minima stay 0 where the type has none
  float d, e;                 // halves
};

struct KQuant {
  std::string_view type;     // of ggml
  int group;                 // weights that share n (and m)
  int code_min, code_max;
  int step_min, step_max;    // n
  int minimum_max;           // m from 0; 0 = the type has no minima
  std::int64_t bytes;        // of a super-block
  // Scales (and offsets; null without minima) [256 / group] with a small sum of importance * (w - decoded)^2 for nearest codes;
  // `importance` [256] or null. The two levels are chosen together: the integers of every group by their true error under a
  // given d and e, these from several starts and then by least squares. Returns the largest half that this takes: NaN when a
  // weight is not finite, and 65504 or more when half precision cannot hold it (what was written is then of no use).
  float (*fit)(const float* w, const float* importance, float* scales, float* offsets);
  void (*pack)(const KQuantBlock& block, std::byte* out);
  void (*unpack)(const std::byte* in, KQuantBlock& block);

  int groups() const { return kquant_span / group; }
  bool minimum() const { return minimum_max > 0; }
};

extern const KQuant kquant_q2_k, kquant_q3_k, kquant_q4_k, kquant_q5_k, kquant_q6_k, kquant_iq4_xs;

// d, n, e and m of given products: those with the largest integers, of which every choice decodes to the same weights. False when
// the scales are not products of one half with integers in range.
bool kquant_factor(const KQuant& kquant, const float* scales, const float* offsets, KQuantBlock& block);

}  // namespace kompakt
