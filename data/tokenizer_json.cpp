// Readers of tokenizer.json, vocab.txt and vocab.json + merges.txt, and of the configuration files beside them.
#include <algorithm>

#include "core/error.h"
#include "core/files.h"
#include "core/log.h"
#include "core/text.h"
#include "data/tokenizer_description.h"

namespace kompakt {
namespace {

// Streams "model.vocab" and "model.merges" into lists (they hold up to half a million entries) and builds the rest as usual.
class TokenizerJsonReader : public nlohmann::json_sax<Json> {
 public:
  // With `bare` the root object itself is the vocabulary (vocab.json).
  TokenizerJsonReader(std::string place, bool bare) : place_(std::move(place)), bare_(bare) {}
  Json root;
  std::vector<std::pair<std::string, std::int64_t>> vocab;
  bool has_vocab = false, has_merges = false;
  std::vector<std::pair<std::string, std::string>> merges;

  bool null() override { return value(Json(nullptr)); }
  bool boolean(bool v) override { return value(Json(v)); }
  bool number_integer(number_integer_t v) override { return value(Json(v)); }
  bool number_unsigned(number_unsigned_t v) override { return value(Json(v)); }
  bool number_float(number_float_t v, const string_t&) override { return value(Json(v)); }
  bool string(string_t& v) override { return value(Json(std::move(v))); }
  bool binary(binary_t&) override { return false; }
  bool start_object(std::size_t) override { return open(Json::object()); }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool key(string_t& v) override {
    Frame& frame = frames_.back();
    frame.key = std::move(v);
    if (frame.kind == Kind::plain && frame.json->contains(frame.key)) throw Error(str("key \"", frame.key, "\" appears twice in one JSON object")).at(place_);
    return true;
  }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& error) override {
    throw Error("the text is not valid JSON").at(str(place_, ", byte ", position)).given(error.what());
  }

 private:
  enum class Kind { plain, vocab, merges, pair };
  struct Frame {
    Kind kind = Kind::plain;
    Json* json = nullptr;
    std::string key;
  };

  [[noreturn]] void broken(const char* what, const Json& v) const { throw Error(what).at(place_).given(v.dump(-1, ' ', false, Json::error_handler_t::replace)); }

  bool value(Json v) {
    if (frames_.empty()) {
      root = std::move(v);
      return true;
    }
    Frame& frame = frames_.back();
    switch (frame.kind) {
      case Kind::plain: attach(std::move(v)); break;
      case Kind::vocab:
        if (!v.is_number_integer()) broken("an id in the vocabulary is no whole number", v);
        vocab.emplace_back(frame.key, v.get<std::int64_t>());
        break;
      case Kind::merges: {
        if (!v.is_string()) broken("a merge is neither a text nor a pair of texts", v);
        const auto& text = v.get_ref<const std::string&>();
        const std::size_t space = text.find(' ');
        if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) broken("a merge is not two tokens with a space between", v);
        merges.emplace_back(text.substr(0, space), text.substr(space + 1));
        break;
      }
      case Kind::pair:
        if (!v.is_string()) broken("a merge is neither a text nor a pair of texts", v);
        pair_.push_back(v.get<std::string>());
        break;
    }
    return true;
  }

  Json* attach(Json v) {
    Frame& frame = frames_.back();
    if (frame.json->is_array()) {
      frame.json->push_back(std::move(v));
      return &frame.json->back();
    }
    Json& place = (*frame.json)[frame.key];
    place = std::move(v);
    return &place;
  }

  bool open(Json v) {
    if (frames_.size() > 100) throw Error("the JSON text is nested too deeply").at(place_).allowed("at most 100 levels");
    Frame next;
    if (frames_.empty()) {
      if (bare_ && v.is_object()) {
        next.kind = Kind::vocab;
        has_vocab = true;
      }
      root = std::move(v);
      next.json = &root;
    } else if (frames_.back().kind == Kind::merges && v.is_array()) {
      next.kind = Kind::pair;
      pair_.clear();
    } else if (frames_.back().kind != Kind::plain) {
      broken("the vocabulary or the merges hold something nested", v);
    } else if (frames_.size() == 2 && frames_[0].key == "model" && frames_[1].key == "vocab" && v.is_object()) {
      next.kind = Kind::vocab;
      has_vocab = true;
    } else if (frames_.size() == 2 && frames_[0].key == "model" && frames_[1].key == "merges" && v.is_array()) {
      next.kind = Kind::merges;
      has_merges = true;
    } else {
      next.json = attach(std::move(v));
    }
    frames_.push_back(std::move(next));
    return true;
  }

  bool close() {
    if (frames_.back().kind == Kind::pair) {
      if (pair_.size() != 2) broken("a merge is not a pair of tokens", Json(pair_));
      merges.emplace_back(pair_[0], pair_[1]);
    }
    frames_.pop_back();
    return true;
  }

  std::string place_;
  bool bare_;
  std::vector<Frame> frames_;
  std::vector<std::string> pair_;
};

void read_tokenizer_text(TokenizerJsonReader& reader, std::string_view text, const std::string& place) {
  if (invalid_utf8(text)) throw Error("the JSON text is not valid UTF-8").at(str(place, ", byte ", *invalid_utf8(text)));
  Json::sax_parse(text.begin(), text.end(), &reader);
}

void add_merges(TokenizerDescription& out, const std::vector<std::pair<std::string, std::string>>& merges) {
  out.merges.reserve(merges.size());
  std::string joined;
  for (const auto& [left, right] : merges) {
    joined = left;
    // Continuations carry the prefix; the result has it once.
    joined += starts_with(right, out.bpe.prefix) ? std::string_view(right).substr(out.bpe.prefix.size()) : std::string_view(right);
    BpeMerge merge;
    for (const auto& [text, id] : {std::pair{&left, &merge.left}, std::pair{&right, &merge.right}, std::pair<const std::string*, std::int32_t*>{&joined, &merge.result}}) {
      const std::int64_t found = out.vocabulary.find(*text);
      if (found < 0) throw Error(str("the merge \"", left, "\" + \"", right, "\" needs the token \"", *text, "\", which the vocabulary does not have")).at(out.place);
      *id = static_cast<std::int32_t>(found);
    }
    merge.rank = static_cast<std::int32_t>(out.merges.size());
    out.merges.push_back(merge);
  }
}

AddedToken read_added_token(const Json& json, const std::string& place) {
  AddedToken token;
  token.content = json_get<std::string>(json, "content", place);
  token.id = json_get<std::int64_t>(json, "id", place);
  token.special = json_get_or<bool>(json, "special", place, false);
  token.single_word = json_get_or<bool>(json, "single_word", place, false);
  token.lstrip = json_get_or<bool>(json, "lstrip", place, false);
  token.rstrip = json_get_or<bool>(json, "rstrip", place, false);
  token.normalized = json_get_or<bool>(json, "normalized", place, !token.special);
  return token;
}

std::int64_t find_token(const TokenizerDescription& description, const std::string& text) {
  for (const AddedToken& token : description.added)
    if (token.content == text) return token.id;
  return description.vocabulary.find(text);
}

// A token in a configuration file: a text, or an object with "content".
std::string token_text(const Json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_object() && value.contains("content") && value.at("content").is_string()) return value.at("content").get<std::string>();
  return "";
}

std::string template_text(const Json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_array()) return "";
  for (const Json& row : value)  // several named templates
    if (row.is_object() && row.value("name", "") == "default") return row.value("template", "");
  return "";
}

// [PAD] and its kin are special wherever a vocabulary without further description holds them.
void add_bert_specials(TokenizerDescription& description) {
  for (const SpecialTokenRow& row : special_token_rows) {
    if (!*row.bert_name) continue;
    if (description.special.*row.member < 0) description.special.*row.member = find_token(description, row.bert_name);
  }
}

void mark_specials(TokenizerDescription& description) {
  std::vector<AddedToken> added;
  for (const SpecialTokenRow& row : special_token_rows) {
    const std::int64_t id = description.special.*row.member;
    if (id < 0 || std::any_of(added.begin(), added.end(), [&](const AddedToken& token) { return token.id == id; })) continue;
    AddedToken token;
    token.content = std::string(description.vocabulary.text(id));
    token.id = id;
    token.special = true;
    added.push_back(token);
  }
  std::sort(added.begin(), added.end(), [](const AddedToken& a, const AddedToken& b) { return a.id < b.id; });
  description.added = std::move(added);
}

}  // namespace

void read_tokenizer_config(TokenizerDescription& description, const std::filesystem::path& folder) {
  for (const char* name : {"special_tokens_map.json", "tokenizer_config.json"}) {  // the later file wins
    const auto file = folder / name;
    if (!std::filesystem::exists(file)) continue;
    const Json config = read_json(file);
    if (!config.is_object()) throw Error("the file is not a JSON object").at(file.string());
    for (const SpecialTokenRow& row : special_token_rows) {
      if (!config.contains(row.key)) continue;
      const std::string text = token_text(config.at(row.key));
      if (text.empty()) continue;
      const std::int64_t id = find_token(description, text);
      if (id < 0) throw Error(str("the ", row.key, " \"", text, "\" is not in the vocabulary")).at(file.string()).hint("the configuration belongs to another tokenizer");
      description.special.*row.member = id;
    }
    if (config.contains("chat_template")) description.chat_template = template_text(config.at("chat_template"));
  }
  if (const auto file = folder / "chat_template.jinja"; std::filesystem::exists(file)) description.chat_template = read_text(file);
}

TokenizerDescription read_tokenizer_json(const std::filesystem::path& file) {
  const MappedFile mapped(file);
  TokenizerDescription out;
  out.place = file.string();
  TokenizerJsonReader reader(out.place, false);
  read_tokenizer_text(reader, mapped.text(), out.place);
  const Json& root = reader.root;
  const Json model = json_get<Json>(root, "model", out.place);
  // Files of old versions leave the type out; the keys tell.
  const auto type = json_get_or<std::string>(model, "type", out.place, reader.has_merges ? "BPE" : model.contains("max_input_chars_per_word") ? "WordPiece" : "(none)");
  if (type != "BPE" && type != "WordPiece") throw Error(str("the tokenizer model \"", type, "\" is not supported")).at(out.place).allowed("BPE, WordPiece");
  if (!reader.has_vocab || reader.vocab.empty()) throw Error("the tokenizer has no vocabulary").at(out.place);
  for (auto& [text, id] : reader.vocab) out.vocabulary.add(std::move(text), id, out.place);
  if (type == "WordPiece") {
    out.model = SubwordKind::wordpiece;
    out.wordpiece.unknown = json_get_or<std::string>(model, "unk_token", out.place, "[UNK]");
    out.wordpiece.prefix = json_get_or<std::string>(model, "continuing_subword_prefix", out.place, "##");
    out.wordpiece.max_characters = json_get_or<std::int64_t>(model, "max_input_chars_per_word", out.place, 100);
  } else {
    out.model = SubwordKind::bpe;
    if (json_get_or<double>(model, "dropout", out.place, 0) != 0) throw Error("BPE dropout makes tokens random and is not supported").at(out.place).given(model.at("dropout").dump()).hint("set model.dropout to null");
    out.bpe.unknown = json_get_or<std::string>(model, "unk_token", out.place, "");
    out.bpe.prefix = json_get_or<std::string>(model, "continuing_subword_prefix", out.place, "");
    out.bpe.suffix = json_get_or<std::string>(model, "end_of_word_suffix", out.place, "");
    out.bpe.byte_fallback = json_get_or<bool>(model, "byte_fallback", out.place, false);
    out.bpe.fuse_unknown = json_get_or<bool>(model, "fuse_unk", out.place, false);
    out.bpe.ignore_merges = json_get_or<bool>(model, "ignore_merges", out.place, false);
    if (!reader.has_merges) throw Error("the BPE tokenizer has no merges").at(out.place);
    add_merges(out, reader.merges);
  }
  if (root.contains("added_tokens") && !root.at("added_tokens").is_null()) {
    for (const Json& token : root.at("added_tokens")) {
      AddedToken read = read_added_token(token, out.place);
      const std::int64_t in_vocabulary = out.vocabulary.find(read.content);
      if (in_vocabulary >= 0 && in_vocabulary != read.id)
        throw Error(str("the added token \"", read.content, "\" has the id ", read.id, " and stands in the vocabulary with the id ", in_vocabulary)).at(out.place);
      if (in_vocabulary < 0 && out.vocabulary.has(read.id))
        throw Error(str("the added token \"", read.content, "\" has the id ", read.id, " of the token \"", out.vocabulary.text(read.id), "\"")).at(out.place);
      if (read.id < 0 || read.id >= (1 << 24)) throw Error(str("the added token \"", read.content, "\" has an impossible id")).at(out.place).given(std::to_string(read.id));
      if (!read.content.empty()) out.added.push_back(std::move(read));
    }
  }
  const auto part = [&](const char* key) { return root.contains(key) ? root.at(key) : Json(nullptr); };
  out.normalizer = part("normalizer");
  out.pre_tokenizer = part("pre_tokenizer");
  out.post_processor = part("post_processor");
  out.decoder = part("decoder");
  read_tokenizer_config(out, file.parent_path());
  if (out.special.unk < 0) out.special.unk = find_token(out, out.model == SubwordKind::wordpiece ? out.wordpiece.unknown : out.bpe.unknown);
  if (out.model == SubwordKind::wordpiece) add_bert_specials(out);
  return out;
}

TokenizerDescription read_vocab_txt(const std::filesystem::path& file) {
  const std::string text = read_text(file);
  TokenizerDescription out;
  out.place = file.string();
  out.model = SubwordKind::wordpiece;
  if (const auto bad = invalid_utf8(text)) throw Error("the vocabulary is not valid UTF-8").at(str(out.place, ":", std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(*bad), '\n') + 1));
  bool upper = false;
  std::int64_t line_number = 0;
  for (std::string line : split(text, '\n')) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    const std::int64_t id = line_number++;
    if (line.empty()) continue;  // a hole keeps the numbers of the later lines
    upper = upper || (line.front() != '[' && std::any_of(line.begin(), line.end(), [](char c) { return c >= 'A' && c <= 'Z'; }));
    out.vocabulary.add(std::move(line), id, str(out.place, ":", line_number));
  }
  if (out.vocabulary.size() == 0) throw Error("the vocabulary is empty").at(out.place);
  const auto folder = file.parent_path();
  read_tokenizer_config(out, folder);
  add_bert_specials(out);
  bool lowercase = !upper;  // a vocabulary without upper-case letters can only serve lower-cased text
  if (const auto config = folder / "tokenizer_config.json"; std::filesystem::exists(config)) lowercase = json_get_or<bool>(read_json(config), "do_lower_case", config.string(), lowercase);
  mark_specials(out);
  set_bert_parts(out, lowercase);
  return out;
}

TokenizerDescription read_vocab_and_merges(const std::filesystem::path& vocab, const std::filesystem::path& merges) {
  TokenizerDescription out;
  out.place = vocab.string();
  const MappedFile mapped(vocab);
  TokenizerJsonReader reader(out.place, true);
  read_tokenizer_text(reader, mapped.text(), out.place);
  if (!reader.has_vocab || reader.vocab.empty()) throw Error("the file is no vocabulary: an object of token and id is needed").at(out.place);
  for (auto& [text, id] : reader.vocab) out.vocabulary.add(std::move(text), id, out.place);
  std::vector<std::pair<std::string, std::string>> pairs;
  std::int64_t line_number = 0;
  for (std::string line : split(read_text(merges), '\n')) {
    ++line_number;
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.empty() || starts_with(line, "#version")) continue;
    const std::size_t space = line.find(' ');
    if (space == std::string::npos || space == 0 || space + 1 == line.size() || line.find(' ', space + 1) != std::string::npos)
      throw Error("a merge is not two tokens with a space between").at(str(merges.string(), ":", line_number)).given(line);
    pairs.emplace_back(line.substr(0, space), line.substr(space + 1));
  }
  out.place = merges.string();
  add_merges(out, pairs);
  out.place = vocab.string();
  set_byte_level_parts(out, {}, true);
  read_tokenizer_config(out, vocab.parent_path());
  if (const std::int64_t end = out.vocabulary.find("<|endoftext|>"); end >= 0) {
    for (auto member : {&SpecialTokens::bos, &SpecialTokens::eos})
      if (out.special.*member < 0) out.special.*member = end;
  }
  mark_specials(out);
  return out;
}

}  // namespace kompakt
