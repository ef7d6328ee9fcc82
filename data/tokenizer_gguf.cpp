// Tokenizers from GGUF metadata: "bert" (WordPiece), "gpt2" (byte-level BPE with a named pattern), "llama" (SentencePiece scores).
#include <algorithm>
#include <map>
#include <numeric>

#include "core/error.h"
#include "core/text.h"
#include "data/tokenizer_description.h"
#include "data/tokenizer_gguf.h"
#include "data/unicode.h"
#include "formats/gguf.h"

namespace kompakt {
namespace {

// Values of tokenizer.ggml.token_type.
enum GgufTokenType : std::int64_t { gguf_normal = 1, gguf_unknown = 2, gguf_control = 3, gguf_user_defined = 4, gguf_unused = 5, gguf_byte = 6 };

const char* const gguf_meta = "\xE2\x96\x81";  // U+2581: a space in SentencePiece vocabularies, a word's start in BERT's

// What stands between the text and the byte-level BPE for each name of tokenizer.ggml.pre. The patterns are cut in turn.
struct GgufPreRow {
  const char* name;
  std::vector<std::string> patterns;
  bool gpt2;           // GPT-2's pattern comes last
  bool nfc;            // the models were trained on NFC text
  bool ignore_merges;  // whole words of the vocabulary are taken without merging
  bool bos;            // begin token unless the file says otherwise
};

const std::vector<GgufPreRow>& gguf_pre_rows() {
  static const std::string llama3 = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
  static const std::string qwen2 = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
  static const std::string tekken =
      R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
  static const std::string gpt4o =
      R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
  static const std::vector<GgufPreRow> rows = {
      {"gpt-2", {}, true, false, false, false},
      {"phi-2", {}, true, false, false, false},
      {"olmo", {}, true, false, false, false},
      {"mpt", {}, true, false, false, false},
      {"jais", {}, true, false, false, false},
      {"smollm", {R"(\p{N})"}, true, false, false, false},
      {"starcoder", {R"(\p{N})"}, true, false, false, false},
      {"refact", {R"(\p{N})"}, true, false, false, false},
      {"command-r", {R"(\p{N})"}, true, false, false, false},
      {"codeshell", {R"(\p{N})"}, true, false, false, false},
      {"exaone", {R"(\p{N})"}, true, false, false, false},
      {"minerva-7b", {R"(\p{N})"}, true, false, false, false},
      {"qwen2", {qwen2}, false, true, false, false},
      {"deepseek-r1-qwen", {qwen2}, false, true, false, false},
      {"stablelm2", {qwen2}, false, false, false, false},
      {"megrez", {qwen2}, false, false, false, false},
      {"hunyuan", {qwen2}, false, false, false, false},
      {"llama-bpe", {llama3}, false, false, true, true},
      {"llama3", {llama3}, false, false, true, true},
      {"llama-v3", {llama3}, false, false, true, true},
      {"falcon3", {llama3}, false, false, true, true},
      {"pixtral", {llama3}, false, false, true, true},
      {"lfm2", {llama3}, false, false, true, true},
      {"dbrx", {llama3}, false, false, false, false},
      {"smaug-bpe", {llama3}, false, false, false, false},
      {"tekken", {tekken}, false, false, true, true},
      {"gpt-4o", {gpt4o}, false, false, false, false},
      {"llama4", {gpt4o}, false, false, false, true},
  };
  return rows;
}

struct GgufVocabulary {
  const std::vector<std::string>* tokens = nullptr;
  std::vector<std::int64_t> types;
};

template <class List>
const List* gguf_list(const GgufFile& file, const std::string& key) {
  const GgufValue* value = file.get(key);
  return value ? std::get_if<List>(&value->data) : nullptr;
}

GgufVocabulary gguf_vocabulary(const GgufFile& file) {
  GgufVocabulary out;
  out.tokens = gguf_list<std::vector<std::string>>(file, "tokenizer.ggml.tokens");
  if (!out.tokens) throw Error("the file has no vocabulary: the key tokenizer.ggml.tokens is missing or not a list of texts").at(file.path().string());
  const auto* types = gguf_list<std::vector<std::int64_t>>(file, "tokenizer.ggml.token_type");
  out.types = types ? *types : std::vector<std::int64_t>(out.tokens->size(), gguf_normal);
  if (out.types.size() != out.tokens->size()) throw Error(str("tokenizer.ggml.token_type has ", out.types.size(), " entries for ", out.tokens->size(), " tokens")).at(file.path().string());
  for (std::size_t i = 0; i < out.tokens->size(); ++i)
    if (invalid_utf8((*out.tokens)[i])) throw Error(str("token ", i, " is not valid UTF-8")).at(file.path().string());
  return out;
}

void read_gguf_specials(TokenizerDescription& out, const GgufFile& file) {
  static const std::pair<const char*, std::int64_t SpecialTokens::*> rows[] = {
      {"bos_token_id", &SpecialTokens::bos},       {"eos_token_id", &SpecialTokens::eos}, {"unknown_token_id", &SpecialTokens::unk}, {"padding_token_id", &SpecialTokens::pad},
      {"seperator_token_id", &SpecialTokens::sep},  // sic: the format's own spelling
      {"separator_token_id", &SpecialTokens::sep}, {"cls_token_id", &SpecialTokens::cls}, {"mask_token_id", &SpecialTokens::mask}};
  for (const auto& [key, member] : rows) {
    const std::string full = str("tokenizer.ggml.", key);
    if (!file.get(full)) continue;
    const std::int64_t id = file.integer(full);
    if (id < 0 || !out.vocabulary.has(id)) throw Error(str("the id of ", full, " is not in the vocabulary")).at(out.place).given(std::to_string(id));
    out.special.*member = id;
  }
  out.chat_template = file.text_or("tokenizer.chat_template", "");
}

// Special (control, unknown) and user-defined tokens, found in the text before the model.
void add_gguf_tokens(TokenizerDescription& out, const GgufVocabulary& vocabulary, bool rstrip) {
  for (std::size_t i = 0; i < vocabulary.types.size(); ++i) {
    const std::int64_t type = vocabulary.types[i];
    const bool special = type == gguf_control || type == gguf_unknown;
    const std::string text(out.vocabulary.text(static_cast<std::int64_t>(i)));
    // Runs of spaces among the user-defined tokens stand as U+2581: the merges make them.
    if ((!special && type != gguf_user_defined) || (!special && text.find(gguf_meta) != std::string::npos)) continue;
    AddedToken token;
    token.content = text;
    token.id = static_cast<std::int64_t>(i);
    token.special = special;
    token.rstrip = rstrip && starts_with(text, "<|");
    out.added.push_back(std::move(token));
  }
}

void read_gguf_bert(TokenizerDescription& out, const GgufFile& file, const GgufVocabulary& vocabulary) {
  out.model = SubwordKind::wordpiece;
  bool upper = false;
  for (std::size_t i = 0; i < vocabulary.tokens->size(); ++i) {
    std::string text = (*vocabulary.tokens)[i];
    // Converters mark word starts by U+2581 and drop the "##" of continuations; special tokens are kept.
    const bool bare = vocabulary.types[i] != gguf_normal || (starts_with(text, "[") && ends_with(text, "]") && text.size() > 2);
    if (starts_with(text, gguf_meta)) text = text.substr(3);
    else if (!bare) text = out.wordpiece.prefix + text;
    upper = upper || (!bare && std::any_of(text.begin(), text.end(), [](char c) { return c >= 'A' && c <= 'Z'; }));
    out.vocabulary.add(std::move(text), static_cast<std::int64_t>(i), out.place);
  }
  read_gguf_specials(out, file);
  // Files name cls by the key of bos when they come from old converters.
  if (out.special.cls < 0) out.special.cls = out.special.bos >= 0 ? out.special.bos : out.vocabulary.find("[CLS]");
  if (out.special.sep < 0) out.special.sep = out.special.eos >= 0 ? out.special.eos : out.vocabulary.find("[SEP]");
  if (out.special.unk < 0) out.special.unk = out.vocabulary.find("[UNK]");
  if (out.special.unk < 0) throw Error("the WordPiece vocabulary has no unknown token").at(out.place);
  out.wordpiece.unknown = std::string(out.vocabulary.text(out.special.unk));
  add_gguf_tokens(out, vocabulary, false);
  set_bert_parts(out, !upper);
}

void read_gguf_bpe(TokenizerDescription& out, const GgufFile& file, const GgufVocabulary& vocabulary) {
  const std::string pre = file.text_or("tokenizer.ggml.pre", "");
  const auto& rows = gguf_pre_rows();
  const auto row = std::find_if(rows.begin(), rows.end(), [&](const GgufPreRow& candidate) { return pre == candidate.name; });
  if (row == rows.end()) {
    std::vector<std::string> names;
    for (const GgufPreRow& candidate : rows) names.push_back(candidate.name);
    throw Error(str("the pre-tokenizer \"", pre, "\" of the file (key tokenizer.ggml.pre) is not known", did_you_mean(pre, names))).at(out.place).allowed(join(names, ", ")).hint("give the tokenizer.json of the model instead");
  }
  const auto* merges = gguf_list<std::vector<std::string>>(file, "tokenizer.ggml.merges");
  if (!merges) throw Error("the file has no merges: the key tokenizer.ggml.merges is missing or not a list of texts").at(out.place);
  for (std::size_t i = 0; i < vocabulary.tokens->size(); ++i) out.vocabulary.add((*vocabulary.tokens)[i], static_cast<std::int64_t>(i), out.place);
  for (std::size_t i = 0; i < merges->size(); ++i) {
    const std::string& text = (*merges)[i];
    const std::size_t space = text.find(' ', 1);
    BpeMerge merge;
    if (space != std::string::npos) {
      const std::string left = text.substr(0, space), right = text.substr(space + 1);
      merge = {static_cast<std::int32_t>(out.vocabulary.find(left)), static_cast<std::int32_t>(out.vocabulary.find(right)), static_cast<std::int32_t>(out.vocabulary.find(left + right)),
               static_cast<std::int32_t>(i)};
    }
    if (space == std::string::npos || merge.left < 0 || merge.right < 0 || merge.result < 0) throw Error(str("merge ", i, " is not two tokens of the vocabulary")).at(out.place).given(text);
    out.merges.push_back(merge);
  }
  out.bpe.ignore_merges = row->ignore_merges;
  read_gguf_specials(out, file);
  add_gguf_tokens(out, vocabulary, false);
  set_byte_level_parts(out, row->patterns, row->gpt2);
  if (row->nfc) out.normalizer = {{"type", "NFC"}};
  set_bos_eos_template(out, file.flag_or("tokenizer.ggml.add_bos_token", row->bos), file.flag_or("tokenizer.ggml.add_eos_token", false));
}

void read_gguf_sentencepiece(TokenizerDescription& out, const GgufFile& file, const GgufVocabulary& vocabulary) {
  const auto* scores = gguf_list<std::vector<double>>(file, "tokenizer.ggml.scores");
  if (!scores || scores->size() != vocabulary.tokens->size()) throw Error("the file has no scores for its tokens: the key tokenizer.ggml.scores is missing or has another length").at(out.place);
  for (std::size_t i = 0; i < vocabulary.tokens->size(); ++i) out.vocabulary.add((*vocabulary.tokens)[i], static_cast<std::int64_t>(i), out.place);
  // Any two neighbours whose joint text is a token may merge; the highest score goes first, equal scores from the left.
  std::vector<std::int64_t> order;
  for (std::size_t i = 0; i < vocabulary.tokens->size(); ++i)
    if (vocabulary.types[i] == gguf_normal || vocabulary.types[i] == gguf_user_defined || vocabulary.types[i] == gguf_unused) order.push_back(static_cast<std::int64_t>(i));
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return (*scores)[static_cast<std::size_t>(a)] > (*scores)[static_cast<std::size_t>(b)]; });
  std::int32_t rank = -1;
  double previous = 0;
  for (const std::int64_t id : order) {
    const std::string_view text = out.vocabulary.text(id);
    const double score = (*scores)[static_cast<std::size_t>(id)];
    if (rank < 0 || score != previous) ++rank;
    previous = score;
    for (std::size_t cut = 1; cut < text.size(); ++cut) {
      if ((static_cast<unsigned char>(text[cut]) & 0xC0) == 0x80) continue;
      const std::int64_t left = out.vocabulary.find(text.substr(0, cut)), right = out.vocabulary.find(text.substr(cut));
      if (left >= 0 && right >= 0) out.merges.push_back({static_cast<std::int32_t>(left), static_cast<std::int32_t>(right), static_cast<std::int32_t>(id), rank});
    }
  }
  read_gguf_specials(out, file);
  out.bpe.byte_fallback = true;
  out.bpe.fuse_unknown = true;
  if (out.special.unk >= 0) out.bpe.unknown = std::string(out.vocabulary.text(out.special.unk));
  add_gguf_tokens(out, vocabulary, file.text_or("general.architecture", "") == "phi3");
  const bool prefix = file.flag_or("tokenizer.ggml.add_space_prefix", true);
  const Json replace = {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", gguf_meta}};
  const Json prepend = {{"type", "Prepend"}, {"prepend", gguf_meta}};
  out.normalizer = prefix ? Json{{"type", "Sequence"}, {"normalizers", Json::array({prepend, replace})}} : replace;
  Json decoders = Json::array();
  decoders.push_back({{"type", "Replace"}, {"pattern", {{"String", gguf_meta}}}, {"content", " "}});
  decoders.push_back({{"type", "ByteFallback"}});
  decoders.push_back({{"type", "Fuse"}});
  if (prefix) decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  out.decoder = {{"type", "Sequence"}, {"decoders", decoders}};
  set_bos_eos_template(out, file.flag_or("tokenizer.ggml.add_bos_token", true), file.flag_or("tokenizer.ggml.add_eos_token", false));
}

struct GgufModelRow {
  const char* name;
  void (*read)(TokenizerDescription&, const GgufFile&, const GgufVocabulary&);
};

const GgufModelRow gguf_model_rows[] = {{"bert", read_gguf_bert}, {"gpt2", read_gguf_bpe}, {"llama", read_gguf_sentencepiece}};

}  // namespace

std::unique_ptr<Tokenizer> tokenizer_from_gguf(const GgufFile& file) {
  TokenizerDescription description;
  description.place = file.path().string();
  const std::string model = file.text("tokenizer.ggml.model");
  for (const GgufModelRow& row : gguf_model_rows) {
    if (model != row.name) continue;
    row.read(description, file, gguf_vocabulary(file));
    return build_tokenizer(std::move(description));
  }
  throw Error(str("the tokenizer model \"", model, "\" of the file is not supported")).at(description.place).allowed("bert, gpt2, llama");
}

namespace {

// Patterns that a pre-tokenizer of tokenizer.json cuts by, in the form of the rows above; false when it has other parts.
bool gguf_patterns(const Json& part, std::vector<std::string>& patterns, bool& gpt2) {
  if (part.is_null()) return false;
  const std::string type = part.value("type", "");
  if (type == "Sequence") {
    for (const Json& inner : part.at("pretokenizers"))
      if (!gguf_patterns(inner, patterns, gpt2)) return false;
    return true;
  }
  if (type == "ByteLevel") {
    gpt2 = gpt2 || part.value("use_regex", true);
    return !part.value("add_prefix_space", false);
  }
  if (type == "Digits" && part.value("individual_digits", false)) return patterns.push_back(R"(\p{N})"), true;
  if (type == "Split" && part.contains("pattern") && part.at("pattern").contains("Regex")) return patterns.push_back(part.at("pattern").at("Regex").get<std::string>()), true;
  return false;
}

std::string gguf_pre_name(const TokenizerDescription& description) {
  std::vector<std::string> patterns;
  bool gpt2 = false;
  const bool nfc = !description.normalizer.is_null() && description.normalizer.value("type", "") == "NFC";
  if (gguf_patterns(description.pre_tokenizer, patterns, gpt2))
    for (const GgufPreRow& row : gguf_pre_rows())
      if (row.patterns == patterns && row.gpt2 == gpt2 && row.nfc == nfc && row.ignore_merges == description.bpe.ignore_merges) return row.name;
  throw Error("the pre-tokenizer of this tokenizer has no name in GGUF").at(description.place).given(description.pre_tokenizer.dump()).hint("export to another format, or start from a model whose tokenizer llama.cpp knows");
}

}  // namespace

std::vector<std::pair<std::string, GgufValue>> gguf_tokenizer_metadata(const Tokenizer& tokenizer, std::int64_t rows) {
  const TokenizerDescription* description = tokenizer.description();
  if (!description) throw Error("this tokenizer cannot be written to GGUF");
  if (description->model == SubwordKind::wordpiece) throw Error("WordPiece tokenizers are not written to GGUF").at(description->place).hint("take format kompakt for encoders");
  const bool byte_fallback = description->bpe.byte_fallback;
  const std::int64_t size = std::max(tokenizer.vocab_size(), rows);
  std::vector<std::string> tokens;
  std::vector<std::int64_t> types(static_cast<std::size_t>(size), gguf_normal);
  for (std::int64_t id = 0; id < size; ++id) {
    tokens.emplace_back(id < tokenizer.vocab_size() ? tokenizer.token(id) : std::string_view());
    if (tokens.back().empty()) tokens.back() = str("[PAD", id, "]"), types[static_cast<std::size_t>(id)] = gguf_unused;
  }
  for (const AddedToken& token : description->added) types[static_cast<std::size_t>(token.id)] = token.special ? gguf_control : gguf_user_defined;
  if (byte_fallback) {
    for (int byte = 0; byte < 256; ++byte)
      if (const auto id = tokenizer.id_of(byte_fallback_token(static_cast<unsigned char>(byte)))) types[static_cast<std::size_t>(*id)] = gguf_byte;
    if (tokenizer.special().unk >= 0) types[static_cast<std::size_t>(tokenizer.special().unk)] = gguf_unknown;
  }
  std::vector<BpeMerge> merges = description->merges;
  std::stable_sort(merges.begin(), merges.end(), [](const BpeMerge& a, const BpeMerge& b) { return a.rank < b.rank; });
  std::vector<std::pair<std::string, GgufValue>> out = {{"tokenizer.ggml.model", GgufValue::text(byte_fallback ? "llama" : "gpt2")}};
  out.emplace_back("tokenizer.ggml.pre", GgufValue::text(byte_fallback ? "default" : gguf_pre_name(*description)));
  out.emplace_back("tokenizer.ggml.tokens", GgufValue::texts(tokens));
  if (byte_fallback) {
    // The order of the merges' results is all that a SentencePiece score says.
    std::vector<double> scores(static_cast<std::size_t>(size), 0);
    double next = -1;
    for (const BpeMerge& merge : merges)
      if (double& score = scores[static_cast<std::size_t>(merge.result)]; score == 0) score = next--;
    out.emplace_back("tokenizer.ggml.scores", GgufValue::floats(scores));
  }
  out.emplace_back("tokenizer.ggml.token_type", GgufValue::int32s(types));
  if (!byte_fallback) {
    std::vector<std::string> lines;
    for (const BpeMerge& merge : merges) lines.push_back(str(description->vocabulary.text(merge.left), " ", description->vocabulary.text(merge.right)));
    out.emplace_back("tokenizer.ggml.merges", GgufValue::texts(lines));
  }
  const SpecialTokens& special = tokenizer.special();
  const std::pair<const char*, std::int64_t> ids[] = {{"bos", special.bos}, {"eos", special.eos}, {"unknown", special.unk}, {"padding", special.pad}};
  for (const auto& [name, id] : ids)
    if (id >= 0) out.emplace_back(str("tokenizer.ggml.", name, "_token_id"), GgufValue::uint32(static_cast<std::uint32_t>(id)));
  const std::vector<std::int64_t> frame = tokenizer.encode("", true);
  out.emplace_back("tokenizer.ggml.add_bos_token", GgufValue::boolean_(!frame.empty() && frame.front() == special.bos));
  out.emplace_back("tokenizer.ggml.add_eos_token", GgufValue::boolean_(!frame.empty() && frame.back() == special.eos && frame.size() > (frame.front() == special.bos ? 1u : 0u)));
  if (byte_fallback) out.emplace_back("tokenizer.ggml.add_space_prefix", GgufValue::boolean_(description->normalizer.dump().find("Prepend") != std::string::npos));
  if (const std::string chat = tokenizer.chat_template(); !chat.empty()) out.emplace_back("tokenizer.chat_template", GgufValue::text(chat));
  return out;
}

}  // namespace kompakt
