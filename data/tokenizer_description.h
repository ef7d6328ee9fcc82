// Everything that defines a tokenizer, whatever file it came from. The readers fill it; one class executes it; save writes it.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "core/json.h"
#include "data/added_tokens.h"
#include "data/subword_model.h"
#include "data/tokenizer.h"
#include "data/vocabulary.h"

namespace kompakt {

enum class SubwordKind { wordpiece, bpe };

struct TokenizerDescription {
  std::string place;  // the file, for messages
  SubwordKind model = SubwordKind::bpe;
  Vocabulary vocabulary;  // of the model; added tokens may lie outside
  std::vector<BpeMerge> merges;
  WordPieceOptions wordpiece;
  BpeOptions bpe;
  std::vector<AddedToken> added;
  Json normalizer, pre_tokenizer, post_processor, decoder;  // in the form of tokenizer.json; null = none
  SpecialTokens special;
  std::string chat_template;
};

// Checks the parts against each other and builds them.
std::unique_ptr<Tokenizer> build_tokenizer(TokenizerDescription description);

TokenizerDescription read_tokenizer_json(const std::filesystem::path& file);
TokenizerDescription read_vocab_txt(const std::filesystem::path& file);
TokenizerDescription read_vocab_and_merges(const std::filesystem::path& vocab, const std::filesystem::path& merges);
// Special tokens and chat template of tokenizer_config.json, special_tokens_map.json and chat_template.jinja beside the tokenizer.
void read_tokenizer_config(TokenizerDescription& description, const std::filesystem::path& folder);
void save_description(const TokenizerDescription& description, const std::filesystem::path& folder);

// Rows that several readers and writers share: key in tokenizer_config.json and member.
struct SpecialTokenRow {
  const char* key;
  std::int64_t SpecialTokens::*member;
  const char* bert_name;  // what WordPiece vocabularies call it
};
extern const std::vector<SpecialTokenRow> special_token_rows;

// The parts of a BERT tokenizer around its vocabulary (vocab.txt, GGUF).
void set_bert_parts(TokenizerDescription& description, bool lowercase);
// Byte-level BPE around a vocabulary: splits as a list of patterns.
void set_byte_level_parts(TokenizerDescription& description, const std::vector<std::string>& patterns, bool gpt2);
// Adds bos before and eos after the text by a template.
void set_bos_eos_template(TokenizerDescription& description, bool bos, bool eos);

}  // namespace kompakt
