// safetensors: same bytes as the reference writer, round trips, shards, and every kind of broken file.
#include "formats/safetensors.h"

#include <catch2/catch.hpp>
#include <cmath>

#include "core/json.h"
#include "tests/formats/bytes.h"
#include "tests/support.h"

namespace kompakt {
namespace {

using testing::ByteBuilder;
using testing::contains_all;
using testing::error_text;
using testing::put_file;

std::string file_bytes(const std::string& header, std::size_t data) { return ByteBuilder().u64(header.size()).raw(header).zeros(data).bytes; }

std::string one_tensor(const std::string& inside, std::size_t data) { return file_bytes("{\"w\":{" + inside + "}}", data); }

TensorData counted(const std::string& name, std::vector<std::int64_t> shape, float first) {
  std::vector<float> values(static_cast<std::size_t>(*checked_product(shape)));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = first + static_cast<float>(i);
  return make_tensor(name, std::move(shape), std::move(values));
}

}  // namespace

TEST_CASE("a file of the reference writer is reproduced byte for byte") {
  const auto golden = testing::source_folder() / "tests/goldens/formats_order.safetensors";
  const auto file = SafetensorsFile::open(golden);
  REQUIRE(file.tensors().size() == 7);
  CHECK(file.metadata().at("format") == "pt");
  CHECK(file.find("scalar")->shape.empty());
  CHECK(to_float32(*file.find("scalar")) == std::vector<float>{2.5f});
  CHECK(file.find("nothing")->shape == std::vector<std::int64_t>{0, 3});
  CHECK(to_float32(*file.find("nothing")).empty());
  CHECK(to_float32(*file.find("mask")) == std::vector<float>{0, 1, 255});
  CHECK(to_float32(*file.find("ids")) == std::vector<float>{0, 1, 2, 3});
  CHECK(file.find("absent") == nullptr);
  const TemporaryFolder folder;
  write_safetensors(folder.path() / "again.safetensors", file.tensors(), file.metadata());
  CHECK(read_text(folder.path() / "again.safetensors") == read_text(golden));
}

TEST_CASE("all element types convert to float32 as numpy does") {
  const auto file = SafetensorsFile::open(testing::source_folder() / "tests/goldens/formats_dtypes.safetensors");
  int compared = 0;
  for (const auto& tensor : file.tensors()) {
    const TensorData* expected = file.find(tensor.name + ".as_float32");
    if (!expected) continue;
    CAPTURE(tensor.name);
    CHECK(to_float32(tensor) == to_float32(*expected));
    ++compared;
  }
  CHECK(compared == 15);
}

TEST_CASE("writing does not depend on the order of the tensors, and reads back") {
  const TemporaryFolder folder;
  const auto a = counted("b", {2, 3}, 1), b = counted("a", {4}, 7), c = make_tensor("c", DType::u8, {3}, std::vector<std::byte>(3)), d = make_tensor("d", DType::i64, {1}, std::vector<std::byte>(8));
  write_safetensors(folder.path() / "1.safetensors", {a, b, c, d}, {{"k", "v"}, {"a", "\"quoted\" ü"}});
  write_safetensors(folder.path() / "2.safetensors", {d, c, b, a}, {{"a", "\"quoted\" ü"}, {"k", "v"}});
  const std::string bytes = read_text(folder.path() / "1.safetensors");
  CHECK(bytes == read_text(folder.path() / "2.safetensors"));
  std::uint64_t length;
  std::memcpy(&length, bytes.data(), 8);
  CHECK(length % 8 == 0);
  CHECK(bytes.find("\"d\":") < bytes.find("\"b\":"));  // larger elements first
  const auto file = SafetensorsFile::open(folder.path() / "1.safetensors");
  CHECK(file.metadata().at("a") == "\"quoted\" ü");
  CHECK(to_float32(*file.find("b")) == std::vector<float>{1, 2, 3, 4, 5, 6});
  CHECK(file.tensors().front().name == "a");
  write_safetensors(folder.path() / "3.safetensors", file.tensors(), file.metadata());
  CHECK(read_text(folder.path() / "3.safetensors") == bytes);
  write_safetensors(folder.path() / "none.safetensors", {});
  CHECK(SafetensorsFile::open(folder.path() / "none.safetensors").tensors().empty());
}

TEST_CASE("the data outlives the file object") {
  const TemporaryFolder folder;
  write_safetensors(folder.path() / "x.safetensors", {counted("w", {3}, 5)});
  const TensorData tensor = *SafetensorsFile::open(folder.path() / "x.safetensors").find("w");
  CHECK(to_float32(tensor) == std::vector<float>{5, 6, 7});
}

TEST_CASE("shards: written by size, read as one, checked against the index") {
  const TemporaryFolder folder;
  const std::vector<TensorData> tensors = {counted("a", {4}, 0), counted("b", {4}, 10), counted("c", {100}, 20), counted("d", {1}, 30)};
  write_safetensors_sharded(folder.path() / "whole", tensors, 10'000);
  CHECK(std::filesystem::exists(folder.path() / "whole/model.safetensors"));
  const auto model = folder.path() / "model";
  write_safetensors_sharded(model, tensors, 32, {{"format", "pt"}});
  CHECK(std::filesystem::exists(model / "model-00001-of-00003.safetensors"));
  const Json index = read_json(model / "model.safetensors.index.json");
  CHECK(index["metadata"]["total_size"] == 436);
  CHECK(index["weight_map"]["c"] == "model-00002-of-00003.safetensors");
  const auto file = SafetensorsFile::open(model);
  REQUIRE(file.tensors().size() == 4);
  CHECK(to_float32(*file.find("d")) == std::vector<float>{30});
  CHECK(file.metadata().at("format") == "pt");

  SECTION("a tensor in two shards") {
    write_safetensors(model / "model-00003-of-00003.safetensors", {counted("d", {1}, 30), counted("a", {4}, 0)});
    CHECK(contains_all(error_text([&] { SafetensorsFile::open(model); }), {"model-00003", "\"a\"", "model-00001"}));
  }
  SECTION("a tensor that the index misses") {
    write_safetensors(model / "model-00003-of-00003.safetensors", {counted("d", {1}, 30), counted("extra", {4}, 0)});
    CHECK(contains_all(error_text([&] { SafetensorsFile::open(model); }), {"model-00003", "\"extra\"", "missing in the index"}));
  }
  SECTION("a tensor that the shard misses") {
    write_safetensors(model / "model-00003-of-00003.safetensors", {});
    CHECK(contains_all(error_text([&] { SafetensorsFile::open(model); }), {"model-00003", "\"d\"", "promises"}));
  }
  SECTION("a shard outside the folder") {
    write_text(model / "model.safetensors.index.json", R"({"weight_map": {"a": "../whole/model.safetensors"}})");
    CHECK(contains_all(error_text([&] { SafetensorsFile::open(model); }), {"\"a\"", "plain file name", "../whole"}));
  }
  SECTION("both forms in one folder") {
    write_safetensors(model / "model.safetensors", {});
    CHECK(contains_all(error_text([&] { SafetensorsFile::open(model); }), {"both", "out of date"}));
  }
  SECTION("an index without a map") {
    write_text(model / "model.safetensors.index.json", "[]");
    CHECK(contains_all(error_text([&] { SafetensorsFile::open(model); }), {"weight_map"}));
  }
  CHECK(contains_all(error_text([&] { SafetensorsFile::open(folder.path()); }), {"neither", "model.safetensors"}));
}

TEST_CASE("broken safetensors files are refused with file and tensor named") {
  struct Broken {
    const char* what;
    std::string bytes;
    std::vector<const char*> parts;
  };
  const std::string good = R"("dtype":"F32","shape":[2],"data_offsets":[0,8])";
  const std::string huge(300, '[');
  const Broken broken[] = {
      {"empty", "", {"0 bytes"}},
      {"seven bytes", std::string(7, '\0'), {"7 bytes"}},
      {"header longer than the file", ByteBuilder().u64(100).raw("{}").bytes, {"100 bytes", "cut short"}},
      {"header longer than allowed", ByteBuilder().u64(100'000'001).raw("{}").bytes, {"too large", "100000001"}},
      {"header of 2^64 - 1", ByteBuilder().u64(UINT64_MAX).raw("{}").bytes, {"too large"}},
      {"empty header", file_bytes("", 0), {"'{'"}},
      {"space before", file_bytes(" {}", 0), {"'{'"}},
      {"bad JSON", file_bytes("{\"w\":", 0), {"not valid JSON"}},
      {"text after", file_bytes("{}x", 0), {"not valid JSON"}},
      {"bad UTF-8", file_bytes("{\"w\xff\":1}", 0), {"UTF-8"}},
      {"overlong UTF-8", file_bytes("{\"\xc0\xaf\":1}", 0), {"UTF-8"}},
      {"deep nesting", file_bytes("{\"w\":" + huge, 0), {"\"w\""}},
      {"list instead of a tensor", file_bytes("{\"w\":[1]}", 0), {"wrong value", "\"w\""}},
      {"number instead of a tensor", file_bytes("{\"w\":1}", 0), {"wrong value", "\"w\""}},
      {"null", file_bytes("{\"w\":null}", 0), {"null"}},
      {"true", file_bytes("{\"w\":true}", 0), {"true"}},
      {"duplicate name", file_bytes("{\"w\":{" + good + "},\"w\":{" + good + "}}", 8), {"\"w\"", "twice"}},
      {"duplicate key", one_tensor(good + ",\"dtype\":\"F32\"", 8), {"\"dtype\"", "twice", "\"w\""}},
      {"duplicate metadata", file_bytes(R"({"__metadata__":{"a":"1","a":"2"}})", 0), {"\"a\"", "twice"}},
      {"two metadata", file_bytes(R"({"__metadata__":{},"__metadata__":{}})", 0), {"__metadata__", "twice"}},
      {"metadata number", file_bytes(R"({"__metadata__":{"a":1}})", 0), {"wrong value", "\"a\""}},
      {"metadata nested", file_bytes(R"({"__metadata__":{"a":{}}})", 0), {"wrong value", "\"a\""}},
      {"unknown key", one_tensor(good + ",\"stride\":[1]", 8), {"unknown key", "stride", "\"w\""}},
      {"missing key", one_tensor(R"("dtype":"F32","shape":[2])", 8), {"lacks \"data_offsets\"", "\"w\""}},
      {"unknown dtype", one_tensor(R"("dtype":"F33","shape":[2],"data_offsets":[0,8])", 8), {"unknown dtype", "did you mean", "\"w\""}},
      {"dtype number", one_tensor(R"("dtype":3,"shape":[2],"data_offsets":[0,8])", 8), {"wrong value", "dtype"}},
      {"shape text", one_tensor(R"("dtype":"F32","shape":"2","data_offsets":[0,8])", 8), {"wrong value", "shape"}},
      {"shape negative", one_tensor(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])", 8), {"negative", "shape", "\"w\""}},
      {"shape fraction", one_tensor(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])", 8), {"wrong value", "shape"}},
      {"shape nested", one_tensor(R"("dtype":"F32","shape":[[2]],"data_offsets":[0,8])", 8), {"wrong value", "shape"}},
      {"shape 2^63", one_tensor(R"("dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,8])", 8), {"too large", "9223372036854775808", "\"w\""}},
      {"shape 2^64", one_tensor(R"("dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,8])", 8), {"wrong value", "shape"}},
      {"product 2^64", one_tensor(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8])", 8), {"overflows", "\"w\""}},
      {"bytes 2^64", one_tensor(R"("dtype":"F64","shape":[2305843009213693953],"data_offsets":[0,8])", 8), {"overflows", "\"w\""}},
      {"too many dimensions", one_tensor(R"("dtype":"F32","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"data_offsets":[0,4])", 4), {"too many dimensions"}},
      {"one offset", one_tensor(R"("dtype":"F32","shape":[2],"data_offsets":[8])", 8), {"two numbers", "[8]"}},
      {"three offsets", one_tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])", 8), {"two numbers"}},
      {"reversed", one_tensor(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])", 8), {"reversed", "\"w\""}},
      {"past the end", one_tensor(R"("dtype":"F32","shape":[4],"data_offsets":[0,16])", 8), {"only 8 bytes", "\"w\"", "cut short"}},
      {"size differs", one_tensor(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])", 8), {"needs 12 bytes", "\"w\""}},
      {"hole at the start", one_tensor(R"("dtype":"F32","shape":[2],"data_offsets":[4,12])", 12), {"hole of 4 bytes", "\"w\""}},
      {"trailing bytes", one_tensor(good, 9), {"1 bytes follow"}},
      {"hole between", file_bytes(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}})", 5), {"hole of 1 bytes", "\"b\""}},
      {"overlap", file_bytes(R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})", 4), {"overlaps", "\"b\""}},
      {"same bytes twice", file_bytes(R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}})", 3), {"overlaps", "\"b\""}},
  };
  const TemporaryFolder folder;
  for (const Broken& one : broken) {
    CAPTURE(one.what);
    const auto path = put_file(folder, one.bytes, "broken.safetensors");
    const std::string text = error_text([&] { SafetensorsFile::open(path); });
    CHECK(text.find("broken.safetensors") != std::string::npos);
    for (const char* part : one.parts) CHECK(contains_all(text, {part}));
  }
  CHECK_NOTHROW(SafetensorsFile::open(put_file(folder, one_tensor(good, 8), "good.safetensors")));
}

TEST_CASE("every truncation of a safetensors file is refused") {
  const TemporaryFolder folder;
  const std::string good = read_text(testing::source_folder() / "tests/goldens/formats_order.safetensors");
  for (std::size_t size = 0; size < good.size(); ++size) {
    const auto path = put_file(folder, good.substr(0, size), "cut.safetensors");
    CHECK_THROWS_AS(SafetensorsFile::open(path), Error);
  }
}

TEST_CASE("mutated safetensors files parse or throw Error") {
  const std::string good = read_text(testing::source_folder() / "tests/goldens/formats_order.safetensors");
  const int refused = testing::fuzz(good, 4000, 1, "fuzz.safetensors", [](const auto& path) {
    const auto file = SafetensorsFile::open(path);
    for (const auto& tensor : file.tensors()) to_float32(tensor);
  });
  CHECK(refused > 2000);
  CHECK(refused < 4000);  // some mutations touch only data
}

TEST_CASE("what cannot be written is refused before a file appears") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "x.safetensors";
  CHECK(contains_all(error_text([&] { write_safetensors(path, {counted("w", {1}, 0), counted("w", {2}, 0)}); }), {"\"w\"", "same name"}));
  CHECK(contains_all(error_text([&] { write_safetensors(path, {counted("__metadata__", {1}, 0)}); }), {"reserved"}));
  CHECK(contains_all(error_text([&] { write_safetensors(path, {counted("\xff", {1}, 0)}); }), {"UTF-8"}));
  CHECK(contains_all(error_text([&] { write_safetensors(path, {}, {{"k", "\xff"}}); }), {"UTF-8", "\"k\""}));
  CHECK_FALSE(std::filesystem::exists(path));
}

}  // namespace kompakt
