// HDF5 through its C API: data sets, attributes, growing data sets. The only door to HDF5. One thread at a time.
// Every handle is RAII; HDF5's own error printing is off and its stack becomes the Error's text.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "formats/tensor_data.h"

namespace kompakt {

std::string hdf5_version();  // of the library, "1.10.8"

class Hdf5File {
 public:
  enum class Mode { read, create, append };  // create writes under a temporary name until close()
  Hdf5File(const std::filesystem::path& path, Mode mode);
  ~Hdf5File();
  Hdf5File(Hdf5File&&) noexcept;
  Hdf5File& operator=(Hdf5File&&) noexcept;

  void write(const std::string& dataset, const TensorData& tensor);  // creates groups of a/b/c as needed
  TensorData read(const std::string& dataset) const;                 // owning copy
  // A data set of bytes-per-row that can grow along its first dimension; chunked and deflated.
  void create_growing(const std::string& dataset, DType dtype, std::vector<std::int64_t> row_shape, std::int64_t chunk_rows);
  void append_rows(const std::string& dataset, std::span<const std::byte> rows);
  TensorData read_rows(const std::string& dataset, std::int64_t first, std::int64_t count) const;
  std::int64_t rows(const std::string& dataset) const;
  bool has(const std::string& path) const;
  std::vector<std::string> list(const std::string& group = "/") const;  // sorted full paths of all data sets below
  void set_attribute(const std::string& name, const std::string& value);  // on the root
  std::string attribute(const std::string& name) const;
  void flush();
  void close();  // throws on failure; the destructor does not

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kompakt
