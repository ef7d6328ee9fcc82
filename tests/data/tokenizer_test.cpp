// Hand-sized tokenizers, restriction of the vocabulary, saving and reloading, hostile input, broken files.
#include <catch2/catch.hpp>

#include <chrono>
#include <set>

#include "core/files.h"
#include "core/random.h"
#include "core/text.h"
#include "data/regex.h"
#include "data/tokenizer.h"
#include "data/unicode.h"
#include "tests/data/tokenizer_files.h"
#include "tests/support.h"

using namespace kompakt;
using namespace kompakt::testing;
using Ids = std::vector<std::int64_t>;

namespace {

std::unique_ptr<Tokenizer> from_json(const std::string& text) {
  const TemporaryFolder folder;
  write_text(folder.path() / "tokenizer.json", text);
  return load_tokenizer(folder.path());
}

std::string json_error(const std::string& text) {
  return error_text([&] { from_json(text); });
}

const char* const small_bert = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nun\n##aff\n##able\na\n!\n\xE4\xB8\xAD\n##a\nb\n##b\n";

std::unique_ptr<Tokenizer> bert() {
  const TemporaryFolder folder;
  write_text(folder.path() / "vocab.txt", small_bert);
  return load_tokenizer(folder.path());
}

// A byte-level BPE with "lo", "low" and the byte tokens they need.
std::string small_bpe(const std::string& extra = "", const std::string& parts = R"("pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}, "decoder": {"type": "ByteLevel"},)") {
  return R"({"version": "1.0", "added_tokens": [)" + extra + R"(], )" + parts +
         R"("model": {"type": "BPE", "vocab": {"l": 0, "o": 1, "w": 2, "Ġ": 3, "lo": 4, "low": 5, "Ġlow": 6}, "merges": ["l o", "lo w", "Ġ low"]}})";
}

void check_cut(const Tokenizer& tokenizer, const std::vector<std::string>& texts) {
  std::set<std::int64_t> kept;
  for (const std::int64_t id : tokenizer.indispensable()) kept.insert(id);
  for (const std::string& text : texts)
    for (const std::int64_t id : tokenizer.encode(text)) kept.insert(id);
  const Ids list(kept.begin(), kept.end());
  const auto cut = tokenizer.restrict_to(list);
  CHECK(cut->vocab_size() == static_cast<std::int64_t>(list.size()));
  for (const std::int64_t id : {0, static_cast<int>(list.size()) / 2, static_cast<int>(list.size()) - 1}) CHECK(cut->token(id) == tokenizer.token(list[static_cast<std::size_t>(id)]));
  const TemporaryFolder folder;
  cut->save(folder.path());
  const auto again = load_tokenizer(folder.path());
  CHECK(again->fingerprint() == cut->fingerprint());
  CHECK(again->vocab_size() == cut->vocab_size());
  CHECK(again->chat_template() == tokenizer.chat_template());
  for (const std::string& text : texts) {
    const Ids ids = cut->encode(text);
    CHECK(again->encode(text) == ids);
    CHECK(again->decode(ids) == cut->decode(ids));
    CHECK(cut->decode(ids) == tokenizer.decode(tokenizer.encode(text)));
  }
  const std::string unseen = "Zyx 42 \xC3\xA9!";
  CHECK(again->encode(unseen) == cut->encode(unseen));
  // Without one indispensable token the cut is refused, naming it.
  Ids less = list;
  less.erase(std::find(less.begin(), less.end(), tokenizer.indispensable()[0]));
  CHECK(contains_all(error_text([&] { tokenizer.restrict_to(less); }), {"indispensable", std::string(tokenizer.token(tokenizer.indispensable()[0])).c_str()}));
  CHECK(contains_all(error_text([&] { tokenizer.restrict_to(Ids{5, 4}); }), {"not sorted"}));
  CHECK(contains_all(error_text([&] { tokenizer.restrict_to(Ids{tokenizer.vocab_size()}); }), {"no token"}));
}

}  // namespace

TEST_CASE("WordPiece on a vocabulary of fourteen tokens") {
  const auto tokenizer = bert();
  CHECK(tokenizer->kind() == "wordpiece");
  CHECK(tokenizer->encode("unaffable!") == Ids{2, 5, 6, 7, 9, 3});
  CHECK(tokenizer->encode("UN\xC3\x81" "B") == Ids{2, 5, 11, 13, 3});   // accents and case go
  CHECK(tokenizer->encode("a\xE4\xB8\xAD" "b", false) == Ids{8, 10, 12});  // Chinese characters stand alone
  CHECK(tokenizer->encode("unx a", false) == Ids{1, 8});                 // one bad part makes the word unknown
  CHECK(tokenizer->encode("", false).empty());
  CHECK(tokenizer->encode("") == Ids{2, 3});
  CHECK(tokenizer->encode("a[SEP]a", false) == Ids{8, 3, 8});
  CHECK(tokenizer->encode("[SEP]", false, false) == Ids{1, 1, 1});
  CHECK(tokenizer->encode(std::string(101, 'a'), false) == Ids{1});
  CHECK(tokenizer->encode(std::string(100, 'a'), false).size() == 100);
  CHECK(tokenizer->decode(Ids{2, 5, 6, 7, 9, 3}) == "unaffable!");
  CHECK(tokenizer->decode(Ids{2, 8, 3}, false) == "[CLS] a [SEP]");
  CHECK(tokenizer->special().cls == 2);
  CHECK(tokenizer->special().mask == 4);
  CHECK(tokenizer->id_of("##aff") == 6);
  CHECK(!tokenizer->id_of("zzz"));
}

TEST_CASE("byte-level BPE by hand") {
  const auto tokenizer = from_json(small_bpe());
  CHECK(tokenizer->encode("low low") == Ids{5, 6});
  CHECK(tokenizer->encode("lolow") == Ids{4, 5});
  CHECK(tokenizer->encode("xlow").size() == 1);  // x is no token: it vanishes without an unknown token
  CHECK(tokenizer->decode(Ids{5, 6}) == "low low");
  // A word of 100,000 characters: a quadratic merge would take minutes.
  const auto start = std::chrono::steady_clock::now();
  std::string word;
  for (int i = 0; i < 50000; ++i) word += "lo";
  CHECK(tokenizer->encode(word).size() == 50000);
  CHECK(tokenizer->encode(std::string(100000, ' ') + "low").size() >= 100000);
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(5));
}

TEST_CASE("added tokens: strip, single word, normalized, longest first") {
  const auto token = [](int id, const char* content, const char* flags) { return str(R"({"id": )", id, R"(, "content": ")", content, R"(", )", flags, "}"); };
  const auto tokenizer = from_json(small_bpe(token(7, "<x>", R"("special": true, "lstrip": true, "rstrip": true)") + "," + token(8, "<x>>", R"("special": false, "normalized": false)") + "," +
                                             token(9, "wow", R"("special": false, "single_word": true, "normalized": false)")));
  CHECK(tokenizer->encode("low <x>  low") == Ids{5, 7, 5});
  CHECK(tokenizer->encode("low<x>>low") == Ids{5, 8, 5});
  CHECK(tokenizer->encode("wow low") == Ids{9, 6});
  CHECK(tokenizer->encode("lowow").back() != 9);
  CHECK(tokenizer->encode("<x>", true, false).empty());  // not parsed: its characters are no tokens here
  CHECK(tokenizer->vocab_size() == 10);
  CHECK(tokenizer->decode(Ids{5, 7, 8}) == "low<x>>");
}

TEST_CASE("parts of a tokenizer.json that are not supported are named") {
  CHECK(contains_all(json_error(small_bpe("", R"("normalizer": {"type": "Precompiled", "precompiled_charsmap": ""},)")), {"normalizer", "Precompiled", "NFC"}));
  CHECK(contains_all(json_error(small_bpe("", R"("pre_tokenizer": {"type": "UnicodeScripts"},)")), {"pre-tokenizer", "UnicodeScripts"}));
  CHECK(contains_all(json_error(small_bpe("", R"("decoder": {"type": "CTC"},)")), {"decoder", "CTC"}));
  CHECK(contains_all(json_error(small_bpe("", R"("post_processor": {"type": "Other"},)")), {"post-processor", "Other"}));
  CHECK(contains_all(json_error(small_bpe("", R"("pre_tokenizer": {"type": "Split", "pattern": {"Regex": "["}, "behavior": "Isolated", "invert": false},)")), {"regular expression"}));
  CHECK(contains_all(json_error(small_bpe("", R"("pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Odd", "invert": false},)")), {"Odd", "Isolated"}));
  CHECK(contains_all(json_error(R"({"model": {"type": "Unigram", "vocab": [["a", 0]]}})"), {"Unigram", "BPE"}));
  CHECK(contains_all(json_error(R"({"model": {"type": "BPE", "dropout": 0.1, "vocab": {"a": 0}, "merges": []}})"), {"dropout"}));
}

TEST_CASE("broken tokenizer files are errors") {
  CHECK(contains_all(json_error("{"), {"JSON"}));
  CHECK(contains_all(json_error("[]"), {"model"}));
  CHECK(contains_all(json_error("17"), {"model"}));
  CHECK(contains_all(json_error(R"({"model": 3})"), {"tokenizer.json"}));
  CHECK(contains_all(json_error(R"({"model": {"type": "BPE", "vocab": {"a": 0}}})"), {"merges"}));
  CHECK(contains_all(json_error(R"({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}})"), {"id 0", "a", "b"}));
  CHECK(contains_all(json_error(R"({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}})"), {"-1"}));
  CHECK(contains_all(json_error(R"({"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}})"), {"whole number"}));
  CHECK(contains_all(json_error(R"({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}})"), {"ab"}));
  CHECK(contains_all(json_error(R"({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["ab"]}})"), {"merge"}));
  CHECK(contains_all(json_error(R"({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]}})"), {"merge"}));
  CHECK(contains_all(json_error(R"({"model": {"type": "WordPiece", "vocab": {"a": 0}}})"), {"[UNK]"}));
  CHECK(contains_all(json_error(small_bpe(R"({"id": 3, "content": "<x>"})")), {"<x>", "3"}));
  const TemporaryFolder folder;
  CHECK(contains_all(error_text([&] { load_tokenizer(folder.path()); }), {"holds no tokenizer", "vocab.txt"}));
  CHECK(contains_all(error_text([&] { load_tokenizer(folder.path() / "none"); }), {"does not exist"}));
  write_text(folder.path() / "vocab.txt", "[UNK]\na\na\n");
  CHECK(contains_all(error_text([&] { load_tokenizer(folder.path()); }), {"vocab.txt:3", "twice"}));
  write_text(folder.path() / "vocab.txt", "[UNK]\n\xFF\n");
  CHECK(contains_all(error_text([&] { load_tokenizer(folder.path()); }), {"vocab.txt:2", "UTF-8"}));
}

TEST_CASE("a vocabulary is cut, saved and read again with equal ids") {
  check_cut(*bert(), {"unaffable a!", "b a"});
  if (!shared_data("tokenizers/gpt2")) return skip("no shared tokenizers");
  const std::vector<std::string> texts = {"The quick brown fox jumps over the lazy dog.", "Gr\xC3\xBC\xC3\x9F" "e aus M\xC3\xBCnchen, 2024!"};
  check_cut(*load_tokenizer(*shared_data("tokenizers/gpt2")), texts);
  check_cut(*load_tokenizer(*shared_data("tokenizers/ggml_vocab/ggml-vocab-bert-bge.gguf")), {"the quick brown fox.", "it is 2024!"});
  check_cut(*load_tokenizer(*shared_data("tokenizers/ggml_vocab/ggml-vocab-phi-3.gguf")), texts);
  if (const auto qwen = unpacked_tokenizer("qwen3")) check_cut(*qwen, {"The quick brown fox.<|im_end|>", "Hello 123"});
}

TEST_CASE("bytes that are no text do not break any tokenizer") {
  std::vector<std::unique_ptr<Tokenizer>> tokenizers;
  tokenizers.push_back(bert());
  tokenizers.push_back(from_json(small_bpe()));
  if (shared_data("tokenizers/ggml_vocab")) {
    for (const char* name : {"gpt-2", "llama-spm", "starcoder", "bert-bge"}) tokenizers.push_back(load_tokenizer(*shared_data(str("tokenizers/ggml_vocab/ggml-vocab-", name, ".gguf"))));
  }
  const CounterRandom random(3, "random-bytes");
  std::uint64_t draw = 0;
  for (int round = 0; round < 300; ++round) {
    std::string text;
    for (std::uint64_t i = random.below(draw++, 60); i > 0; --i) text += static_cast<char>(random.below(draw++, 256));
    for (const auto& tokenizer : tokenizers) {
      const Ids ids = tokenizer->encode(text);
      CHECK(ids == tokenizer->encode(valid_utf8_copy(text)));
      CHECK(!invalid_utf8(tokenizer->decode(ids, false)));
    }
  }
  for (const auto& tokenizer : tokenizers) CHECK(tokenizer->decode(Ids{-5, 1 << 30}).empty());
}

TEST_CASE("patterns mean what they mean in Oniguruma") {
  CHECK(translate_pattern(R"(\s[^\S\w]\d)", "x") == R"(\p{White_Space}[^\P{White_Space}\p{L}\p{M}\p{Nd}\p{Pc}]\p{Nd})");
  CHECK(contains_all(error_text([] { translate_pattern("[a&&b]", "place"); }), {"&&", "place"}));
  CHECK(contains_all(error_text([] { translate_pattern("[a[b]]", "place"); }), {"inside another"}));
  std::vector<std::pair<std::size_t, std::size_t>> matches;
  Regex("a*", "x").find_all("baac", matches);
  CHECK(matches == std::vector<std::pair<std::size_t, std::size_t>>{{0, 0}, {1, 3}, {3, 3}, {4, 4}});
}

TEST_CASE("chat messages are wrapped by the family of the template") {
  const auto with = [](const std::string& jinja) {
    const TemporaryFolder folder;
    write_text(folder.path() / "tokenizer.json", small_bpe());
    write_text(folder.path() / "chat_template.jinja", jinja);
    return load_tokenizer(folder.path());
  };
  CHECK(apply_chat(*with("{{'<|im_start|>' + m + '<|im_end|>'}}"), "Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
  CHECK(apply_chat(*with("{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"), "Hi") == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
  CHECK(apply_chat(*with("<start_of_turn> <end_of_turn>"), " Hi ", "S") == "<start_of_turn>user\nS\n\nHi<end_of_turn>\n<start_of_turn>model\n");
  CHECK(apply_chat(*with("[INST] [/INST]"), "Hi", "S") == "[INST] <<SYS>>\nS\n<</SYS>>\n\nHi [/INST]");
  CHECK(contains_all(error_text([&] { apply_chat(*with("{{ strange }}"), "Hi"); }), {"strange", "ChatML"}));
  CHECK(contains_all(error_text([&] { apply_chat(*bert(), "Hi"); }), {"no chat template"}));
}
