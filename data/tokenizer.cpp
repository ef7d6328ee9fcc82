// The tokenizer that executes a description: added tokens, normalizer, pre-tokenizer, model, post-processor, and decoders back.
#include "data/tokenizer.h"

#include <algorithm>
#include <functional>
#include <map>
#include <set>

#include "core/error.h"
#include "core/files.h"
#include "core/hash.h"
#include "core/text.h"
#include "data/byte_level.h"
#include "data/decoder.h"
#include "data/normalizer.h"
#include "data/pretokenizer.h"
#include "data/tokenizer_description.h"
#include "data/unicode.h"
#include "formats/gguf.h"

namespace kompakt {

const std::vector<SpecialTokenRow> special_token_rows = {
    {"bos_token", &SpecialTokens::bos, ""},      {"eos_token", &SpecialTokens::eos, ""},      {"pad_token", &SpecialTokens::pad, "[PAD]"}, {"unk_token", &SpecialTokens::unk, "[UNK]"},
    {"cls_token", &SpecialTokens::cls, "[CLS]"}, {"sep_token", &SpecialTokens::sep, "[SEP]"}, {"mask_token", &SpecialTokens::mask, "[MASK]"},
};

namespace {

// True when "type" or any "type" below it is `wanted`.
bool tokenizer_part_has(const Json& part, const std::string& wanted) {
  if (part.is_object() && part.value("type", "") == wanted) return true;
  if (!part.is_structured()) return false;
  return std::any_of(part.begin(), part.end(), [&](const Json& item) { return tokenizer_part_has(item, wanted); });
}

class PipelineTokenizer : public Tokenizer {
 public:
  explicit PipelineTokenizer(TokenizerDescription description) : description_(std::move(description)) {
    const std::string& place = description_.place;
    normalizer_ = make_normalizer(description_.normalizer, place);
    pre_tokenizer_ = make_pre_tokenizer(description_.pre_tokenizer, place);
    decoder_ = make_decoder(description_.decoder, place);
    frame_ = make_frame(description_.post_processor, place);
    byte_level_ = description_.model == SubwordKind::bpe && (tokenizer_part_has(description_.pre_tokenizer, "ByteLevel") || tokenizer_part_has(description_.normalizer, "ByteLevel"));
    model_ = description_.model == SubwordKind::wordpiece ? make_wordpiece(description_.vocabulary, description_.wordpiece, place)
                                                           : make_bpe(description_.vocabulary, description_.merges, description_.bpe, place);
    vocab_size_ = description_.vocabulary.limit();
    // Special tokens come first in the reference's search: they win against an equal pattern.
    for (const bool special : {true, false}) {
      for (const AddedToken& token : description_.added) {
        if (token.special != special) continue;
        if (token.normalized && normalizer_) normalized_search_.add(token, normalizer_->apply(token.content));
        else (token.normalized ? normalized_search_ : raw_search_).add(token, token.content);
      }
    }
    for (const AddedToken& token : description_.added) {
      added_text_[token.id] = token.content;
      added_id_[token.content] = token.id;
      if (token.special) special_ids_.insert(token.id);
      vocab_size_ = std::max(vocab_size_, token.id + 1);
    }
    for (const auto& ids : {frame_.before, frame_.after})
      for (const std::int64_t id : ids)
        if (this->token(id).empty()) throw Error(str("the post-processor adds the id ", id, ", which the vocabulary does not have")).at(place);
  }

  std::vector<std::int64_t> encode(std::string_view text, bool add_special, bool parse_special) const override {
    const std::string valid = valid_utf8_copy(text);
    std::vector<std::int64_t> ids;
    if (add_special) ids = frame_.before;
    for (const TextPart& part : raw_search_.split(valid, !parse_special)) {
      if (part.id >= 0) {
        ids.push_back(part.id);
        continue;
      }
      std::string plain = valid.substr(part.begin, part.end - part.begin);
      if (normalizer_) plain = normalizer_->apply(std::move(plain));
      if (normalized_search_.empty()) {
        encode_plain(std::move(plain), part.begin == 0, ids);
        continue;
      }
      for (const TextPart& inner : normalized_search_.split(plain, !parse_special)) {
        if (inner.id >= 0) ids.push_back(inner.id);
        else encode_plain(plain.substr(inner.begin, inner.end - inner.begin), part.begin == 0 && inner.begin == 0, ids);
      }
    }
    if (add_special) ids.insert(ids.end(), frame_.after.begin(), frame_.after.end());
    return ids;
  }

  std::string decode(std::span<const std::int64_t> ids, bool skip_special) const override {
    std::vector<std::string> tokens;
    tokens.reserve(ids.size());
    for (const std::int64_t id : ids) {
      if (skip_special && special_ids_.count(id)) continue;
      const std::string_view text = token(id);
      if (!text.empty()) tokens.emplace_back(text);
    }
    if (!decoder_) return join(tokens, " ");
    decoder_->apply(tokens);
    std::string out;
    for (const std::string& token : tokens) out += token;
    return out;
  }

  std::int64_t vocab_size() const override { return vocab_size_; }

  std::string_view token(std::int64_t id) const override {
    if (const auto found = added_text_.find(id); found != added_text_.end()) return found->second;
    return description_.vocabulary.text(id);
  }

  std::optional<std::int64_t> id_of(std::string_view text) const override {
    if (const auto found = added_id_.find(text); found != added_id_.end()) return found->second;
    const std::int64_t id = description_.vocabulary.find(text);
    return id < 0 ? std::nullopt : std::optional(id);
  }

  const SpecialTokens& special() const override { return description_.special; }

  std::string_view kind() const override { return description_.model == SubwordKind::wordpiece ? "wordpiece" : byte_level_ ? "byte-level-bpe" : description_.bpe.byte_fallback ? "byte-fallback-bpe" : "bpe"; }

  std::vector<std::int64_t> indispensable() const override {
    std::set<std::int64_t> keep(special_ids_);
    for (const SpecialTokenRow& row : special_token_rows) keep.insert(description_.special.*row.member);
    keep.insert(frame_.before.begin(), frame_.before.end());
    keep.insert(frame_.after.begin(), frame_.after.end());
    const Vocabulary& vocabulary = description_.vocabulary;
    const BpeOptions& bpe = description_.bpe;
    const std::string& unknown = description_.model == SubwordKind::wordpiece ? description_.wordpiece.unknown : bpe.unknown;
    if (!unknown.empty()) keep.insert(vocabulary.find(unknown));
    if (description_.model == SubwordKind::wordpiece) {
      // ASCII characters alone and inside words. Characters of other scripts stay where the texts show them, else they are unknown.
      for (char c = 33; c < 127; ++c)
        for (const std::string& prefix : {std::string(), description_.wordpiece.prefix}) keep.insert(vocabulary.find(prefix + c));
    } else if (byte_level_) {
      for (int byte = 0; byte < 256; ++byte) keep.insert(vocabulary.find(byte_level_character(static_cast<unsigned char>(byte))));
    } else if (bpe.byte_fallback) {
      for (int byte = 0; byte < 256; ++byte) keep.insert(vocabulary.find(byte_fallback_token(static_cast<unsigned char>(byte))));
      keep.insert(vocabulary.find("\xE2\x96\x81"));
      for (char c = 33; c < 127; ++c) keep.insert(vocabulary.find(std::string(1, c)));
    } else {
      for (std::int64_t id = 0; id < vocabulary.limit(); ++id)
        if (count_code_points(vocabulary.text(id)) == 1) keep.insert(id);
    }
    keep.erase(-1);
    return {keep.begin(), keep.end()};
  }

  std::unique_ptr<Tokenizer> restrict_to(std::span<const std::int64_t> kept) const override;

  void save(const std::filesystem::path& folder) const override { save_description(description_, folder); }
  std::string chat_template() const override { return description_.chat_template; }
  std::string fingerprint() const override;
  const TokenizerDescription* description() const override { return &description_; }
  void save_compact(const std::filesystem::path& folder) const override;

 private:
  void encode_plain(std::string text, bool at_start, std::vector<std::int64_t>& ids) const {
    Pieces pieces;
    pieces.buffer = std::move(text);
    pieces.at_start = at_start;
    if (!pieces.buffer.empty()) pieces.ranges.emplace_back(0, pieces.buffer.size());
    if (pre_tokenizer_) pre_tokenizer_->apply(pieces);
    for (std::size_t i = 0; i < pieces.ranges.size(); ++i) model_->encode(pieces.piece(i), ids);
  }

  TokenizerDescription description_;
  std::unique_ptr<Normalizer> normalizer_;
  std::unique_ptr<PreTokenizer> pre_tokenizer_;
  std::unique_ptr<SubwordModel> model_;
  std::unique_ptr<Decoder> decoder_;
  SpecialFrame frame_;
  AddedTokenSearch raw_search_, normalized_search_;
  std::map<std::int64_t, std::string> added_text_;
  std::map<std::string, std::int64_t, std::less<>> added_id_;
  std::set<std::int64_t> special_ids_;
  std::int64_t vocab_size_ = 0;
  bool byte_level_ = false;
};

std::unique_ptr<Tokenizer> PipelineTokenizer::restrict_to(std::span<const std::int64_t> kept) const {
  std::vector<std::int64_t> new_id(static_cast<std::size_t>(vocab_size_), -1);
  for (std::size_t i = 0; i < kept.size(); ++i) {
    if (kept[i] < 0 || kept[i] >= vocab_size_ || token(kept[i]).empty()) throw Error(str("the vocabulary has no token with the id ", kept[i])).at(description_.place);
    if (i > 0 && kept[i] <= kept[i - 1]) throw Error(str("the kept ids are not sorted: ", kept[i - 1], " stands before ", kept[i])).at(description_.place);
    new_id[static_cast<std::size_t>(kept[i])] = static_cast<std::int64_t>(i);
  }
  const auto renew = [&](std::int64_t id) { return id < 0 || id >= vocab_size_ ? -1 : new_id[static_cast<std::size_t>(id)]; };
  for (const std::int64_t id : indispensable())
    if (renew(id) < 0) throw Error(str("the token \"", token(id), "\" (id ", id, ") is indispensable and not among the kept ones")).at(description_.place).hint("add Tokenizer::indispensable() to the kept ids");
  TokenizerDescription cut;
  cut.place = description_.place;
  cut.model = description_.model;
  cut.wordpiece = description_.wordpiece;
  cut.bpe = description_.bpe;
  for (const std::int64_t id : kept)
    if (description_.vocabulary.has(id)) cut.vocabulary.add(std::string(description_.vocabulary.text(id)), renew(id), cut.place);
  for (BpeMerge merge : description_.merges) {
    const std::int64_t left = renew(merge.left), right = renew(merge.right), result = renew(merge.result);
    if (left < 0 || right < 0 || result < 0) continue;
    merge.left = static_cast<std::int32_t>(left);
    merge.right = static_cast<std::int32_t>(right);
    merge.result = static_cast<std::int32_t>(result);
    cut.merges.push_back(merge);
  }
  for (AddedToken token : description_.added) {
    token.id = renew(token.id);
    if (token.id >= 0) cut.added.push_back(token);
  }
  cut.normalizer = description_.normalizer;
  cut.pre_tokenizer = description_.pre_tokenizer;
  cut.decoder = description_.decoder;
  cut.post_processor = renumber_post_processor(description_.post_processor, renew, description_.place);
  for (const SpecialTokenRow& row : special_token_rows) cut.special.*row.member = renew(description_.special.*row.member);
  cut.chat_template = description_.chat_template;
  return build_tokenizer(std::move(cut));
}

void PipelineTokenizer::save_compact(const std::filesystem::path& folder) const {
  save(folder);
  if (description_.model != SubwordKind::wordpiece || !std::filesystem::exists(folder / "vocab.txt")) return;
  // vocab.txt says it all for the usual WordPiece tokenizer; where it does not, tokenizer.json stays.
  const TemporaryFolder trial;
  for (const char* name : {"vocab.txt", "tokenizer_config.json"}) std::filesystem::copy_file(folder / name, trial.path() / name);
  if (load_tokenizer(trial.path())->fingerprint() != fingerprint()) return;
  for (const char* name : {"tokenizer.json", "special_tokens_map.json"}) std::filesystem::remove(folder / name);
}

std::string PipelineTokenizer::fingerprint() const {
  Sha256 hash;
  const auto put = [&](std::string_view text) { hash.update(str(text.size(), ":")).update(text); };
  put(kind());
  for (std::int64_t id = 0; id < vocab_size_; ++id) put(token(id));
  std::vector<BpeMerge> merges = description_.merges;
  std::stable_sort(merges.begin(), merges.end(), [](const BpeMerge& a, const BpeMerge& b) { return a.rank < b.rank; });
  if (description_.bpe.byte_fallback) {
    // SentencePiece vocabularies define merges by the order of their results; files spell the pairs in different orders.
    std::set<std::int32_t> seen;
    for (const BpeMerge& merge : merges)
      if (seen.insert(merge.result).second) put(std::to_string(merge.result));
  } else {
    for (const BpeMerge& merge : merges) put(str(merge.left, " ", merge.right));
  }
  for (const SpecialTokenRow& row : special_token_rows) put(std::to_string(description_.special.*row.member));
  return hash.hex();
}

}  // namespace

std::unique_ptr<Tokenizer> build_tokenizer(TokenizerDescription description) { return std::make_unique<PipelineTokenizer>(std::move(description)); }

void set_bert_parts(TokenizerDescription& description, bool lowercase) {
  description.normalizer = {{"type", "BertNormalizer"}, {"clean_text", true}, {"handle_chinese_chars", true}, {"strip_accents", nullptr}, {"lowercase", lowercase}};
  description.pre_tokenizer = {{"type", "BertPreTokenizer"}};
  description.decoder = {{"type", "WordPiece"}, {"prefix", description.wordpiece.prefix}, {"cleanup", true}};
  const auto token = [&](std::int64_t id) { return std::string(description.vocabulary.text(id)); };
  const std::int64_t cls = description.special.cls, sep = description.special.sep;
  if (cls < 0 || sep < 0) throw Error("the WordPiece vocabulary lacks [CLS] or [SEP]").at(description.place);
  const auto special = [&](std::int64_t id, int type) { return Json{{"SpecialToken", {{"id", token(id)}, {"type_id", type}}}}; };
  const auto sequence = [](const char* id, int type) { return Json{{"Sequence", {{"id", id}, {"type_id", type}}}}; };
  Json tokens = Json::object();
  for (const std::int64_t id : {cls, sep}) tokens[token(id)] = {{"id", token(id)}, {"ids", Json::array({id})}, {"tokens", Json::array({token(id)})}};
  description.post_processor = {{"type", "TemplateProcessing"},
                                {"single", Json::array({special(cls, 0), sequence("A", 0), special(sep, 0)})},
                                {"pair", Json::array({special(cls, 0), sequence("A", 0), special(sep, 0), sequence("B", 1), special(sep, 1)})},
                                {"special_tokens", tokens}};
}

void set_byte_level_parts(TokenizerDescription& description, const std::vector<std::string>& patterns, bool gpt2) {
  const auto byte_level = [&](bool use_regex) { return Json{{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", use_regex}}; };
  Json parts = Json::array();
  for (const std::string& pattern : patterns) parts.push_back({{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}, {"invert", false}});
  parts.push_back(byte_level(gpt2));
  description.pre_tokenizer = parts.size() == 1 ? parts[0] : Json{{"type", "Sequence"}, {"pretokenizers", parts}};
  description.decoder = byte_level(true);
  description.post_processor = byte_level(true);
}

void set_bos_eos_template(TokenizerDescription& description, bool bos, bool eos) {
  Json single = Json::array(), tokens = Json::object();
  const auto add = [&](bool wanted, std::int64_t id, const char* name) {
    if (!wanted) return;
    if (id < 0) throw Error(str("the tokenizer is to add ", name, " and does not name its id")).at(description.place);
    std::string text(description.vocabulary.text(id));
    single.push_back({{"SpecialToken", {{"id", text}, {"type_id", 0}}}});
    tokens[text] = {{"id", text}, {"ids", Json::array({id})}, {"tokens", Json::array({text})}};
  };
  add(bos, description.special.bos, "a begin token");
  single.push_back({{"Sequence", {{"id", "A"}, {"type_id", 0}}}});
  add(eos, description.special.eos, "an end token");
  if (single.size() == 1) return;
  Json pair = single;
  for (Json piece : single) {
    auto& body = piece.begin().value();
    body["type_id"] = 1;
    if (piece.contains("Sequence")) body["id"] = "B";
    pair.push_back(piece);
  }
  description.post_processor = {{"type", "TemplateProcessing"}, {"single", single}, {"pair", pair}, {"special_tokens", tokens}};
}

std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& path) {
  namespace fs = std::filesystem;
  if (fs::is_directory(path)) {
    if (fs::exists(path / "tokenizer.json")) return load_tokenizer(path / "tokenizer.json");
    if (fs::exists(path / "vocab.txt")) return load_tokenizer(path / "vocab.txt");
    if (fs::exists(path / "vocab.json") && fs::exists(path / "merges.txt")) return load_tokenizer(path / "vocab.json");
    throw Error("the folder holds no tokenizer").at(path.string()).allowed("tokenizer.json, vocab.txt, or vocab.json with merges.txt").hint("copy the tokenizer files of the model into this folder");
  }
  if (!fs::exists(path)) throw Error("the tokenizer does not exist").at(path.string());
  if (path.extension() == ".gguf") return tokenizer_from_gguf(GgufFile::open(path));
  const fs::path folder = path.parent_path();
  const std::string name = path.filename().string();
  TokenizerDescription description;
  if (path.extension() == ".txt" && name != "merges.txt") description = read_vocab_txt(path);
  else if (ends_with(name, "vocab.json")) description = read_vocab_and_merges(path, folder / (name.substr(0, name.size() - 10) + "merges.txt"));
  else if (ends_with(name, "merges.txt")) description = read_vocab_and_merges(folder / (name.substr(0, name.size() - 10) + "vocab.json"), path);
  else if (path.extension() == ".json") description = read_tokenizer_json(path);
  else throw Error("the file is no tokenizer that can be read").at(path.string()).allowed("tokenizer.json, vocab.txt, vocab.json with merges.txt, *.gguf");
  return build_tokenizer(std::move(description));
}

}  // namespace kompakt
