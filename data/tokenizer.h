// Text to token ids and back, from tokenizer.json, vocab.txt or GGUF metadata. Equal to the Python package `tokenizers`.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kompakt {

class GgufFile;
struct TokenizerDescription;

struct SpecialTokens {  // -1 = the tokenizer has none
  std::int64_t bos = -1, eos = -1, pad = -1, unk = -1, cls = -1, sep = -1, mask = -1;
};

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  // `add_special`: what the tokenizer's post-processor adds ([CLS] … [SEP], BOS). Special tokens in the text itself are
  // recognised as single tokens when `parse_special`. Never throws for any valid or invalid UTF-8 text.
  virtual std::vector<std::int64_t> encode(std::string_view text, bool add_special = true, bool parse_special = true) const = 0;
  virtual std::string decode(std::span<const std::int64_t> ids, bool skip_special = true) const = 0;
  virtual std::int64_t vocab_size() const = 0;                  // highest id + 1, added tokens included
  virtual std::string_view token(std::int64_t id) const = 0;    // as stored in the vocabulary file
  virtual std::optional<std::int64_t> id_of(std::string_view token) const = 0;
  virtual const SpecialTokens& special() const = 0;
  virtual std::string_view kind() const = 0;                    // "wordpiece", "byte-level-bpe", "byte-fallback-bpe"
  // Ids that the vocabulary cut must keep so that every text still encodes (special, single characters or bytes and the
  // pieces that their merges need).
  virtual std::vector<std::int64_t> indispensable() const = 0;
  // A tokenizer with only `kept` (sorted old ids); the new id of kept[i] is i. Consistent: merges whose parts or result are
  // gone are dropped. Throws Error when an indispensable id is missing.
  virtual std::unique_ptr<Tokenizer> restrict_to(std::span<const std::int64_t> kept) const = 0;
  // Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and (WordPiece) vocab.txt, loadable by `tokenizers`
  // and `transformers`. Deterministic.
  virtual void save(const std::filesystem::path& folder) const = 0;
  // The fewest bytes from which load_tokenizer gives an equal tokenizer: what an artifact ships (WordPiece: vocab.txt and
  // tokenizer_config.json, no tokenizer.json).
  virtual void save_compact(const std::filesystem::path& folder) const { save(folder); }
  // Chat template text (Jinja) or "" when none.
  virtual std::string chat_template() const = 0;
  // What it is made of, for writers of other formats; null when the implementation has none.
  virtual const TokenizerDescription* description() const { return nullptr; }
  // SHA-256 over kind, vocabulary, merges and special tokens: equal for equal tokenizers, whatever file they came from.
  virtual std::string fingerprint() const = 0;
};

// A folder (tokenizer.json preferred, else vocab.txt, else vocab.json + merges.txt), or one of these files, or a .gguf file.
std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& path);
std::unique_ptr<Tokenizer> tokenizer_from_gguf(const GgufFile& file);

// One user message wrapped for an instruction model: ChatML, Llama-2/3, Gemma and Phi templates are recognised by their
// markers in chat_template(); others give an Error that says so.
std::string apply_chat(const Tokenizer& tokenizer, std::string_view user_message, std::string_view system_message = "");

}  // namespace kompakt
