#include "quantize/hadamard.h"

#include <ATen/ATen.h>

#include <cmath>
#include <stdexcept>
#include <vector>

#include "core/random.h"
#include "core/text.h"

namespace kompakt {
namespace {

bool hadamard_is_prime(std::int64_t n) {
  if (n < 2) return false;
  for (std::int64_t d = 2; d * d <= n; ++d)
    if (n % d == 0) return false;
  return true;
}

// Jacobsthal matrix: Q[i][j] = 1 where i - j is a square modulo p, -1 where not, 0 on the diagonal.
at::Tensor hadamard_jacobsthal(std::int64_t p) {
  std::vector<double> character(static_cast<std::size_t>(p), -1);
  for (std::int64_t i = 1; i < p; ++i) character[static_cast<std::size_t>(i * i % p)] = 1;
  character[0] = 0;
  at::Tensor q = at::empty({p, p}, at::kDouble);
  double* out = q.mutable_data_ptr<double>();
  for (std::int64_t i = 0; i < p; ++i)
    for (std::int64_t j = 0; j < p; ++j) out[i * p + j] = character[static_cast<std::size_t>((i - j + p) % p)];
  return q;
}

// Q bordered by a first row of ones and a first column of `side`.
at::Tensor hadamard_border(const at::Tensor& q, double side) {
  const std::int64_t n = q.size(0) + 1;
  at::Tensor c = at::zeros({n, n}, at::kDouble);
  c.slice(0, 1, n).slice(1, 1, n).copy_(q);
  c.select(0, 0).slice(0, 1, n).fill_(1);
  c.select(1, 0).slice(0, 1, n).fill_(side);
  return c;
}

at::Tensor hadamard_small(double a, double b, double c, double d) { return at::tensor({a, b, c, d}, at::kDouble).reshape({2, 2}); }

// A base of order m without doubling, or undefined.
at::Tensor hadamard_base(std::int64_t m, std::string& name) {
  if (m == 1) return name = "1", at::ones({1, 1}, at::kDouble);
  if ((m - 1) % 4 == 3 && hadamard_is_prime(m - 1)) {
    name = str("Paley I ", m);
    return hadamard_border(hadamard_jacobsthal(m - 1), -1) + at::eye(m, at::kDouble);
  }
  const std::int64_t p = m / 2 - 1;
  if (m % 2 == 0 && p % 4 == 1 && hadamard_is_prime(p)) {
    name = str("Paley II ", m);
    const at::Tensor conference = hadamard_border(hadamard_jacobsthal(p), 1);
    return at::kron(conference, hadamard_small(1, 1, 1, -1)) + at::kron(at::eye(p + 1, at::kDouble), hadamard_small(1, -1, -1, -1));
  }
  return {};
}

at::Tensor hadamard_named(std::int64_t n, std::string& name) {
  if (n < 1) throw std::logic_error(str("a Hadamard matrix of order ", n));
  std::int64_t doublings = 0, m = n;
  for (; m % 2 == 0; m /= 2) ++doublings;
  // From the smallest base up: the odd part alone fits only where it is 1.
  for (; doublings >= 0; --doublings, m *= 2) {
    at::Tensor h = hadamard_base(m, name);
    if (!h.defined()) continue;
    for (std::int64_t k = 0; k < doublings; ++k) h = at::kron(hadamard_small(1, 1, 1, -1), h);
    name = m == 1 ? str("Sylvester ", n) : doublings == 0 ? name : str("2^", doublings, " x ", name);
    return h;
  }
  return {};
}

// Rows made orthonormal one after the other, each twice, which is enough for full double precision. Own loops, because a
// blocked LAPACK routine may give other bits with another number of threads.
at::Tensor hadamard_gram_schmidt(std::int64_t n, const CounterRandom& random) {
  at::Tensor rows = at::empty({n, n}, at::kDouble);
  double* q = rows.mutable_data_ptr<double>();
  for (std::int64_t i = 0; i < n * n; ++i) q[i] = random.normal(static_cast<std::uint64_t>(i));
  for (std::int64_t i = 0; i < n; ++i) {
    double* v = q + i * n;
    for (int pass = 0; pass < 2; ++pass)
      for (std::int64_t j = 0; j < i; ++j) {
        const double* u = q + j * n;
        double dot = 0;
        for (std::int64_t k = 0; k < n; ++k) dot += u[k] * v[k];
        for (std::int64_t k = 0; k < n; ++k) v[k] -= dot * u[k];
      }
    double square = 0;
    for (std::int64_t k = 0; k < n; ++k) square += v[k] * v[k];
    const double inverse = 1 / std::sqrt(square);
    for (std::int64_t k = 0; k < n; ++k) v[k] *= inverse;
  }
  return rows;
}

}  // namespace

at::Tensor hadamard_matrix(std::int64_t n) {
  std::string name;
  return hadamard_named(n, name);
}

Rotation random_rotation(std::int64_t n, std::uint64_t seed, std::string_view stream) {
  Rotation out;
  const CounterRandom random(seed, stream);
  const at::Tensor h = hadamard_named(n, out.construction);
  if (!h.defined()) return {hadamard_gram_schmidt(n, random), "random orthogonal"};
  at::Tensor signs = at::empty({n, 1}, at::kDouble);
  for (std::int64_t i = 0; i < n; ++i) signs.mutable_data_ptr<double>()[i] = random.bits(static_cast<std::uint64_t>(i)) & 1 ? 1 : -1;
  out.matrix = h * signs / std::sqrt(static_cast<double>(n));
  return out;
}

}  // namespace kompakt
