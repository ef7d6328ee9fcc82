#include "formats/hdf5_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <new>
#include <stdexcept>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"
#include "formats/hdf5_handles.h"

namespace kompakt {
namespace fs = std::filesystem;
namespace {

using hdf5::checked;
using hdf5::Handle;

constexpr unsigned deflate_level = 4;
constexpr std::int64_t max_chunk_bytes = std::int64_t{1} << 31;  // HDF5 stops at 2^32 - 1

std::vector<hsize_t> extents(const std::vector<std::int64_t>& shape) { return {shape.begin(), shape.end()}; }

struct OpenDataset {
  Handle dataset, space;
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape;
};

OpenDataset open_dataset(hid_t file, const std::string& name, const std::string& place) {
  OpenDataset result;
  result.dataset = checked(H5Dopen2(file, name.c_str(), H5P_DEFAULT), H5Dclose, "open the data set", place);
  const Handle properties = checked(H5Dget_create_plist(result.dataset.get()), H5Pclose, "read the layout", place);
  // Such data sets name other files, which an untrusted file must not make us open.
  if (H5Pget_layout(properties.get()) == H5D_VIRTUAL || H5Pget_external_count(properties.get()) > 0)
    throw Error("the data set keeps its data in another file").at(place).allowed("data inside the file itself");
  const Handle type = checked(H5Dget_type(result.dataset.get()), H5Tclose, "read the element type", place);
  result.dtype = hdf5::dtype_of(type.get(), place);
  result.space = checked(H5Dget_space(result.dataset.get()), H5Sclose, "read the shape", place);
  const int rank = H5Sget_simple_extent_ndims(result.space.get());
  if (rank < 0) hdf5::fail("read the shape", place);
  std::vector<hsize_t> sizes(static_cast<std::size_t>(rank));
  if (rank > 0 && H5Sget_simple_extent_dims(result.space.get(), sizes.data(), nullptr) < 0) hdf5::fail("read the shape", place);
  for (const hsize_t size : sizes) {
    if (size > INT64_MAX) throw Error("a dimension of the data set is too large").at(place).given(str(size));
    result.shape.push_back(static_cast<std::int64_t>(size));
  }
  return result;
}

std::vector<std::byte> room_for(const std::vector<std::int64_t>& shape, DType dtype, const std::string& place) {
  const auto count = checked_product(shape);
  std::int64_t bytes = 0;
  if (!count || __builtin_mul_overflow(*count, static_cast<std::int64_t>(size_of(dtype)), &bytes)) throw Error("the size of the data set overflows").at(place).given(shape_text(shape));
  try {
    return std::vector<std::byte>(static_cast<std::size_t>(bytes));
  } catch (const std::exception&) {  // bad_alloc or length_error: a hostile or a truly large shape
    throw Error(str("there is no memory for a data set of ", human_bytes(static_cast<double>(bytes))), ExitCode::resource).at(place).given(shape_text(shape));
  }
}

std::int64_t row_bytes(const OpenDataset& set, const std::string& place) {
  if (set.shape.empty()) throw Error("the data set has no rows: it is a scalar").at(place);
  const auto count = checked_product(std::span(set.shape).subspan(1));
  std::int64_t bytes = 0;
  if (!count || __builtin_mul_overflow(*count, static_cast<std::int64_t>(size_of(set.dtype)), &bytes)) throw Error("the size of a row overflows").at(place).given(shape_text(set.shape));
  return bytes;
}

// Memory and file spaces of rows first .. first + count - 1.
std::pair<Handle, Handle> row_spaces(const OpenDataset& set, std::int64_t first, std::int64_t count, const std::string& place) {
  std::vector<hsize_t> start(set.shape.size(), 0), size = extents(set.shape);
  start[0] = static_cast<hsize_t>(first);
  size[0] = static_cast<hsize_t>(count);
  Handle space = checked(H5Dget_space(set.dataset.get()), H5Sclose, "read the shape", place);
  hdf5::check(H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, start.data(), nullptr, size.data(), nullptr), "select rows", place);
  Handle memory = checked(H5Screate_simple(static_cast<int>(size.size()), size.data(), nullptr), H5Sclose, "select rows", place);
  return {std::move(memory), std::move(space)};
}

// Groups on the way are made; no time stamps, so that equal content gives equal bytes.
Handle create_dataset(hid_t file, const std::string& name, DType dtype, hid_t space, const Handle& properties, const std::string& place) {
  if (name.empty() || name.find('\0') != std::string::npos || invalid_utf8(name)) throw Error("the name of the data set is empty or not valid UTF-8").at(place);
  const Handle links = checked(H5Pcreate(H5P_LINK_CREATE), H5Pclose, "create the data set", place);
  hdf5::check(H5Pset_create_intermediate_group(links.get(), 1), "create the data set", place);
  hdf5::check(H5Pset_char_encoding(links.get(), H5T_CSET_UTF8), "create the data set", place);
  hdf5::check(H5Pset_obj_track_times(properties.get(), false), "create the data set", place);
  const Handle type = hdf5::type_of(dtype);
  return checked(H5Dcreate2(file, name.c_str(), type.get(), space, links.get(), properties.get(), H5P_DEFAULT), H5Dclose, "create the data set", place);
}

herr_t collect_dataset(hid_t, const char* name, const H5O_info_t* info, void* target) {
  if (info->type == H5O_TYPE_DATASET) static_cast<std::vector<std::string>*>(target)->emplace_back(name);
  return 0;
}

}  // namespace

struct Hdf5File::State {
  fs::path path, temporary;  // temporary is empty unless the file is being created
  Mode mode = Mode::read;
  Handle file;

  ~State() {
    file.reset();
    std::error_code ignored;
    if (!temporary.empty()) fs::remove(temporary, ignored);
  }
  std::string place(const std::string& dataset) const { return str(path.string(), ": data set \"", dataset, "\""); }
  void need_writing(const std::string& dataset) const {
    if (mode == Mode::read) throw std::logic_error("Hdf5File: the file was opened for reading: " + place(dataset));
  }
};

Hdf5File::Hdf5File(const fs::path& path, Mode mode) : state_(std::make_unique<State>()) {
  hdf5::silence();
  state_->path = path;
  state_->mode = mode;
  if (mode == Mode::create) {
    if (path.has_parent_path()) make_folder(path.parent_path());
    state_->temporary = path.parent_path() / str(".", path.filename().string(), ".tmp-", ::getpid());
    state_->file = checked(H5Fcreate(state_->temporary.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT), H5Fclose, "create the file", path.string());
    return;
  }
  if (!fs::exists(path)) throw Error("the file does not exist").at(path.string()).hint("check the path; relative paths in a recipe start at the recipe's folder");
  if (!fs::is_regular_file(path)) throw Error("is not a regular file").at(path.string());
  if (H5Fis_hdf5(path.c_str()) <= 0) {
    H5Eclear2(H5E_DEFAULT);
    throw Error("the file is not an HDF5 file").at(path.string()).hint("it may be cut short, or still be written");
  }
  state_->file = checked(H5Fopen(path.c_str(), mode == Mode::read ? H5F_ACC_RDONLY : H5F_ACC_RDWR, H5P_DEFAULT), H5Fclose, "open the file", path.string());
}

Hdf5File::~Hdf5File() = default;
Hdf5File::Hdf5File(Hdf5File&&) noexcept = default;
Hdf5File& Hdf5File::operator=(Hdf5File&&) noexcept = default;

void Hdf5File::write(const std::string& dataset, const TensorData& tensor) {
  state_->need_writing(dataset);
  const std::string place = state_->place(dataset);
  if (static_cast<std::size_t>(tensor.elements()) * size_of(tensor.dtype) != tensor.bytes.size()) throw std::logic_error("Hdf5File::write: bytes do not match the shape of " + place);
  const auto sizes = extents(tensor.shape);
  const Handle space = sizes.empty() ? checked(H5Screate(H5S_SCALAR), H5Sclose, "create the data set", place)
                                     : checked(H5Screate_simple(static_cast<int>(sizes.size()), sizes.data(), nullptr), H5Sclose, "create the data set", place);
  const Handle properties = checked(H5Pcreate(H5P_DATASET_CREATE), H5Pclose, "create the data set", place);
  const Handle set = create_dataset(state_->file.get(), dataset, tensor.dtype, space.get(), properties, place);
  const Handle type = hdf5::type_of(tensor.dtype);
  if (!tensor.bytes.empty()) hdf5::check(H5Dwrite(set.get(), type.get(), H5S_ALL, H5S_ALL, H5P_DEFAULT, tensor.bytes.data()), "write the data set", place);
}

TensorData Hdf5File::read(const std::string& dataset) const {
  const std::string place = state_->place(dataset);
  const OpenDataset set = open_dataset(state_->file.get(), dataset, place);
  auto bytes = room_for(set.shape, set.dtype, place);
  const Handle type = hdf5::type_of(set.dtype);
  if (!bytes.empty()) hdf5::check(H5Dread(set.dataset.get(), type.get(), H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes.data()), "read the data set", place);
  return make_tensor(dataset, set.dtype, set.shape, std::move(bytes));
}

void Hdf5File::create_growing(const std::string& dataset, DType dtype, std::vector<std::int64_t> row_shape, std::int64_t chunk_rows) {
  state_->need_writing(dataset);
  const std::string place = state_->place(dataset);
  const auto row = checked_product(row_shape);
  std::int64_t chunk_bytes = 0;
  if (!row || *row == 0 || chunk_rows < 1) throw std::logic_error("Hdf5File::create_growing: rows and chunks must not be empty: " + place);
  if (__builtin_mul_overflow(*row, static_cast<std::int64_t>(size_of(dtype)), &chunk_bytes) || __builtin_mul_overflow(chunk_bytes, chunk_rows, &chunk_bytes) || chunk_bytes > max_chunk_bytes)
    throw Error("a chunk of the data set is too large").at(place).given(str(chunk_rows, " rows of ", shape_text(row_shape))).allowed(str("at most ", max_chunk_bytes, " bytes"));
  row_shape.insert(row_shape.begin(), 0);
  std::vector<hsize_t> sizes = extents(row_shape), most = sizes, chunk = sizes;
  most[0] = H5S_UNLIMITED;
  chunk[0] = static_cast<hsize_t>(chunk_rows);
  const int rank = static_cast<int>(sizes.size());
  const Handle space = checked(H5Screate_simple(rank, sizes.data(), most.data()), H5Sclose, "create the data set", place);
  const Handle properties = checked(H5Pcreate(H5P_DATASET_CREATE), H5Pclose, "create the data set", place);
  hdf5::check(H5Pset_chunk(properties.get(), rank, chunk.data()), "divide into chunks", place);
  hdf5::check(H5Pset_shuffle(properties.get()), "compress", place);  // bytes of equal rank together: floats deflate better
  hdf5::check(H5Pset_deflate(properties.get(), deflate_level), "compress", place);
  create_dataset(state_->file.get(), dataset, dtype, space.get(), properties, place);
}

void Hdf5File::append_rows(const std::string& dataset, std::span<const std::byte> rows) {
  state_->need_writing(dataset);
  const std::string place = state_->place(dataset);
  OpenDataset set = open_dataset(state_->file.get(), dataset, place);
  const std::int64_t width = row_bytes(set, place);
  if (width == 0 || rows.size() % static_cast<std::size_t>(width) != 0) throw std::logic_error("Hdf5File::append_rows: bytes are not whole rows: " + place);
  const std::int64_t first = set.shape[0], count = static_cast<std::int64_t>(rows.size()) / width;
  if (count == 0) return;
  set.shape[0] = first + count;
  const auto sizes = extents(set.shape);
  hdf5::check(H5Dset_extent(set.dataset.get(), sizes.data()), "grow the data set", place);
  const auto [memory, space] = row_spaces(set, first, count, place);
  const Handle type = hdf5::type_of(set.dtype);
  hdf5::check(H5Dwrite(set.dataset.get(), type.get(), memory.get(), space.get(), H5P_DEFAULT, rows.data()), "write rows", place);
}

TensorData Hdf5File::read_rows(const std::string& dataset, std::int64_t first, std::int64_t count) const {
  const std::string place = state_->place(dataset);
  OpenDataset set = open_dataset(state_->file.get(), dataset, place);
  if (set.shape.empty()) throw Error("the data set has no rows: it is a scalar").at(place);
  if (first < 0 || count < 0 || first > set.shape[0] || count > set.shape[0] - first)
    throw Error("the rows go past the end of the data set").at(place).given(str("rows ", first, " to ", first, " + ", count)).allowed(str("0 to ", set.shape[0]));
  set.shape[0] = count;
  auto bytes = room_for(set.shape, set.dtype, place);
  if (!bytes.empty()) {
    const auto [memory, space] = row_spaces(set, first, count, place);
    const Handle type = hdf5::type_of(set.dtype);
    hdf5::check(H5Dread(set.dataset.get(), type.get(), memory.get(), space.get(), H5P_DEFAULT, bytes.data()), "read rows", place);
  }
  return make_tensor(dataset, set.dtype, set.shape, std::move(bytes));
}

std::int64_t Hdf5File::rows(const std::string& dataset) const {
  const std::string place = state_->place(dataset);
  const OpenDataset set = open_dataset(state_->file.get(), dataset, place);
  if (set.shape.empty()) throw Error("the data set has no rows: it is a scalar").at(place);
  return set.shape[0];
}

bool Hdf5File::has(const std::string& path) const {
  // Every step must exist: H5Lexists fails when an earlier one is missing.
  std::string so_far;
  for (const std::string& part : split(path, '/')) {
    if (part.empty()) continue;
    so_far += (so_far.empty() ? "" : "/") + part;
    if (H5Lexists(state_->file.get(), so_far.c_str(), H5P_DEFAULT) <= 0) {
      H5Eclear2(H5E_DEFAULT);
      return false;
    }
  }
  return true;
}

std::vector<std::string> Hdf5File::list(const std::string& group) const {
  const std::string place = str(state_->path.string(), ": group \"", group, "\"");
  const Handle object = checked(H5Oopen(state_->file.get(), group.c_str(), H5P_DEFAULT), H5Oclose, "open the group", place);
  std::vector<std::string> names;
  hdf5::check(H5Ovisit2(object.get(), H5_INDEX_NAME, H5_ITER_INC, collect_dataset, &names, H5O_INFO_BASIC), "list the group", place);
  std::string prefix = group;
  while (!prefix.empty() && prefix.front() == '/') prefix.erase(0, 1);
  while (!prefix.empty() && prefix.back() == '/') prefix.pop_back();
  for (std::string& name : names) name = name == "." ? prefix : prefix.empty() ? name : prefix + "/" + name;
  std::sort(names.begin(), names.end());
  return names;
}

void Hdf5File::set_attribute(const std::string& name, const std::string& value) {
  const std::string place = str(state_->path.string(), ": attribute \"", name, "\"");
  state_->need_writing(name);
  if (name.empty() || name.find('\0') != std::string::npos || value.find('\0') != std::string::npos || invalid_utf8(value)) throw Error("the attribute is not valid UTF-8 text").at(place);
  if (H5Aexists(state_->file.get(), name.c_str()) > 0) hdf5::check(H5Adelete(state_->file.get(), name.c_str()), "replace the attribute", place);
  // Of variable length: fixed ones end at 64 KiB.
  const Handle type = checked(H5Tcopy(H5T_C_S1), H5Tclose, "write the attribute", place);
  hdf5::check(H5Tset_size(type.get(), H5T_VARIABLE), "write the attribute", place);
  hdf5::check(H5Tset_cset(type.get(), H5T_CSET_UTF8), "write the attribute", place);
  const Handle space = checked(H5Screate(H5S_SCALAR), H5Sclose, "write the attribute", place);
  const Handle attribute = checked(H5Acreate2(state_->file.get(), name.c_str(), type.get(), space.get(), H5P_DEFAULT, H5P_DEFAULT), H5Aclose, "write the attribute", place);
  const char* text = value.c_str();
  hdf5::check(H5Awrite(attribute.get(), type.get(), &text), "write the attribute", place);
}

std::string Hdf5File::attribute(const std::string& name) const {
  const std::string place = str(state_->path.string(), ": attribute \"", name, "\"");
  const Handle attribute = checked(H5Aopen(state_->file.get(), name.c_str(), H5P_DEFAULT), H5Aclose, "open the attribute", place);
  const Handle type = checked(H5Aget_type(attribute.get()), H5Tclose, "read the attribute", place);
  const Handle space = checked(H5Aget_space(attribute.get()), H5Sclose, "read the attribute", place);
  if (H5Tget_class(type.get()) != H5T_STRING || H5Sget_simple_extent_npoints(space.get()) != 1) throw Error("the attribute is not one text").at(place);
  if (H5Tis_variable_str(type.get()) > 0) {
    char* text = nullptr;
    hdf5::check(H5Aread(attribute.get(), type.get(), &text), "read the attribute", place);
    const std::string value = text ? text : "";
    H5Dvlen_reclaim(type.get(), space.get(), H5P_DEFAULT, &text);
    return value;
  }
  std::string value(H5Tget_size(type.get()), '\0');
  hdf5::check(H5Aread(attribute.get(), type.get(), value.data()), "read the attribute", place);
  return value.substr(0, value.find('\0'));
}

void Hdf5File::flush() { hdf5::check(H5Fflush(state_->file.get(), H5F_SCOPE_LOCAL), "flush the file", state_->path.string()); }

void Hdf5File::close() {
  if (!state_->file) return;
  hdf5::check(state_->file.reset(), "close the file", state_->path.string());
  if (state_->mode == Mode::read) return;
  const fs::path& written = state_->temporary.empty() ? state_->path : state_->temporary;
  const int descriptor = ::open(written.c_str(), O_RDONLY | O_CLOEXEC);
  const bool flushed = descriptor >= 0 && ::fsync(descriptor) == 0;
  if (descriptor >= 0) ::close(descriptor);
  if (!flushed) throw Error("cannot flush the file to disk", ExitCode::resource).at(state_->path.string());
  if (state_->temporary.empty()) return;
  std::error_code code;
  fs::rename(state_->temporary, state_->path, code);
  if (code) throw Error(str("cannot rename the finished file: ", code.message())).at(state_->path.string());
  state_->temporary.clear();
}

std::string hdf5_version() {
  unsigned major = 0, minor = 0, release = 0;
  H5get_libversion(&major, &minor, &release);
  return str(major, ".", minor, ".", release);
}

}  // namespace kompakt
