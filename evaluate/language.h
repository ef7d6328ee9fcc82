// Perplexity of a decoder and its divergence from a teacher over windows of text. Forward passes only.
//
// Protocol: non-overlapping windows of equal length, no BOS added, positions 1..length-1 scored given everything before in
// the window. Log-probabilities in float32 with max subtraction, KL = sum p (log p - log q) over the full vocabulary, sums in
// double. Of heads with different numbers of rows (padding behind a shared vocabulary) KL is over the rows of both: p among those alone, q of
// the whole head, so that probability which the student leaves in its padding counts against it. Logits are made `chunk` positions at a time: never windows x vocabulary at once.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "model/transformer.h"

namespace kompakt {

struct LanguageScores {
  std::vector<double> window_nll;   // nats, sum over the scored positions of each window
  std::int64_t scored_per_window = 0;
  std::vector<float> kl;            // per scored position, nats; empty without a teacher
  std::vector<unsigned char> same_top1;  // per scored position; empty without a teacher
  std::vector<double> teacher_window_nll;
  double mean_nll() const;          // nats per scored token
};

// `teacher` may be null. Windows hold at least two tokens each, all of one length.
LanguageScores score_language(const Transformer& model, const Transformer* teacher, const std::vector<std::vector<std::int64_t>>& windows,
                              std::int64_t chunk = 128, const std::function<void(std::int64_t)>& progress = {});

extern const char* const language_protocol;  // one line for the report

}  // namespace kompakt
