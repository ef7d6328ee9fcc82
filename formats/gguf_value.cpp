#include "formats/gguf_value.h"

#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "core/error.h"
#include "core/text.h"

namespace kompakt {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF and safetensors are little-endian and are mapped as they are");

using Type = GgufValue::Type;
enum class ValueKind { whole_unsigned, whole_signed, real, truth, text, list };

struct ValueRow {
  Type type;
  const char* name;
  std::size_t width;  // bytes; the least number for texts and lists
  ValueKind kind;
};

// Row i describes the type with number i.
constexpr std::array<ValueRow, 13> value_rows = {{
    {Type::u8, "u8", 1, ValueKind::whole_unsigned},
    {Type::i8, "i8", 1, ValueKind::whole_signed},
    {Type::u16, "u16", 2, ValueKind::whole_unsigned},
    {Type::i16, "i16", 2, ValueKind::whole_signed},
    {Type::u32, "u32", 4, ValueKind::whole_unsigned},
    {Type::i32, "i32", 4, ValueKind::whole_signed},
    {Type::f32, "f32", 4, ValueKind::real},
    {Type::boolean, "bool", 1, ValueKind::truth},
    {Type::string, "string", 8, ValueKind::text},
    {Type::array, "array", 12, ValueKind::list},
    {Type::u64, "u64", 8, ValueKind::whole_unsigned},
    {Type::i64, "i64", 8, ValueKind::whole_signed},
    {Type::f64, "f64", 8, ValueKind::real},
}};

const ValueRow& value_row(Type type) { return value_rows.at(static_cast<std::size_t>(type)); }

const ValueRow& read_value_row(GgufCursor& cursor, const char* what) {
  const std::uint32_t number = cursor.u32(what);
  if (number >= value_rows.size()) throw Error(str("unknown ", what)).at(cursor.place()).given(str(number)).allowed(str("0 to ", value_rows.size() - 1)).hint("the file is damaged");
  return value_rows[number];
}

std::int64_t sign_extended(std::uint64_t bits, std::size_t width) {
  const unsigned shift = 64 - 8 * static_cast<unsigned>(width);
  return static_cast<std::int64_t>(bits << shift) >> shift;
}

std::uint64_t read_bits(GgufCursor& cursor, const ValueRow& row) {
  std::uint64_t bits = 0;
  const auto bytes = cursor.take(row.width, "a value");
  std::memcpy(&bits, bytes.data(), row.width);
  return bits;
}

double real_of(std::uint64_t bits, const ValueRow& row) {
  return row.width == 4 ? static_cast<double>(std::bit_cast<float>(static_cast<std::uint32_t>(bits))) : std::bit_cast<double>(bits);
}

bool truth_of(std::uint64_t bits, const GgufCursor& cursor) {
  if (bits > 1) throw Error("a bool is neither 0 nor 1").at(cursor.place()).given(str(bits)).hint("the file is damaged");
  return bits == 1;
}

void append_bits(std::string& out, std::uint64_t bits, const ValueRow& row) { out.append(reinterpret_cast<const char*>(&bits), row.width); }

std::uint64_t bits_of(double value, const ValueRow& row) {
  return row.width == 4 ? std::bit_cast<std::uint32_t>(static_cast<float>(value)) : std::bit_cast<std::uint64_t>(value);
}

// A whole number must survive the width of its type, or the file would hold another one.
void check_fits(std::int64_t value, const ValueRow& row) {
  const bool fits = row.kind == ValueKind::truth ? value == 0 || value == 1
                    : row.width == 8             ? true
                    : row.kind == ValueKind::whole_signed ? sign_extended(static_cast<std::uint64_t>(value), row.width) == value
                                                          : value >= 0 && static_cast<std::uint64_t>(value) >> (8 * row.width) == 0;
  if (!fits) throw Error(str("the number does not fit the GGUF type ", row.name)).given(str(value));
}

template <class T>
const T& held(const GgufValue& value) {
  if (const T* data = std::get_if<T>(&value.data)) return *data;
  throw std::logic_error(std::string("a GGUF value of type ") + gguf_type_name(value) + " holds data of another type");
}

GgufValue read_list(GgufCursor& cursor) {
  const ValueRow& row = read_value_row(cursor, "element type");
  const std::uint64_t count = cursor.u64("the length of an array");
  if (row.kind == ValueKind::list) throw Error("an array of arrays is not supported").at(cursor.place()).hint("no known writer makes one; the file is probably damaged");
  if (count > cursor.left() / row.width) throw Error(str("an array of ", count, " elements goes past the end of the file")).at(cursor.place()).hint("the file is cut short or damaged");
  GgufValue value{.type = Type::array, .element = row.type, .data = {}};
  const auto size = static_cast<std::size_t>(count);
  if (row.kind == ValueKind::text) {
    auto& texts = value.data.emplace<std::vector<std::string>>();
    texts.reserve(size);
    for (std::size_t i = 0; i < size; ++i) texts.push_back(cursor.text("an element of an array"));
  } else if (row.kind == ValueKind::real) {
    auto& reals = value.data.emplace<std::vector<double>>(size);
    for (double& item : reals) item = real_of(read_bits(cursor, row), row);
  } else {
    auto& wholes = value.data.emplace<std::vector<std::int64_t>>(size);
    for (std::int64_t& item : wholes) {
      const std::uint64_t bits = read_bits(cursor, row);
      item = row.kind == ValueKind::truth ? truth_of(bits, cursor) : row.kind == ValueKind::whole_signed ? sign_extended(bits, row.width) : static_cast<std::int64_t>(bits);
    }
  }
  return value;
}

void append_list(std::string& out, const GgufValue& value) {
  const ValueRow& row = value_row(value.element);
  append_little_endian(out, static_cast<std::uint32_t>(row.type));
  if (row.kind == ValueKind::list) throw std::logic_error("an array of arrays cannot be written to GGUF");
  if (row.kind == ValueKind::text) {
    const auto& texts = held<std::vector<std::string>>(value);
    append_little_endian(out, static_cast<std::uint64_t>(texts.size()));
    for (const auto& item : texts) append_gguf_text(out, item);
  } else if (row.kind == ValueKind::real) {
    const auto& reals = held<std::vector<double>>(value);
    append_little_endian(out, static_cast<std::uint64_t>(reals.size()));
    for (const double item : reals) append_bits(out, bits_of(item, row), row);
  } else {
    const auto& wholes = held<std::vector<std::int64_t>>(value);
    append_little_endian(out, static_cast<std::uint64_t>(wholes.size()));
    for (const std::int64_t item : wholes) {
      check_fits(item, row);
      append_bits(out, static_cast<std::uint64_t>(item), row);
    }
  }
}

}  // namespace

std::span<const std::byte> GgufCursor::take(std::uint64_t count, const char* what) {
  if (count > left()) throw Error(str("the file ends inside ", what, ": ", count, " bytes are needed at byte ", position_, ", ", left(), " are left")).at(place_).hint("the file is cut short or damaged: download or copy it again");
  const auto result = bytes_.subspan(position_, static_cast<std::size_t>(count));
  position_ += static_cast<std::size_t>(count);
  return result;
}

std::uint32_t GgufCursor::u32(const char* what) {
  std::uint32_t value;
  std::memcpy(&value, take(sizeof value, what).data(), sizeof value);
  return value;
}

std::uint64_t GgufCursor::u64(const char* what) {
  std::uint64_t value;
  std::memcpy(&value, take(sizeof value, what).data(), sizeof value);
  return value;
}

std::string GgufCursor::text(const char* what) {
  const std::uint64_t length = u64(what);
  const auto bytes = take(length, what);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

GgufValue read_gguf_value(GgufCursor& cursor) {
  const ValueRow& row = read_value_row(cursor, "value type");
  if (row.kind == ValueKind::list) return read_list(cursor);
  GgufValue value{.type = row.type, .data = {}};
  if (row.kind == ValueKind::text) {
    value.data = cursor.text("a text value");
    return value;
  }
  const std::uint64_t bits = read_bits(cursor, row);
  if (row.kind == ValueKind::whole_unsigned) value.data = bits;
  else if (row.kind == ValueKind::whole_signed) value.data = sign_extended(bits, row.width);
  else if (row.kind == ValueKind::truth) value.data = truth_of(bits, cursor);
  else value.data = real_of(bits, row);
  return value;
}

void append_gguf_text(std::string& out, const std::string& text) {
  append_little_endian(out, static_cast<std::uint64_t>(text.size()));
  out += text;
}

void append_gguf_value(std::string& out, const GgufValue& value) {
  const ValueRow& row = value_row(value.type);
  append_little_endian(out, static_cast<std::uint32_t>(row.type));
  switch (row.kind) {
    case ValueKind::list: append_list(out, value); return;
    case ValueKind::text: append_gguf_text(out, held<std::string>(value)); return;
    case ValueKind::real: append_bits(out, bits_of(held<double>(value), row), row); return;
    case ValueKind::truth: append_bits(out, held<bool>(value), row); return;
    case ValueKind::whole_signed:
      check_fits(held<std::int64_t>(value), row);
      append_bits(out, static_cast<std::uint64_t>(held<std::int64_t>(value)), row);
      return;
    case ValueKind::whole_unsigned:
      if (row.width < 8) check_fits(static_cast<std::int64_t>(held<std::uint64_t>(value)), row);
      append_bits(out, held<std::uint64_t>(value), row);
      return;
  }
}

std::string gguf_type_name(const GgufValue& value) {
  if (value.type != Type::array) return value_row(value.type).name;
  return std::string("array of ") + value_row(value.element).name;
}

GgufValue GgufValue::uint32(std::uint32_t v) { return {.type = Type::u32, .data = std::uint64_t{v}}; }
GgufValue GgufValue::int32(std::int32_t v) { return {.type = Type::i32, .data = std::int64_t{v}}; }
GgufValue GgufValue::uint64(std::uint64_t v) { return {.type = Type::u64, .data = v}; }
GgufValue GgufValue::float32(float v) { return {.type = Type::f32, .data = static_cast<double>(v)}; }
GgufValue GgufValue::boolean_(bool v) { return {.type = Type::boolean, .data = v}; }
GgufValue GgufValue::text(std::string v) { return {.type = Type::string, .data = std::move(v)}; }
GgufValue GgufValue::texts(std::vector<std::string> v) { return {.type = Type::array, .element = Type::string, .data = std::move(v)}; }
GgufValue GgufValue::floats(std::vector<double> v) { return {.type = Type::array, .element = Type::f32, .data = std::move(v)}; }
GgufValue GgufValue::int32s(std::vector<std::int64_t> v) { return {.type = Type::array, .element = Type::i32, .data = std::move(v)}; }

}  // namespace kompakt
