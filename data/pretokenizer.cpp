// One class a pre-tokenizer; all cutting goes through one function that knows the five delimiter behaviours.
#include "data/pretokenizer.h"

#include <algorithm>
#include <functional>

#include "core/error.h"
#include "core/text.h"
#include "data/byte_level.h"
#include "data/regex.h"
#include "data/unicode.h"

namespace kompakt {

const char* const gpt2_pattern = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

namespace {

using PieceRange = std::pair<std::size_t, std::size_t>;
enum class SplitBehavior { removed, isolated, contiguous, merged_with_previous, merged_with_next };
// Fills `matches` with the delimiters of a piece.
using PieceMatcher = std::function<void(std::string_view, std::vector<PieceRange>&)>;

void cut_piece(PieceRange piece, const std::vector<PieceRange>& matches, SplitBehavior behavior, bool invert, std::vector<PieceRange>& out) {
  // Alternating parts that cover the piece, each a delimiter or not.
  thread_local std::vector<std::pair<PieceRange, bool>> parts;
  parts.clear();
  std::size_t done = 0;
  const std::size_t length = piece.second - piece.first;
  for (const auto& [begin, end] : matches) {
    if (done < begin) parts.push_back({{done, begin}, invert});
    parts.push_back({{begin, end}, !invert});
    done = end;
  }
  if (done < length) parts.push_back({{done, length}, invert});
  const std::size_t first = out.size();
  const auto push = [&](PieceRange range) { out.emplace_back(piece.first + range.first, piece.first + range.second); };
  bool previous = false;
  switch (behavior) {
    case SplitBehavior::removed:
      for (const auto& [range, match] : parts)
        if (!match) push(range);
      break;
    case SplitBehavior::isolated:
      for (const auto& [range, match] : parts) push(range);
      break;
    case SplitBehavior::contiguous:
      for (const auto& [range, match] : parts) {
        if (match == previous && out.size() > first) out.back().second = piece.first + range.second;
        else push(range);
        previous = match;
      }
      break;
    case SplitBehavior::merged_with_previous:
      for (const auto& [range, match] : parts) {
        if (match && !previous && out.size() > first) out.back().second = piece.first + range.second;
        else push(range);
        previous = match;
      }
      break;
    case SplitBehavior::merged_with_next:
      for (std::size_t i = parts.size(); i-- > 0;) {
        const auto& [range, match] = parts[i];
        if (match && !previous && out.size() > first) out.back().first = piece.first + range.first;
        else push(range);
        previous = match;
      }
      std::reverse(out.begin() + static_cast<std::ptrdiff_t>(first), out.end());
      break;
  }
  std::size_t kept = first;
  for (std::size_t i = first; i < out.size(); ++i)
    if (out[i].first < out[i].second) out[kept++] = out[i];
  out.resize(kept);
}

class SplitPreTokenizer : public PreTokenizer {
 public:
  SplitPreTokenizer(PieceMatcher matcher, SplitBehavior behavior, bool invert) : matcher_(std::move(matcher)), behavior_(behavior), invert_(invert) {}
  void apply(Pieces& pieces) const override {
    std::vector<PieceRange> out, matches;
    out.reserve(pieces.ranges.size() * 4);
    for (std::size_t i = 0; i < pieces.ranges.size(); ++i) {
      matcher_(pieces.piece(i), matches);
      cut_piece(pieces.ranges[i], matches, behavior_, invert_, out);
    }
    pieces.ranges = std::move(out);
  }

 private:
  PieceMatcher matcher_;
  SplitBehavior behavior_;
  bool invert_;
};

template <class Predicate>
PieceMatcher match_characters(Predicate predicate) {
  return [predicate](std::string_view text, std::vector<PieceRange>& matches) {
    matches.clear();
    for (std::size_t offset = 0; offset < text.size();) {
      const std::size_t start = offset;
      if (predicate(next_code_point(text, offset))) matches.emplace_back(start, offset);
    }
  };
}

PieceMatcher match_regex(const std::string& pattern, const std::string& place) {
  auto regex = std::make_shared<Regex>(pattern, place);
  return [regex](std::string_view text, std::vector<PieceRange>& matches) { regex->find_all(text, matches); };
}

PieceMatcher match_text(std::string literal) {
  return [literal](std::string_view text, std::vector<PieceRange>& matches) {
    matches.clear();
    if (literal.empty()) return;
    for (std::size_t at = text.find(literal); at != std::string_view::npos; at = text.find(literal, at + literal.size())) matches.emplace_back(at, at + literal.size());
  };
}

// Rewrites every piece; the ranges follow.
template <class Write>
void rewrite_pieces(Pieces& pieces, const Write& write) {
  std::string buffer;
  buffer.reserve(pieces.buffer.size() * 3 / 2 + 8);
  for (std::size_t i = 0; i < pieces.ranges.size(); ++i) {
    const std::size_t begin = buffer.size();
    write(buffer, pieces.piece(i), i == 0 && pieces.at_start);
    pieces.ranges[i] = {begin, buffer.size()};
  }
  pieces.buffer = std::move(buffer);
}

class ByteLevelPreTokenizer : public PreTokenizer {
 public:
  ByteLevelPreTokenizer(bool add_prefix_space, bool use_regex, const std::string& place) : add_prefix_space_(add_prefix_space) {
    if (use_regex) split_ = std::make_unique<SplitPreTokenizer>(match_regex(gpt2_pattern, place), SplitBehavior::isolated, false);
  }
  void apply(Pieces& pieces) const override {
    if (add_prefix_space_) {
      rewrite_pieces(pieces, [](std::string& out, std::string_view piece, bool) {
        if (piece.empty() || piece.front() != ' ') out += ' ';
        out += piece;
      });
    }
    if (split_) split_->apply(pieces);
    rewrite_pieces(pieces, [](std::string& out, std::string_view piece, bool) { append_byte_level(out, piece); });
  }

 private:
  bool add_prefix_space_;
  std::unique_ptr<SplitPreTokenizer> split_;
};

enum class PrependScheme { always, never, first };

class MetaspacePreTokenizer : public PreTokenizer {
 public:
  MetaspacePreTokenizer(std::string replacement, PrependScheme scheme, bool split) : replacement_(std::move(replacement)), scheme_(scheme) {
    if (split) split_ = std::make_unique<SplitPreTokenizer>(match_text(replacement_), SplitBehavior::merged_with_next, false);
  }
  void apply(Pieces& pieces) const override {
    rewrite_pieces(pieces, [this](std::string& out, std::string_view piece, bool first) {
      const bool begins = starts_with(piece, replacement_) || (!piece.empty() && piece.front() == ' ');
      if (!begins && (scheme_ == PrependScheme::always || (scheme_ == PrependScheme::first && first))) out += replacement_;
      for (const char c : piece) {
        if (c == ' ') out += replacement_;
        else out += c;
      }
    });
    if (split_) split_->apply(pieces);
  }

 private:
  std::string replacement_;
  PrependScheme scheme_;
  std::unique_ptr<SplitPreTokenizer> split_;
};

class SequencePreTokenizer : public PreTokenizer {
 public:
  explicit SequencePreTokenizer(std::vector<std::unique_ptr<PreTokenizer>> parts) : parts_(std::move(parts)) {}
  void apply(Pieces& pieces) const override {
    for (const auto& part : parts_) part->apply(pieces);
  }

 private:
  std::vector<std::unique_ptr<PreTokenizer>> parts_;
};

SplitBehavior split_behavior(const std::string& name, const std::string& place) {
  static const std::pair<const char*, SplitBehavior> rows[] = {{"Removed", SplitBehavior::removed},
                                                               {"Isolated", SplitBehavior::isolated},
                                                               {"Contiguous", SplitBehavior::contiguous},
                                                               {"MergedWithPrevious", SplitBehavior::merged_with_previous},
                                                               {"MergedWithNext", SplitBehavior::merged_with_next}};
  for (const auto& [row, behavior] : rows)
    if (name == row) return behavior;
  throw Error(str("the split behavior \"", name, "\" is unknown")).at(place).allowed("Removed, Isolated, Contiguous, MergedWithPrevious, MergedWithNext");
}

std::unique_ptr<PreTokenizer> pre_split(const Json& json, const std::string& place) {
  const Json pattern = json_get<Json>(json, "pattern", place);
  const SplitBehavior behavior = split_behavior(json_get<std::string>(json, "behavior", place), place);
  const bool invert = json_get_or<bool>(json, "invert", place, false);
  if (pattern.contains("String")) return std::make_unique<SplitPreTokenizer>(match_text(json_get<std::string>(pattern, "String", place)), behavior, invert);
  return std::make_unique<SplitPreTokenizer>(match_regex(json_get<std::string>(pattern, "Regex", place), place), behavior, invert);
}

std::unique_ptr<PreTokenizer> pre_byte_level(const Json& json, const std::string& place) {
  return std::make_unique<ByteLevelPreTokenizer>(json_get_or<bool>(json, "add_prefix_space", place, true), json_get_or<bool>(json, "use_regex", place, true), place);
}

std::unique_ptr<PreTokenizer> pre_digits(const Json& json, const std::string& place) {
  const bool individual = json_get_or<bool>(json, "individual_digits", place, false);
  return std::make_unique<SplitPreTokenizer>(match_characters(is_numeric), individual ? SplitBehavior::isolated : SplitBehavior::contiguous, false);
}

std::unique_ptr<PreTokenizer> pre_punctuation(const Json& json, const std::string& place) {
  return std::make_unique<SplitPreTokenizer>(match_characters(is_bert_punctuation), split_behavior(json_get_or<std::string>(json, "behavior", place, "Isolated"), place), false);
}

std::unique_ptr<PreTokenizer> pre_metaspace(const Json& json, const std::string& place) {
  const auto replacement = json_get_or<std::string>(json, "replacement", place, "\xE2\x96\x81");
  const bool split = json_get_or<bool>(json, "split", place, true);
  // Files before version 0.15 of `tokenizers` have add_prefix_space instead of prepend_scheme.
  const auto scheme = json_get_or<std::string>(json, "prepend_scheme", place, json_get_or<bool>(json, "add_prefix_space", place, true) ? "always" : "never");
  static const std::pair<const char*, PrependScheme> rows[] = {{"always", PrependScheme::always}, {"never", PrependScheme::never}, {"first", PrependScheme::first}};
  for (const auto& [name, value] : rows)
    if (scheme == name) return std::make_unique<MetaspacePreTokenizer>(replacement, value, split);
  throw Error(str("the Metaspace prepend_scheme \"", scheme, "\" is unknown")).at(place).allowed("always, never, first");
}

std::unique_ptr<PreTokenizer> pre_white_space(const Json&, const std::string&) {
  return std::make_unique<SplitPreTokenizer>(match_characters(is_white_space), SplitBehavior::removed, false);
}

std::unique_ptr<PreTokenizer> pre_words(const Json&, const std::string& place) {
  return std::make_unique<SplitPreTokenizer>(match_regex(R"(\w+|[^\w\s]+)", place), SplitBehavior::removed, true);
}

std::unique_ptr<PreTokenizer> pre_delimiter(const Json& json, const std::string& place) {
  return std::make_unique<SplitPreTokenizer>(match_text(json_get<std::string>(json, "delimiter", place)), SplitBehavior::removed, false);
}

std::unique_ptr<PreTokenizer> pre_bert(const Json&, const std::string&) {
  std::vector<std::unique_ptr<PreTokenizer>> parts;
  parts.push_back(std::make_unique<SplitPreTokenizer>(match_characters(is_white_space), SplitBehavior::removed, false));
  parts.push_back(std::make_unique<SplitPreTokenizer>(match_characters(is_bert_punctuation), SplitBehavior::isolated, false));
  return std::make_unique<SequencePreTokenizer>(std::move(parts));
}

std::unique_ptr<PreTokenizer> pre_sequence(const Json& json, const std::string& place) {
  std::vector<std::unique_ptr<PreTokenizer>> parts;
  for (const Json& part : json_get<Json>(json, "pretokenizers", place)) {
    if (auto made = make_pre_tokenizer(part, place)) parts.push_back(std::move(made));
  }
  return std::make_unique<SequencePreTokenizer>(std::move(parts));
}

struct PreTokenizerRow {
  const char* type;
  std::unique_ptr<PreTokenizer> (*make)(const Json&, const std::string&);
};

const PreTokenizerRow pre_tokenizer_rows[] = {
    {"BertPreTokenizer", pre_bert}, {"ByteLevel", pre_byte_level},     {"CharDelimiterSplit", pre_delimiter}, {"Digits", pre_digits},
    {"Metaspace", pre_metaspace},   {"Punctuation", pre_punctuation}, {"Sequence", pre_sequence},            {"Split", pre_split},
    {"Whitespace", pre_words},      {"WhitespaceSplit", pre_white_space},
};

}  // namespace

std::unique_ptr<PreTokenizer> make_pre_tokenizer(const Json& description, const std::string& place) {
  if (description.is_null()) return nullptr;
  const auto type = json_get<std::string>(description, "type", place);
  std::vector<std::string> names;
  for (const PreTokenizerRow& row : pre_tokenizer_rows) {
    if (type == row.type) return row.make(description, place);
    names.push_back(row.type);
  }
  throw Error(str("the pre-tokenizer \"", type, "\" of the tokenizer is not supported")).at(place).allowed(join(names, ", "));
}

}  // namespace kompakt
