// Files and folders that appear whole or not at all, locks, maps, hashes.
#include "core/files.h"

#include <catch2/catch.hpp>
#include <unistd.h>

#include "core/error.h"
#include "core/hash.h"
#include "tests/support.h"

namespace kompakt {
namespace fs = std::filesystem;

using testing::contains_all;
using testing::error_text;

TEST_CASE("an atomic file appears at commit, whole") {
  const TemporaryFolder folder;
  const fs::path path = folder.path() / "deep/er/x.txt";
  {
    AtomicFile file(path);
    file.write("half");
    CHECK_FALSE(fs::exists(path));
  }
  CHECK(fs::is_empty(path.parent_path()));
  write_text(path, "old");
  {
    AtomicFile file(path);
    file.write("ne");
    file.write("w");
    CHECK(file.written() == 3);
    CHECK(read_text(path) == "old");
    file.commit();
  }
  CHECK(read_text(path) == "new");
  CHECK(std::distance(fs::directory_iterator(path.parent_path()), fs::directory_iterator()) == 1);
}

TEST_CASE("an atomic folder replaces an older one at commit") {
  const TemporaryFolder folder;
  for (const char* name : {"out", "slash/"}) {
    CAPTURE(name);
    const fs::path target = folder.path() / name;
    make_folder(target);
    write_text(target / "stale.txt", "stale");
    {
      AtomicFolder unfinished(target);
      write_text(unfinished.path() / "a.txt", "half");
    }
    CHECK(fs::exists(target / "stale.txt"));
    AtomicFolder fresh(target);
    write_text(fresh.path() / "sub/a.txt", "whole");
    fresh.commit();
    CHECK(read_text(target / "sub/a.txt") == "whole");
    CHECK_FALSE(fs::exists(target / "stale.txt"));
  }
  CHECK(std::distance(fs::directory_iterator(folder.path()), fs::directory_iterator()) == 2);
}

TEST_CASE("a locked folder names its holder") {
  const TemporaryFolder folder;
  {
    const FolderLock lock(folder.path());
    const std::string holder = std::to_string(::getpid());
    CHECK(contains_all(error_text([&] { FolderLock second(folder.path()); }), {"another kompakt", holder.c_str(), "--out"}));
  }
  CHECK_NOTHROW(FolderLock(folder.path()));
}

TEST_CASE("maps read files, and mistakes are named") {
  const TemporaryFolder folder;
  write_text(folder.path() / "x", "abc");
  write_text(folder.path() / "empty", "");
  MappedFile file(folder.path() / "x");
  CHECK(file.text() == "abc");
  MappedFile moved = std::move(file);
  CHECK(moved.text() == "abc");
  CHECK(MappedFile(folder.path() / "empty").bytes().empty());
  CHECK(contains_all(error_text([&] { MappedFile(folder.path() / "none"); }), {"none", "No such file", "check the path"}));
  CHECK(contains_all(error_text([&] { MappedFile missing(folder.path()); }), {"is a folder"}));
  CHECK(contains_all(error_text([&] { make_folder(folder.path() / "x" / "y"); }), {"cannot create the folder"}));
}

TEST_CASE("links share or copy content; sizes add up") {
  const TemporaryFolder folder;
  write_text(folder.path() / "a", "12345");
  link_or_copy(folder.path() / "a", folder.path() / "sub/b");
  CHECK(read_text(folder.path() / "sub/b") == "12345");
  CHECK(bytes_on_disk(folder.path()) == 10);
  CHECK(bytes_on_disk(folder.path() / "a") == 5);
  CHECK(contains_all(error_text([&] { bytes_on_disk(folder.path() / "none"); }), {"none"}));
}

TEST_CASE("SHA-256 gives the published digests") {
  CHECK(sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(Sha256().update("a").update("bc").hex() == sha256("abc"));
  const TemporaryFolder folder;
  write_text(folder.path() / "x", "abc");
  CHECK(sha256_file(folder.path() / "x") == sha256("abc"));
}

TEST_CASE("the hash of a folder depends on names and contents, not on order") {
  const TemporaryFolder folder;
  write_text(folder.path() / "1/a", "x");
  write_text(folder.path() / "1/sub/b", "y");
  write_text(folder.path() / "2/sub/b", "y");
  write_text(folder.path() / "2/a", "x");
  write_text(folder.path() / "3/a", "y");
  write_text(folder.path() / "3/sub/b", "x");
  CHECK(sha256_folder(folder.path() / "1") == sha256_folder(folder.path() / "2"));
  CHECK(sha256_folder(folder.path() / "1") != sha256_folder(folder.path() / "3"));
}

}  // namespace kompakt
