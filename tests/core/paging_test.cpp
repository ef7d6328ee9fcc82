// Memory in a file: content survives being let go, other memory is left alone.
#include "core/paging.h"

#include <catch2/catch.hpp>
#include <cstring>
#include <vector>

#include "core/files.h"
#include "core/hash.h"
#include "core/system.h"
#include "tests/support.h"

namespace kompakt {

TEST_CASE("pages of a paged memory leave and come back", "[paging]") {
  const TemporaryFolder folder;
  const std::size_t size = std::size_t(32) << 20;
  PagedMemory memory(folder.path(), size);
  REQUIRE(memory.bytes().size() == size);
  CHECK(std::filesystem::is_empty(folder.path()));  // the file has no name
  for (std::size_t i = 0; i < size; i += 64) memory.bytes()[i] = static_cast<std::byte>(i / 64 % 251);
  const std::int64_t full = current_memory_bytes();
  CHECK(is_paged(memory.bytes().data() + 5));
  CHECK(is_paged(memory.bytes().data() + size - 1));
  CHECK(!is_paged(memory.bytes().data() + size));
  CHECK(release_pages(memory.bytes().data(), size));
  CHECK(current_memory_bytes() < full - (std::int64_t(24) << 20));
  bool same = true;
  for (std::size_t i = 0; i < size; i += 64) same = same && memory.bytes()[i] == static_cast<std::byte>(i / 64 % 251);
  CHECK(same);
  CHECK(release_pages(memory.bytes().data() + 100, 10));  // less than a page: nothing to do
  CHECK(!release_pages(memory.bytes().data() + size - 10, 20));
}

TEST_CASE("other memory is not let go", "[paging]") {
  std::vector<std::byte> plain(1 << 20, std::byte{7});
  CHECK(!is_paged(plain.data()));
  CHECK(!release_pages(plain.data(), plain.size()));
  CHECK(plain[70000] == std::byte{7});
  const TemporaryFolder folder;
  const PagedMemory empty(folder.path(), 0);
  CHECK(empty.bytes().empty());
  CHECK(testing::contains_all(testing::error_text([&] { PagedMemory(folder.path(), std::size_t(1) << 60); }), {"weights", "--out"}));
}

TEST_CASE("the hash of a file longer than a piece", "[paging]") {
  const TemporaryFolder folder;
  const std::string text(std::size_t(20) << 20, 'x');
  write_text(folder.path() / "long", text + "y");
  CHECK(sha256_file(folder.path() / "long") == sha256(text + "y"));
}

}  // namespace kompakt
