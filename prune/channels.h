// Channels of a decoder's residual stream: how important each is, by the criteria of criteria.h, and the rotation that gathers what
// the stream carries in its first ones.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "model/transformer.h"
#include "prune/criteria.h"

namespace kompakt {

// Why the residual stream of a family cannot be made narrower; empty = it can.
std::string hidden_obstacle(const ModelConfig& config);
// Why its channels cannot be rotated first, as far as the shape tells (a tied head: unless it is untied); empty = they can.
std::string hidden_rotation_obstacle(const ModelConfig& config, bool untie);

// Scores float64 [d] on the CPU, larger = more important. A channel is what all norms in front of attention, MLP and head put out
// at its place: the sum (Taylor: the sum of the gates' gradients) over them. The rows of the table of criteria.
at::Tensor channels_taylor(Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t seed);
at::Tensor channels_taylor_abs(Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t seed);
at::Tensor channels_magnitude(Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t seed);
at::Tensor channels_activation(Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t seed);
at::Tensor channels_flap(Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t seed);
at::Tensor channels_random(Transformer& model, const std::vector<TokenBatch>& batches, std::uint64_t seed);

// The `count` best as rising numbers; of equal ones the lower.
std::vector<std::int64_t> best_channels(const at::Tensor& scores, std::int64_t count);

// SliceGPT (Ashkboos et al. 2024) with one rotation for the whole stream, so that no matrix is left over between blocks: norms are
// folded (a tied head is untied when `untie`), then the stream is rotated by the eigenvectors of the mean over all norms of the
// second moment of what they put out, by falling eigenvalue. The model computes what it did (model/invariance.h has the proof).
// Returns the eigenvalues [d], float64: energy of every new channel. Error where there is no data.
at::Tensor rotate_to_principal(Transformer& model, const std::vector<TokenBatch>& batches, bool untie);

}  // namespace kompakt
