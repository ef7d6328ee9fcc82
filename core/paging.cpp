#include "core/paging.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <string>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"

namespace kompakt {
namespace {

std::mutex paging_mutex;
std::map<std::uintptr_t, std::size_t> paging_ranges;  // begin -> size of every PagedMemory

}  // namespace

PagedMemory::PagedMemory(const std::filesystem::path& folder, std::size_t size) : size_(size) {
  if (size == 0) return;
  make_folder(folder);
  std::string name = (folder / "paged-XXXXXX").string();
  const int descriptor = ::mkstemp(name.data());
  const auto fail = [&](const char* what, int code) {
    if (descriptor >= 0) ::close(descriptor);
    throw Error(str(what, ": ", std::strerror(code)), ExitCode::resource).at(folder.string()).hint("free some disk space, or put the run folder on another disk (--out)");
  };
  if (descriptor < 0) fail("cannot create a file for weights", errno);
  ::unlink(name.c_str());
  // Allocated at once: a full disk is an Error here and not a bus error in the middle of the work.
  if (const int code = ::posix_fallocate(descriptor, 0, static_cast<off_t>(size)); code != 0) fail(str("no room for ", human_bytes(static_cast<double>(size)), " of weights").c_str(), code);
  void* memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (memory == MAP_FAILED) fail("cannot map the file", errno);
  ::close(descriptor);
  data_ = static_cast<std::byte*>(memory);
  const std::lock_guard lock(paging_mutex);
  paging_ranges[reinterpret_cast<std::uintptr_t>(data_)] = size_;
}

PagedMemory::~PagedMemory() {
  if (!data_) return;
  {
    const std::lock_guard lock(paging_mutex);
    paging_ranges.erase(reinterpret_cast<std::uintptr_t>(data_));
  }
  ::munmap(data_, size_);
}

std::size_t page_bytes() {
  static const auto bytes = static_cast<std::size_t>(::sysconf(_SC_PAGE_SIZE));
  return bytes;
}

bool is_paged(const void* data) {
  const auto at = reinterpret_cast<std::uintptr_t>(data);
  const std::lock_guard lock(paging_mutex);
  const auto after = paging_ranges.upper_bound(at);
  return after != paging_ranges.begin() && at < std::prev(after)->first + std::prev(after)->second;
}

void release_mapped_pages(const void* data, std::size_t size) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data), page = static_cast<std::uintptr_t>(page_bytes());
  const std::uintptr_t first = (begin + page - 1) / page * page, last = (begin + size) / page * page;
  if (first < last) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

bool release_pages(const void* data, std::size_t size) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  const std::lock_guard lock(paging_mutex);
  const auto after = paging_ranges.upper_bound(begin);
  if (after == paging_ranges.begin()) return false;
  const auto& [start, length] = *std::prev(after);
  if (begin + size > start + length) return false;
  // A shared mapping of a file: the pages stay in the file, only this process lets go of them.
  release_mapped_pages(data, size);
  return true;
}

}  // namespace kompakt
