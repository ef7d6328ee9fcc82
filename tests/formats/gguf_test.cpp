// GGUF: a file of the reference writer, round trips, typed access, and every kind of broken file.
#include "formats/gguf.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <cstdlib>

#include "formats/safetensors.h"
#include "tests/formats/bytes.h"
#include "tests/support.h"

namespace kompakt {
namespace {

using testing::ByteBuilder;
using testing::contains_all;
using testing::error_text;
using testing::put_file;

std::filesystem::path golden_gguf() { return testing::source_folder() / "tests/goldens/formats_blocks.gguf"; }

ByteBuilder head(std::uint64_t tensors, std::uint64_t keys, std::uint32_t version = 3) { return ByteBuilder().raw("GGUF").u32(version).u64(tensors).u64(keys); }

ByteBuilder& tensor_info(ByteBuilder& out, const std::string& name, std::vector<std::uint64_t> dims, std::uint32_t type, std::uint64_t offset) {
  out.text(name).u32(static_cast<std::uint32_t>(dims.size()));
  for (const auto size : dims) out.u64(size);
  return out.u32(type).u64(offset);
}

// A file of one F32 tensor unless told otherwise, with its data.
std::string one(std::vector<std::uint64_t> dims = {4}, std::uint32_t type = 0, std::uint64_t offset = 0, std::size_t data = 32, const std::string& name = "w") {
  ByteBuilder out = head(1, 0);
  return tensor_info(out, name, std::move(dims), type, offset).pad(32).zeros(data).bytes;
}

std::string two(std::uint64_t first, std::uint64_t second, std::size_t data, const std::string& name = "b") {
  ByteBuilder out = head(2, 0);
  tensor_info(out, "a", {8}, 0, first);
  return tensor_info(out, name, {8}, 0, second).pad(32).zeros(data).bytes;
}

std::string one_key(const std::string& key, std::uint32_t type, const std::string& value) { return head(0, 1).text(key).u32(type).raw(value).bytes; }

GgufTensor owned(const std::string& name, const char* type, std::vector<std::int64_t> shape) {
  const GgmlType* row = find_ggml_type(std::string_view(type));
  GgufTensor tensor{name, row, std::move(shape), {}, nullptr};
  const auto bytes = std::make_shared<const std::vector<std::byte>>(static_cast<std::size_t>(tensor.elements() / row->block * row->bytes), std::byte{1});
  tensor.bytes = *bytes;
  tensor.owner = bytes;
  return tensor;
}

}  // namespace

TEST_CASE("a GGUF file of the reference writer is read and reproduced byte for byte") {
  const auto file = GgufFile::open(golden_gguf());
  CHECK(file.text("general.architecture") == "golden");
  CHECK(file.integer("golden.u32") == 7);
  CHECK(file.integer("golden.i8") == -8);
  CHECK(file.integer("golden.u16") == 65535);
  CHECK(file.integer("golden.i64") == INT64_MIN);
  CHECK(file.number_or("golden.f32", 0) == 0.1f);
  CHECK(file.number_or("golden.f64", 0) == 0.1);
  CHECK(file.number_or("golden.u64", 0) == 0x1p64);
  CHECK(file.flag_or("golden.bool", false));
  CHECK(file.text("golden.text") == "Grüße, 世界");
  CHECK(std::get<std::vector<std::string>>(file.get("golden.texts")->data) == std::vector<std::string>{"a", "", "ß"});
  CHECK(std::get<std::vector<std::int64_t>>(file.get("golden.numbers")->data) == std::vector<std::int64_t>{1, -2, 3});
  CHECK(std::get<std::vector<double>>(file.get("golden.reals")->data) == std::vector<double>{0.5, -0.25});
  CHECK(std::get<std::vector<std::int64_t>>(file.get("golden.bools")->data) == std::vector<std::int64_t>{1, 0});
  CHECK(file.find("plain.halves")->shape == std::vector<std::int64_t>{3, 4});
  CHECK(to_float32(*file.find("plain.scales"))[1] == 1.0f / 3);
  const TemporaryFolder folder;
  write_gguf(folder.path() / "again.gguf", file.metadata(), file.tensors());
  CHECK(read_text(folder.path() / "again.gguf") == read_text(golden_gguf()));
}

TEST_CASE("decoded blocks equal those of the reference package bit for bit") {
  const auto file = GgufFile::open(golden_gguf());
  const auto values = SafetensorsFile::open(testing::source_folder() / "tests/goldens/formats_blocks.safetensors");
  int compared = 0;
  for (const auto& tensor : file.tensors()) {
    if (tensor.name.rfind("decode.", 0) != 0) continue;
    CAPTURE(tensor.name);
    REQUIRE(values.find(tensor.name));
    CHECK(tensor.shape == values.find(tensor.name)->shape);
    CHECK(to_float32(tensor) == to_float32(*values.find(tensor.name)));
    ++compared;
  }
  CHECK(compared == 16);
}

TEST_CASE("encoded blocks equal those of the reference package byte for byte") {
  const auto file = GgufFile::open(golden_gguf());
  const auto source = to_float32(*SafetensorsFile::open(testing::source_folder() / "tests/goldens/formats_blocks.safetensors").find("source"));
  int compared = 0;
  for (const auto& tensor : file.tensors()) {
    if (tensor.name.rfind("encode.", 0) != 0) continue;
    CAPTURE(tensor.name);
    const GgmlType& type = *tensor.type;
    std::vector<std::byte> bytes(tensor.bytes.size());
    for (std::int64_t i = 0; i < 1024 / type.block; ++i) type.encode(source.data() + i * type.block, bytes.data() + i * type.bytes);
    CHECK(std::equal(bytes.begin(), bytes.end(), tensor.bytes.begin(), tensor.bytes.end()));
    ++compared;
  }
  CHECK(compared == 9);
}

TEST_CASE("typed access names key, type given and type needed") {
  const auto file = GgufFile::open(golden_gguf());
  CHECK(contains_all(error_text([&] { file.integer("golden.u33"); }), {"formats_blocks.gguf", "\"golden.u33\"", "did you mean \"golden.u32\""}));
  CHECK(contains_all(error_text([&] { file.integer("golden.text"); }), {"\"golden.text\"", "string", "whole number"}));
  CHECK(contains_all(error_text([&] { file.integer("golden.u64"); }), {"\"golden.u64\"", "below 2^63"}));
  CHECK(contains_all(error_text([&] { file.text("golden.texts"); }), {"array of string", "string"}));
  CHECK(contains_all(error_text([&] { file.flag_or("golden.u32", true); }), {"u32", "bool"}));
  CHECK(contains_all(error_text([&] { file.number_or("golden.bool", 1); }), {"bool", "a number"}));
  CHECK(file.integer_or("absent", 5) == 5);
  CHECK(file.text_or("absent", "x") == "x");
  CHECK(file.flag_or("absent", true));
  CHECK(file.number_or("absent", 0.5) == 0.5);
}

TEST_CASE("all value types and odd sizes survive a round trip") {
  using Type = GgufValue::Type;
  std::vector<std::pair<std::string, GgufValue>> metadata = {
      {"a", GgufValue::uint32(UINT32_MAX)}, {"b", GgufValue::int32(INT32_MIN)}, {"c", GgufValue::uint64(UINT64_MAX)}, {"d", GgufValue::float32(-0.0f)}, {"e", GgufValue::boolean_(false)},
      {"f", GgufValue::text(std::string("\0x", 2))}, {"g", GgufValue::texts({})}, {"h", GgufValue::floats({0.1f, 2})}, {"i", GgufValue::int32s({-1, 2})},
      {"j", {.type = Type::array, .element = Type::u64, .data = std::vector<std::int64_t>{-1}}}, {"k", {.type = Type::i16, .data = std::int64_t{-3}}},
      {"l", {.type = Type::array, .element = Type::f64, .data = std::vector<double>{0.1}}}, {"m", {.type = Type::array, .element = Type::boolean, .data = std::vector<std::int64_t>{1, 0}}},
      {"general.alignment", GgufValue::uint32(64)}};
  const TemporaryFolder folder;
  const auto path = folder.path() / "x.gguf";
  const std::vector<GgufTensor> tensors = {owned("scalar", "F32", {}), owned("odd", "F16", {3, 5}), owned("blocks", "Q4_0", {2, 3, 64}), owned("four", "I8", {1, 2, 3, 4})};
  write_gguf(path, metadata, tensors);
  const auto file = GgufFile::open(path);
  REQUIRE(file.metadata().size() == metadata.size());
  for (std::size_t i = 0; i < metadata.size(); ++i) {
    CHECK(file.metadata()[i].first == metadata[i].first);
    CHECK(file.metadata()[i].second.data == metadata[i].second.data);
    CHECK(gguf_type_name(file.metadata()[i].second) == gguf_type_name(metadata[i].second));
  }
  REQUIRE(file.tensors().size() == 4);
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(file.tensors()[i].shape == tensors[i].shape);
    CHECK(std::equal(tensors[i].bytes.begin(), tensors[i].bytes.end(), file.tensors()[i].bytes.begin(), file.tensors()[i].bytes.end()));
  }
  write_gguf(folder.path() / "y.gguf", file.metadata(), file.tensors());
  CHECK(read_text(folder.path() / "y.gguf") == read_text(path));
  write_gguf(folder.path() / "empty.gguf", {}, {});
  CHECK(GgufFile::open(folder.path() / "empty.gguf").tensors().empty());
}

TEST_CASE("version 2 and tensors out of order are read") {
  const TemporaryFolder folder;
  ByteBuilder out = head(1, 0, 2);
  CHECK(GgufFile::open(put_file(folder, tensor_info(out, "w", {4}, 0, 0).pad(32).zeros(16).bytes, "v2.gguf")).tensors().size() == 1);
  CHECK(GgufFile::open(put_file(folder, two(32, 0, 64), "order.gguf")).tensors().front().name == "a");
}

TEST_CASE("broken GGUF files are refused with file and tensor or key named") {
  struct Broken {
    const char* what;
    std::string bytes;
    std::vector<const char*> parts;
  };
  const std::uint64_t big = std::uint64_t{1} << 63;
  const auto list = [](std::uint32_t element, std::uint64_t count, const std::string& rest) { return ByteBuilder().u32(element).u64(count).raw(rest).bytes; };
  const Broken broken[] = {
      {"empty", "", {"magic"}},
      {"wrong magic", "GGML" + one().substr(4), {"does not begin with"}},
      {"no version", "GGUF", {"version", "cut short"}},
      {"version 1", head(0, 0, 1).bytes, {"unknown GGUF version", "1"}},
      {"version 4", head(0, 0, 4).bytes, {"unknown GGUF version", "4"}},
      {"big-endian", head(0, 0, 0x03000000).bytes, {"big-endian"}},
      {"no counts", ByteBuilder().raw("GGUF").u32(3).bytes, {"number of tensors"}},
      {"many tensors", head(UINT64_MAX, 0).bytes, {"number of tensors", "18446744073709551615"}},
      {"many keys", head(0, UINT64_MAX).bytes, {"number of keys", "18446744073709551615"}},
      {"more tensors than there are", head(2, 0).raw(one().substr(24)).bytes, {"broken.gguf"}},
      {"key past the end", head(0, 1).u64(1000).zeros(20).bytes, {"key number 0", "cut short"}},
      {"key length 2^64-1", head(0, 1).u64(UINT64_MAX).zeros(20).bytes, {"key number 0"}},
      {"empty key", one_key("", 4, std::string(4, '\0')), {"key number 0", "0 bytes"}},
      {"key not UTF-8", one_key("\xff", 4, std::string(4, '\0')), {"UTF-8"}},
      {"unknown value type", one_key("k", 13, std::string(8, '\0')), {"\"k\"", "unknown value type", "13"}},
      {"value cut", one_key("k", 10, std::string(7, '\0')), {"\"k\"", "cut short"}},
      {"bool 2", one_key("k", 7, "\x02"), {"\"k\"", "bool", "2"}},
      {"text past the end", one_key("k", 8, ByteBuilder().u64(5).raw("abcd").bytes), {"\"k\"", "cut short"}},
      {"text length 2^64-1", one_key("k", 8, ByteBuilder().u64(UINT64_MAX).bytes), {"\"k\"", "cut short"}},
      {"array of unknown type", one_key("k", 9, list(99, 1, "xxxx")), {"\"k\"", "unknown element type", "99"}},
      {"array of arrays", one_key("k", 9, list(9, 1, "xxxxxxxxxxxxxxxx")), {"\"k\"", "array of arrays"}},
      {"array longer than the file", one_key("k", 9, list(4, 3, std::string(8, '\0'))), {"\"k\"", "3 elements"}},
      {"array count 2^62 (bytes overflow)", one_key("k", 9, list(4, std::uint64_t{1} << 62, std::string(8, '\0'))), {"\"k\"", "past the end"}},
      {"array of texts 2^61", one_key("k", 9, list(8, std::uint64_t{1} << 61, std::string(8, '\0'))), {"\"k\"", "past the end"}},
      {"array of bools with a 7", one_key("k", 9, list(7, 2, std::string("\x01\x07", 2))), {"\"k\"", "bool"}},
      {"key twice", head(0, 2).text("k").u32(0).raw("1").text("k").u32(0).raw("1").bytes, {"\"k\"", "twice"}},
      {"alignment 0", one_key("general.alignment", 4, std::string(4, '\0')), {"general.alignment", "power of two"}},
      {"alignment 48", one_key("general.alignment", 4, ByteBuilder().u32(48).bytes), {"general.alignment", "power of two", "48"}},
      {"alignment of text", one_key("general.alignment", 8, ByteBuilder().text("32").bytes), {"general.alignment", "string", "u32"}},
      {"name not UTF-8", one({4}, 0, 0, 32, "\xc3"), {"tensor number 0", "UTF-8"}},
      {"empty name", one({4}, 0, 0, 32, ""), {"tensor number 0", "0 bytes"}},
      {"long name", one({4}, 0, 0, 32, std::string(128, 'x')), {"128 bytes"}},
      {"five dimensions", one({1, 1, 1, 1, 1}), {"\"w\"", "too many dimensions", "5"}},
      {"dimension 0", one({0}), {"\"w\"", "out of range", "0"}},
      {"dimension 2^63", one({big}), {"\"w\"", "out of range", "9223372036854775808"}},
      {"product overflows", one({std::uint64_t{1} << 32, std::uint64_t{1} << 32}), {"\"w\"", "overflows"}},
      {"bytes overflow", one({std::uint64_t{1} << 62}), {"\"w\"", "overflows"}},
      {"elements overflow although bytes fit", one({std::uint64_t{1} << 32, std::uint64_t{1} << 31}, 2), {"\"w\"", "overflows"}},
      {"removed type", one({4}, 4), {"\"w\"", "Q4_2"}},
      {"unsupported type", one({256}, 16), {"\"w\"", "IQ2_XXS"}},
      {"unknown type", one({4}, 1000), {"\"w\"", "1000"}},
      {"rows not whole blocks", one({33}, 2), {"\"w\"", "33", "Q4_0", "multiple of 32"}},
      {"unaligned offset", one({4}, 0, 16, 64), {"\"w\"", "not aligned", "16"}},
      {"offset past the end", one({4}, 0, 320), {"\"w\"", "past the end"}},
      {"offset 2^64 - 32", one({4}, 0, UINT64_MAX - 31), {"\"w\"", "past the end"}},
      {"data cut", one({4}, 0, 0, 15), {"\"w\"", "past the end", "cut short"}},
      {"no data", one({4}, 0, 0, 0), {"\"w\"", "past the end"}},
      {"overlap", two(0, 0, 64), {"overlaps"}},
      {"hole", two(0, 64, 96), {"\"b\"", "hole of 32 bytes"}},
      {"hole at the start", one({4}, 0, 32, 64), {"\"w\"", "hole"}},
      {"same name", two(0, 32, 64, "a"), {"\"a\"", "twice"}},
      {"trailing bytes", one({4}, 0, 0, 33), {"1 bytes follow"}},
      {"trailing bytes without tensors", head(0, 0).zeros(9).bytes, {"1 bytes follow"}},
  };
  const TemporaryFolder folder;
  for (const Broken& row : broken) {
    CAPTURE(row.what);
    const auto path = put_file(folder, row.bytes, "broken.gguf");
    const std::string text = error_text([&] { GgufFile::open(path); });
    CHECK(text.find("broken.gguf") != std::string::npos);
    for (const char* part : row.parts) CHECK(contains_all(text, {part}));
  }
  CHECK_NOTHROW(GgufFile::open(put_file(folder, one(), "good.gguf")));
  CHECK_NOTHROW(GgufFile::open(put_file(folder, one({4}, 0, 0, 16), "unpadded.gguf")));
}

TEST_CASE("every truncation inside header and infos of a GGUF file is refused, and nearly all mutations are") {
  const std::string good = read_text(golden_gguf());
  const TemporaryFolder folder;
  for (std::size_t size = 0; size < good.size(); size += size < 4096 ? 1 : 97) {
    const auto path = put_file(folder, good.substr(0, size), "cut.gguf");
    CHECK_THROWS_AS(GgufFile::open(path), Error);
  }
  // Mutate a small file, so that most changes hit its structure.
  const auto whole = GgufFile::open(golden_gguf());
  write_gguf(folder.path() / "small.gguf", whole.metadata(), {*whole.find("plain.scales"), *whole.find("plain.halves"), *whole.find("encode.Q4_0")});
  const int refused = testing::fuzz(read_text(folder.path() / "small.gguf"), 4000, 2, "fuzz.gguf", [](const auto& path) {
    const auto file = GgufFile::open(path);
    for (const auto& tensor : file.tensors()) to_float32(tensor);
  });
  CHECK(refused > 1000);
  CHECK(refused < 4000);
}

TEST_CASE("what llama.cpp would refuse is not written") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "x.gguf";
  CHECK(contains_all(error_text([&] { write_gguf(path, {}, {owned(std::string(64, 'n'), "F32", {1})}); }), {"64 bytes", "llama.cpp"}));
  CHECK(contains_all(error_text([&] { write_gguf(path, {}, {owned("a", "F32", {1}), owned("a", "F32", {1})}); }), {"\"a\"", "same name"}));
  CHECK(contains_all(error_text([&] { write_gguf(path, {{"k", GgufValue::uint32(1)}, {"k", GgufValue::uint32(1)}}, {}); }), {"\"k\"", "twice"}));
  CHECK(contains_all(error_text([&] { write_gguf(path, {}, {owned("a", "F32", {0})}); }), {"\"a\"", "empty"}));
  CHECK(contains_all(error_text([&] { write_gguf(path, {}, {owned("a", "Q4_0", {64, 16})}); }), {"\"a\"", "multiple of 32", "smaller block"}));
  CHECK(contains_all(error_text([&] { write_gguf(path, {}, {owned("a", "F32", {1, 1, 1, 1, 1})}); }), {"\"a\"", "too many dimensions"}));
  CHECK(contains_all(error_text([&] { write_gguf(path, {{"k", GgufValue{.type = GgufValue::Type::u8, .data = std::uint64_t{256}}}}, {}); }), {"256", "u8"}));
  CHECK_FALSE(std::filesystem::exists(path));
}

TEST_CASE("a real model file is read and rewritten") {
  const char* given = std::getenv("KOMPAKT_SMOLLM2");
  if (!given) return testing::skip("KOMPAKT_SMOLLM2 does not name the GGUF file of SmolLM2");
  const auto file = GgufFile::open(given);
  CHECK(file.text("general.architecture") == "llama");
  const GgufTensor* embedding = file.find("token_embd.weight");
  REQUIRE(embedding);
  double sum = 0;
  for (const float value : to_float32(*embedding)) sum += std::fabs(value);
  CHECK(sum / static_cast<double>(embedding->elements()) > 1e-3);
  CHECK(sum / static_cast<double>(embedding->elements()) < 1.0);
  const TemporaryFolder folder;
  write_gguf(folder.path() / "again.gguf", file.metadata(), file.tensors());
  const MappedFile a{std::filesystem::path(given)}, b(folder.path() / "again.gguf");
  CHECK(a.text() == b.text());
}

}  // namespace kompakt
