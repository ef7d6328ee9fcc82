// `kompakt explain`: help made from the tables and field lists that the recipe reader itself uses.
#include <algorithm>

#include "core/fields.h"
#include "core/text.h"
#include "data/dataset.h"
#include "distill/losses.h"
#include "export/exporters.h"
#include "model/families.h"
#include "pipeline/describe.h"
#include "pipeline/recipe.h"
#include "pipeline/stages.h"
#include "report/metrics.h"
#include "train/schedule.h"

namespace kompakt {
namespace {

struct Topic {
  std::string kind, name, summary;
};

std::vector<Topic> explain_rows() {
  std::vector<Topic> rows;
  for (const StageRow& row : stage_rows()) rows.push_back({"stage", std::string(row.name), std::string(row.summary)});
  for (const Grid& row : grids()) rows.push_back({"grid", std::string(row.name), std::string(row.summary)});
  for (const LogitLoss& row : logit_losses()) rows.push_back({"logit loss", std::string(row.name), std::string(row.summary)});
  for (const Exporter& row : exporters()) rows.push_back({"export format", std::string(row.name), std::string(row.summary)});
  for (const Family& row : families()) rows.push_back({"model family", std::string(row.name), std::string(row.summary)});
  for (const Metric& row : metrics()) rows.push_back({"metric (for gates)", row.name, row.summary});
  return rows;
}

Json explain_field(const FieldInfo& field) {
  return Json{{"key", field.key}, {"type", field.type}, {"default", field.default_text}, {"allowed", field.range}, {"help", field.help}};
}

std::vector<FieldInfo> explain_owner(const std::string& owner) {
  if (const StageRow* stage = find_stage(owner)) return explain_fields([&](FieldVisitor& v) { stage->describe(v); });
  if (owner == "recipe") return explain_recipe();
  if (owner == "data") {
    DataSource source;
    return explain_fields([&](FieldVisitor& v) { fields(v, source); });
  }
  return {};
}

Json explain_list(const std::vector<FieldInfo>& fields) {
  Json list = Json::array();
  for (const FieldInfo& field : fields) list.push_back(explain_field(field));
  return list;
}

}  // namespace

Json explain(const std::string& topic) {
  const std::vector<Topic> rows = explain_rows();
  if (topic.empty()) {
    Json list = Json::array();
    for (const Topic& row : rows) list.push_back(Json{{"kind", row.kind}, {"name", row.name}, {"summary", row.summary}});
    return Json{{"topic", ""}, {"rows", list}, {"fields", explain_list(explain_recipe())}};
  }
  std::string path = topic;
  if (starts_with(path, "stages.")) path = path.substr(7);
  const std::size_t dot = path.find('.');
  const std::string owner = path.substr(0, dot);
  const std::vector<FieldInfo> fields = explain_owner(owner);
  if (dot == std::string::npos) {
    Json found = Json::array();
    for (const Topic& row : rows)
      if (row.name == owner) found.push_back(Json{{"kind", row.kind}, {"name", row.name}, {"summary", row.summary}});
    if (!found.empty() || !fields.empty()) return Json{{"topic", topic}, {"rows", found}, {"fields", explain_list(fields)}};
  } else {
    std::vector<FieldInfo> found;
    const std::string key = path.substr(dot + 1);
    std::vector<std::string> keys;
    for (const FieldInfo& field : fields) {
      keys.push_back(owner + "." + field.key);
      if (field.key == key || starts_with(field.key, key + ".")) found.push_back(field);
    }
    if (!found.empty()) return Json{{"topic", topic}, {"rows", Json::array()}, {"fields", explain_list(found)}};
    if (!keys.empty()) throw Error(str("unknown key \"", topic, "\"", did_you_mean(path, keys))).allowed(join(keys, ", "));
  }
  // A bare option name: every stage that has it.
  std::vector<FieldInfo> found;
  std::vector<std::string> names;
  for (const StageRow& stage : stage_rows())
    for (FieldInfo& field : explain_owner(std::string(stage.name))) {
      names.push_back(field.key);
      if (field.key == topic) field.key = str(stage.name, ".", field.key), found.push_back(field);
    }
  if (!found.empty()) return Json{{"topic", topic}, {"rows", Json::array()}, {"fields", explain_list(found)}};
  for (const Topic& row : rows) names.push_back(row.name);
  throw Error(str("nothing is called \"", topic, "\"", did_you_mean(topic, names))).hint("`kompakt explain` alone lists everything");
}

std::string explain_text(const Json& explanation) {
  std::string out, kind;
  for (const Json& row : explanation.at("rows")) {
    if (row.at("kind") != kind) out += str(out.empty() ? "" : "\n", kind = row.at("kind").get<std::string>(), "\n");
    std::string left = "  " + row.at("name").get<std::string>();
    left.resize(std::max<std::size_t>(left.size() + 2, 22), ' ');
    out += left + row.at("summary").get<std::string>() + "\n";
  }
  if (!explanation.at("fields").empty()) out += str(out.empty() ? "" : "\n", "options\n");
  for (const Json& field : explanation.at("fields")) {
    std::string left = "  " + field.at("key").get<std::string>();
    left.resize(std::max<std::size_t>(left.size() + 2, 30), ' ');
    out += left + field.at("help").get<std::string>() + "\n" + std::string(30, ' ') + field.at("type").get<std::string>();
    if (const auto value = field.at("default").get<std::string>(); !value.empty()) out += ", default " + value;
    if (const auto allowed = field.at("allowed").get<std::string>(); !allowed.empty()) out += "; " + allowed;
    out += "\n";
  }
  return out;
}

}  // namespace kompakt
