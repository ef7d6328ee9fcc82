// Token texts by id and ids by text.
#include "data/vocabulary.h"

#include <algorithm>

#include "core/error.h"
#include "core/text.h"

namespace kompakt {

void Vocabulary::add(std::string text, std::int64_t id, const std::string& place) {
  if (id < 0 || id >= (1 << 24)) throw Error(str("token \"", text, "\" has an impossible id")).at(place).given(std::to_string(id)).allowed("0 to 16777215");
  if (has(id)) throw Error(str("two tokens have the id ", id, ": \"", this->text(id), "\" and \"", text, "\"")).at(place);
  if (!ids_.emplace(text, id).second) throw Error(str("the token \"", text, "\" stands twice in the vocabulary, with the ids ", find(text), " and ", id)).at(place);
  if (id >= limit()) {
    texts_.resize(static_cast<std::size_t>(id) + 1);
    present_.resize(static_cast<std::size_t>(id) + 1, false);
  }
  longest_ = std::max(longest_, text.size());
  texts_[static_cast<std::size_t>(id)] = std::move(text);
  present_[static_cast<std::size_t>(id)] = true;
}

}  // namespace kompakt
