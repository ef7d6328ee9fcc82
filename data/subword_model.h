// The models that turn one piece of text into ids: WordPiece and byte-pair encoding.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "data/vocabulary.h"

namespace kompakt {

// One merge of byte-pair encoding: `left` and `right` side by side become `result`. Lower rank goes first; equal ranks go left to right.
struct BpeMerge {
  std::int32_t left = 0, right = 0, result = 0, rank = 0;
};

struct WordPieceOptions {
  std::string unknown = "[UNK]";
  std::string prefix = "##";           // of a token that continues a word
  std::int64_t max_characters = 100;   // longer words are unknown
};

struct BpeOptions {
  std::string unknown;                 // "" = none: characters outside the vocabulary vanish
  std::string prefix, suffix;          // continuing_subword_prefix, end_of_word_suffix
  bool byte_fallback = false, fuse_unknown = false, ignore_merges = false;
};

class SubwordModel {
 public:
  virtual ~SubwordModel() = default;
  virtual void encode(std::string_view piece, std::vector<std::int64_t>& ids) const = 0;
};

// The vocabulary must outlive the model.
std::unique_ptr<SubwordModel> make_wordpiece(const Vocabulary& vocabulary, const WordPieceOptions& options, const std::string& place);
std::unique_ptr<SubwordModel> make_bpe(const Vocabulary& vocabulary, const std::vector<BpeMerge>& merges, const BpeOptions& options, const std::string& place);

// Text of the token that stands for a byte in byte fallback: "<0x0A>".
std::string byte_fallback_token(unsigned char byte);

}  // namespace kompakt
