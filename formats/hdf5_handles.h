// Handles of the HDF5 C API that close themselves, its error stack as our Error, and the table of element types.
// Internal to formats/hdf5_*.cpp.
#pragma once

#include <hdf5.h>

#include <string>
#include <utility>

#include "formats/dtype.h"

namespace kompakt::hdf5 {

// Any identifier; `close` is the call of its kind (H5Dclose, H5Sclose, ...).
class Handle {
 public:
  Handle() = default;
  Handle(hid_t id, herr_t (*close)(hid_t)) : id_(id), close_(close) {}
  ~Handle() { reset(); }
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(id_, other.id_);
    std::swap(close_, other.close_);
    return *this;
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  hid_t get() const { return id_; }
  explicit operator bool() const { return id_ >= 0; }
  herr_t reset() {
    const hid_t id = std::exchange(id_, -1);
    return id >= 0 ? close_(id) : 0;
  }

 private:
  hid_t id_ = -1;
  herr_t (*close_)(hid_t) = nullptr;
};

// Switches HDF5's own printing off for this thread; once is enough, more do no harm.
void silence();
// Throws an Error: what was attempted, where, and HDF5's stack in one line (innermost cause last).
[[noreturn]] void fail(const std::string& action, const std::string& place);
// The identifier, or the Error.
Handle checked(hid_t id, herr_t (*close)(hid_t), const std::string& action, const std::string& place);
void check(herr_t status, const std::string& action, const std::string& place);

// Little-endian type of file and memory alike: h5py reads the halves, the bfloats appear as custom floats.
Handle type_of(DType dtype);
// The dtype that holds all values of a file's type (big-endian files are converted on reading). Error for other classes.
DType dtype_of(hid_t type, const std::string& place);

}  // namespace kompakt::hdf5
