// TensorBoard's records byte by byte, read back by a parser of the format's own description.
#include "report/event_file.h"

#include <catch2/catch.hpp>

#include <bit>
#include <cstring>
#include <vector>

#include "core/files.h"
#include "core/text.h"

using namespace kompakt;

namespace {

std::string event_hex(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) out += str("0123456789abcdef"[static_cast<unsigned char>(c) >> 4], "0123456789abcdef"[c & 15]);
  return out;
}

struct EventRead {
  double wall_time = 0;
  std::int64_t step = 0;
  std::string version, tag;
  float value = 0;
  bool start = false;
};

// Protobuf by hand: enough for the four messages that are written.
struct EventParser {
  std::string_view rest;
  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (int shift = 0;; shift += 7) {
      REQUIRE(!rest.empty());
      const auto byte = static_cast<unsigned char>(rest[0]);
      rest.remove_prefix(1);
      value |= static_cast<std::uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) return value;
    }
  }
  std::string_view take(std::size_t count) {
    REQUIRE(rest.size() >= count);
    const std::string_view out = rest.substr(0, count);
    rest.remove_prefix(count);
    return out;
  }
  template <class T>
  T number() {
    T out;
    std::memcpy(&out, take(sizeof out).data(), sizeof out);
    return out;
  }
};

EventRead event_read(std::string_view payload) {
  EventRead out;
  EventParser event{payload};
  while (!event.rest.empty()) {
    switch (event.varint()) {
      case 1 << 3 | 1: out.wall_time = event.number<double>(); break;
      case 2 << 3: out.step = static_cast<std::int64_t>(event.varint()); break;
      case 3 << 3 | 2: out.version = event.take(event.varint()); break;
      case 7 << 3 | 2: out.start = event.take(event.varint()) == std::string("\x08\x01", 2); break;
      case 5 << 3 | 2: {
        EventParser summary{event.take(event.varint())};
        REQUIRE(summary.varint() == (1 << 3 | 2));
        EventParser value{summary.take(summary.varint())};
        REQUIRE(value.varint() == (1 << 3 | 2));
        out.tag = value.take(value.varint());
        REQUIRE(value.varint() == (2 << 3 | 5));
        out.value = value.number<float>();
        break;
      }
      default: FAIL("a field that is not written");
    }
  }
  return out;
}

std::vector<EventRead> event_file_read(const std::filesystem::path& path) {
  const std::string text = read_text(path);
  std::vector<EventRead> out;
  EventParser file{text};
  while (!file.rest.empty()) {
    const auto length = file.number<std::uint64_t>();
    file.take(4);
    const std::string_view payload = file.take(length);
    CHECK(event_record(payload).substr(12 + length) == file.take(4));
    out.push_back(event_read(payload));
  }
  return out;
}

}  // namespace

TEST_CASE("CRC-32C: the published check values") {
  CHECK(crc32c("") == 0);
  CHECK(crc32c("123456789") == 0xe3069283u);
  CHECK(crc32c(std::string(32, '\0')) == 0x8a9136aau);  // RFC 3720 B.4
  CHECK(crc32c(std::string(32, '\xff')) == 0x62a8ab43u);
}

TEST_CASE("records have the bytes that TensorFlow writes") {
  // The first record of every event file at wall time 0: as written by TensorBoard's own writer (length 24, "brain.Event:2").
  CHECK(event_hex(event_version(0)) == "0900000000000000001a0d627261696e2e4576656e743a32");
  CHECK(event_hex(event_record(event_version(0))).substr(0, 24) == "1800000000000000a37f4b22");
  // loss = 0.5 at step 300, wall time 1.5: written out by hand from the .proto files.
  CHECK(event_hex(event_scalar("loss", 0.5, 300, 1.5)) == "09000000000000f83f10ac022a0d0a0b0a046c6f7373150000003f");
  CHECK(event_hex(event_start(7, 0)) == "090000000000000000" "1007" "3a020801");
}

TEST_CASE("events of metrics become scalars, a file a stage") {
  const TemporaryFolder folder;
  {
    EventFolder events(folder.path() / "tensorboard");
    events.metric("start", {{"recipe", "x"}});
    events.metric("step", {{"stage", "01-finetune"}, {"step", 10}, {"loss", 1.25}, {"parts", {{"cross_entropy", 1.25}}}, {"gradient_norm", 2.0}, {"learning_rate", 1e-3}, {"tokens_per_second", 100.0}, {"memory_bytes", 4096}});
    events.metric("dev", {{"stage", "01-finetune"}, {"epoch", 0.5}, {"step", 10}, {"score", nullptr}});
    events.metric("step", {{"stage", "02-distill"}, {"step", 20}, {"loss", 0.5}, {"parts", Json::object()}});
  }
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder.path() / "tensorboard" / "01-finetune")) files.push_back(entry.path());
  REQUIRE(files.size() == 1);
  CHECK(files[0].filename().string().rfind("events.out.tfevents.", 0) == 0);
  const std::vector<EventRead> events = event_file_read(files[0]);
  REQUIRE(events.size() == 9);  // version, start, six numbers of the step, one of dev (its score is none)
  CHECK(events[0].version == "brain.Event:2");
  CHECK(events[1].start);
  CHECK(events[1].step == 10);
  std::map<std::string, float> values;
  for (std::size_t i = 2; i < events.size(); ++i) {
    values[events[i].tag] = events[i].value;
    CHECK(events[i].step == 10);
    CHECK(events[i].wall_time > 1.6e9);
  }
  CHECK(values.at("step/loss") == 1.25f);
  CHECK(values.at("step/parts/cross_entropy") == 1.25f);
  CHECK(values.at("step/memory_bytes") == 4096.0f);
  CHECK(values.at("dev/epoch") == 0.5f);
  CHECK(std::filesystem::exists(folder.path() / "tensorboard" / "02-distill"));
  CHECK(!std::filesystem::exists(folder.path() / "tensorboard" / "start"));
}
