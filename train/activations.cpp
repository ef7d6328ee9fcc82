#include "train/activations.h"

#include <ATen/ATen.h>
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <mutex>
#include <string>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"

namespace kompakt {

struct Activations::File {
  struct Slot {
    off_t offset = 0;
    std::size_t bytes = 0;
  };
  int descriptor = -1;
  std::filesystem::path folder;
  std::mutex mutex;
  std::vector<Slot> slots;
  off_t end = 0;

  explicit File(std::filesystem::path where) : folder(std::move(where)) {
    make_folder(folder);
    std::string name = (folder / "activations-XXXXXX").string();
    descriptor = ::mkstemp(name.data());
    if (descriptor < 0) fail("create a file for activations");
    ::unlink(name.c_str());
  }
  ~File() {
    if (descriptor >= 0) ::close(descriptor);
  }
  [[noreturn]] void fail(const char* action) const {
    throw Error(str("cannot ", action, ": ", std::strerror(errno)), ExitCode::resource).at(folder.string()).hint("free some disk space, or set spill: false");
  }
  // Every byte of a slot through `move` (pread or pwrite).
  template <class Move, class Byte>
  void transfer(const Slot& slot, Byte* data, const Move& move, const char* action) const {
    for (std::size_t done = 0; done < slot.bytes;) {
      const ssize_t count = move(descriptor, data + done, slot.bytes - done, slot.offset + static_cast<off_t>(done));
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) fail(action);
      done += static_cast<std::size_t>(count);
    }
  }
};

Activations::Activations(std::filesystem::path folder) {
  if (!folder.empty()) file_ = std::make_unique<File>(std::move(folder));
}
Activations::~Activations() = default;
Activations::Activations(Activations&&) noexcept = default;
Activations& Activations::operator=(Activations&&) noexcept = default;

void Activations::resize(std::size_t batches) {
  values_.resize(batches);
  if (file_) file_->slots.resize(batches);
}

void Activations::put(std::size_t batch, const at::Tensor& value) {
  if (!file_ || !value.device().is_cpu() || (value.scalar_type() != at::kFloat && value.scalar_type() != at::kBFloat16)) {
    values_[batch] = value;
    return;
  }
  const at::Tensor dense = value.contiguous();
  File::Slot& slot = file_->slots[batch];
  if (slot.bytes != dense.nbytes()) {
    const std::lock_guard lock(file_->mutex);
    slot = {file_->end, dense.nbytes()};
    file_->end += static_cast<off_t>(dense.nbytes());
  }
  file_->transfer(slot, static_cast<const char*>(dense.const_data_ptr()), ::pwrite, "write activations");
  values_[batch] = at::empty(dense.sizes(), dense.options().device(at::kMeta));
}

at::Tensor Activations::get(std::size_t batch) const {
  const at::Tensor& value = values_[batch];
  if (!value.defined() || !value.is_meta()) return value;
  at::Tensor out = at::empty(value.sizes(), value.scalar_type());
  file_->transfer(file_->slots[batch], static_cast<char*>(out.mutable_data_ptr()), ::pread, "read activations");
  return out;
}

void Activations::drop(std::size_t batch) { values_[batch] = at::Tensor(); }

}  // namespace kompakt
