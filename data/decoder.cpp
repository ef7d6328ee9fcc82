// One class a decoder; the table at the end maps the type names.
#include "data/decoder.h"

#include "core/error.h"
#include "core/text.h"
#include "data/byte_level.h"
#include "data/unicode.h"

namespace kompakt {
namespace {

class ByteLevelDecoder : public Decoder {
 public:
  void apply(std::vector<std::string>& tokens) const override {
    std::string bytes;
    for (const std::string& token : tokens) {
      const std::size_t before = bytes.size();
      for (std::size_t offset = 0; offset < token.size();) {
        const int value = byte_level_value(next_code_point(token, offset));
        if (value < 0) {  // an added token with a character outside the table stands for itself
          bytes.resize(before);
          bytes += token;
          break;
        }
        bytes += static_cast<char>(static_cast<unsigned char>(value));
      }
    }
    tokens.assign(1, valid_utf8_copy(bytes));
  }
};

class WordPieceDecoder : public Decoder {
 public:
  WordPieceDecoder(std::string prefix, bool cleanup) : prefix_(std::move(prefix)), cleanup_(cleanup) {}
  void apply(std::vector<std::string>& tokens) const override {
    static const std::pair<const char*, const char*> rows[] = {{" .", "."},     {" ?", "?"},       {" !", "!"},   {" ,", ","},     {" ' ", "'"},   {" n't", "n't"},
                                                               {" 'm", "'m"}, {" do not", " don't"}, {" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"}};
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (i > 0) tokens[i] = !prefix_.empty() && starts_with(tokens[i], prefix_) ? tokens[i].substr(prefix_.size()) : " " + tokens[i];
      if (!cleanup_) continue;
      for (const auto& [from, to] : rows) tokens[i] = replace_all(std::move(tokens[i]), from, to);
    }
  }

 private:
  std::string prefix_;
  bool cleanup_;
};

class ByteFallbackDecoder : public Decoder {
 public:
  void apply(std::vector<std::string>& tokens) const override {
    std::vector<std::string> out;
    std::string bytes;
    const auto flush = [&] {
      if (bytes.empty()) return;
      if (!invalid_utf8(bytes)) out.push_back(bytes);
      else out.insert(out.end(), bytes.size(), "\xEF\xBF\xBD");
      bytes.clear();
    };
    for (std::string& token : tokens) {
      const int value = byte_value(token);
      if (value >= 0) {
        bytes += static_cast<char>(static_cast<unsigned char>(value));
        continue;
      }
      flush();
      out.push_back(std::move(token));
    }
    flush();
    tokens = std::move(out);
  }

 private:
  static int byte_value(const std::string& token) {
    if (token.size() != 6 || token.compare(0, 3, "<0x") != 0 || token[5] != '>') return -1;
    int value = 0;
    for (const char c : {token[3], token[4]}) {
      const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
      if (digit < 0) return -1;
      value = value * 16 + digit;
    }
    return value;
  }
};

class FuseDecoder : public Decoder {
 public:
  void apply(std::vector<std::string>& tokens) const override {
    std::string all;
    for (const std::string& token : tokens) all += token;
    tokens.assign(1, all);
  }
};

class StripDecoder : public Decoder {
 public:
  StripDecoder(std::string content, std::int64_t start, std::int64_t stop) : content_(std::move(content)), start_(start), stop_(stop) {}
  void apply(std::vector<std::string>& tokens) const override {
    for (std::string& token : tokens) {
      std::string_view view = token;
      for (std::int64_t i = 0; i < start_ && starts_with(view, content_); ++i) view.remove_prefix(content_.size());
      for (std::int64_t i = 0; i < stop_ && ends_with(view, content_); ++i) view.remove_suffix(content_.size());
      token = std::string(view);
    }
  }

 private:
  std::string content_;
  std::int64_t start_, stop_;
};

class ReplaceDecoder : public Decoder {
 public:
  ReplaceDecoder(std::string from, std::string to) : from_(std::move(from)), to_(std::move(to)) {}
  void apply(std::vector<std::string>& tokens) const override {
    for (std::string& token : tokens) token = replace_all(std::move(token), from_, to_);
  }

 private:
  std::string from_, to_;
};

class MetaspaceDecoder : public Decoder {
 public:
  MetaspaceDecoder(std::string replacement, bool prepended) : replacement_(std::move(replacement)), prepended_(prepended) {}
  void apply(std::vector<std::string>& tokens) const override {
    for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = replace_all(std::move(tokens[i]), replacement_, i == 0 && prepended_ ? "" : " ");
  }

 private:
  std::string replacement_;
  bool prepended_;
};

class SuffixDecoder : public Decoder {  // "BPEDecoder": the end-of-word suffix becomes a space
 public:
  explicit SuffixDecoder(std::string suffix) : suffix_(std::move(suffix)) {}
  void apply(std::vector<std::string>& tokens) const override {
    for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = replace_all(std::move(tokens[i]), suffix_, i + 1 == tokens.size() ? "" : " ");
  }

 private:
  std::string suffix_;
};

class SequenceDecoder : public Decoder {
 public:
  explicit SequenceDecoder(std::vector<std::unique_ptr<Decoder>> parts) : parts_(std::move(parts)) {}
  void apply(std::vector<std::string>& tokens) const override {
    for (const auto& part : parts_) part->apply(tokens);
  }

 private:
  std::vector<std::unique_ptr<Decoder>> parts_;
};

std::unique_ptr<Decoder> decoder_byte_level(const Json&, const std::string&) { return std::make_unique<ByteLevelDecoder>(); }
std::unique_ptr<Decoder> decoder_byte_fallback(const Json&, const std::string&) { return std::make_unique<ByteFallbackDecoder>(); }
std::unique_ptr<Decoder> decoder_fuse(const Json&, const std::string&) { return std::make_unique<FuseDecoder>(); }
std::unique_ptr<Decoder> decoder_suffix(const Json& json, const std::string& place) { return std::make_unique<SuffixDecoder>(json_get_or<std::string>(json, "suffix", place, "</w>")); }

std::unique_ptr<Decoder> decoder_wordpiece(const Json& json, const std::string& place) {
  return std::make_unique<WordPieceDecoder>(json_get_or<std::string>(json, "prefix", place, "##"), json_get_or<bool>(json, "cleanup", place, true));
}

std::unique_ptr<Decoder> decoder_strip(const Json& json, const std::string& place) {
  return std::make_unique<StripDecoder>(json_get<std::string>(json, "content", place), json_get<std::int64_t>(json, "start", place), json_get<std::int64_t>(json, "stop", place));
}

std::unique_ptr<Decoder> decoder_replace(const Json& json, const std::string& place) {
  const Json pattern = json_get<Json>(json, "pattern", place);
  if (!pattern.contains("String")) throw Error("a Replace decoder with a regular expression is not supported").at(place).given(pattern.dump());
  return std::make_unique<ReplaceDecoder>(json_get<std::string>(pattern, "String", place), json_get<std::string>(json, "content", place));
}

std::unique_ptr<Decoder> decoder_metaspace(const Json& json, const std::string& place) {
  const auto scheme = json_get_or<std::string>(json, "prepend_scheme", place, json_get_or<bool>(json, "add_prefix_space", place, true) ? "always" : "never");
  return std::make_unique<MetaspaceDecoder>(json_get_or<std::string>(json, "replacement", place, "\xE2\x96\x81"), scheme != "never");
}

std::unique_ptr<Decoder> decoder_sequence(const Json& json, const std::string& place) {
  std::vector<std::unique_ptr<Decoder>> parts;
  for (const Json& part : json_get<Json>(json, "decoders", place)) {
    if (auto made = make_decoder(part, place)) parts.push_back(std::move(made));
  }
  return std::make_unique<SequenceDecoder>(std::move(parts));
}

struct DecoderRow {
  const char* type;
  std::unique_ptr<Decoder> (*make)(const Json&, const std::string&);
};

const DecoderRow decoder_rows[] = {
    {"BPEDecoder", decoder_suffix}, {"ByteFallback", decoder_byte_fallback}, {"ByteLevel", decoder_byte_level}, {"Fuse", decoder_fuse},           {"Metaspace", decoder_metaspace},
    {"Replace", decoder_replace},   {"Sequence", decoder_sequence},          {"Strip", decoder_strip},          {"WordPiece", decoder_wordpiece},
};

}  // namespace

std::unique_ptr<Decoder> make_decoder(const Json& description, const std::string& place) {
  if (description.is_null()) return nullptr;
  const auto type = json_get<std::string>(description, "type", place);
  std::vector<std::string> names;
  for (const DecoderRow& row : decoder_rows) {
    if (type == row.type) return row.make(description, place);
    names.push_back(row.type);
  }
  throw Error(str("the decoder \"", type, "\" of the tokenizer is not supported")).at(place).allowed(join(names, ", "));
}

}  // namespace kompakt
