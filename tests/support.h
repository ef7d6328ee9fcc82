// Helpers shared by all tests: where the data is, skipping aloud, checking an Error's text.
#pragma once

#include <filesystem>
#include <functional>
#include <optional>
#include <string>

namespace kompakt::testing {

std::filesystem::path source_folder();
// A file or folder of ../shared/data (or $KOMPAKT_SHARED), or nothing. The test must then call skip().
std::optional<std::filesystem::path> shared_data(const std::string& relative);
// Prints "skipped: <why>" so that nothing is silent; the caller returns.
void skip(const std::string& why);
// what() of the Error that `action` throws; fails the test when it throws nothing or something else.
std::string error_text(const std::function<void()>& action);
// True when `text` contains every one of `parts`; prints the first that is missing.
bool contains_all(const std::string& text, std::initializer_list<const char*> parts);

}  // namespace kompakt::testing
