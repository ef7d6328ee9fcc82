// Factorizations in the metric of the inputs.
#include "train/inverse_factor.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "model/parallel.h"

namespace kompakt {
namespace {

at::Tensor inverse_damped(const at::Tensor& hessian, double damping) {
  at::Tensor damped = hessian.clone();
  damped.diagonal().add_(damping * hessian.diagonal().mean().item<double>());
  return damped;
}

// Inverse of an upper triangular matrix by halves, so that nearly all of its work are matrix products.
at::Tensor inverse_of_upper(const at::Tensor& upper) {
  const std::int64_t n = upper.size(0), half = n / 2;
  if (n <= 128) return at::linalg_solve_triangular(upper, at::eye(n, upper.options()), /*upper=*/true).triu();
  const at::Tensor first = inverse_of_upper(upper.slice(0, 0, half).slice(1, 0, half)), second = inverse_of_upper(upper.slice(0, half).slice(1, half));
  at::Tensor out = at::zeros_like(upper);
  out.slice(0, 0, half).slice(1, 0, half).copy_(first);
  out.slice(0, half).slice(1, half).copy_(second);
  out.slice(0, 0, half).slice(1, half).copy_(at::matmul(at::matmul(first, upper.slice(0, 0, half).slice(1, half)), second).neg_());
  return out;
}

}  // namespace

at::Tensor inverse_factor(const at::Tensor& hessian) {
  const SingleThread single;
  // With J the reversal of order: J H J = L L^T, so H = M M^T with M = J L J upper triangular, and H^-1 = U^T U with U = M^-1.
  // One factorization and one triangular inverse, no inverse of H.
  const at::Tensor reversed = hessian.flip({0, 1}).contiguous();
  const auto [lower, info] = at::linalg_cholesky_ex(reversed);
  if (info.item<int>() != 0) return {};
  const at::Tensor middle = lower.flip({0, 1}).contiguous();
  const at::Tensor upper = inverse_of_upper(middle);
  if (!upper.isfinite().all().item<bool>() || upper.diagonal().min().item<double>() <= 0) return {};
  return upper.contiguous();
}

InverseFactor damped_inverse_factor(const at::Tensor& hessian, double asked, bool float64) {
  InverseFactor factor;
  std::vector<std::pair<double, bool>> ladder;
  for (const double raise : {1.0, 10.0, 100.0}) ladder.emplace_back(std::max(asked, raise > 1 ? 1e-4 : 0.0) * raise, float64);
  if (!float64)
    for (const double raise : {1.0, 100.0}) ladder.emplace_back(std::max(asked, raise > 1 ? 1e-4 : 0.0) * raise, true);
  for (std::size_t i = 0; i < ladder.size(); ++i) {
    const auto [damping, wide] = ladder[i];
    const at::Tensor upper = inverse_factor(inverse_damped(hessian, damping).to(wide ? at::kDouble : at::kFloat));
    if (!upper.defined()) continue;
    factor.upper = upper, factor.damping = damping;
    factor.path = wide ? "cholesky float64" : "cholesky";
    if (i > 0) factor.path += damping > asked ? ", damping raised" : ", float32 failed";
    factor.diagonal = upper.diagonal().contiguous();
    return factor;
  }
  factor.damping = asked;
  factor.path = "diagonal";
  factor.diagonal = inverse_damped(hessian, asked).diagonal().clamp_min(1e-30).rsqrt().contiguous();
  return factor;
}

}  // namespace kompakt
