// AdamW (Loshchilov & Hutter 2019) through the fused kernel of ATen, with moments kept by parameter name.
// Decides which parameter gets which learning rate and decay; knows no schedule and no file.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "model/transformer.h"
#include "train/options.h"

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

class AdamW {
 public:
  AdamW(std::vector<TrainableParameter> parameters, double beta1, double beta2, double epsilon);

  // One update with learning rate = own rate x factor. Parameters without a gradient are left alone, their step count too.
  // `gradient_divisor` (scalar float32 tensor or undefined) divides every gradient first: clipping without an extra pass.
  void step(double factor, const at::Tensor& gradient_divisor = {});
  void zero_grad();
  std::vector<at::Tensor> gradients() const;  // those that are defined
  const std::vector<TrainableParameter>& parameters() const { return parameters_; }

  // Moments and step counts as named tensors that share memory: "first_moment.<name>", "second_moment.<name>", "steps.<name>".
  std::vector<std::pair<std::string, at::Tensor>> state() const;

 private:
  struct Group {
    double learning_rate, weight_decay;
    std::vector<std::size_t> members;
  };
  std::vector<TrainableParameter> parameters_;
  std::vector<at::Tensor> first_, second_, steps_;
  std::vector<Group> groups_;
  double beta1_, beta2_, epsilon_;
};

}  // namespace kompakt
