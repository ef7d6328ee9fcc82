#include "quantize/layer_report.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "core/text.h"
#include "quantize/tensors.h"

namespace kompakt {
namespace {

// At most `count` rows, evenly spread.
at::Tensor report_rows(std::int64_t rows, std::int64_t count) {
  std::vector<std::int64_t> index;
  for (std::int64_t i = 0; i < std::min(rows, count); ++i) index.push_back(i * rows / std::min(rows, count));
  return at::tensor(at::ArrayRef<std::int64_t>(index), at::kLong);
}

Quantized report_select(const Quantized& q, const at::Tensor& rows) {
  return {q.codes.index_select(0, rows), q.scales.index_select(0, rows), q.offsets.defined() ? q.offsets.index_select(0, rows) : at::Tensor()};
}

// tr(A H A^T)
double report_energy(const at::Tensor& a, const at::Tensor& h) { return (at::matmul(a.to(h.scalar_type()), h) * a).sum(at::kDouble).item<double>(); }

}  // namespace

Json describe_layer(const std::string& name, const GridSpec& spec, const at::Tensor& weight, const Quantized& quantized) {
  at::NoGradGuard no_grad;
  constexpr std::int64_t chunk = 4096;  // an embedding is large beside everything else
  double square = 0, error = 0;
  for (std::int64_t first = 0; first < weight.size(0); first += chunk) {
    const std::int64_t end = std::min(weight.size(0), first + chunk);
    const at::Tensor part = weight.slice(0, first, end).to(at::kCPU, at::kFloat);
    square += part.square().sum(at::kDouble).item<double>();
    error += (part - decode(spec, rows_of(quantized, first, end))).square_().sum(at::kDouble).item<double>();
  }
  return Json{{"layer", name}, {"format", std::string(spec.grid->name)}, {"group", spec.group}, {"rows", weight.size(0)}, {"columns", weight.size(1)},
              {"bits", spec.bits_per_weight(weight.size(1))}, {"error", square > 0 ? error / square : 0}};
}

void describe_output(Json& row, const GridSpec& spec, const at::Tensor& weight, const LayerResult& result, const SecondMoments& moments) {
  at::NoGradGuard no_grad;
  const at::Tensor h = moments.hessian.to(at::kCPU), all = report_rows(weight.size(0), 128), few = report_rows(weight.size(0), 32);
  const auto relative = [](double error, double energy) { return energy > 0 ? std::max(0.0, error) / energy : 0.0; };
  const at::Tensor w = weight.index_select(0, all), e = w - decode(spec, report_select(result.quantized, all));
  row["output_error"] = relative(report_energy(e, h), report_energy(w, h));
  // The costly rest on fewer rows.
  const at::Tensor fw = weight.index_select(0, few), fe = fw - decode(spec, report_select(result.quantized, few)), fr = fw - decode(spec, encode(spec, fw));
  const double energy = report_energy(fw, h), error = report_energy(fe, h);
  row["rounding_error"] = relative(report_energy(fr, h), energy);
  if (moments.half.defined() && moments.tokens > moments.half_tokens) {
    // The second half is what is left of the whole.
    const at::Tensor half = moments.half.to(at::kCPU);
    const double share = moments.half_share;
    const double first_energy = report_energy(fw, half), first_error = report_energy(fe, half);
    row["halves"] = std::abs(relative(first_error, first_energy) - relative(error - share * first_error, energy - share * first_energy));
  }
  row["damping"] = result.damping;
  row["path"] = result.path;
  row["dead_inputs"] = result.dead;
  if (!result.objective.empty() && result.objective.front() > 0) row["polish_gain"] = 1 - result.objective.back() / result.objective.front();
}

bool halves_disagree(const Json& row) {
  return row.contains("halves") && row.at("halves").get<double>() > std::max(0.0, row.at("rounding_error").get<double>() - row.at("output_error").get<double>());
}

Json sparsity_json(const Json& rows, const SparsityPattern& pattern, const std::set<std::string>& dense) {
  Json layers = Json::array();
  double weights = 0, zeros = 0;
  for (const Json& row : rows) {
    if (!row.contains("sparsity")) continue;
    const double all = row.at("rows").get<double>() * row.at("columns").get<double>(), share = row.at("sparsity").get<double>();
    weights += all, zeros += std::round(all * share);
    layers.push_back(Json{{"layer", row.at("layer")}, {"sparsity", share}, {"output_error", row.at("output_error")}});
  }
  return Json{{"criterion", "sparsegpt"}, {"pattern", pattern.text()}, {"refit", "none"}, {"weights", static_cast<std::int64_t>(weights)}, {"zeros", static_cast<std::int64_t>(zeros)}, {"layers", layers}, {"dense", Json(dense)}};
}

std::string layer_table(const Json& rows) {
  struct Column {
    const char *key, *title;
    int digits;  // -1 = text
  };
  static constexpr Column columns[] = {{"layer", "layer", -1}, {"format", "format", -1}, {"bits", "bits", 3}, {"sparsity", "zeros", 3}, {"error", "error", 5}, {"output_error", "output", 5}, {"rounding_error", "rounding", 5},
                                       {"halves", "halves", 5}, {"damping", "damping", 4}, {"seconds", "seconds", 2}};
  std::vector<std::vector<std::string>> cells(1);
  std::vector<const Column*> shown;  // those that a row has something for
  for (const Column& column : columns)
    if (std::any_of(rows.begin(), rows.end(), [&](const Json& row) { return row.contains(column.key); })) shown.push_back(&column);
  for (const Column* column : shown) cells[0].emplace_back(column->title);
  for (const Json& row : rows) {
    cells.emplace_back();
    for (const Column* column : shown)
      cells.back().push_back(!row.contains(column->key) ? "" : column->digits < 0 ? row.at(column->key).get<std::string>() : fixed(row.at(column->key).get<double>(), column->digits));
  }
  std::string out;
  for (const auto& line : cells) {
    for (std::size_t c = 0; c < line.size(); ++c) {
      std::size_t width = 0;
      for (const auto& other : cells) width = std::max(width, other[c].size());
      const std::string space(width - line[c].size(), ' ');
      out += shown[c]->digits < 0 ? line[c] + space : space + line[c];
      out += c + 1 < line.size() ? "  " : "\n";
    }
  }
  return out;
}

}  // namespace kompakt
