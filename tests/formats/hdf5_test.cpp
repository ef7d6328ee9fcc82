// HDF5: all element types, growing data sets, whole files by rename, equal bytes, damaged files.
#include "formats/hdf5_file.h"

#include <catch2/catch.hpp>
#include <cstring>
#include <stdexcept>

#include "tests/formats/bytes.h"
#include "tests/support.h"

namespace kompakt {
namespace {

using testing::contains_all;
using testing::error_text;
using Mode = Hdf5File::Mode;

std::vector<std::byte> counted_bytes(std::size_t count) {
  std::vector<std::byte> bytes(count);
  for (std::size_t i = 0; i < count; ++i) bytes[i] = static_cast<std::byte>(i * 7 + 1);
  return bytes;
}

bool same(const TensorData& a, const TensorData& b) {
  return a.dtype == b.dtype && a.shape == b.shape && std::equal(a.bytes.begin(), a.bytes.end(), b.bytes.begin(), b.bytes.end());
}

void write_sample(const std::filesystem::path& path) {
  Hdf5File file(path, Mode::create);
  file.write("group/inner/w", make_tensor("w", {2, 3}, {1, 2, 3, 4, 5, 6}));
  file.create_growing("rows", DType::f16, {2}, 4);
  file.append_rows("rows", counted_bytes(4 * 10));
  file.set_attribute("kind", "teacher cache, ü");
  file.close();
}

}  // namespace

TEST_CASE("every element type survives an HDF5 file") {
  const TemporaryFolder folder;
  std::vector<TensorData> tensors;
  for (int i = 0; i <= static_cast<int>(DType::boolean); ++i) {
    const auto dtype = static_cast<DType>(i);
    auto bytes = counted_bytes(6 * size_of(dtype));
    if (dtype == DType::boolean) bytes = {std::byte{1}, std::byte{0}, std::byte{1}, std::byte{0}, std::byte{0}, std::byte{1}};
    tensors.push_back(make_tensor("type/" + std::string(name_of(dtype)), dtype, {2, 3}, std::move(bytes)));
  }
  tensors.push_back(make_tensor("scalar", {}, {2.5f}));
  tensors.push_back(make_tensor("empty", {0, 3}, {}));
  Hdf5File file(folder.path() / "x.h5", Mode::create);
  for (const auto& tensor : tensors) file.write(tensor.name, tensor);
  file.close();
  const Hdf5File back(folder.path() / "x.h5", Mode::read);
  for (const auto& tensor : tensors) {
    CAPTURE(tensor.name);
    CHECK(same(back.read(tensor.name), tensor));
  }
  CHECK(back.list().size() == tensors.size());
  CHECK(back.list("type").front() == "type/BF16");
  CHECK(back.has("type/F32"));
  CHECK(back.has("type"));
  CHECK_FALSE(back.has("type/F33"));
  CHECK_FALSE(back.has("a/b/c"));
}

TEST_CASE("growing data sets take rows in any portions") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "x.h5";
  const auto all = counted_bytes(4 * 3 * 23);
  {
    Hdf5File file(path, Mode::create);
    file.create_growing("a/rows", DType::i32, {3}, 5);
    CHECK(file.rows("a/rows") == 0);
    std::size_t at = 0;
    for (const std::size_t count : {1u, 0u, 7u, 15u}) {
      file.append_rows("a/rows", std::span(all).subspan(at * 12, count * 12));
      at += count;
    }
    file.close();
  }
  {
    Hdf5File file(path, Mode::append);
    file.append_rows("a/rows", std::span(all).subspan(0, 24));
    file.flush();
    file.close();
  }
  const Hdf5File file(path, Mode::read);
  CHECK(file.rows("a/rows") == 25);
  const auto middle = file.read_rows("a/rows", 4, 9);
  CHECK(middle.shape == std::vector<std::int64_t>{9, 3});
  CHECK(std::memcmp(middle.bytes.data(), all.data() + 48, 108) == 0);
  CHECK(std::memcmp(file.read_rows("a/rows", 23, 2).bytes.data(), all.data(), 24) == 0);
  CHECK(file.read_rows("a/rows", 25, 0).bytes.empty());
  CHECK(contains_all(error_text([&] { file.read_rows("a/rows", 20, 6); }), {"x.h5", "a/rows", "past the end"}));
  CHECK_THROWS_AS(file.read_rows("a/rows", INT64_MAX, INT64_MAX), Error);
  CHECK_THROWS_AS(file.read_rows("a/rows", -1, 1), Error);
}

TEST_CASE("a created file appears whole at close or not at all") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "deep/x.h5";
  {
    Hdf5File file(path, Mode::create);
    file.write("w", make_tensor("w", {1}, {1}));
    CHECK_FALSE(std::filesystem::exists(path));
  }
  CHECK(std::filesystem::is_empty(folder.path() / "deep"));
  {
    Hdf5File file(path, Mode::create);
    Hdf5File moved = std::move(file);
    moved.write("w", make_tensor("w", {1}, {1}));
    moved.close();
    moved.close();
  }
  CHECK(std::filesystem::exists(path));
  CHECK(std::distance(std::filesystem::directory_iterator(folder.path() / "deep"), std::filesystem::directory_iterator()) == 1);
}

TEST_CASE("equal content gives equal bytes") {
  const TemporaryFolder folder;
  write_sample(folder.path() / "a.h5");
  write_sample(folder.path() / "b.h5");
  CHECK(read_text(folder.path() / "a.h5") == read_text(folder.path() / "b.h5"));
}

TEST_CASE("attributes are texts of any length and can be replaced") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "x.h5";
  const std::string large(100'000, 'x');
  Hdf5File file(path, Mode::create);
  file.set_attribute("a", "first");
  file.set_attribute("a", "second");
  file.set_attribute("large", large);
  file.set_attribute("empty", "");
  CHECK_THROWS_AS(file.set_attribute("bad", "\xff"), Error);
  CHECK_THROWS_AS(file.set_attribute("bad", std::string("a\0b", 3)), Error);
  file.close();
  const Hdf5File back(path, Mode::read);
  CHECK(back.attribute("a") == "second");
  CHECK(back.attribute("large") == large);
  CHECK(back.attribute("empty").empty());
  CHECK(contains_all(error_text([&] { back.attribute("absent"); }), {"x.h5", "\"absent\""}));
}

TEST_CASE("mistakes with HDF5 files are named") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "x.h5";
  write_sample(path);
  CHECK(contains_all(error_text([&] { Hdf5File(folder.path() / "none.h5", Mode::read); }), {"none.h5", "does not exist"}));
  CHECK(contains_all(error_text([&] { Hdf5File(folder.path(), Mode::read); }), {"not a regular file"}));
  CHECK(contains_all(error_text([&] { Hdf5File(testing::put_file(folder, "no", "text.h5"), Mode::read); }), {"text.h5", "not an HDF5 file"}));
  CHECK(contains_all(error_text([&] { Hdf5File(path, Mode::read).read("absent/w"); }), {"x.h5", "\"absent/w\"", "cannot open"}));
  CHECK(contains_all(error_text([&] { Hdf5File(path, Mode::read).read("group"); }), {"\"group\""}));
  CHECK(contains_all(error_text([&] { Hdf5File(path, Mode::append).write("rows", make_tensor("w", {1}, {1})); }), {"\"rows\"", "cannot create"}));
  CHECK_THROWS_AS(Hdf5File(path, Mode::read).write("w", make_tensor("w", {1}, {1})), std::logic_error);
  CHECK_THROWS_AS(Hdf5File(path, Mode::append).append_rows("rows", counted_bytes(3)), std::logic_error);
}

TEST_CASE("damaged HDF5 files give Error and nothing else") {
  const TemporaryFolder folder;
  write_sample(folder.path() / "x.h5");
  const std::string good = read_text(folder.path() / "x.h5");
  const auto open_all = [](const std::filesystem::path& path) {
    const Hdf5File file(path, Mode::read);
    for (const auto& name : file.list()) file.read(name);
    file.attribute("kind");
  };
  for (std::size_t size = 0; size < good.size(); size += 61) {
    const auto path = testing::put_file(folder, good.substr(0, size), "cut.h5");
    CHECK_THROWS_AS(open_all(path), Error);
  }
}

}  // namespace kompakt
