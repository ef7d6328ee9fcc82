// Small tokenizers of decoders, from files written on the spot.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/files.h"
#include "core/json.h"
#include "core/text.h"
#include "data/byte_level.h"
#include "data/tokenizer.h"

namespace kompakt::testing {

// Byte-level BPE: "<end>" is id 0, the 256 bytes follow, then the results of `merges` ("a b"; a space stands for itself as "Ġ").
inline std::unique_ptr<Tokenizer> byte_tokenizer(const std::vector<std::string>& merges, const std::string& chat = "") {
  Json vocabulary = {{"<end>", 0}};
  std::int64_t next = 1;
  for (int byte = 0; byte < 256; ++byte) vocabulary[byte_level_character(static_cast<unsigned char>(byte))] = next++;
  Json list = Json::array();
  for (const std::string& merge : merges) {
    list.push_back(merge);
    std::string joined = merge;
    joined.erase(joined.find(' '), 1);
    vocabulary[joined] = next++;
  }
  const Json json = {{"version", "1.0"}, {"added_tokens", {{{"id", 0}, {"content", "<end>"}, {"single_word", false}, {"lstrip", false}, {"rstrip", false}, {"normalized", false}, {"special", true}}}},
                     {"normalizer", nullptr}, {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}}}, {"post_processor", nullptr},
                     {"decoder", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}}},
                     {"model", {{"type", "BPE"}, {"dropout", nullptr}, {"unk_token", nullptr}, {"continuing_subword_prefix", nullptr}, {"end_of_word_suffix", nullptr}, {"fuse_unk", false}, {"byte_fallback", false}, {"vocab", vocabulary}, {"merges", list}}}};
  const TemporaryFolder folder;
  write_text(folder.path() / "tokenizer.json", json.dump());
  Json config = {{"eos_token", "<end>"}};
  if (!chat.empty()) config["chat_template"] = chat;
  write_text(folder.path() / "tokenizer_config.json", config.dump());
  return load_tokenizer(folder.path());
}
inline std::unique_ptr<Tokenizer> word_tokenizer() { return byte_tokenizer({"t h", "th e", "Ġ c", "a t", "Ġc at", "s at"}); }
inline std::unique_ptr<Tokenizer> other_tokenizer() { return byte_tokenizer({"h e", "Ġ t", "Ġc a", "Ġ c", "a t"}); }

}  // namespace kompakt::testing
