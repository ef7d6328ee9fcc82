// Memory that lies in a file without a name: pages that nobody uses leave the process and come back when they are touched.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace kompakt {

class PagedMemory {
 public:
  // A file of `size` bytes in `folder`, gone with the object. Error when the disk is full or the folder cannot be written.
  PagedMemory(const std::filesystem::path& folder, std::size_t size);
  ~PagedMemory();
  PagedMemory(const PagedMemory&) = delete;
  PagedMemory& operator=(const PagedMemory&) = delete;
  std::span<std::byte> bytes() const { return {data_, size_}; }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

std::size_t page_bytes();
// Lets the whole pages inside [data, data + size) leave this process when they belong to a PagedMemory; their content stays.
// False, and nothing done, for any other memory.
bool release_pages(const void* data, std::size_t size);
// The same for memory that maps a file read-only (MappedFile): read again when touched.
void release_mapped_pages(const void* data, std::size_t size);
bool is_paged(const void* data);  // belongs to a PagedMemory

}  // namespace kompakt
