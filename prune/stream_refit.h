// Least-squares compensation towards the residual stream of the uncut model: every output and down projection is refitted, in
// order, so that the stream behind it comes as close as it can to the stream of the original. What earlier cuts changed, and
// what removed layers would have added, is made up for where a linear map of the remaining activations can.
#pragma once

#include <cstdint>
#include <vector>

#include "model/transformer.h"
#include "train/calibration.h"

namespace kompakt {

// `layers`: for every block of `cut` its number in `original`, rising. Inputs are those of the compensated model so far.
// For a linear with input z, a target t and weights of tokens a it minimises
//   sum a |t - W z - b|^2 + lambda |W - W_0|^2,   lambda = ridge * mean diag E[a z z^T],   b only where there is a bias.
// t is the sum of residual and linear in the original minus the residual of `cut`; behind the last kept layer before removed
// ones, in the original behind those. a = 1 / mean square of the target stream where the next reader normalizes it (RMS), so
// that a few tokens of huge norm do not decide; 1 where norms follow the sum (BERT; the block's last norm becomes that of the
// last removed layer). With norms between linear and sum (Gemma 3) t is the linear's own output in the original.
// `narrow`: the stream itself has lost channels. The stream of the original is then taken at those that stay; the gain of every
// norm is multiplied by one number, the least-squares fit of what it puts out to what the original's puts out at these channels
// (a mean over fewer channels is another one); with `readers`, everything that reads a norm is refitted to what it would make of
// the original's, W = argmin E|W_before y - W y'|^2 + lambda |W - W_S|^2. Without `writers` output and down projections stay, and
// all is fitted on the original's own stream. A tied head cannot follow: its matrix is the embedding.
// Both models on one device, float32. Memory: two streams of activations. The same bytes for every number of threads.
struct NarrowStream {
  const Transformer& before;                // `cut` with all channels
  const std::vector<std::int64_t>& channels;  // of those that stay, rising
  bool readers = true, writers = true;
};
void refit_to_stream(Transformer& cut, const Transformer& original, const std::vector<std::int64_t>& layers, const CalibrationSet& set, double ridge = 1e-3, const NarrowStream* narrow = nullptr);

}  // namespace kompakt
