#include "pipeline/store.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "core/error.h"
#include "core/files.h"
#include "core/hash.h"
#include "core/log.h"
#include "core/text.h"

namespace kompakt {
namespace fs = std::filesystem;
namespace {

constexpr const char* store_record = "outputs.json";

fs::path store_entry(const fs::path& root, const std::string& key) { return root / "stages" / key.substr(0, 2) / key; }

std::vector<std::string> store_files(const fs::path& entry) {
  std::vector<std::string> names;
  for (const auto& file : fs::recursive_directory_iterator(entry))
    if (file.is_regular_file()) names.push_back(file.path().lexically_relative(entry).generic_string());
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace

Store::Store(fs::path root) : root_(std::move(root)) { make_folder(root_); }

std::optional<fs::path> Store::find(const std::string& key) const {
  const fs::path entry = store_entry(root_, key);
  if (!fs::exists(entry)) return std::nullopt;
  std::string damage;
  if (!fs::exists(entry / store_record)) {
    damage = "its record is missing";
  } else {
    const Json record = read_json(entry / store_record);
    for (const auto& [name, file] : record.items()) {
      std::error_code code;
      const auto size = fs::file_size(entry / name, code);
      if (code || size != file.value("bytes", std::uintmax_t{0})) damage = str("file \"", name, "\" is missing or has another size");
    }
  }
  if (damage.empty()) return entry;
  log_warning(str("the stored stage output ", entry.string(), " is damaged (", damage, "): it is made anew"));
  fs::remove_all(entry);
  return std::nullopt;
}

fs::path Store::add(const std::string& key, const std::function<void(const fs::path&)>& fill) {
  const fs::path entry = store_entry(root_, key);
  AtomicFolder folder(entry);
  fill(folder.path());
  Json record = Json::object();
  for (const std::string& name : store_files(folder.path())) record[name] = Json{{"bytes", fs::file_size(folder.path() / name)}, {"sha256", sha256_file(folder.path() / name)}};
  write_json(folder.path() / store_record, record);
  folder.commit();
  return entry;
}

Json Store::outputs(const fs::path& entry) {
  Json hashes = Json::object();
  const Json record = read_json(entry / store_record);
  // stage.json holds times: it is no output, and lineage must be the same for the same bytes.
  for (const auto& [name, file] : record.items())
    if (name != "stage.json") hashes[name] = file.at("sha256");
  return hashes;
}

void Store::link_into(const fs::path& entry, const fs::path& target) {
  AtomicFolder folder(target);
  for (const std::string& name : store_files(entry))
    if (name != store_record && name != "stage.json") link_or_copy(entry / name, folder.path() / name);
  folder.commit();
}

fs::path store_folder(const std::string& configured, const fs::path& base) {
  if (!configured.empty()) return fs::path(configured).is_absolute() ? fs::path(configured) : base / configured;
  if (const char* cache = std::getenv("XDG_CACHE_HOME"); cache && *cache) return fs::path(cache) / "kompakt";
  if (const char* home = std::getenv("HOME"); home && *home) return fs::path(home) / ".cache" / "kompakt";
  throw Error("there is no home folder for the store").hint("set HOME, or store: FOLDER in the recipe");
}

}  // namespace kompakt
