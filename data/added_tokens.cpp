// A byte trie walked from every position that can begin a token.
#include "data/added_tokens.h"

#include <algorithm>

#include "core/text.h"
#include "data/unicode.h"

namespace kompakt {
namespace {

char32_t added_last_character(std::string_view text) {
  std::size_t start = text.size() - 1;
  while (start > 0 && (static_cast<unsigned char>(text[start]) & 0xC0) == 0x80) --start;
  return next_code_point(text, start);
}

}  // namespace

std::int32_t AddedTokenSearch::child(std::int32_t node, unsigned char byte) const {
  for (const auto& [key, next] : nodes_[static_cast<std::size_t>(node)].children)
    if (key == byte) return next;
  return -1;
}

void AddedTokenSearch::add(const AddedToken& token, const std::string& pattern) {
  if (pattern.empty()) return;
  std::int32_t node = 0;
  for (const char c : pattern) {
    const auto byte = static_cast<unsigned char>(c);
    std::int32_t next = child(node, byte);
    if (next < 0) {
      next = static_cast<std::int32_t>(nodes_.size());
      nodes_.emplace_back();
      nodes_[static_cast<std::size_t>(node)].children.emplace_back(byte, next);
    }
    node = next;
  }
  if (nodes_[static_cast<std::size_t>(node)].token >= 0) return;
  nodes_[static_cast<std::size_t>(node)].token = static_cast<std::int32_t>(tokens_.size());
  tokens_.push_back(token);
  first_[static_cast<unsigned char>(pattern.front())] = true;
}

std::vector<TextPart> AddedTokenSearch::split(std::string_view text, bool skip_special) const {
  std::vector<TextPart> parts;
  std::size_t done = 0;
  for (std::size_t at = 0; at < text.size() && !tokens_.empty();) {
    if (!first_[static_cast<unsigned char>(text[at])]) {
      ++at;
      continue;
    }
    std::int32_t node = 0, found = -1;
    std::size_t found_end = at;
    for (std::size_t i = at; i < text.size(); ++i) {
      node = child(node, static_cast<unsigned char>(text[i]));
      if (node < 0) break;
      if (nodes_[static_cast<std::size_t>(node)].token >= 0) {
        found = nodes_[static_cast<std::size_t>(node)].token;
        found_end = i + 1;
      }
    }
    if (found < 0) {
      ++at;
      continue;
    }
    std::size_t start = at, stop = found_end;
    at = found_end;  // a refused match is skipped as a whole, as the reference does
    const AddedToken& token = tokens_[static_cast<std::size_t>(found)];
    if (skip_special && token.special) continue;
    if (token.single_word) {
      std::size_t next = stop;
      if (start > 0 && is_word_character(added_last_character(text.substr(0, start)))) continue;
      if (stop < text.size() && is_word_character(next_code_point(text, next))) continue;
    }
    if (token.lstrip) {
      while (start > done) {
        std::size_t before = start - 1;
        while (before > done && (static_cast<unsigned char>(text[before]) & 0xC0) == 0x80) --before;
        std::size_t offset = before;
        if (!is_white_space(next_code_point(text, offset))) break;
        start = before;
      }
    }
    if (token.rstrip) {
      while (stop < text.size()) {
        std::size_t after = stop;
        if (!is_white_space(next_code_point(text, after))) break;
        stop = after;
      }
    }
    if (done < start) parts.push_back({-1, done, start});
    parts.push_back({token.id, start, stop});
    done = stop;
  }
  if (done < text.size()) parts.push_back({-1, done, text.size()});
  return parts;
}

}  // namespace kompakt
