// Ten thousand lines and every code point against hashes made with the Python package `tokenizers`
// (scripts/make_goldens_tokenizers.py).
#include <catch2/catch.hpp>
#include <cstdio>
#include <cstdlib>
#include <algorithm>

#include "core/files.h"
#include "core/text.h"
#include "data/tokenizer.h"
#include "tests/data/tokenizer_files.h"
#include "tests/support.h"

using namespace kompakt;
using namespace kompakt::testing;

namespace {

constexpr std::uint64_t fnv_start = 0xCBF29CE484222325ull;

std::uint64_t fnv(std::string_view data, std::uint64_t value = fnv_start) {
  for (const char c : data) value = (value ^ static_cast<unsigned char>(c)) * 0x100000001B3ull;
  return value;
}

std::string short_hash(std::uint64_t value) {
  char text[8];
  std::snprintf(text, sizeof text, "%04x", static_cast<unsigned>((value >> 32 ^ value) & 0xFFFF));
  return text;
}

std::string ids_text(const std::vector<std::int64_t>& ids) {
  std::string out;
  for (const std::int64_t id : ids) out += std::to_string(id) + " ";
  return out;
}

std::vector<std::string> mixed_lines(const std::filesystem::path& shared) {
  const std::pair<const char*, std::size_t> sources[] = {{"lm/wikitext2/test.txt", 2600},          {"calibration/multilingual.utf8", 525}, {"classification/trec6/test.txt", 500},
                                                         {"classification/banking77/test.csv", 2500}, {"lm/tinyshakespeare.txt", 2500},      {"lm/books_de/faust.txt", 2500}};
  std::vector<std::string> lines;
  for (const auto& [name, count] : sources) {
    std::size_t taken = 0;
    for (std::string& line : split(read_text(shared / name), '\n')) {
      if (taken == count || line.find_first_not_of(" \r\t") == std::string::npos) continue;
      lines.push_back(std::move(line));
      ++taken;
    }
  }
  lines.resize(10000);
  return lines;
}

// Characters of Unicode versions that the libraries disagree about are left out by their blocks.
void check_goldens(const Tokenizer& tokenizer, const std::string& name, const std::vector<std::int64_t>& other_blocks) {
  const auto shared = shared_data("lm/tinyshakespeare.txt");
  REQUIRE(shared);
  const auto lines = mixed_lines(shared->parent_path().parent_path());
  std::vector<std::string> rows = split(read_text(source_folder() / "tests" / "goldens" / ("tokenizer_" + name + ".txt")), '\n');
  REQUIRE(rows.size() == 1 + 1000 + 1 + 4352 + 1);
  std::size_t wrong_lines = 0, wrong_decodes = 0, wrong_blocks = 0;
  for (std::size_t start = 0; start < lines.size(); start += 10) {
    const std::string& row = rows[1 + start / 10];
    std::string decoded;
    bool good = true;
    for (std::size_t i = 0; i < 10; ++i) {
      const auto ids = tokenizer.encode(lines[start + i]);
      decoded += tokenizer.decode(ids) + "\n";
      if (short_hash(fnv(ids_text(ids))) == row.substr(4 * i, 4)) continue;
      good = false;
      if (++wrong_lines <= 5) UNSCOPED_INFO(name << " line " << start + i << ": " << lines[start + i] << "\n  " << ids_text(ids));
    }
    if (good && short_hash(fnv(decoded)) != row.substr(41) && ++wrong_decodes <= 3) UNSCOPED_INFO(name << " decoded from line " << start << ": " << decoded);
  }
  std::string blocks;
  for (std::int64_t block = 0; block < 4352; ++block) {
    if (std::find(other_blocks.begin(), other_blocks.end(), block) != other_blocks.end()) continue;
    std::uint64_t value = fnv_start;
    for (std::int64_t code = block * 256; code < block * 256 + 256; ++code) {
      if (code >= 0xD800 && code <= 0xDFFF) continue;
      std::string c;
      append_utf8(c, static_cast<char32_t>(code));
      value = fnv(ids_text(tokenizer.encode("a" + c + "b " + c)), value);
    }
    if (short_hash(value) == rows[1002 + static_cast<std::size_t>(block)]) continue;
    ++wrong_blocks;
    blocks += std::to_string(block) + ", ";
  }
  INFO(name << ": " << wrong_lines << " lines, " << wrong_decodes << " decodes, blocks " << blocks);
  CHECK(wrong_lines == 0);
  CHECK(wrong_decodes == 0);
  CHECK(wrong_blocks == 0);
}

}  // namespace

TEST_CASE("WordPiece equals the reference on ten thousand lines and all characters") {
  const char* folder = std::getenv("KOMPAKT_MINILM");
  if (!folder) return skip("KOMPAKT_MINILM does not name the folder of all-MiniLM-L6-v2");
  if (!shared_data("lm/tinyshakespeare.txt")) return skip("no shared data");
  check_goldens(*load_tokenizer(folder), "minilm", {});
  // The same vocabulary without tokenizer.json.
  const auto bare = load_tokenizer(std::filesystem::path(folder) / "vocab.txt");
  check_goldens(*bare, "minilm", {});
  CHECK(bare->fingerprint() == load_tokenizer(folder)->fingerprint());
}

TEST_CASE("Byte-level and byte-fallback BPE equal the reference on ten thousand lines and all characters") {
  for (const char* name : {"qwen3", "llama2", "gemma3"}) {
    const auto tokenizer = unpacked_tokenizer(name);
    if (!tokenizer) return skip("no shared tokenizers, or no xz program");
    // Block 0x1D2: the Kaktovik numerals of Unicode 15 are no numbers yet to PCRE2 10.42, which Qwen's pattern asks.
    check_goldens(*tokenizer, name, std::string(name) == "qwen3" ? std::vector<std::int64_t>{0x1D2} : std::vector<std::int64_t>{});
  }
}
