// Second moments of the inputs of linear layers, block by block: the prefix of the model is already quantized, one block and
// the activations in front of it are in memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

#include "model/transformer.h"
#include "train/context.h"

namespace kompakt {

// The inputs that a method looks at, and what the report says about them.
struct CalibrationSet {
  std::vector<ModelInput> inputs;  // batches
  std::vector<at::Tensor> valid;   // per batch: flat positions of tokens that are no padding, or undefined = all
  std::int64_t sequences = 0, tokens = 0;
  std::string hash;                // SHA-256 over the token ids
};
// Training examples (classification) or calibration windows (text), at most `sequences`, the same for the same seed.
// Error with a remedy when there are none.
CalibrationSet calibration_set(const StageContext& context, std::int64_t sequences);

struct SecondMoments {
  at::Tensor hessian;  // [K,K] float64, E[x x^T]
  at::Tensor cross;    // [K,K] float64, E[x~ x^T], only with a teacher
  std::int64_t tokens = 0;
};

// Activations in front of one block of the quantized model and, with a teacher, of the float model.
class SequentialCalibration {
 public:
  // Embeds the calibration set with the model's present embedding. `original_embedding` [V,d]: the float table of the
  // teacher; undefined = no teacher activations are kept.
  SequentialCalibration(Transformer& model, const CalibrationSet& set, const at::Tensor& original_embedding);

  // Moments of the input of `linear` in block `layer`, whose earlier linears already hold decoded weights. `original` are the
  // float weights of the block's linears by name, put in place for the teacher's pass.
  SecondMoments moments(std::int64_t layer, const std::string& linear, const std::map<std::string, at::Tensor>& original);
  // Moves on behind block `layer`.
  void advance(std::int64_t layer, const std::map<std::string, at::Tensor>& original);

 private:
  at::Tensor input_of(std::int64_t layer, const at::Tensor& x, std::size_t batch, const std::string& linear) const;
  void swap_weights(std::int64_t layer, std::map<std::string, at::Tensor>& weights);
  Transformer& model_;
  const CalibrationSet& set_;
  std::vector<at::Tensor> quantized_, teacher_;  // per batch [B,T,d]
};

}  // namespace kompakt
