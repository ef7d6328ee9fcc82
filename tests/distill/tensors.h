// Small tensors for tests: from JSON, from the counter-based generator; gradients by autograd and by finite differences.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <utility>

#include "core/json.h"
#include "core/random.h"

namespace kompakt::testing {

inline at::Tensor tensor_of(const Json& values, std::vector<std::int64_t> shape) {
  return at::tensor(values.get<std::vector<double>>(), at::kDouble).reshape(shape);
}

inline at::Tensor random_tensor(std::vector<std::int64_t> shape, std::uint64_t seed, double scale = 1) {
  at::Tensor out = at::empty(shape, at::kDouble);
  const CounterRandom random(seed, "test");
  for (std::int64_t i = 0; i < out.numel(); ++i) out.data_ptr<double>()[i] = scale * random.normal(static_cast<std::uint64_t>(i));
  return out;
}

inline double largest_difference(const at::Tensor& a, const at::Tensor& b) {
  return a.numel() == 0 ? 0 : (a.detach().to(at::kDouble) - b.detach().to(at::kDouble)).abs().max().item<double>();
}

using ScalarFunction = std::function<at::Tensor(const at::Tensor&)>;

// Value and gradient of a scalar function at x.
inline std::pair<double, at::Tensor> gradient_of(const ScalarFunction& function, const at::Tensor& x) {
  const at::Tensor leaf = x.detach().clone().requires_grad_();
  const at::Tensor value = function(leaf);
  return {value.item<double>(), torch::autograd::grad({value}, {leaf})[0]};
}

// Largest difference between the gradient and central differences, relative to the largest entry of the gradient. x float64.
inline double gradient_error(const ScalarFunction& function, const at::Tensor& x, double step = 1e-6) {
  const at::Tensor gradient = gradient_of(function, x).second;
  at::Tensor numeric = at::empty_like(x);
  for (std::int64_t i = 0; i < x.numel(); ++i) {
    at::Tensor up = x.detach().clone(), down = x.detach().clone();
    up.view({-1})[i] += step;
    down.view({-1})[i] -= step;
    numeric.view({-1})[i] = (function(up).item<double>() - function(down).item<double>()) / (2 * step);
  }
  return largest_difference(gradient, numeric) / std::max(1e-3, gradient.abs().max().item<double>());
}

}  // namespace kompakt::testing
