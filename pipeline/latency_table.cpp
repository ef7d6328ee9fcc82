#include "pipeline/latency_table.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <set>
#include <vector>

#include "core/error.h"
#include "core/log.h"
#include "core/system.h"
#include "core/text.h"
#include "model/checkpoint.h"
#include "model/parallel.h"
#include "model/transformer.h"
#include "pipeline/describe.h"

namespace kompakt {
namespace {

using Shape = std::pair<std::int64_t, std::int64_t>;

// Weights of one forward pass by shape, and how often each occurs.
std::map<Shape, std::int64_t> latency_shapes(const ModelConfig& config) {
  std::map<Shape, std::int64_t> out;
  const ModelConfig one = with_layers(config, 1);
  Transformer shapes(one, 0, c10::Device(c10::kMeta));
  for (const Linear* linear : shapes.linears()) out[{linear->out_features(), linear->in_features()}] += config.layers;
  if (!config.is_classifier() && shapes.final_norm.weight.defined()) ++out[{config.vocab, config.hidden}];
  return out;
}

// Median microseconds of `work`, run for at least a twentieth of a second and five times.
template <class Work>
double latency_median(const Work& work) {
  std::vector<double> times;
  double total = 0;
  work();
  while (times.size() < 5 || (total < 5e4 && times.size() < 400)) {
    const auto start = std::chrono::steady_clock::now();
    work();
    times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
    total += times.back();
  }
  std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2), times.end());
  return times[times.size() / 2];
}

// Joules that the processor has used since some moment; nothing where the machine does not tell.
std::optional<double> latency_joules() {
  std::ifstream file("/sys/class/powercap/intel-rapl:0/energy_uj");
  double value = 0;
  if (file >> value) return value / 1e6;
  return std::nullopt;
}

}  // namespace

double LatencyTable::milliseconds(const ModelConfig& config) const {
  double n = 0, sx = 0, sy = 0, sxx = 0, sxy = 0;
  for (const auto& [shape, time] : us) {
    const double x = static_cast<double>(shape.first) * static_cast<double>(shape.second);
    n += 1, sx += x, sy += time, sxx += x * x, sxy += x * time;
  }
  const double spread = n * sxx - sx * sx, slope = spread > 0 ? (n * sxy - sx * sy) / spread : (sx > 0 ? sy / sx : 0), base = n > 0 && spread > 0 ? (sy - slope * sx) / n : 0;
  double total = layer_us * static_cast<double>(config.layers);
  for (const auto& [shape, count] : latency_shapes(config)) {
    const auto found = us.find(shape);
    const double one = found != us.end() ? found->second : std::max(0.0, base + slope * static_cast<double>(shape.first) * static_cast<double>(shape.second));
    total += one * static_cast<double>(count);
  }
  return total / 1e3;
}

LatencyTable measure_latency_table(const ModelConfig& config, std::int64_t tokens) {
  const at::NoGradGuard no_grad;
  LatencyTable table;
  table.processor = processor_name(), table.threads = at::get_num_threads(), table.tokens = tokens;
  std::set<Shape> shapes;
  const auto eighths = [](std::int64_t full) {
    std::set<std::int64_t> out = {full};
    for (std::int64_t i = 2; i < 8; ++i) out.insert(std::max<std::int64_t>(1, full * i / 8));
    return out;
  };
  for (const std::int64_t width : eighths(config.ffn)) {
    ModelConfig shape = config;
    shape.ffn = width;
    for (const auto& [key, count] : latency_shapes(shape)) shapes.insert(key);
  }
  for (const std::int64_t groups : eighths(config.kv_heads)) {
    ModelConfig shape = config;
    shape.kv_heads = groups, shape.heads = groups * (config.heads / config.kv_heads);
    for (const auto& [key, count] : latency_shapes(shape)) shapes.insert(key);
  }
  const auto joules = latency_joules();
  const auto start = std::chrono::steady_clock::now();
  Progress progress("latency table", static_cast<std::int64_t>(shapes.size()), "shape");
  std::int64_t done = 0;
  for (const Shape& shape : shapes) {
    check_interrupted();
    const at::Tensor weight = at::ones({shape.first, shape.second}), x = at::ones({tokens, shape.second});
    table.us[shape] = latency_median([&] { at::linear(x, weight); });
    progress.update(++done);
  }
  progress.finish();
  // The rest of a layer: one block, less its products.
  const ModelConfig one = with_layers(config, 1);
  const Transformer model(one, 1);
  ModelInput input;
  input.ids = at::full({1, tokens}, 1, at::kLong);
  const at::Tensor x = model.embed(input);
  double products = 0;
  for (const auto& [shape, count] : latency_shapes(one))
    if (shape.first != config.vocab) products += table.us.at(shape) * static_cast<double>(count);
  table.layer_us = std::max(0.0, latency_median([&] { model.block_forward(0, x, input); }) - products);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (const auto after = latency_joules(); joules && after && *after > *joules) table.watts = (*after - *joules) / seconds;
  return table;
}

Json to_json(const LatencyTable& table) {
  Json rows = Json::array();
  for (const auto& [shape, time] : table.us) rows.push_back(Json{{"rows", shape.first}, {"columns", shape.second}, {"us", time}});
  return Json{{"kind", "kompakt latency table"}, {"processor", table.processor}, {"threads", table.threads}, {"tokens", table.tokens}, {"layer_us", table.layer_us}, {"watts", table.watts ? Json(*table.watts) : Json()}, {"products", rows}};
}

LatencyTable read_latency_table(const std::filesystem::path& file) {
  const Json json = read_json(file);
  if (!json.is_object() || json.value("kind", "") != "kompakt latency table") throw Error("the file is no latency table").at(file.string()).hint("kompakt doctor --latency-table FILE --model DIR makes one");
  const std::string place = file.string();
  LatencyTable table;
  table.processor = json_get<std::string>(json, "processor", place);
  table.threads = static_cast<int>(json_get<std::int64_t>(json, "threads", place));
  table.tokens = json_get<std::int64_t>(json, "tokens", place);
  table.layer_us = json_get<double>(json, "layer_us", place);
  if (json.contains("watts") && !json.at("watts").is_null()) table.watts = json_get<double>(json, "watts", place);
  if (!json.contains("products") || !json.at("products").is_array() || json.at("products").empty()) throw Error("the latency table holds no products").at(place);
  for (const Json& row : json.at("products")) table.us[{json_get<std::int64_t>(row, "rows", place), json_get<std::int64_t>(row, "columns", place)}] = json_get<double>(row, "us", place);
  return table;
}

Json write_latency_table(const std::filesystem::path& model, const std::filesystem::path& file, std::int64_t tokens) {
  const ModelConfig config = load_config(model);
  if (config.max_positions > 0 && tokens > config.max_positions) throw Error("the model reads fewer tokens at once").at("kompakt doctor --tokens").given(str(tokens)).allowed(str("1 to ", config.max_positions));
  const LatencyTable table = measure_latency_table(config, tokens);
  Json out = to_json(table);
  write_json(file, out);
  out["file"] = file.string(), out["model_ms"] = table.milliseconds(config);
  return out;
}

std::string latency_table_text(const Json& table) {
  const Json& watts = table.at("watts");
  return str(table.at("products").size(), " products of ", table.at("tokens").dump(), " tokens on ", table.at("threads").dump(), " threads of ", table.at("processor").get<std::string>(), ": ", table.at("file").get<std::string>(),
             "\none forward pass of this model: ", fixed(table.at("model_ms").get<double>(), 3), " ms by the table; power: ", watts.is_null() ? std::string("this machine does not tell (budgets of joules need \"watts\" in the table)") : str(fixed(watts.get<double>(), 1), " W"), "\n");
}

}  // namespace kompakt
