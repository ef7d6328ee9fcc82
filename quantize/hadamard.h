// Hadamard matrices, and the orthogonal matrices made of them that spread outliers over all channels.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <string_view>

namespace kompakt {

// Double [n,n] with entries +-1 and H H^T = n I: the smallest Paley base m of n = 2^k m, doubled k times as Sylvester does.
// Bases: 1; p + 1 for a prime p = 3 mod 4 (Paley I: 4, 8, 12, 20, 24, ...); 2 (p + 1) for a prime p = 1 mod 4 (Paley II:
// 12, 28, 36, 60, ...). Undefined where n has no such form. A power of two gives scipy.linalg.hadamard(n).
at::Tensor hadamard_matrix(std::int64_t n);

struct Rotation {
  at::Tensor matrix;         // double [n,n], orthogonal; acts on row vectors: x R
  std::string construction;  // "2^4 x Paley II 36", "random orthogonal"
};
// diag(s) H / sqrt(n) with random signs s before the mixing (signs behind it would only flip columns); where no Hadamard
// matrix is known, a random orthogonal matrix by Gram-Schmidt of a Gaussian one (the Q of QR with a positive diagonal of R).
// A function of n, seed and stream alone.
Rotation random_rotation(std::int64_t n, std::uint64_t seed, std::string_view stream);

}  // namespace kompakt
