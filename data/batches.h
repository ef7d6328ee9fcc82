// From tokenized examples to batches: deterministic order, length buckets, packing with document boundaries, resume.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/json.h"

namespace kompakt {

class Tokenizer;
struct ClassificationSet;

// Row-major [rows, columns] ids with the true length of each row; padding is `pad`.
struct TokenBatch {
  std::vector<std::int64_t> ids;
  std::vector<std::int64_t> lengths;    // [rows]
  std::vector<std::int64_t> labels;     // [rows] class labels; empty for text
  std::vector<std::int64_t> examples;   // [rows] index of the example in its set
  std::vector<std::int64_t> documents;  // packed text: [rows*columns] document number inside the row, else empty
  std::vector<std::int64_t> positions;  // packed text: [rows*columns] position restarting at each document, else empty
  std::vector<std::int64_t> prompts;    // [rows] leading tokens that are given and not learned; empty = none
  std::int64_t rows = 0, columns = 0;
  std::int64_t tokens() const;          // without padding
};

struct TokenizedExamples {
  std::vector<std::vector<std::int64_t>> ids;
  std::vector<std::int64_t> labels;
  std::int64_t truncated = 0;  // how many texts were cut
};

// Encodes every text with the tokenizer's special tokens. Longer ones are cut to `max_length` tokens (0 = no limit) and keep the
// special tokens at their end ([SEP], eos); with `refuse_long` the first longer text is an Error.
TokenizedExamples tokenize(const ClassificationSet& set, const Tokenizer& tokenizer, std::int64_t max_length, bool refuse_long);

// Batches of an epoch are a pure function of (seed, epoch): shuffle, sort by length inside chunks of `chunk_batches` batches,
// cut into batches, shuffle the batches. chunk_batches = 0: no sorting.
// `data` must outlive the object.
class ClassificationBatches {
 public:
  ClassificationBatches(const TokenizedExamples& data, std::int64_t batch_size, std::int64_t chunk_batches, std::uint64_t seed, std::int64_t pad);
  std::int64_t batches_per_epoch() const;
  TokenBatch get(std::int64_t epoch, std::int64_t index) const;
  // In order of length, no shuffling: for evaluation. Results go back to place through `examples`.
  std::vector<TokenBatch> evaluation(std::int64_t batch_size) const;

 private:
  const TokenizedExamples& data_;
  std::int64_t batch_size_, chunk_batches_, pad_;
  std::uint64_t seed_;
  mutable std::int64_t cached_epoch_ = -1;
  mutable std::vector<std::vector<std::int64_t>> order_;
};

// Rows of exactly `length` tokens: documents joined by `separator` (eos), cut at row ends. With `boundaries` the document
// numbers and restarting positions are filled; a document that a row end cuts starts again at position 0 in the next row. The ragged tail is dropped. Order of rows is a pure function of (seed, epoch).
class TextBatches {
 public:
  TextBatches(std::vector<std::vector<std::int64_t>> documents, std::int64_t length, std::int64_t batch_size, std::int64_t separator, bool boundaries, std::uint64_t seed);
  std::int64_t rows() const;
  std::int64_t batches_per_epoch() const;
  TokenBatch get(std::int64_t epoch, std::int64_t index) const;
  std::vector<std::int64_t> row(std::int64_t index) const;  // unshuffled, for calibration and perplexity

 private:
  std::vector<std::int64_t> tokens_, documents_;  // documents_: number of the document of each token
  std::int64_t length_, batch_size_;
  bool boundaries_;
  std::uint64_t seed_;
  mutable std::int64_t cached_epoch_ = -1;
  mutable std::vector<std::int64_t> order_;
};

}  // namespace kompakt
