#include "core/fields.h"

#include <algorithm>
#include <set>

#include "core/text.h"

namespace kompakt {
namespace {

class Reader final : public FieldVisitor {
 public:
  Reader(const Node& node, std::string context, Problems& problems) : node_(node), context_(std::move(context)), problems_(problems) {}

  void flag(const char* key, bool& value, const char*) override {
    if (const Node* found = scalar(key, "true or false")) {
      if (!found->quoted && (found->scalar == "true" || found->scalar == "false")) value = found->scalar == "true";
      else wrong(key, *found, "true or false");
    }
  }
  void integer(const char* key, std::int64_t& value, const char*, const Range& range) override {
    if (const Node* found = scalar(key, "a whole number")) read_integer(key, *found, value, range);
  }
  void number(const char* key, double& value, const char*, const Range& range) override {
    const Node* found = scalar(key, "a number");
    if (!found) return;
    const auto parsed = found->quoted ? std::nullopt : parse_double(found->scalar);
    if (!parsed) wrong(key, *found, "a number");
    else if (inside(key, *found, *parsed, range)) value = *parsed;
  }
  void text(const char* key, std::string& value, const char*) override {
    if (const Node* found = scalar(key, "a text")) value = found->scalar;
  }
  void choice(const char* key, std::string& value, const char*, const std::vector<std::string>& names) override {
    const Node* found = scalar(key, "one of the listed names");
    if (!found) return;
    if (std::find(names.begin(), names.end(), found->scalar) != names.end()) value = found->scalar;
    else problems_.add(Error(str("unknown value \"", found->scalar, "\" for \"", key, "\" in ", context_, did_you_mean(found->scalar, names))).at(found->place.text()).given(found->scalar).allowed(join(names, ", ")));
  }
  void integers(const char* key, std::vector<std::int64_t>& value, const char*, const Range& range) override {
    const Node* found = take(key);
    if (!found) return;
    if (!found->is_list()) return wrong(key, *found, "a list of whole numbers");
    std::vector<std::int64_t> read;
    for (const Node& item : found->items) {
      std::int64_t number = 0;
      if (!item.is_scalar()) return wrong(key, item, "a whole number");
      if (!read_integer(key, item, number, range)) return;
      read.push_back(number);
    }
    value = std::move(read);
  }
  void texts(const char* key, std::vector<std::string>& value, const char*) override {
    const Node* found = take(key);
    if (!found) return;
    std::vector<std::string> read;
    if (found->is_scalar()) {
      read.push_back(found->scalar);  // one value may stand without brackets
    } else if (found->is_list()) {
      for (const Node& item : found->items) {
        if (!item.is_scalar()) return wrong(key, item, "a text");
        read.push_back(item.scalar);
      }
    } else {
      return wrong(key, *found, "a list of texts");
    }
    value = std::move(read);
  }
  void bytes(const char* key, std::int64_t& value, const char*) override {
    const Node* found = scalar(key, "a size such as 60MB");
    if (!found) return;
    if (const auto parsed = parse_bytes(found->scalar)) value = *parsed;
    else wrong(key, *found, "a size such as 60MB, 2.5 MiB or 1024");
  }
  void section(const char* key, bool& present, const char*, const std::function<void(FieldVisitor&)>& members) override {
    const Node* found = take(key);
    if (!found) return;
    if (!found->is_map()) return wrong(key, *found, "a map");
    present = true;
    read_fields(*found, str("\"", key, "\" of ", context_), problems_, members);
  }
  void list(const char* key, const char*, std::size_t, const std::function<void(std::size_t)>& resize,
            const std::function<void(std::size_t, FieldVisitor&)>& element) override {
    const Node* found = take(key);
    if (!found) return;
    if (!found->is_list()) return wrong(key, *found, "a list of maps");
    resize(found->items.size());
    for (std::size_t i = 0; i < found->items.size(); ++i) {
      if (!found->items[i].is_map()) {
        wrong(key, found->items[i], "a map");
        continue;
      }
      read_fields(found->items[i], str("item ", i, " of \"", key, "\" of ", context_), problems_, [&](FieldVisitor& v) { element(i, v); });
    }
  }
  void subtree(const char* key, Node& value, const char*) override {
    if (const Node* found = take(key)) value = *found;
  }

  void finish() {
    for (const Node::Entry& entry : node_.entries) {
      if (std::find(known_.begin(), known_.end(), entry.key) != known_.end()) continue;
      problems_.add(Error(str("unknown key \"", entry.key, "\" in ", context_, did_you_mean(entry.key, known_))).at(entry.place.text()).allowed(join(known_, ", ")));
    }
  }

 private:
  const Node* take(const char* key) {
    known_.emplace_back(key);
    const Node* found = node_.find(key);
    return found && !found->is_null() ? found : nullptr;
  }
  const Node* scalar(const char* key, const char* needed) {
    const Node* found = take(key);
    if (found && !found->is_scalar()) {
      wrong(key, *found, needed);
      return nullptr;
    }
    return found;
  }
  void wrong(const char* key, const Node& node, const std::string& needed) {
    problems_.add(Error(str("wrong type for \"", key, "\" in ", context_)).at(node.place.text()).given(node.is_scalar() ? str("\"", node.scalar, "\"") : std::string(node.kind_name())).allowed(needed));
  }
  bool inside(const char* key, const Node& node, double value, const Range& range) {
    const bool low = range.min && (range.open_min ? value <= *range.min : value < *range.min);
    if (!low && !(range.max && value > *range.max)) return true;
    problems_.add(Error(str("\"", key, "\" in ", context_, " is out of range")).at(node.place.text()).given(node.scalar).allowed(range.text()));
    return false;
  }
  bool read_integer(const char* key, const Node& node, std::int64_t& value, const Range& range) {
    const auto parsed = node.quoted ? std::nullopt : parse_int(node.scalar);
    if (!parsed) {
      wrong(key, node, "a whole number");
      return false;
    }
    if (!inside(key, node, static_cast<double>(*parsed), range)) return false;
    value = *parsed;
    return true;
  }

  const Node& node_;
  std::string context_;
  Problems& problems_;
  std::vector<std::string> known_;
};

class Writer final : public FieldVisitor {
 public:
  Node result = Node::map();
  void flag(const char* key, bool& value, const char*) override { put(key, value ? "true" : "false"); }
  void integer(const char* key, std::int64_t& value, const char*, const Range&) override { put(key, std::to_string(value)); }
  void number(const char* key, double& value, const char*, const Range&) override { put(key, shortest(value)); }
  void text(const char* key, std::string& value, const char*) override { result.set(key, Node::text(value, true)); }
  void choice(const char* key, std::string& value, const char*, const std::vector<std::string>&) override { put(key, value); }
  void integers(const char* key, std::vector<std::int64_t>& value, const char*, const Range&) override {
    Node list = Node::list();
    for (const std::int64_t item : value) list.items.push_back(Node::text(std::to_string(item)));
    result.set(key, std::move(list));
  }
  void texts(const char* key, std::vector<std::string>& value, const char*) override {
    Node list = Node::list();
    for (const std::string& item : value) list.items.push_back(Node::text(item, true));
    result.set(key, std::move(list));
  }
  void bytes(const char* key, std::int64_t& value, const char*) override { put(key, std::to_string(value)); }
  void section(const char* key, bool& present, const char*, const std::function<void(FieldVisitor&)>& members) override {
    if (present) result.set(key, write_fields(members));
  }
  void list(const char* key, const char*, std::size_t size, const std::function<void(std::size_t)>&,
            const std::function<void(std::size_t, FieldVisitor&)>& element) override {
    Node out = Node::list();
    for (std::size_t i = 0; i < size; ++i) out.items.push_back(write_fields([&](FieldVisitor& v) { element(i, v); }));
    result.set(key, std::move(out));
  }
  void subtree(const char* key, Node& value, const char*) override {
    if (!value.is_null()) result.set(key, value);
  }

 private:
  void put(const char* key, std::string value) { result.set(key, Node::text(std::move(value))); }
};

class Explainer final : public FieldVisitor {
 public:
  Explainer(std::string prefix, std::vector<FieldInfo>& out) : prefix_(std::move(prefix)), out_(out) {}
  void flag(const char* key, bool& value, const char* help) override { add(key, "true/false", value ? "true" : "false", "", help); }
  void integer(const char* key, std::int64_t& value, const char* help, const Range& range) override { add(key, "integer", std::to_string(value), range.text(), help); }
  void number(const char* key, double& value, const char* help, const Range& range) override { add(key, "number", shortest(value), range.text(), help); }
  void text(const char* key, std::string& value, const char* help) override { add(key, "text", value, "", help); }
  void choice(const char* key, std::string& value, const char* help, const std::vector<std::string>& names) override { add(key, "name", value, join(names, ", "), help); }
  void integers(const char* key, std::vector<std::int64_t>& value, const char* help, const Range& range) override {
    std::vector<std::string> parts;
    for (const auto item : value) parts.push_back(std::to_string(item));
    add(key, "list of integers", "[" + join(parts, ", ") + "]", range.text(), help);
  }
  void texts(const char* key, std::vector<std::string>& value, const char* help) override { add(key, "list of texts", "[" + join(value, ", ") + "]", "", help); }
  void bytes(const char* key, std::int64_t& value, const char* help) override { add(key, "size", std::to_string(value), "", help); }
  void section(const char* key, bool&, const char* help, const std::function<void(FieldVisitor&)>& members) override {
    add(key, "map", "", "", help);
    Explainer inner(str(prefix_, key, "."), out_);
    members(inner);
  }
  void list(const char* key, const char* help, std::size_t, const std::function<void(std::size_t)>& resize,
            const std::function<void(std::size_t, FieldVisitor&)>& element) override {
    add(key, "list of maps", "", "", help);
    resize(1);
    Explainer inner(str(prefix_, key, "[]."), out_);
    element(0, inner);
    resize(0);
  }
  void subtree(const char* key, Node&, const char* help) override { add(key, "map", "", "", help); }

 private:
  void add(const char* key, std::string type, std::string value, std::string range, const char* help) {
    out_.push_back({prefix_ + key, std::move(type), std::move(value), std::move(range), help});
  }
  std::string prefix_;
  std::vector<FieldInfo>& out_;
};

}  // namespace

std::string Range::text() const {
  if (min && max) return str(open_min ? "more than " : "", shortest(*min), " to ", shortest(*max));
  if (min) return str(open_min ? "more than " : "at least ", shortest(*min));
  if (max) return str("at most ", shortest(*max));
  return "";
}

void read_fields(const Node& node, const std::string& context, Problems& problems, const std::function<void(FieldVisitor&)>& members) {
  if (!node.is_map() && !node.is_null()) {
    problems.add(Error(str(context, " must be a map of keys and values")).at(node.place.text()).given(node.kind_name()));
    return;
  }
  Reader reader(node, context, problems);
  members(reader);
  reader.finish();
}

Node write_fields(const std::function<void(FieldVisitor&)>& members) {
  Writer writer;
  members(writer);
  return writer.result;
}

std::vector<FieldInfo> explain_fields(const std::function<void(FieldVisitor&)>& members) {
  std::vector<FieldInfo> out;
  Explainer explainer("", out);
  members(explainer);
  return out;
}

}  // namespace kompakt
