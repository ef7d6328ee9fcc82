// The table of models that terminal, Markdown and page share. Private to report/.
#pragma once

#include <string>
#include <vector>

#include "core/json.h"

namespace kompakt {

struct ModelTable {
  std::vector<std::string> header;             // "model", then titles
  std::vector<std::string> metrics;            // of header[1..]: the metric, "" for the ratio of sizes
  std::vector<std::vector<std::string>> rows;  // cells as text, one row a model
};
// Columns that no row fills are left out. Without `costs` the time of making and stages that make no model are left out too.
ModelTable model_table(const Json& report, bool costs = true);
std::vector<const Json*> table_rows(const Json& report, bool costs = true);  // the report's entries, row by row
std::string aligned(const ModelTable& table);

}  // namespace kompakt
