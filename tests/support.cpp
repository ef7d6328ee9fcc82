#include "tests/support.h"

#include <catch2/catch.hpp>
#include <cstdio>
#include <cstdlib>

#include "core/error.h"

namespace kompakt::testing {
namespace fs = std::filesystem;

fs::path source_folder() { return KOMPAKT_SOURCE_DIR; }

std::optional<fs::path> shared_data(const std::string& relative) {
  const char* given = std::getenv("KOMPAKT_SHARED");
  const fs::path root = given ? fs::path(given) : source_folder() / ".." / "shared" / "data";
  const fs::path path = root / relative;
  if (fs::exists(path)) return path;
  return std::nullopt;
}

void skip(const std::string& why) { std::printf("skipped: %s\n", why.c_str()); }

std::string error_text(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  } catch (const std::exception& error) {
    FAIL("expected kompakt::Error, got: " << error.what());
  }
  FAIL("expected kompakt::Error, nothing was thrown");
  return {};
}

bool contains_all(const std::string& text, std::initializer_list<const char*> parts) {
  for (const char* part : parts) {
    if (text.find(part) != std::string::npos) continue;
    UNSCOPED_INFO("missing \"" << part << "\" in: " << text);
    return false;
  }
  return true;
}

}  // namespace kompakt::testing
