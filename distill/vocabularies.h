// What the tokenizers of student and teacher have in common, before anything is computed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/json.h"
#include "data/tokenizer.h"

namespace kompakt {

struct VocabularyComparison {
  std::int64_t student_ids = 0, teacher_ids = 0;    // of the tokenizers
  std::int64_t student_rows = 0, teacher_rows = 0;  // of the embeddings: what is more than ids is padding
  std::int64_t shared = 0;                          // tokens of the same spelling
  std::int64_t same_id = 0;                         // ids that are the same token on both sides
  std::int64_t first_difference = -1;               // the first id with two spellings, added tokens apart; -1 = none
  std::string student_token, teacher_token;         // there
  struct Special {
    std::string name, student, teacher;  // "eos_token"; "" where a side has none
  };
  std::vector<Special> special;                     // those that one of the two has
  std::string chat;                                 // "the same", "different", "of the student alone", "of the teacher alone", "none"

  // Losses that compare token by token make sense: every id that both have means the same, added tokens apart.
  bool comparable() const { return first_difference < 0; }
  std::string text() const;  // one line
  Json json() const;
};
VocabularyComparison compare_vocabularies(const Tokenizer& student, std::int64_t student_rows, const Tokenizer& teacher, std::int64_t teacher_rows);

// Error with the numbers and what to do unless comparable().
void check_comparable(const VocabularyComparison& comparison, const std::string& place);

}  // namespace kompakt
