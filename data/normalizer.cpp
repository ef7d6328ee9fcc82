// One class a normalizer of tokenizer.json; the table at the end maps the type names.
#include "data/normalizer.h"

#include <functional>
#include <vector>

#include "core/error.h"
#include "core/text.h"
#include "data/byte_level.h"
#include "data/regex.h"
#include "data/unicode.h"

namespace kompakt {
namespace {

class NormalFormNormalizer : public Normalizer {
 public:
  explicit NormalFormNormalizer(NormalForm form) : form_(form) {}
  std::string apply(std::string text) const override { return normal_form(text, form_); }

 private:
  NormalForm form_;
};

template <class Map>
std::string normalizer_map(const std::string& text, const Map& map) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t offset = 0; offset < text.size();) {
    const char32_t c = next_code_point(text, offset);
    map(out, c);
  }
  return out;
}

class LowercaseNormalizer : public Normalizer {
 public:
  std::string apply(std::string text) const override { return normalizer_map(text, append_lower); }
};

class StripAccentsNormalizer : public Normalizer {
 public:
  std::string apply(std::string text) const override {
    return normalizer_map(text, [](std::string& out, char32_t c) {
      if (!is_mark(c)) append_utf8(out, c);
    });
  }
};

class StripNormalizer : public Normalizer {
 public:
  StripNormalizer(bool left, bool right) : left_(left), right_(right) {}
  std::string apply(std::string text) const override {
    std::size_t first = text.size(), end = 0;
    for (std::size_t offset = 0; offset < text.size();) {
      const std::size_t start = offset;
      if (is_white_space(next_code_point(text, offset))) continue;
      first = std::min(first, start);
      end = offset;
    }
    if (!left_) first = 0;
    if (!right_) end = text.size();
    return first < end ? text.substr(first, end - first) : std::string();
  }

 private:
  bool left_, right_;
};

class PrependNormalizer : public Normalizer {
 public:
  explicit PrependNormalizer(std::string prefix) : prefix_(std::move(prefix)) {}
  std::string apply(std::string text) const override { return text.empty() ? text : prefix_ + text; }

 private:
  std::string prefix_;
};

class ReplaceNormalizer : public Normalizer {
 public:
  ReplaceNormalizer(std::string literal, std::unique_ptr<Regex> regex, std::string content) : literal_(std::move(literal)), regex_(std::move(regex)), content_(std::move(content)) {}
  std::string apply(std::string text) const override {
    if (!regex_) return replace_all(std::move(text), literal_, content_);
    std::vector<std::pair<std::size_t, std::size_t>> matches;
    regex_->find_all(text, matches);
    std::string out;
    std::size_t done = 0;
    for (const auto& [begin, end] : matches) {
      out.append(text, done, begin - done);
      out += content_;
      done = end;
    }
    return out.append(text, done, std::string::npos);
  }

 private:
  std::string literal_;
  std::unique_ptr<Regex> regex_;
  std::string content_;
};

class ByteLevelNormalizer : public Normalizer {
 public:
  std::string apply(std::string text) const override {
    std::string out;
    append_byte_level(out, text);
    return out;
  }
};

bool normalizer_is_chinese(char32_t c) {
  // The block from U+2B820 starts at U+2B920 in the reference; kept, because ids must agree.
  return (c >= 0x4E00 && c <= 0x9FFF) || (c >= 0x3400 && c <= 0x4DBF) || (c >= 0x20000 && c <= 0x2A6DF) || (c >= 0x2A700 && c <= 0x2B73F) || (c >= 0x2B740 && c <= 0x2B81F) ||
         (c >= 0x2B920 && c <= 0x2CEAF) || (c >= 0xF900 && c <= 0xFAFF) || (c >= 0x2F800 && c <= 0x2FA1F);
}

class BertNormalizer : public Normalizer {
 public:
  BertNormalizer(bool clean, bool chinese, bool strip, bool lower) : clean_(clean), chinese_(chinese), strip_(strip), lower_(lower) {}
  std::string apply(std::string text) const override {
    text = normalizer_map(text, [this](std::string& out, char32_t c) {
      if (clean_) {
        const bool space = c == '\t' || c == '\n' || c == '\r' || is_white_space(c);
        if (c == 0 || c == 0xFFFD || (c != '\t' && c != '\n' && c != '\r' && is_other_category(c))) return;
        if (space) c = ' ';
      }
      const bool apart = chinese_ && normalizer_is_chinese(c);
      if (apart) out += ' ';
      append_utf8(out, c);
      if (apart) out += ' ';
    });
    if (strip_) {
      text = normalizer_map(normal_form(text, NormalForm::nfd), [](std::string& out, char32_t c) {
        if (!is_nonspacing_mark(c)) append_utf8(out, c);
      });
    }
    return lower_ ? normalizer_map(text, append_lower) : text;
  }

 private:
  bool clean_, chinese_, strip_, lower_;
};

class SequenceNormalizer : public Normalizer {
 public:
  explicit SequenceNormalizer(std::vector<std::unique_ptr<Normalizer>> parts) : parts_(std::move(parts)) {}
  std::string apply(std::string text) const override {
    for (const auto& part : parts_) text = part->apply(std::move(text));
    return text;
  }

 private:
  std::vector<std::unique_ptr<Normalizer>> parts_;
};

using NormalizerMaker = std::unique_ptr<Normalizer> (*)(const Json&, const std::string&);
struct NormalizerRow {
  const char* type;
  NormalizerMaker make;
};

template <NormalForm form>
std::unique_ptr<Normalizer> make_normal_form(const Json&, const std::string&) {
  return std::make_unique<NormalFormNormalizer>(form);
}

template <class Simple>
std::unique_ptr<Normalizer> make_simple_normalizer(const Json&, const std::string&) {
  return std::make_unique<Simple>();
}

std::unique_ptr<Normalizer> make_replace(const Json& json, const std::string& place) {
  const Json pattern = json_get<Json>(json, "pattern", place);
  const auto content = json_get<std::string>(json, "content", place);
  if (pattern.contains("String")) return std::make_unique<ReplaceNormalizer>(json_get<std::string>(pattern, "String", place), nullptr, content);
  return std::make_unique<ReplaceNormalizer>("", std::make_unique<Regex>(json_get<std::string>(pattern, "Regex", place), place), content);
}

std::unique_ptr<Normalizer> make_bert(const Json& json, const std::string& place) {
  const bool lower = json_get_or<bool>(json, "lowercase", place, true);
  return std::make_unique<BertNormalizer>(json_get_or<bool>(json, "clean_text", place, true), json_get_or<bool>(json, "handle_chinese_chars", place, true),
                                          json_get_or<bool>(json, "strip_accents", place, lower), lower);
}

std::unique_ptr<Normalizer> make_strip(const Json& json, const std::string& place) {
  return std::make_unique<StripNormalizer>(json_get_or<bool>(json, "strip_left", place, true), json_get_or<bool>(json, "strip_right", place, true));
}

std::unique_ptr<Normalizer> make_prepend(const Json& json, const std::string& place) { return std::make_unique<PrependNormalizer>(json_get<std::string>(json, "prepend", place)); }

std::unique_ptr<Normalizer> make_normalizer_sequence(const Json& json, const std::string& place) {
  std::vector<std::unique_ptr<Normalizer>> parts;
  for (const Json& part : json_get<Json>(json, "normalizers", place)) {
    if (auto made = make_normalizer(part, place)) parts.push_back(std::move(made));
  }
  return std::make_unique<SequenceNormalizer>(std::move(parts));
}

const NormalizerRow normalizer_rows[] = {
    {"BertNormalizer", make_bert},
    {"ByteLevel", make_simple_normalizer<ByteLevelNormalizer>},
    {"Lowercase", make_simple_normalizer<LowercaseNormalizer>},
    {"NFC", make_normal_form<NormalForm::nfc>},
    {"NFD", make_normal_form<NormalForm::nfd>},
    {"NFKC", make_normal_form<NormalForm::nfkc>},
    {"NFKD", make_normal_form<NormalForm::nfkd>},
    {"Prepend", make_prepend},
    {"Replace", make_replace},
    {"Sequence", make_normalizer_sequence},
    {"Strip", make_strip},
    {"StripAccents", make_simple_normalizer<StripAccentsNormalizer>},
};

}  // namespace

std::unique_ptr<Normalizer> make_normalizer(const Json& description, const std::string& place) {
  if (description.is_null()) return nullptr;
  const auto type = json_get<std::string>(description, "type", place);
  std::vector<std::string> names;
  for (const NormalizerRow& row : normalizer_rows) {
    if (type == row.type) return row.make(description, place);
    names.push_back(row.type);
  }
  throw Error(str("the normalizer \"", type, "\" of the tokenizer is not supported")).at(place).allowed(join(names, ", "));
}

}  // namespace kompakt
