// Added tokens of tokenizer.json: found in the text before the model sees it.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace kompakt {

class Normalizer;

struct AddedToken {
  std::string content;
  std::int64_t id = 0;
  bool special = false;
  bool single_word = false;  // only between characters that are no part of a word
  bool lstrip = false, rstrip = false;  // swallow the white space before, after
  bool normalized = false;   // searched for in the normalized text
};

// A part of a text: an added token (id >= 0) or text for the model (id = -1).
struct TextPart {
  std::int64_t id = -1;
  std::size_t begin = 0, end = 0;
};

// Leftmost-longest search for one group of added tokens.
class AddedTokenSearch {
 public:
  // Empty patterns are left out; of two equal patterns the first one counts.
  void add(const AddedToken& token, const std::string& pattern);
  bool empty() const { return tokens_.empty(); }
  // Parts that cover `text`. With `skip_special` special tokens are plain text.
  std::vector<TextPart> split(std::string_view text, bool skip_special) const;

 private:
  struct Node {
    std::vector<std::pair<unsigned char, std::int32_t>> children;
    std::int32_t token = -1;
  };
  std::int32_t child(std::int32_t node, unsigned char byte) const;
  std::vector<Node> nodes_{1};
  std::array<bool, 256> first_{};
  std::vector<AddedToken> tokens_;
};

}  // namespace kompakt
