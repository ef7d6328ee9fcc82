#include "core/json.h"

#include <cmath>
#include <cstdint>
#include <unordered_set>
#include <vector>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"

namespace kompakt {
namespace {

std::string line_and_column(std::string_view text, std::size_t offset) {
  std::size_t line = 1, column = 1;
  for (std::size_t i = 0; i < std::min(offset, text.size()); ++i) {
    ++column;
    if (text[i] == '\n') {
      ++line;
      column = 1;
    }
  }
  return str(line, ":", column);
}

// Builds the tree by events. The library's own parser looks every new key up in a list (quadratic: a vocabulary of 150,000
// words would take minutes) and keeps the last of two equal keys without a word; this one does neither.
class JsonBuilder : public nlohmann::json_sax<Json> {
 public:
  JsonBuilder(std::string_view text, const std::string& place) : text_(text), place_(place) {}
  Json result;

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(std::int64_t value) override { return add(value); }
  bool number_unsigned(std::uint64_t value) override { return add(value); }
  bool number_float(double value, const std::string&) override { return add(value); }
  bool string(std::string& value) override { return add(std::move(value)); }
  bool binary(Json::binary_t&) override { return false; }
  bool start_object(std::size_t) override { return open(Json::object()); }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(std::string& name) override {
    if (!open_.back().keys.insert(name).second) throw Error(str("key \"", name, "\" appears twice in one JSON object")).at(place_);
    key_ = std::move(name);
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& error) override {
    throw Error("the text is not valid JSON").at(str(place_, ":", line_and_column(text_, position > 0 ? position - 1 : 0))).given(error.what());
  }

 private:
  struct Level {
    Json* container;
    std::unordered_set<std::string> keys;
  };
  Json* place_value(Json value) {
    if (open_.empty()) {
      result = std::move(value);
      return &result;
    }
    Json& container = *open_.back().container;
    if (container.is_array()) return &container.get_ref<Json::array_t&>().emplace_back(std::move(value));
    // The base is a plain vector of pairs; appending to it skips the search, as the key is known to be new.
    std::vector<Json::object_t::value_type>& members = container.get_ref<Json::object_t&>();
    return &members.emplace_back(std::move(key_), std::move(value)).second;
  }
  bool add(Json value) {
    place_value(std::move(value));
    return true;
  }
  bool open(Json container) {
    if (open_.size() >= 200) throw Error("the JSON text is nested too deeply").at(place_).allowed("at most 200 levels");
    open_.push_back({place_value(std::move(container)), {}});
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  std::string_view text_;
  const std::string& place_;
  std::string key_;
  std::vector<Level> open_;
};

const char* type_name(const Json& value) { return value.type_name(); }

Error wrong_type(const Json& value, const std::string& key, const std::string& place, const char* needed) {
  std::string shown = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (shown.size() > 60) shown = shown.substr(0, 57) + "...";
  return Error(str("key \"", key, "\" has the wrong type")).at(place).given(str(shown, " (", type_name(value), ")")).allowed(needed);
}

const Json& member(const Json& object, const std::string& key, const std::string& place) {
  if (!object.is_object() || !object.contains(key)) {
    std::vector<std::string> keys;
    if (object.is_object())
      for (const auto& [name, value] : object.items()) keys.push_back(name);
    throw Error(str("key \"", key, "\" is missing", did_you_mean(key, keys))).at(place);
  }
  return object.at(key);
}

}  // namespace

Json parse_json(std::string_view text, const std::string& place) {
  if (const auto bad = invalid_utf8(text)) throw Error("the JSON text is not valid UTF-8").at(str(place, ":", line_and_column(text, *bad)));
  JsonBuilder builder(text, place);
  Json::sax_parse(text, &builder);
  return std::move(builder.result);
}

Json read_json(const std::filesystem::path& path) { return parse_json(MappedFile(path).text(), path.string()); }

std::string dump_json(const Json& json) { return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"; }

void write_json(const std::filesystem::path& path, const Json& json) { write_text(path, dump_json(json)); }

template <>
std::int64_t json_get<std::int64_t>(const Json& object, const std::string& key, const std::string& place) {
  const Json& value = member(object, key, place);
  if (value.is_number_integer() && !(value.is_number_unsigned() && value.get<std::uint64_t>() > INT64_MAX)) return value.get<std::int64_t>();
  if (value.is_number_float() && value.get<double>() == std::floor(value.get<double>()) && std::abs(value.get<double>()) < 9e15) return static_cast<std::int64_t>(value.get<double>());
  throw wrong_type(value, key, place, "a whole number");
}

template <>
double json_get<double>(const Json& object, const std::string& key, const std::string& place) {
  const Json& value = member(object, key, place);
  if (!value.is_number()) throw wrong_type(value, key, place, "a number");
  return value.get<double>();
}

template <>
bool json_get<bool>(const Json& object, const std::string& key, const std::string& place) {
  const Json& value = member(object, key, place);
  if (!value.is_boolean()) throw wrong_type(value, key, place, "true or false");
  return value.get<bool>();
}

template <>
std::string json_get<std::string>(const Json& object, const std::string& key, const std::string& place) {
  const Json& value = member(object, key, place);
  if (!value.is_string()) throw wrong_type(value, key, place, "a text");
  return value.get<std::string>();
}

template <>
std::vector<std::int64_t> json_get<std::vector<std::int64_t>>(const Json& object, const std::string& key, const std::string& place) {
  const Json& value = member(object, key, place);
  if (!value.is_array()) throw wrong_type(value, key, place, "a list of whole numbers");
  std::vector<std::int64_t> out;
  for (const Json& item : value) {
    if (!item.is_number_integer()) throw wrong_type(value, key, place, "a list of whole numbers");
    out.push_back(item.get<std::int64_t>());
  }
  return out;
}

template <>
std::vector<std::string> json_get<std::vector<std::string>>(const Json& object, const std::string& key, const std::string& place) {
  const Json& value = member(object, key, place);
  if (!value.is_array()) throw wrong_type(value, key, place, "a list of texts");
  std::vector<std::string> out;
  for (const Json& item : value) {
    if (!item.is_string()) throw wrong_type(value, key, place, "a list of texts");
    out.push_back(item.get<std::string>());
  }
  return out;
}

template <>
Json json_get<Json>(const Json& object, const std::string& key, const std::string& place) {
  return member(object, key, place);
}

}  // namespace kompakt
