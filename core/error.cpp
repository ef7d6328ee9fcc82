#include "core/error.h"

#include <utility>

namespace kompakt {

Error::Error(std::string what_happened, ExitCode code) : message_(std::move(what_happened)), code_(code) { compose(); }

Error& Error::at(std::string place) { place_ = std::move(place); compose(); return *this; }
Error& Error::given(std::string value) { given_ = std::move(value); compose(); return *this; }
Error& Error::allowed(std::string values) { allowed_ = std::move(values); compose(); return *this; }
Error& Error::hint(std::string action) { hint_ = std::move(action); compose(); return *this; }

void Error::compose() {
  text_ = place_.empty() ? message_ : place_ + ": " + message_;
  if (!given_.empty()) text_ += "\n  given:   " + given_;
  if (!allowed_.empty()) text_ += "\n  allowed: " + allowed_;
  if (!hint_.empty()) text_ += "\n  to do:   " + hint_;
}

void Problems::throw_if_any(const std::string& summary) const {
  if (errors_.empty()) return;
  if (errors_.size() == 1) throw errors_.front();
  std::string text = summary + " (" + std::to_string(errors_.size()) + " mistakes)";
  for (const Error& error : errors_) text += "\n" + std::string(error.what());
  throw Error(text, errors_.front().code());
}

}  // namespace kompakt
