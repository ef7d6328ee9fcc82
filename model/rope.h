// Rotary position embedding: frequencies with their scalings, rotation of pairs (i, i + hd/2), and the row order of GGUF.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "model/config.h"

namespace kompakt {

// Angle per position of each pair, [head_dim / 2], in double. `local`: Gemma 3's sliding-window layers (local_theta, no scaling).
// Formulas of the scalings: none, linear, llama3, yarn as in transformers' modeling_rope_utils.
std::vector<double> rope_frequencies(const RopeConfig& rope, std::int64_t head_dim, bool local = false);
// Factor on cosine and sine (YaRN's temperature); 1 for the other scalings.
double rope_magnitude(const RopeConfig& rope);

struct RopeTables {
  at::Tensor cos, sin;  // [.., T, hd], both halves filled
};
// positions [T] or [B,T] int64 -> tables [T,hd] or [B,1,T,hd] in the type and on the device of `like`.
RopeTables rope_tables(const RopeConfig& rope, std::int64_t head_dim, const at::Tensor& positions, const at::Tensor& like, bool local = false);
// x [B,H,T,hd] rotated.
at::Tensor apply_rope(const at::Tensor& x, const RopeTables& tables);

// Row order of query and key weights. Hugging Face rotates the pairs (i, i + hd/2) of a head, GGUF's llama the pairs (2i, 2i+1):
// new row (h, 2i + s) = old row (h, s hd/2 + i). w [heads * hd, ..]; biases [heads * hd] likewise.
at::Tensor permute_rope_rows(const at::Tensor& w, std::int64_t heads);    // Hugging Face -> GGUF
at::Tensor unpermute_rope_rows(const at::Tensor& w, std::int64_t heads);  // GGUF -> Hugging Face

}  // namespace kompakt
