#include "core/files.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "core/error.h"
#include "core/text.h"

namespace kompakt {
namespace fs = std::filesystem;
namespace {

Error file_error(const std::string& action, const fs::path& path, int code) {
  const bool full = code == ENOSPC || code == EDQUOT || code == EFBIG;  // disk, quota, the shell's `ulimit -f`
  Error error(str("cannot ", action, ": ", std::strerror(code)), full ? ExitCode::resource : ExitCode::user);
  error.at(path.string());
  if (code == ENOENT) error.hint("check the path; relative paths in a recipe start at the recipe's folder");
  if (code == EACCES || code == EPERM || code == EROFS) error.hint("check the permissions, or choose another folder (--out for a run, store: in the recipe for the store)");
  if (full) error.hint("free some space and run again with --resume");
  return error;
}

void flush_folder(const fs::path& folder) {
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) return;
  ::fsync(descriptor);
  ::close(descriptor);
}

fs::path temporary_name(const fs::path& path) {
  fs::path name = path.parent_path() / str(".", path.filename().string(), ".tmp-", ::getpid());
  return name;
}

}  // namespace

MappedFile::MappedFile(const fs::path& path) : path_(path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) throw file_error("open the file", path, errno);
  struct stat info {};
  if (::fstat(descriptor, &info) != 0) {
    const int code = errno;
    ::close(descriptor);
    throw file_error("read the file", path, code);
  }
  if (!S_ISREG(info.st_mode)) {
    ::close(descriptor);
    throw Error(S_ISDIR(info.st_mode) ? "is a folder, a file is needed" : "is not a regular file").at(path.string());
  }
  size_ = static_cast<std::size_t>(info.st_size);
  if (size_ > 0) {
    void* memory = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor, 0);
    if (memory == MAP_FAILED) {
      const int code = errno;
      ::close(descriptor);
      throw file_error("map the file", path, code);
    }
    data_ = static_cast<const std::byte*>(memory);
  }
  ::close(descriptor);
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)), path_(std::move(other.path_)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(path_, other.path_);
  return *this;
}

AtomicFile::AtomicFile(fs::path path) : path_(std::move(path)) {
  if (path_.has_parent_path()) make_folder(path_.parent_path());
  temporary_ = temporary_name(path_);
  descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor_ < 0) throw file_error("create the file", path_, errno);
}

AtomicFile::~AtomicFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  ::unlink(temporary_.c_str());
}

void AtomicFile::fail(const char* action) const { throw file_error(action, path_, errno); }

void AtomicFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::write(descriptor_, bytes.data(), bytes.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail("write the file");
    bytes = bytes.subspan(static_cast<std::size_t>(count));
    written_ += static_cast<std::size_t>(count);
  }
}

void AtomicFile::write(std::string_view text) { write(std::as_bytes(std::span(text.data(), text.size()))); }

void AtomicFile::commit() {
  if (::fsync(descriptor_) != 0) fail("flush the file");
  if (::close(std::exchange(descriptor_, -1)) != 0) fail("close the file");
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail("rename the finished file");
  flush_folder(path_.has_parent_path() ? path_.parent_path() : fs::path("."));
}

AtomicFolder::AtomicFolder(fs::path path) : target_(std::move(path)) {
  if (!target_.has_filename()) target_ = target_.parent_path();  // "out/" and "out" are the same folder
  if (target_.has_parent_path()) make_folder(target_.parent_path());
  temporary_ = temporary_name(target_);
  std::error_code ignored;
  fs::remove_all(temporary_, ignored);
  make_folder(temporary_);
}

AtomicFolder::~AtomicFolder() {
  std::error_code ignored;
  if (!committed_) fs::remove_all(temporary_, ignored);
}

void AtomicFolder::commit() {
  for (const auto& entry : fs::recursive_directory_iterator(temporary_))
    if (entry.is_directory()) flush_folder(entry.path());
  flush_folder(temporary_);
  std::error_code code;
  fs::path old;
  if (fs::exists(target_)) {
    // A folder cannot be replaced in one call: move the older one aside first, so that the target name never holds half a result.
    old = temporary_.string() + "-old";
    fs::rename(target_, old, code);
    if (code) throw file_error("replace the folder", target_, code.value());
  }
  fs::rename(temporary_, target_, code);
  if (code) throw file_error("rename the finished folder", target_, code.value());
  committed_ = true;
  flush_folder(target_.has_parent_path() ? target_.parent_path() : fs::path("."));
  if (!old.empty()) fs::remove_all(old, code);
}

FolderLock::FolderLock(const fs::path& folder) {
  make_folder(folder);
  const fs::path path = folder / ".lock";
  descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (descriptor_ < 0) throw file_error("lock the folder", folder, errno);
  if (::flock(descriptor_, LOCK_EX | LOCK_NB) != 0) {
    const int code = errno;
    char holder[32] = {};
    const ssize_t count = ::read(descriptor_, holder, sizeof holder - 1);
    ::close(std::exchange(descriptor_, -1));
    if (code != EWOULDBLOCK) throw file_error("lock the folder", folder, code);
    throw Error(str("another kompakt is at work in this folder (process ", count > 0 ? trim(holder) : "unknown", ")"))
        .at(folder.string())
        .hint("wait until it has ended, or choose another folder with --out");
  }
  const std::string id = str(::getpid(), "\n");
  if (::ftruncate(descriptor_, 0) != 0 || ::write(descriptor_, id.data(), id.size()) < 0) throw file_error("lock the folder", folder, errno);
}

FolderLock::~FolderLock() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

TemporaryFolder::TemporaryFolder() {
  std::string pattern = (fs::temp_directory_path() / "kompakt-XXXXXX").string();
  if (!::mkdtemp(pattern.data())) throw file_error("create a temporary folder", pattern, errno);
  path_ = pattern;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

std::string read_text(const fs::path& path) { return std::string(MappedFile(path).text()); }

void write_text(const fs::path& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

void make_folder(const fs::path& path) {
  std::error_code code;
  fs::create_directories(path, code);
  if (code) throw file_error("create the folder", path, code.value());
}

void link_or_copy(const fs::path& from, const fs::path& to) {
  std::error_code code;
  if (to.has_parent_path()) make_folder(to.parent_path());
  fs::create_hard_link(from, to, code);
  if (!code) return;
  fs::copy_file(from, to, fs::copy_options::overwrite_existing, code);
  if (code) throw file_error("copy the file", to, code.value());
}

std::size_t bytes_on_disk(const fs::path& path) {
  if (!fs::exists(path)) throw file_error("read", path, ENOENT);
  if (fs::is_regular_file(path)) return fs::file_size(path);
  std::size_t total = 0;
  for (const auto& entry : fs::recursive_directory_iterator(path))
    if (entry.is_regular_file()) total += entry.file_size();
  return total;
}

}  // namespace kompakt
