// Two tokenizations of one text: spans of tokens that end at the same byte, and what a batch of packed rows makes of them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

namespace kompakt {

// Tokens [student_begin, student_end) and [teacher_begin, teacher_end) spell the same bytes.
struct TokenSpan {
  std::int64_t student_begin = 0, student_end = 0, teacher_begin = 0, teacher_end = 0;
  bool operator==(const TokenSpan&) const = default;
};

// `student`, `teacher`: byte offset of the end of each token, not decreasing, both from the same byte. The spans are the shortest possible and
// follow each other without a gap; tokens behind the last common end belong to none. Ends above `limit` do not count (bytes behind it
// differ between the two).
std::vector<TokenSpan> align_spans(std::span<const std::int64_t> student, std::span<const std::int64_t> teacher, std::int64_t limit);

// Aligned spans of a batch, as positions of the flattened [rows x columns] of either side. A position predicts the token behind it.
struct TextAlignment {
  // [m] of every span whose first token is predicted on both sides: the positions before it, where both have read the same text.
  at::Tensor student_starts, teacher_starts;
  // Tokens of these spans: the position that predicts each, the token, and the number of its span, 0 to m - 1.
  at::Tensor student_positions, student_tokens, student_spans;  // [n_s]
  at::Tensor teacher_positions, teacher_tokens, teacher_spans;  // [n_t]
  std::int64_t spans = 0;
  at::Tensor student_shared, teacher_shared;  // [K] ids of the tokens that both vocabularies have
  std::int64_t student_ids = 0, teacher_ids = 0;  // of the tokenizers: rows of the heads behind them are padding; 0 = not known
};

// Collects spans of documents; places are of the flattened batch.
class AlignmentBuilder {
 public:
  // `student_place`, `teacher_place`: of the document's first token. Spans whose first token begins the document (nothing predicts it)
  // or whose student tokens begin before `learned_from` are left out.
  void add(std::span<const TokenSpan> spans, std::span<const std::int64_t> student_ids, std::int64_t student_place, std::span<const std::int64_t> teacher_ids, std::int64_t teacher_place,
           std::int64_t learned_from);
  TextAlignment finish(c10::Device device) const;

 private:
  std::vector<std::int64_t> starts_[2], positions_[2], tokens_[2], numbers_[2];
};

}  // namespace kompakt
