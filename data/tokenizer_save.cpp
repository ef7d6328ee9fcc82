// Writes a tokenizer as tokenizer.json with its companions. The text is written piece by piece: half a million merges as a
// JSON tree would cost a gigabyte.
#include <algorithm>

#include "core/files.h"
#include "core/text.h"
#include "data/tokenizer_description.h"

namespace kompakt {
namespace {

std::string json_text(std::string_view text) { return Json(std::string(text)).dump(); }
const char* json_flag(bool value) { return value ? "true" : "false"; }

// Ids that `tokenizers` itself would give to added tokens outside the vocabulary: the numbers after it, in order.
bool added_ids_follow(const TokenizerDescription& description) {
  std::int64_t next = description.vocabulary.size();
  if (description.vocabulary.limit() != next) return false;
  std::vector<std::int64_t> outside;
  for (const AddedToken& token : description.added)
    if (!description.vocabulary.has(token.id)) outside.push_back(token.id);
  std::sort(outside.begin(), outside.end());
  return std::all_of(outside.begin(), outside.end(), [&](std::int64_t id) { return id == next++; });
}

std::string tokenizer_json_text(const TokenizerDescription& description) {
  std::string out = "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n  \"added_tokens\": [";
  std::vector<AddedToken> added = description.added;
  std::sort(added.begin(), added.end(), [](const AddedToken& a, const AddedToken& b) { return a.id < b.id; });
  for (std::size_t i = 0; i < added.size(); ++i) {
    const AddedToken& token = added[i];
    out += str(i > 0 ? "," : "", "\n    {\"id\": ", token.id, ", \"content\": ", json_text(token.content), ", \"single_word\": ", json_flag(token.single_word), ", \"lstrip\": ", json_flag(token.lstrip),
               ", \"rstrip\": ", json_flag(token.rstrip), ", \"normalized\": ", json_flag(token.normalized), ", \"special\": ", json_flag(token.special), "}");
  }
  out += added.empty() ? "]" : "\n  ]";
  for (const auto& [key, part] : {std::pair{"normalizer", &description.normalizer}, std::pair{"pre_tokenizer", &description.pre_tokenizer}, std::pair{"post_processor", &description.post_processor},
                                  std::pair{"decoder", &description.decoder}})
    out += str(",\n  \"", key, "\": ", part->dump());
  out += ",\n  \"model\": {\n";
  if (description.model == SubwordKind::wordpiece) {
    out += str("    \"type\": \"WordPiece\",\n    \"unk_token\": ", json_text(description.wordpiece.unknown), ",\n    \"continuing_subword_prefix\": ", json_text(description.wordpiece.prefix),
               ",\n    \"max_input_chars_per_word\": ", description.wordpiece.max_characters);
  } else {
    const BpeOptions& bpe = description.bpe;
    const auto or_null = [](const std::string& text) { return text.empty() ? std::string("null") : json_text(text); };
    out += str("    \"type\": \"BPE\",\n    \"dropout\": null,\n    \"unk_token\": ", or_null(bpe.unknown), ",\n    \"continuing_subword_prefix\": ", or_null(bpe.prefix), ",\n    \"end_of_word_suffix\": ",
               or_null(bpe.suffix), ",\n    \"fuse_unk\": ", json_flag(bpe.fuse_unknown), ",\n    \"byte_fallback\": ", json_flag(bpe.byte_fallback), ",\n    \"ignore_merges\": ", json_flag(bpe.ignore_merges));
  }
  out += ",\n    \"vocab\": {";
  std::vector<std::pair<std::int64_t, std::string_view>> vocab;
  for (std::int64_t id = 0; id < description.vocabulary.limit(); ++id)
    if (description.vocabulary.has(id)) vocab.emplace_back(id, description.vocabulary.text(id));
  if (!added_ids_follow(description)) {
    // Ids with gaps hold only when the added tokens stand in the vocabulary as well.
    for (const AddedToken& token : added)
      if (!description.vocabulary.has(token.id)) vocab.emplace_back(token.id, token.content);
    std::sort(vocab.begin(), vocab.end());
  }
  for (std::size_t i = 0; i < vocab.size(); ++i) out += str(i > 0 ? "," : "", "\n      ", json_text(vocab[i].second), ": ", vocab[i].first);
  out += "\n    }";
  if (description.model == SubwordKind::bpe) {
    std::vector<BpeMerge> merges = description.merges;
    std::stable_sort(merges.begin(), merges.end(), [](const BpeMerge& a, const BpeMerge& b) { return a.rank < b.rank; });
    out += ",\n    \"merges\": [";
    for (std::size_t i = 0; i < merges.size(); ++i)
      out += str(i > 0 ? "," : "", "\n      [", json_text(description.vocabulary.text(merges[i].left)), ", ", json_text(description.vocabulary.text(merges[i].right)), "]");
    out += "\n    ]";
  }
  return out + "\n  }\n}\n";
}

}  // namespace

void save_description(const TokenizerDescription& description, const std::filesystem::path& folder) {
  make_folder(folder);
  write_text(folder / "tokenizer.json", tokenizer_json_text(description));
  const auto text_of = [&](std::int64_t id) {
    for (const AddedToken& token : description.added)
      if (token.id == id) return token.content;
    return std::string(description.vocabulary.text(id));
  };
  Json map = Json::object();
  for (const SpecialTokenRow& row : special_token_rows)
    if (const std::int64_t id = description.special.*row.member; id >= 0) map[row.key] = text_of(id);
  write_json(folder / "special_tokens_map.json", map);
  Json config = Json::object();
  config["tokenizer_class"] = description.model == SubwordKind::wordpiece ? "BertTokenizer" : "PreTrainedTokenizerFast";
  for (const auto& [key, value] : map.items()) config[key] = value;
  config["clean_up_tokenization_spaces"] = description.model == SubwordKind::wordpiece;
  if (description.normalizer.is_object() && description.normalizer.contains("lowercase")) config["do_lower_case"] = description.normalizer.at("lowercase");
  if (!description.chat_template.empty()) config["chat_template"] = description.chat_template;
  write_json(folder / "tokenizer_config.json", config);
  if (description.model != SubwordKind::wordpiece) return;
  std::string lines;
  for (std::int64_t id = 0; id < description.vocabulary.limit(); ++id) lines += std::string(description.vocabulary.text(id)) + "\n";
  write_text(folder / "vocab.txt", lines);
}

}  // namespace kompakt
