// The header is read by events (SAX) and not as a tree: duplicates are seen, and depth and memory are bounded.
#include "formats/safetensors_header.h"

#include <unordered_set>

#include "core/error.h"
#include "core/json.h"
#include "core/text.h"

namespace kompakt {
namespace {

// States are the nesting: outside, in the file's object, in a tensor's object, in one of its lists, in the metadata.
class HeaderEvents : public nlohmann::json_sax<Json> {
 public:
  explicit HeaderEvents(std::string place) : place_(std::move(place)) {}
  SafetensorsHeader header;

  bool start_object(std::size_t) override {
    if (state_ == State::outside) state_ = State::file;
    else if (state_ == State::file && key_ == "__metadata__") state_ = State::metadata;
    else if (state_ == State::file) begin_tensor();
    else refuse("an object");
    return true;
  }
  bool end_object() override {
    if (state_ == State::tensor) end_tensor();
    state_ = state_ == State::file ? State::outside : State::file;
    return true;
  }
  bool start_array(std::size_t) override {
    if (state_ != State::tensor || (key_ != "shape" && key_ != "data_offsets")) refuse("a list");
    state_ = State::list;
    return true;
  }
  bool end_array() override {
    state_ = State::tensor;
    return true;
  }
  bool key(std::string& name) override {
    const bool fresh = state_ == State::file ? names_.insert(name).second : state_ == State::metadata ? !header.metadata.count(name) : seen_.insert(name).second;
    if (!fresh) throw Error(str(state_ == State::file ? "tensor \"" : "key \"", name, "\" appears twice in the header")).at(where());
    if (state_ == State::tensor && name != "dtype" && name != "shape" && name != "data_offsets")
      throw Error(str("unknown key \"", name, "\" in the header")).at(where()).allowed("dtype, shape, data_offsets");
    key_ = name;
    return true;
  }
  bool string(std::string& value) override {
    if (state_ == State::metadata) header.metadata.emplace(key_, std::move(value));
    else if (state_ == State::tensor && key_ == "dtype") entry_.dtype = std::move(value);
    else refuse("a text");
    return true;
  }
  bool number_unsigned(std::uint64_t value) override {
    if (state_ != State::list) refuse(str(value));
    if (value > INT64_MAX) throw Error(str("the number in \"", key_, "\" is too large")).at(where()).given(str(value)).allowed("0 to 2^63 - 1");
    numbers().push_back(static_cast<std::int64_t>(value));
    if (key_ == "shape" && entry_.shape.size() > max_rank) throw Error("the tensor has too many dimensions").at(where()).allowed(str("at most ", max_rank));
    return true;
  }
  bool number_integer(std::int64_t value) override {
    if (state_ != State::list) refuse(str(value));
    throw Error(str("the number in \"", key_, "\" is negative")).at(where()).given(str(value)).allowed("0 to 2^63 - 1");
  }
  bool number_float(double, const std::string& text) override { refuse(text); }
  bool boolean(bool value) override { refuse(value ? "true" : "false"); }
  bool null() override { refuse("null"); }
  bool binary(Json::binary_t&) override { refuse("binary data"); }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& error) override {
    throw Error("the header is not valid JSON").at(place_).given(error.what()).hint(str("the mistake is at byte ", 8 + position, " of the file; it is damaged or not a safetensors file"));
  }

 private:
  enum class State { outside, file, tensor, list, metadata };
  static constexpr std::size_t max_rank = 64;

  std::string where() const { return state_ == State::tensor || state_ == State::list ? str(place_, ": tensor \"", entry_.name, "\"") : place_; }
  [[noreturn]] void refuse(const std::string& given) const {
    const char* needed = state_ == State::outside     ? "one object"
                         : state_ == State::file      ? (key_ == "__metadata__" ? "an object of texts" : "an object with dtype, shape and data_offsets")
                         : state_ == State::metadata  ? "a text"
                         : state_ == State::list      ? "whole numbers from 0 to 2^63 - 1"
                         : key_ == "dtype"            ? "a text, for example \"F32\""
                                                      : "a list of whole numbers";
    throw Error(str("the header has a wrong value for \"", key_, "\"")).at(where()).given(given).allowed(needed);
  }
  std::vector<std::int64_t>& numbers() { return key_ == "shape" ? entry_.shape : offsets_; }
  void begin_tensor() {
    state_ = State::tensor;
    entry_ = {};
    entry_.name = key_;
    offsets_.clear();
    seen_.clear();
  }
  void end_tensor() {
    for (const char* needed : {"dtype", "shape", "data_offsets"})
      if (!seen_.count(needed)) throw Error(str("the header lacks \"", needed, "\"")).at(where()).hint("the file is damaged or not a safetensors file");
    if (offsets_.size() != 2) throw Error("data_offsets needs exactly two numbers").at(where()).given(shape_text(offsets_));
    entry_.begin = offsets_[0];
    entry_.end = offsets_[1];
    header.entries.push_back(std::move(entry_));
  }

  std::string place_, key_;
  State state_ = State::outside;
  SafetensorsEntry entry_;
  std::vector<std::int64_t> offsets_;
  std::unordered_set<std::string> names_, seen_;
};

void append_json_text(std::string& out, const std::string& text) { out += nlohmann::json(text).dump(); }

}  // namespace

SafetensorsHeader parse_safetensors_header(std::string_view text, const std::string& place) {
  if (const auto bad = invalid_utf8(text)) throw Error("the header is not valid UTF-8").at(place).hint(str("the mistake is at byte ", 8 + *bad, " of the file; it is damaged or not a safetensors file"));
  HeaderEvents events(place);
  Json::sax_parse(text, &events);
  return std::move(events.header);
}

std::string write_safetensors_header(const std::vector<TensorData>& tensors, const std::map<std::string, std::string>& metadata) {
  std::string out = "{";
  if (!metadata.empty()) {
    out += "\"__metadata__\":{";
    for (const auto& [key, value] : metadata) {
      if (out.back() != '{') out += ',';
      append_json_text(out, key);
      out += ':';
      append_json_text(out, value);
    }
    out += '}';
  }
  std::size_t offset = 0;
  for (const TensorData& tensor : tensors) {
    if (out.size() > 1) out += ',';
    append_json_text(out, tensor.name);
    out += str(":{\"dtype\":\"", name_of(tensor.dtype), "\",\"shape\":[");
    for (std::size_t i = 0; i < tensor.shape.size(); ++i) out += str(i ? "," : "", tensor.shape[i]);
    out += str("],\"data_offsets\":[", offset, ",", offset + tensor.bytes.size(), "]}");
    offset += tensor.bytes.size();
  }
  out += '}';
  out.append((8 - out.size() % 8) % 8, ' ');
  return out;
}

}  // namespace kompakt
