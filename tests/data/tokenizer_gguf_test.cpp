// The test strings of llama.cpp's vocabularies, from GGUF metadata and from the equal tokenizer.json.
#include <catch2/catch.hpp>

#include "core/files.h"
#include "core/text.h"
#include "data/tokenizer.h"
#include "formats/gguf.h"
#include "tests/data/tokenizer_files.h"
#include "tests/support.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

std::vector<std::string> test_strings(const std::filesystem::path& file) {
  std::vector<std::string> out;
  const std::string text = read_text(file), mark = "\n__ggml_vocab_test__\n";
  for (std::size_t start = 0; start < text.size();) {
    const std::size_t end = std::min(text.find(mark, start), text.size());
    out.push_back(text.substr(start, end - start));
    start = end + mark.size();
  }
  return out;
}

std::string spaced(const std::vector<std::int64_t>& ids) {
  std::string out;
  for (const std::int64_t id : ids) out += " " + std::to_string(id);
  return out;
}

void check_strings(const Tokenizer& tokenizer, const std::string& name) {
  const auto inputs = shared_data("tokenizers/ggml_vocab/ggml-vocab-" + name + ".gguf.inp");
  REQUIRE(inputs);
  const auto strings = test_strings(*inputs);
  const auto expected = split(read_text(inputs->parent_path() / ("ggml-vocab-" + name + ".gguf.out")), '\n');
  REQUIRE(strings.size() >= 45);
  REQUIRE(expected.size() >= strings.size());
  for (std::size_t i = 0; i < strings.size(); ++i) {
    INFO(name << " string " << i << ": " << strings[i]);
    CHECK(spaced(tokenizer.encode(strings[i], false, false)) == (trim(expected[i]).empty() ? "" : " " + trim(expected[i])));
  }
}

}  // namespace

TEST_CASE("GGUF vocabularies give the expected ids") {
  if (!shared_data("tokenizers/ggml_vocab")) return skip("no shared tokenizers");
  for (const char* name : {"bert-bge", "gpt-2", "starcoder", "llama-spm", "phi-3"}) check_strings(*load_tokenizer(*shared_data(str("tokenizers/ggml_vocab/ggml-vocab-", name, ".gguf"))), name);
}

TEST_CASE("tokenizer.json and vocab.json give the ids of the GGUF vocabulary of the same family") {
  if (!shared_data("tokenizers/gpt2")) return skip("no shared tokenizers");
  const auto gpt2 = load_tokenizer(*shared_data("tokenizers/gpt2"));
  check_strings(*gpt2, "gpt-2");
  const auto gguf = load_tokenizer(*shared_data("tokenizers/ggml_vocab/ggml-vocab-gpt-2.gguf"));
  CHECK(gpt2->kind() == "byte-level-bpe");
  CHECK(gpt2->special().eos == gguf->special().eos);
  CHECK(gpt2->fingerprint() == gguf->fingerprint());
  const auto spm = load_tokenizer(*shared_data("tokenizers/ggml_vocab/ggml-vocab-llama-spm.gguf"));
  CHECK(spm->encode("Hello") == std::vector<std::int64_t>{1, 15043});
  CHECK(spm->decode(std::vector<std::int64_t>{1, 15043, 3186}) == "Hello world");
  const auto qwen = unpacked_tokenizer("qwen3");
  if (!qwen) return skip("no xz program");
  check_strings(*qwen, "qwen2");
}

TEST_CASE("GGUF tokenizers that are not known are refused by name") {
  const TemporaryFolder folder;
  const auto file = folder.path() / "x.gguf";
  const auto text = [&](std::vector<std::pair<std::string, GgufValue>> metadata) {
    write_gguf(file, metadata, {});
    return error_text([&] { load_tokenizer(file); });
  };
  const auto tokens = GgufValue::texts({"a", "b", "ab"});
  CHECK(contains_all(text({{"general.architecture", GgufValue::text("t5")}, {"tokenizer.ggml.model", GgufValue::text("t5")}, {"tokenizer.ggml.tokens", tokens}}), {"t5", "bert, gpt2, llama"}));
  CHECK(contains_all(text({{"tokenizer.ggml.model", GgufValue::text("gpt2")}, {"tokenizer.ggml.pre", GgufValue::text("qwen9")}, {"tokenizer.ggml.tokens", tokens}}), {"qwen9", "qwen2"}));
  CHECK(contains_all(text({{"tokenizer.ggml.model", GgufValue::text("gpt2")}, {"tokenizer.ggml.pre", GgufValue::text("gpt-2")}, {"tokenizer.ggml.tokens", tokens}}), {"merges"}));
  CHECK(contains_all(text({{"tokenizer.ggml.model", GgufValue::text("llama")}, {"tokenizer.ggml.tokens", tokens}}), {"scores"}));
}
