// Token texts by id and ids by text.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace kompakt {

// Ids need not be dense: a hole has no text. Two tokens never share a text or an id.
class Vocabulary {
 public:
  // Throws Error (at `place`) when the text or the id is taken or the id is not in 0 … 2^24.
  void add(std::string text, std::int64_t id, const std::string& place);
  std::int64_t find(std::string_view text) const {  // -1 when absent
    const auto found = ids_.find(text);
    return found == ids_.end() ? -1 : found->second;
  }
  bool has(std::int64_t id) const { return id >= 0 && id < limit() && present_[static_cast<std::size_t>(id)]; }
  std::string_view text(std::int64_t id) const { return has(id) ? std::string_view(texts_[static_cast<std::size_t>(id)]) : std::string_view(); }
  std::int64_t limit() const { return static_cast<std::int64_t>(texts_.size()); }  // highest id + 1
  std::int64_t size() const { return static_cast<std::int64_t>(ids_.size()); }     // tokens present
  std::size_t longest() const { return longest_; }                                 // bytes

 private:
  std::vector<std::string> texts_;
  std::vector<bool> present_;
  // Own copies of the keys: the texts move when the vector grows.
  struct Hash {
    using is_transparent = void;
    std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
  };
  std::unordered_map<std::string, std::int64_t, Hash, std::equal_to<>> ids_;
  std::size_t longest_ = 0;
};

}  // namespace kompakt
