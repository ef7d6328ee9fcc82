#include "train/measurement.h"

#include "core/error.h"
#include "core/hash.h"
#include "core/log.h"
#include "core/text.h"
#include "model/checkpoint.h"

namespace kompakt {

std::filesystem::path measurement_file(const StageContext& context, const Transformer& model, std::string_view kind, const Json& depends, std::string_view extension) {
  const std::filesystem::path folder = context.measurements.empty() ? context.work : context.measurements;
  if (folder.empty()) return {};
  const std::string key = sha256(str(kind, "\n", fingerprint(model), "\n", config_to_json(model.config()).dump(), "\n", context.seed, "\n", depends.dump()));
  return folder / str(kind.substr(0, kind.find('/')), "-", key, extension);
}

bool recall_measurement(const StageContext& context, const std::filesystem::path& file, std::string_view what, const std::function<void()>& read) {
  if (file.empty() || !std::filesystem::exists(file)) return false;
  std::string fault;
  try {
    read();
    log_info(str(context.title, ": ", what, " measured before, taken over"));
    return true;
  } catch (const Error& error) {
    fault = error.message();
  } catch (const std::exception& error) {  // of the JSON library: a missing key, a value of another type
    fault = error.what();
  }
  log_warning(str(file.string(), " is damaged (", fault, "): ", what, " measured again"));
  return false;
}

}  // namespace kompakt
