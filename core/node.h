// A parsed recipe text: maps, lists and scalars that remember where they stood. The door to yaml-cpp.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/json.h"

namespace kompakt {

struct Place {
  std::string file;
  int line = 0, column = 0;  // from 1; 0 = unknown (a value from --set)
  std::string text() const;
};

struct Node {
  enum class Kind { null, scalar, list, map };
  struct Entry;

  Kind kind = Kind::null;
  std::string scalar;   // text of a scalar as written
  bool quoted = false;  // "17" in quotes is a text, never a number
  std::vector<Node> items;
  std::vector<Entry> entries;
  Place place;

  static Node text(std::string value, bool quoted = false);
  static Node list(std::vector<Node> items = {});
  static Node map();
  bool is_null() const { return kind == Kind::null; }
  bool is_scalar() const { return kind == Kind::scalar; }
  bool is_list() const { return kind == Kind::list; }
  bool is_map() const { return kind == Kind::map; }
  const char* kind_name() const;
  const Node* find(std::string_view key) const;  // in a map; nullptr when absent
  Node& set(const std::string& key, Node value);  // in a map: replaces or appends
};

struct Node::Entry {
  std::string key;
  Place place;  // of the key
  Node value;
};

// Throws Error with file:line:column for syntax errors, duplicate keys, anchors that recurse, several documents.
Node parse_yaml(std::string_view text, const std::string& file);
Node read_yaml(const std::filesystem::path& path);
// Deterministic block style; parses back to an equal tree.
std::string dump_yaml(const Node& node);
// Scalars become numbers or booleans where they read as such and are not quoted.
Json to_json(const Node& node);

// `--set stages.quantize.weights=int4`: walks maps by key and lists by index (0-based) or, in a list of one-key maps
// (the stages), by that key. Unknown paths are Errors with the nearest match; new keys may be added at the last step.
void set_path(Node& root, std::string_view assignment);

}  // namespace kompakt
