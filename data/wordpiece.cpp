// WordPiece: the longest token from the left, then the longest continuation, or one unknown token for the whole word.
#include "core/error.h"
#include "core/text.h"
#include "data/subword_model.h"
#include "data/unicode.h"

namespace kompakt {
namespace {

class WordPieceModel : public SubwordModel {
 public:
  WordPieceModel(const Vocabulary& vocabulary, const WordPieceOptions& options, const std::string& place) : vocabulary_(vocabulary), options_(options) {
    unknown_ = vocabulary.find(options.unknown);
    if (unknown_ < 0) throw Error(str("the vocabulary has no unknown token \"", options.unknown, "\"")).at(place);
  }

  void encode(std::string_view word, std::vector<std::int64_t>& ids) const override {
    if (word.empty()) return;
    const std::size_t before = ids.size();
    if (static_cast<std::int64_t>(count_code_points(word)) > options_.max_characters) {
      ids.push_back(unknown_);
      return;
    }
    std::string candidate;
    for (std::size_t start = 0; start < word.size();) {
      candidate.assign(start > 0 ? options_.prefix : std::string());
      const std::size_t head = candidate.size();
      candidate.append(word.substr(start, vocabulary_.longest()));
      // The cut may have gone through a character; the loop below only stops at character starts.
      std::size_t end = candidate.size() - head;
      std::int64_t found = -1;
      while (end > 0) {
        const bool boundary = start + end == word.size() || (static_cast<unsigned char>(word[start + end]) & 0xC0) != 0x80;
        if (boundary) {
          found = vocabulary_.find(std::string_view(candidate).substr(0, head + end));
          if (found >= 0) break;
        }
        --end;
      }
      if (found < 0) {
        ids.resize(before);
        ids.push_back(unknown_);
        return;
      }
      ids.push_back(found);
      start += end;
    }
  }

 private:
  const Vocabulary& vocabulary_;
  WordPieceOptions options_;
  std::int64_t unknown_ = -1;
};

}  // namespace

std::unique_ptr<SubwordModel> make_wordpiece(const Vocabulary& vocabulary, const WordPieceOptions& options, const std::string& place) {
  return std::make_unique<WordPieceModel>(vocabulary, options, place);
}

}  // namespace kompakt
