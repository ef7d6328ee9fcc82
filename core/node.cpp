#include "core/node.h"

#include <yaml-cpp/yaml.h>

#include "core/error.h"
#include "core/files.h"
#include "core/text.h"

namespace kompakt {
namespace {

Place place_of(const YAML::Mark& mark, const std::string& file) { return {file, mark.line + 1, mark.column + 1}; }

Node convert(const YAML::Node& source, const std::string& file, int depth) {
  Node node;
  node.place = place_of(source.Mark(), file);
  if (depth > 64) throw Error("the recipe is nested too deeply").at(node.place.text()).allowed("at most 64 levels").hint("check for an anchor that contains itself");
  if (source.IsScalar()) {
    node.kind = Node::Kind::scalar;
    node.scalar = source.Scalar();
    node.quoted = source.Tag() == "!";  // yaml-cpp marks quoted scalars with the non-specific tag
  } else if (source.IsSequence()) {
    node.kind = Node::Kind::list;
    for (const YAML::Node& item : source) node.items.push_back(convert(item, file, depth + 1));
  } else if (source.IsMap()) {
    node.kind = Node::Kind::map;
    for (const auto& pair : source) {
      const Place key_place = place_of(pair.first.Mark(), file);
      if (!pair.first.IsScalar()) throw Error("a key must be a plain text").at(key_place.text());
      const std::string key = pair.first.Scalar();
      if (node.find(key)) throw Error(str("key \"", key, "\" appears twice")).at(key_place.text()).hint("remove one of the two");
      node.entries.push_back({key, key_place, convert(pair.second, file, depth + 1)});
    }
  }
  return node;
}

void emit(YAML::Emitter& out, const Node& node) {
  switch (node.kind) {
    case Node::Kind::null: out << YAML::Null; break;
    case Node::Kind::scalar:
      if (node.quoted) out << YAML::DoubleQuoted;
      out << node.scalar;
      break;
    case Node::Kind::list: {
      bool flat = node.items.size() <= 16;
      for (const Node& item : node.items) flat = flat && item.is_scalar();
      if (flat) out << YAML::Flow;
      out << YAML::BeginSeq;
      for (const Node& item : node.items) emit(out, item);
      out << YAML::EndSeq;
      break;
    }
    case Node::Kind::map:
      out << YAML::BeginMap;
      for (const Node::Entry& entry : node.entries) {
        out << YAML::Key << entry.key << YAML::Value;
        emit(out, entry.value);
      }
      out << YAML::EndMap;
      break;
  }
}

}  // namespace

std::string Place::text() const {
  if (line == 0) return file;
  return str(file, ":", line, ":", column);
}

Node Node::text(std::string value, bool quoted) {
  Node node;
  node.kind = Kind::scalar;
  node.scalar = std::move(value);
  node.quoted = quoted;
  return node;
}

Node Node::list(std::vector<Node> items) {
  Node node;
  node.kind = Kind::list;
  node.items = std::move(items);
  return node;
}

Node Node::map() {
  Node node;
  node.kind = Kind::map;
  return node;
}

const char* Node::kind_name() const {
  switch (kind) {
    case Kind::null: return "nothing";
    case Kind::scalar: return "a single value";
    case Kind::list: return "a list";
    case Kind::map: return "a map";
  }
  return "?";
}

const Node* Node::find(std::string_view key) const {
  for (const Entry& entry : entries)
    if (entry.key == key) return &entry.value;
  return nullptr;
}

Node& Node::set(const std::string& key, Node value) {
  for (Entry& entry : entries) {
    if (entry.key != key) continue;
    entry.value = std::move(value);
    return entry.value;
  }
  entries.push_back({key, {}, std::move(value)});
  return entries.back().value;
}

Node parse_yaml(std::string_view text, const std::string& file) {
  if (const auto bad = invalid_utf8(text)) throw Error(str("not valid UTF-8 at byte ", *bad)).at(file);
  try {
    const std::vector<YAML::Node> documents = YAML::LoadAll(std::string(text));
    if (documents.size() > 1) throw Error(str("holds ", documents.size(), " YAML documents, one is allowed")).at(file).hint("remove the lines of three dashes");
    if (documents.empty()) return Node{};
    return convert(documents.front(), file, 0);
  } catch (const YAML::Exception& error) {
    throw Error(str("not valid YAML: ", error.msg)).at(place_of(error.mark, file).text());
  }
}

Node read_yaml(const std::filesystem::path& path) { return parse_yaml(MappedFile(path).text(), path.string()); }

std::string dump_yaml(const Node& node) {
  YAML::Emitter out;
  emit(out, node);
  return std::string(out.c_str()) + "\n";
}

Json to_json(const Node& node) {
  switch (node.kind) {
    case Node::Kind::null: return nullptr;
    case Node::Kind::scalar:
      if (!node.quoted) {
        if (const auto value = parse_int(node.scalar)) return *value;
        if (const auto value = parse_double(node.scalar)) return *value;
        if (node.scalar == "true" || node.scalar == "false") return node.scalar == "true";
      }
      return node.scalar;
    case Node::Kind::list: {
      Json list = Json::array();
      for (const Node& item : node.items) list.push_back(to_json(item));
      return list;
    }
    case Node::Kind::map: {
      Json map = Json::object();
      for (const Node::Entry& entry : node.entries) map[entry.key] = to_json(entry.value);
      return map;
    }
  }
  return nullptr;
}

void set_path(Node& root, std::string_view assignment) {
  const std::size_t equals = assignment.find('=');
  const std::string origin = str("--set ", assignment);
  if (equals == std::string_view::npos || equals == 0) throw Error("--set needs key.path=value").at(origin).hint("for example --set stages.quantize.weights=int4");
  Node value = parse_yaml(assignment.substr(equals + 1), origin);
  const std::vector<std::string> path = split(assignment.substr(0, equals), '.');
  Node* here = &root;
  for (std::size_t i = 0; i < path.size(); ++i) {
    const bool last = i + 1 == path.size();
    const std::string& key = path[i];
    if (here->is_list()) {
      std::vector<std::string> names;
      Node* next = nullptr;
      int found = 0;
      const auto index = parse_int(key);
      for (std::size_t item = 0; item < here->items.size(); ++item) {
        Node& candidate = here->items[item];
        if (index && static_cast<std::size_t>(*index) == item) {
          next = &candidate, found = 1;
          // stages.0.epochs: the item {finetune: {...}} stands for its value unless its own key follows.
          if (!last && candidate.is_map() && candidate.entries.size() == 1 && candidate.entries.front().key != path[i + 1]) next = &candidate.entries.front().value;
        }
        if (candidate.is_map() && candidate.entries.size() == 1) {
          names.push_back(candidate.entries.front().key);
          if (!index && candidate.entries.front().key == key) next = &candidate.entries.front().value, ++found;
        } else if (candidate.is_scalar()) {
          names.push_back(candidate.scalar);
          if (!index && !last && candidate.scalar == key) {  // a bare stage name gets options
            Node grown = Node::map();
            grown.place = candidate.place;
            grown.entries.push_back({key, candidate.place, Node::map()});
            candidate = std::move(grown);
            next = &candidate.entries.front().value, ++found;
          }
        }
      }
      if (found == 0) throw Error(str("\"", key, "\" is not in the list", did_you_mean(key, names))).at(origin).allowed(str(join(names, ", "), names.empty() ? "" : ", or ", "an index from 0 to ", here->items.size() ? here->items.size() - 1 : 0));
      if (found > 1) throw Error(str("\"", key, "\" stands ", found, " times in the list")).at(origin).hint("use its index, for example stages.2");
      if (last) {
        *next = std::move(value);
        return;
      }
      here = next;
      continue;
    }
    if (here->is_null()) *here = Node::map();
    if (!here->is_map()) throw Error(str("\"", key, "\" cannot be set inside ", here->kind_name())).at(origin);
    if (last) {
      here->set(key, std::move(value));
      return;
    }
    Node* next = const_cast<Node*>(here->find(key));
    if (!next) {
      std::vector<std::string> names;
      for (const Node::Entry& entry : here->entries) names.push_back(entry.key);
      const auto match = nearest(key, names);
      if (match) throw Error(str("\"", key, "\" is not in the recipe; did you mean \"", *match, "\"?")).at(origin).allowed(join(names, ", "));
      next = &here->set(key, Node::map());
    }
    here = next;
  }
}

}  // namespace kompakt
