// TensorBoard's event files: records with masked CRC-32C around a small protobuf, written by hand. Scalars only.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>

#include "core/json.h"

namespace kompakt {

std::uint32_t crc32c(std::string_view bytes);  // Castagnoli, reflected, as in iSCSI: "123456789" -> 0xe3069283

// One record of the TFRecord format: length, its checksum, `payload`, its checksum.
std::string event_record(std::string_view payload);
// Serialized tensorflow.Event messages; `wall_time` in seconds since 1970.
std::string event_version(double wall_time);
std::string event_scalar(std::string_view tag, double value, std::int64_t step, double wall_time);
// "A process starts at this step": a reader drops what an earlier one wrote from here on.
std::string event_start(std::int64_t step, double wall_time);

// Turns the events of metrics.jsonl into FOLDER/<stage>/events.out.tfevents.*, one file per stage and process.
class EventFolder {
 public:
  explicit EventFolder(std::filesystem::path folder);
  ~EventFolder();
  EventFolder(const EventFolder&) = delete;
  EventFolder& operator=(const EventFolder&) = delete;
  // "step" and "dev" become scalars, everything else is passed over. Error with code 4 when the file cannot be written.
  void metric(const std::string& event, const Json& fields);

 private:
  struct File;
  File& file_of(const std::string& stage, std::int64_t step);
  std::filesystem::path folder_;
  std::map<std::string, std::unique_ptr<File>> files_;
};

}  // namespace kompakt
