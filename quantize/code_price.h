// Latents of entropy-coded matrices -> codes that fit into as many bytes as the start took: what tuning needs so that a file does not
// outgrow its budget. Rounding gives way where a shorter code lies close: entropy-constrained scalar quantization (Chou, Lookabaugh and
// Gray 1989), with one price of a bit for all matrices.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "quantize/grids.h"

namespace kompakt {

// Codes [N,K] int8 of latents [N,K] (in units of codes) that minimise (latent - code)^2 + price * bits(code), where bits are those of the
// matrix's own codes at price 0, rounded to the nearest. Price 0: the nearest codes.
at::Tensor codes_at_price(const Grid& grid, const at::Tensor& latents, double price);

// Bits of an ideal code for one symbol at a time, over the whole matrix: what stored_bytes comes within a few percent of.
double ideal_bits(const at::Tensor& codes);

// The least price, to a few thousandths, at which codes of all matrices take at most `bytes` as stored_bytes counts them; 0 where rounding
// fits. Largest price: 2 (a bit may move a code's border by a whole step, and half a step is as far as borders move); where that is not
// enough, the codes of that price are what there is.
struct PricedCodes {
  double price = 0;
  std::int64_t bytes = 0;
  std::vector<at::Tensor> codes;
};
struct PricedMatrix {
  GridSpec spec;
  at::Tensor latents, scales;
};
PricedCodes codes_within(const std::vector<PricedMatrix>& matrices, std::int64_t bytes);

}  // namespace kompakt
