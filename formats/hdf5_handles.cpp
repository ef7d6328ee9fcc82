#include "formats/hdf5_handles.h"

#include "core/error.h"
#include "core/text.h"

namespace kompakt::hdf5 {
namespace {

herr_t collect_cause(unsigned, const H5E_error2_t* entry, void* target) {
  auto& text = *static_cast<std::string*>(target);
  if (entry->desc && *entry->desc) text += (text.empty() ? "" : "; ") + std::string(entry->desc);
  return 0;
}

// Floats that HDF5 has no name for, by their bit fields.
struct SmallFloat {
  DType dtype;
  std::size_t bytes, mantissa, exponent, bias;
};
constexpr SmallFloat small_floats[] = {{DType::f16, 2, 10, 5, 15}, {DType::bf16, 2, 7, 8, 127}, {DType::f8_e4m3, 1, 3, 4, 7}, {DType::f8_e5m2, 1, 2, 5, 15}};

Handle small_float_type(const SmallFloat& row) {
  Handle type(H5Tcopy(H5T_IEEE_F32LE), H5Tclose);
  // Fields first and size last: each step must leave a type whose fields lie inside it.
  const std::size_t sign = row.mantissa + row.exponent;
  if (H5Tset_fields(type.get(), sign, row.mantissa, row.exponent, 0, row.mantissa) < 0 || H5Tset_precision(type.get(), 8 * row.bytes) < 0 ||
      H5Tset_size(type.get(), row.bytes) < 0 || H5Tset_ebias(type.get(), row.bias) < 0)
    fail("make a number type", std::string(name_of(row.dtype)));
  return type;
}

Handle boolean_type() {
  Handle type(H5Tenum_create(H5T_STD_I8LE), H5Tclose);  // as h5py writes booleans
  const signed char no = 0, yes = 1;
  H5Tenum_insert(type.get(), "FALSE", &no);
  H5Tenum_insert(type.get(), "TRUE", &yes);
  return type;
}

hid_t plain_type(DType dtype) {
  switch (dtype) {
    case DType::f64: return H5T_IEEE_F64LE;
    case DType::f32: return H5T_IEEE_F32LE;
    case DType::i64: return H5T_STD_I64LE;
    case DType::i32: return H5T_STD_I32LE;
    case DType::i16: return H5T_STD_I16LE;
    case DType::i8: return H5T_STD_I8LE;
    case DType::u64: return H5T_STD_U64LE;
    case DType::u32: return H5T_STD_U32LE;
    case DType::u16: return H5T_STD_U16LE;
    case DType::u8: return H5T_STD_U8LE;
    default: return -1;
  }
}

constexpr DType plain_floats[] = {DType::f64, DType::f32}, plain_integers[] = {DType::i64, DType::i32, DType::i16, DType::i8, DType::u64, DType::u32, DType::u16, DType::u8};

}  // namespace

void silence() { H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr); }

void fail(const std::string& action, const std::string& place) {
  std::string cause;
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, collect_cause, &cause);
  H5Eclear2(H5E_DEFAULT);
  Error error(str("HDF5 cannot ", action));
  error.at(place);
  if (!cause.empty()) error.given(cause);
  throw error;
}

Handle checked(hid_t id, herr_t (*close)(hid_t), const std::string& action, const std::string& place) {
  if (id < 0) fail(action, place);
  return {id, close};
}

void check(herr_t status, const std::string& action, const std::string& place) {
  if (status < 0) fail(action, place);
}

Handle type_of(DType dtype) {
  if (dtype == DType::boolean) return boolean_type();
  for (const SmallFloat& row : small_floats)
    if (row.dtype == dtype) return small_float_type(row);
  return {H5Tcopy(plain_type(dtype)), H5Tclose};
}

DType dtype_of(hid_t type, const std::string& place) {
  const H5T_class_t kind = H5Tget_class(type);
  const std::size_t size = H5Tget_size(type);
  if (kind == H5T_FLOAT) {
    std::size_t sign = 0, exponent_at = 0, exponent = 0, mantissa_at = 0, mantissa = 0;
    check(H5Tget_fields(type, &sign, &exponent_at, &exponent, &mantissa_at, &mantissa), "read a number type", place);
    for (const SmallFloat& row : small_floats)
      if (row.bytes == size && row.mantissa == mantissa && row.exponent == exponent && row.bias == H5Tget_ebias(type)) return row.dtype;
    if (size >= 4)
      for (const DType dtype : plain_floats)
        if (size_of(dtype) == size) return dtype;
  }
  if (kind == H5T_INTEGER)
    for (const DType dtype : plain_integers)
      if (size_of(dtype) == size && (H5Tget_sign(type) == H5T_SGN_2) == (name_of(dtype).front() == 'I')) return dtype;
  if (kind == H5T_ENUM && size == 1 && H5Tget_nmembers(type) == 2) return DType::boolean;
  throw Error("the data set has an element type that is not supported").at(place).given(str("HDF5 class ", static_cast<int>(kind), " of ", size, " bytes")).allowed("integers of 8 to 64 bits, floats of 8 to 64 bits, booleans");
}

}  // namespace kompakt::hdf5
