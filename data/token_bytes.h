// The bytes that single tokens stand for, and byte offsets of tokenized text.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "data/tokenizer.h"

namespace kompakt {

// Raw bytes of a token: a byte-level stand-in is its byte, "<0xE2>" the byte 0xE2, U+2581 a space; added tokens are their own text. May be
// half a character. Empty for an id that the vocabulary lacks. Error for WordPiece, whose tokens do not hold the text's white space.
std::string token_bytes(const Tokenizer& tokenizer, std::int64_t id);

// True when the tokenizer puts a space before a text that has none (SentencePiece's dummy prefix).
bool has_dummy_prefix(const Tokenizer& tokenizer);

// A text as its tokens spell it, without the dummy prefix; ends[i]: bytes of `bytes` up to the end of token i.
struct SpelledText {
  std::string bytes;
  std::vector<std::int64_t> ids, ends;
};
// `table`: token_bytes of every id of the tokenizer.
SpelledText spell_tokens(std::span<const std::int64_t> ids, const std::vector<std::string>& table, bool dummy_prefix);

// token_bytes of all ids.
std::vector<std::string> token_byte_table(const Tokenizer& tokenizer);

}  // namespace kompakt
