// Tokenizers and GGUF metadata: reading tokenizer.ggml.* keys and writing them for an export.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "data/tokenizer.h"
#include "formats/gguf.h"

namespace kompakt {

// tokenizer.ggml.* and tokenizer.chat_template, such that tokenizer_from_gguf gives an equal tokenizer (same fingerprint)
// and llama.cpp the same ids. Embeddings may have more `rows` than the tokenizer has ids: the rest are unused tokens.
// Error when the kind or the pre-tokenizer has no name in GGUF.
std::vector<std::pair<std::string, GgufValue>> gguf_tokenizer_metadata(const Tokenizer& tokenizer, std::int64_t rows);

}  // namespace kompakt
