// One list of fields per option struct; reading, writing and explaining are visitors over it.
//
//   struct PruneOptions { double ffn = 1.0; std::string criterion = "taylor"; };
//   void fields(FieldVisitor& v, PruneOptions& o) {
//     v.number("ffn", o.ffn, "share of feed-forward neurons kept", {.min = 0.0, .max = 1.0});
//     v.choice("criterion", o.criterion, "importance of a unit", criterion_names());
//   }
//
// Not a serialization library: it serves recipes (Node) and nothing else.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/node.h"

namespace kompakt {

struct Range {
  std::optional<double> min, max;
  bool open_min = false;  // min itself is not allowed
  std::string text() const;
};

class FieldVisitor {
 public:
  virtual ~FieldVisitor() = default;
  virtual void flag(const char* key, bool& value, const char* help) = 0;
  virtual void integer(const char* key, std::int64_t& value, const char* help, const Range& range = {}) = 0;
  virtual void number(const char* key, double& value, const char* help, const Range& range = {}) = 0;
  virtual void text(const char* key, std::string& value, const char* help) = 0;
  // `names` are the allowed values (rows of a table).
  virtual void choice(const char* key, std::string& value, const char* help, const std::vector<std::string>& names) = 0;
  virtual void integers(const char* key, std::vector<std::int64_t>& value, const char* help, const Range& range = {}) = 0;
  virtual void texts(const char* key, std::vector<std::string>& value, const char* help) = 0;
  // "60MB" or a plain number of bytes.
  virtual void bytes(const char* key, std::int64_t& value, const char* help) = 0;
  // A nested struct: present is set when the key stands in the recipe; written only when present.
  virtual void section(const char* key, bool& present, const char* help, const std::function<void(FieldVisitor&)>& members) = 0;
  // A list of structs: `resize(n)` makes room, `element(i, v)` visits one.
  virtual void list(const char* key, const char* help, std::size_t size, const std::function<void(std::size_t)>& resize,
                    const std::function<void(std::size_t, FieldVisitor&)>& element) = 0;
  // A subtree kept as it is, for parts that are checked later by their own table.
  virtual void subtree(const char* key, Node& value, const char* help) = 0;
};

// Reads a map into a struct. Collects every mistake (unknown key with nearest match, wrong type, out of range) in `problems`.
// `context` names the owner in messages, for example: stage "quantize".
void read_fields(const Node& node, const std::string& context, Problems& problems, const std::function<void(FieldVisitor&)>& members);
// Writes all fields, defaults included, in the order of the list.
Node write_fields(const std::function<void(FieldVisitor&)>& members);

struct FieldInfo {
  std::string key, type, default_text, range, help;  // key is a dotted path inside the struct
};
std::vector<FieldInfo> explain_fields(const std::function<void(FieldVisitor&)>& members);

}  // namespace kompakt
