#include "report/event_file.h"

#include <unistd.h>

#include <array>
#include <bit>
#include <chrono>
#include <fstream>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"

namespace kompakt {
namespace {

std::string little_endian(std::uint64_t value, int bytes) {
  std::string out;
  for (int i = 0; i < bytes; ++i) out += static_cast<char>(value >> (8 * i) & 0xff);
  return out;
}

// A checksum of data that holds checksums is weak, so TFRecord rotates and shifts it.
std::uint32_t masked(std::uint32_t crc) { return std::rotr(crc, 15) + 0xa282ead8u; }

// Protobuf: key = field number x 8 + wire type (0 varint, 1 eight bytes, 2 bytes with length, 5 four bytes).
std::string varint(std::uint64_t value) {
  std::string out;
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  return out + static_cast<char>(value);
}
std::string field_varint(int number, std::int64_t value) { return varint(static_cast<std::uint64_t>(number) << 3) + varint(static_cast<std::uint64_t>(value)); }
std::string field_double(int number, double value) { return varint(static_cast<std::uint64_t>(number) << 3 | 1) + little_endian(std::bit_cast<std::uint64_t>(value), 8); }
std::string field_float(int number, float value) { return varint(static_cast<std::uint64_t>(number) << 3 | 5) + little_endian(std::bit_cast<std::uint32_t>(value), 4); }
std::string field_bytes(int number, std::string_view value) { return varint(static_cast<std::uint64_t>(number) << 3 | 2) + varint(value.size()) + std::string(value); }

// tensorflow.Event: wall_time = 1, step = 2, file_version = 3, summary = 5, session_log = 7.
std::string event_head(double wall_time, std::int64_t step) { return field_double(1, wall_time) + field_varint(2, step); }

double seconds_now() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

}  // namespace

std::uint32_t crc32c(std::string_view bytes) {
  static const std::array<std::uint32_t, 256> table = [] {
    std::array<std::uint32_t, 256> out{};
    for (std::uint32_t i = 0; i < 256; ++i) {
      std::uint32_t crc = i;
      for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? crc >> 1 ^ 0x82f63b78u : crc >> 1;
      out[i] = crc;
    }
    return out;
  }();
  std::uint32_t crc = ~0u;
  for (const char c : bytes) crc = crc >> 8 ^ table[(crc ^ static_cast<unsigned char>(c)) & 0xff];
  return ~crc;
}

std::string event_record(std::string_view payload) {
  const std::string length = little_endian(payload.size(), 8);
  return length + little_endian(masked(crc32c(length)), 4) + std::string(payload) + little_endian(masked(crc32c(payload)), 4);
}

std::string event_version(double wall_time) { return field_double(1, wall_time) + field_bytes(3, "brain.Event:2"); }

std::string event_scalar(std::string_view tag, double value, std::int64_t step, double wall_time) {
  // Summary.value = 1, Value.tag = 1, Value.simple_value = 2
  return event_head(wall_time, step) + field_bytes(5, field_bytes(1, field_bytes(1, tag) + field_float(2, static_cast<float>(value))));
}

std::string event_start(std::int64_t step, double wall_time) { return event_head(wall_time, step) + field_bytes(7, field_varint(1, 1)); }  // SessionLog.status = START

struct EventFolder::File {
  std::ofstream stream;
  std::filesystem::path path;
  void add(const std::string& message) {
    const std::string record = event_record(message);
    stream.write(record.data(), static_cast<std::streamsize>(record.size()));
    if (!stream.flush()) throw Error("cannot write TensorBoard's event file", ExitCode::resource).at(path.string()).hint("free some space and run again with --resume, or set tensorboard: false");
  }
};

EventFolder::EventFolder(std::filesystem::path folder) : folder_(std::move(folder)) {}
EventFolder::~EventFolder() = default;

EventFolder::File& EventFolder::file_of(const std::string& stage, std::int64_t step) {
  auto& file = files_[stage];
  if (file) return *file;
  const double now = seconds_now();
  make_folder(folder_ / stage);
  file = std::make_unique<File>();
  file->path = folder_ / stage / str("events.out.tfevents.", static_cast<std::int64_t>(now), ".kompakt.", ::getpid());
  file->stream.open(file->path, std::ios::binary | std::ios::app);
  file->add(event_version(now));
  file->add(event_start(step, now));
  return *file;
}

void EventFolder::metric(const std::string& event, const Json& fields) {
  if (event != "step" && event != "dev") return;
  const double now = seconds_now();
  const auto step = fields.at("step").get<std::int64_t>();
  File& file = file_of(fields.at("stage").get<std::string>(), step);
  for (const auto& [key, value] : fields.items()) {
    if (key == "stage" || key == "step") continue;
    if (value.is_number()) file.add(event_scalar(event + "/" + key, value.get<double>(), step, now));
    if (value.is_object())
      for (const auto& [part, number] : value.items())
        if (number.is_number()) file.add(event_scalar(str(event, "/", key, "/", part), number.get<double>(), step, now));
  }
}

}  // namespace kompakt
