// AdamW (Loshchilov & Hutter 2019) through the fused kernel of ATen, with moments kept by parameter name, in float32 or in 8 bits.
// Decides which parameter gets which learning rate and decay; knows no schedule and no file.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "model/transformer.h"
#include "train/options.h"
#include "train/quantized_moments.h"

namespace kompakt {

struct TrainableParameter {
  std::string name;
  at::Tensor value;  // shares memory with the model
  double learning_rate = 0, weight_decay = 0;
};

// "*" stands for any run of characters, everything else for itself.
bool matches_pattern(std::string_view name, std::string_view pattern);

// The model's parameters that train, in checkpoint order: matrices of blocks and head with weight decay; biases, norms and
// embeddings without. Sets requires_grad on those and clears it on the frozen ones.
// Errors: a pattern of `freeze` that matches nothing; nothing left to train.
std::vector<TrainableParameter> trainable_parameters(Transformer& model, const TrainOptions& options);

// Rows of the option `optimizer`.
std::vector<std::string> optimizer_names();
bool optimizer_is_8bit(const std::string& name);

// Smaller tensors (norms, biases) keep float32 moments under 8 bits too, as in bitsandbytes.
constexpr std::int64_t least_8bit_size = 4096;

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
  bool eight_bit = false;
};

class AdamW {
 public:
  // `mine`: parameters that this object updates and keeps moments of; empty = all.
  AdamW(std::vector<TrainableParameter> parameters, const AdamWOptions& options, std::vector<bool> mine = {});

  // One update with learning rate = own rate x factor. Parameters without a gradient are left alone, their step count too.
  // `gradient_divisor` (scalar float32 tensor or undefined) divides every gradient first: clipping without an extra pass.
  void step(double factor, const at::Tensor& gradient_divisor = {});
  void zero_grad();
  std::vector<at::Tensor> gradients() const;  // those that are defined
  const std::vector<TrainableParameter>& parameters() const { return parameters_; }

  // Moments and step counts as named tensors that share memory: "first_moment.<name>", "second_moment.<name>", "steps.<name>"; in 8 bits
  // "first_scales.<name>" and "second_scales.<name>" as well. Parameters of others have zeros of the same shapes.
  std::vector<std::pair<std::string, at::Tensor>> state() const;
  std::vector<std::pair<std::string, at::Tensor>> state_of(std::size_t parameter) const;

 private:
  struct Group {
    double learning_rate, weight_decay;
    std::vector<std::size_t> members;
  };
  struct Moments {
    bool eight_bit = false;
    at::Tensor first, second;               // float32, or undefined
    QuantizedMoment first_8bit, second_8bit;
    at::Tensor steps;                       // scalar float32
  };
  Moments make_moments(const at::Tensor& value) const;
  void step_8bit(const Group& group, double factor, const at::Tensor& gradient_divisor);
  std::vector<TrainableParameter> parameters_;
  AdamWOptions options_;
  std::vector<bool> mine_;
  std::vector<Moments> moments_;  // empty tensors where not mine
  std::vector<Group> groups_;
};

}  // namespace kompakt
