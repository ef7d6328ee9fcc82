// Cross entropy of a large vocabulary straight from hidden states: logits exist for one chunk of tokens at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include "model/transformer.h"

namespace kompakt {

// hidden [N,d], weight [V,d], bias [V] or undefined, targets [N] int64 (all valid) -> scalar mean cross entropy (N >= 1).
// The gradient is hand-written: softmax minus the (smoothed) target, multiplied back chunk by chunk while the forward pass
// has the logits at hand, so the peak is one chunk of logits plus one gradient of the weight. `chunk`: tokens at a time, 0 = as
// many as logit_chunk() says.
at::Tensor chunked_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& targets, double label_smoothing = 0,
                                 std::int64_t chunk = 0);

// The output projection of a decoder with its transforms applied: lm_head, or the token embedding where tied.
struct HeadWeights {
  at::Tensor weight, bias;
};
HeadWeights head_weights(const Transformer& model);

}  // namespace kompakt
