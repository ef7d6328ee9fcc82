// The door to nlohmann-json: strict parsing with our errors, deterministic writing.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace kompakt {

using Json = nlohmann::ordered_json;  // keeps the order of insertion: readable reports, identical bytes

// Throws Error with line and column; duplicate keys, invalid UTF-8 and trailing text are errors.
// `place` names the source in messages (a file name).
Json parse_json(std::string_view text, const std::string& place);
Json read_json(const std::filesystem::path& path);
// Pretty text (2 spaces) with a final newline. NaN and infinity become null.
std::string dump_json(const Json& json);
void write_json(const std::filesystem::path& path, const Json& json);  // atomic

// Typed access with an Error that names the key, the type given and the type needed.
template <class T>
T json_get(const Json& object, const std::string& key, const std::string& place);
template <class T>
T json_get_or(const Json& object, const std::string& key, const std::string& place, T fallback) {
  return object.contains(key) && !object.at(key).is_null() ? json_get<T>(object, key, place) : fallback;
}

}  // namespace kompakt
