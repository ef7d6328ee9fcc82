// Token texts of the vocabulary file back to bytes.
#include "data/token_bytes.h"

#include <algorithm>

#include "core/error.h"
#include "core/text.h"
#include "data/byte_level.h"

namespace kompakt {
namespace {

std::string token_from_byte_level(std::string_view text) {
  std::string out;
  for (std::size_t at = 0; at < text.size();) {
    const int value = byte_level_value(next_code_point(text, at));
    if (value < 0) return std::string(text);  // an added token with a character outside the table stands for itself
    out += static_cast<char>(value);
  }
  return out;
}

int token_hex(char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1; }

std::string token_from_pieces(std::string_view text, bool byte_fallback) {
  if (byte_fallback && text.size() == 6 && text.substr(0, 3) == "<0x" && text[5] == '>' && token_hex(text[3]) >= 0 && token_hex(text[4]) >= 0)
    return std::string(1, static_cast<char>(token_hex(text[3]) * 16 + token_hex(text[4])));
  return replace_all(std::string(text), "\xE2\x96\x81", " ");
}

}  // namespace

std::string token_bytes(const Tokenizer& tokenizer, std::int64_t id) {
  if (tokenizer.kind() == "wordpiece") throw Error("the tokens of a WordPiece tokenizer do not spell the text").hint("compare tokenizers of decoders: byte-level or byte-fallback BPE");
  const std::string_view text = tokenizer.token(id);
  return tokenizer.kind() == "byte-level-bpe" ? token_from_byte_level(text) : token_from_pieces(text, tokenizer.kind() == "byte-fallback-bpe");
}

std::vector<std::string> token_byte_table(const Tokenizer& tokenizer) {
  std::vector<std::string> table;
  for (std::int64_t id = 0; id < tokenizer.vocab_size(); ++id) table.push_back(token_bytes(tokenizer, id));
  return table;
}

bool has_dummy_prefix(const Tokenizer& tokenizer) {
  std::string spelled;
  for (const std::int64_t id : tokenizer.encode("a", false, false)) spelled += token_bytes(tokenizer, id);
  return spelled == " a";
}

SpelledText spell_tokens(std::span<const std::int64_t> ids, const std::vector<std::string>& table, bool dummy_prefix) {
  SpelledText out;
  out.ids.assign(ids.begin(), ids.end());
  for (const std::int64_t id : ids) {
    if (id >= 0 && id < static_cast<std::int64_t>(table.size())) out.bytes += table[static_cast<std::size_t>(id)];
    out.ends.push_back(static_cast<std::int64_t>(out.bytes.size()));
  }
  if (dummy_prefix && !out.bytes.empty() && out.bytes[0] == ' ') {
    out.bytes.erase(0, 1);
    for (std::int64_t& end : out.ends) end = std::max<std::int64_t>(0, end - 1);
  }
  return out;
}

}  // namespace kompakt
