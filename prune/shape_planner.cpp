#include "prune/shape_planner.h"

#include <c10/core/Device.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/error.h"
#include "core/text.h"
#include "model/transformer.h"

namespace kompakt {
namespace {

// Names of the linears whose rows a dimension decides: every layer has the same, so the first layer's stand for all.
std::string shape_linear(const ModelConfig& config, bool feed_forward) {
  const ModelConfig one = with_layers(config, 1);
  const Transformer shapes(one, 0, c10::Device(c10::kMeta));
  return feed_forward ? shapes.blocks[0].mlp.down.name : shapes.blocks[0].attention.output.name;
}

// All that reads the residual stream: its rows are as long as the stream is wide.
std::vector<std::string> shape_readers(const ModelConfig& config) {
  const ModelConfig one = with_layers(config, 1);
  const Transformer shapes(one, 0, c10::Device(c10::kMeta));
  const Block& block = shapes.blocks[0];
  std::vector<std::string> names;
  for (const Linear* linear : {&block.attention.query, &block.attention.key, &block.attention.value, &block.mlp.gate, &block.mlp.up})
    if (linear->weight.defined()) names.push_back(linear->name);
  return names;
}

bool shape_holds(const ShapeTarget& target, const std::string& linear, std::int64_t columns, std::string& why) { return !target.holds || target.holds(linear, columns, why); }

std::string shape_share(std::int64_t value, std::int64_t full) { return shortest(std::round(1e4 * static_cast<double>(value) / static_cast<double>(full)) / 1e4); }

std::string shape_storage(const ShapeTarget& target) {
  if (target.grids.empty()) return target.format.empty() ? "the export" : target.format;
  return target.format.empty() ? target.grids : str(target.format, " with ", target.grids);
}

// "0.75 (1152) or 0.6667 (1024)": the nearest below and above.
std::string shape_nearest(std::int64_t asked, std::int64_t full, const std::vector<std::int64_t>& valid, const char* unit) {
  const auto text = [&](std::int64_t value) { return str(shape_share(value, full), " (", value, " ", unit, ")"); };
  std::vector<std::int64_t> order = valid;
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return std::abs(a - asked) < std::abs(b - asked); });
  std::vector<std::string> near;
  for (std::size_t i = 0; i < order.size() && i < 2; ++i) near.push_back(text(order[i]));
  return join(near, " or ");
}

// Keeps the ends, the asked value and its neighbours, and as many of the others, evenly spread, as there is room for.
std::vector<ShapeChoice> shape_thinned(const std::vector<ShapeChoice>& all, std::size_t most) {
  if (all.size() <= most) return all;
  std::vector<bool> keep(all.size(), false);
  keep.front() = keep.back() = true;
  for (std::size_t i = 0; i < all.size(); ++i)
    if (all[i].asked)
      for (std::size_t j = i > 0 ? i - 1 : 0; j <= std::min(i + 1, all.size() - 1); ++j) keep[j] = true;
  const auto count = static_cast<std::size_t>(std::count(keep.begin(), keep.end(), true));
  for (std::size_t k = 1; count + k <= most; ++k) keep[k * (all.size() - 1) / (most - count + 1)] = true;
  std::vector<ShapeChoice> out;
  for (std::size_t i = 0; i < all.size(); ++i)
    if (keep[i]) out.push_back(all[i]);
  return out;
}

}  // namespace

std::vector<std::int64_t> valid_widths(const ModelConfig& config, std::int64_t multiple, const ShapeTarget& target) {
  const std::string linear = shape_linear(config, true);
  std::vector<std::int64_t> out;
  std::string why;
  if (shape_holds(target, linear, config.ffn, why)) out.push_back(config.ffn);
  for (std::int64_t width = (config.ffn - 1) / multiple * multiple; width > 0; width -= multiple)
    if (shape_holds(target, linear, width, why)) out.push_back(width);
  return out;
}

std::vector<std::int64_t> valid_hidden(const ModelConfig& config, std::int64_t multiple, const ShapeTarget& target) {
  const std::vector<std::string> readers = shape_readers(config);
  const auto held = [&](std::int64_t width) {
    std::string why;
    return std::all_of(readers.begin(), readers.end(), [&](const std::string& reader) { return shape_holds(target, reader, width, why); });
  };
  std::vector<std::int64_t> out;
  if (held(config.hidden)) out.push_back(config.hidden);
  for (std::int64_t width = (config.hidden - 1) / multiple * multiple; width > 0; width -= multiple)
    if (held(width)) out.push_back(width);
  return out;
}

std::vector<HeadPlan> valid_heads(const ModelConfig& config, const ShapeTarget& target) {
  const std::string linear = shape_linear(config, false);
  const std::int64_t group = config.heads / config.kv_heads;
  std::vector<HeadPlan> out;
  // The same count both ways: whole groups go, as in plan_heads.
  for (std::int64_t n = 1; n <= config.kv_heads; ++n) out.push_back({n * group, n});
  for (std::int64_t n = 1; n < group; ++n)
    if (std::none_of(out.begin(), out.end(), [&](const HeadPlan& p) { return p.heads == n * config.kv_heads; })) out.push_back({n * config.kv_heads, config.kv_heads});
  std::erase_if(out, [&](const HeadPlan& plan) {
    std::string why;
    return !shape_holds(target, linear, plan.heads * config.head_dim, why);
  });
  std::sort(out.begin(), out.end(), [](const HeadPlan& a, const HeadPlan& b) { return a.heads > b.heads; });
  return out;
}

void check_shape(const ModelConfig& config, const PruneOptions& options, const ShapeTarget& target) {
  const ModelConfig after = pruned_config(config, options);
  std::string why;
  if (after.ffn < config.ffn && !shape_holds(target, shape_linear(config, true), after.ffn, why)) {
    const std::vector<std::int64_t> valid = valid_widths(config, options.multiple_of, target);
    Error error(str("a feed-forward width of ", after.ffn, " cannot be stored as ", shape_storage(target), ": ", why));
    error.at("structured.ffn").given(str(shortest(options.structured.ffn), " of ", config.ffn, " neurons, rounded to a multiple of ", options.multiple_of));
    error.allowed(valid.empty() ? std::string("no multiple of multiple_of fits") : str("nearest: ", shape_nearest(after.ffn, config.ffn, valid, "neurons")));
    error.hint("choose one of these shares, a multiple_of that the grid's groups divide, or a grid with smaller groups");
    throw error;
  }
  const std::vector<std::string> readers = after.hidden < config.hidden ? shape_readers(config) : std::vector<std::string>();
  if (!std::all_of(readers.begin(), readers.end(), [&](const std::string& reader) { return shape_holds(target, reader, after.hidden, why); })) {
    const std::vector<std::int64_t> valid = valid_hidden(config, options.multiple_of, target);
    Error error(str("a hidden size of ", after.hidden, " cannot be stored as ", shape_storage(target), ": ", why));
    error.at("structured.hidden").given(str(shortest(options.structured.hidden), " of ", config.hidden, " channels, rounded to a multiple of ", options.multiple_of));
    error.allowed(valid.empty() ? std::string("no multiple of multiple_of fits") : str("nearest: ", shape_nearest(after.hidden, config.hidden, valid, "channels")));
    error.hint("choose one of these shares, a multiple_of that the grid's groups divide, or a grid with smaller groups");
    throw error;
  }
  if (after.heads < config.heads && !shape_holds(target, shape_linear(config, false), after.heads * config.head_dim, why)) {
    std::vector<std::int64_t> valid;
    for (const HeadPlan& plan : valid_heads(config, target)) valid.push_back(plan.heads);
    Error error(str(after.heads, " heads of size ", config.head_dim, " make rows of ", after.heads * config.head_dim, ", which cannot be stored as ", shape_storage(target), ": ", why));
    error.at("structured.heads").given(str(shortest(options.structured.heads), " of ", config.heads, " heads"));
    error.allowed(valid.empty() ? std::string("no number of heads fits") : str("nearest: ", shape_nearest(after.heads, config.heads, valid, "heads")));
    error.hint("choose one of these shares, or a grid with smaller groups");
    throw error;
  }
}

std::vector<ShapeAxis> plan_shapes(const ModelConfig& config, const PruneOptions& options, const ShapeTarget& target, std::int64_t pieces, std::size_t most) {
  ModelConfig after = pruned_config(config, options);
  if (options.has_vocabulary && pieces > 0) after.vocab = pieces;
  std::vector<ShapeAxis> axes;
  const std::string held = target.grids.empty() ? std::string() : str(" whose rows ", target.grids, " can store");
  // Sizes are asked for the values that are shown alone: each builds the shape of a whole model.
  const auto finish = [&](ShapeAxis axis, const std::function<void(ModelConfig&, const ShapeChoice&)>& put) {
    axis.choices = shape_thinned(axis.choices, most);
    for (ShapeChoice& choice : axis.choices) {
      choice.share = static_cast<double>(choice.value) / static_cast<double>(axis.full);
      ModelConfig shape = after;
      put(shape, choice);
      if (target.size) choice.size = target.size(shape);
    }
    axes.push_back(std::move(axis));
  };
  if (options.has_structured) {
    ShapeAxis widths{"feed-forward width", "structured.ffn", config.ffn, str(options.multiple_of == 1 ? std::string("any number") : str("multiples of ", options.multiple_of), held), {}};
    for (const std::int64_t width : valid_widths(config, options.multiple_of, target)) widths.choices.push_back({width, 0, 1, {}, width == after.ffn});
    finish(std::move(widths), [](ModelConfig& shape, const ShapeChoice& choice) { shape.ffn = choice.value; });
    ShapeAxis heads{"attention heads", "structured.heads", config.heads, str(config.heads == config.kv_heads ? "any number" : "whole key/value groups, or equally many of each", held), {}};
    for (const HeadPlan& plan : valid_heads(config, target)) heads.choices.push_back({plan.heads, plan.kv_heads, 1, {}, plan.heads == after.heads});
    finish(std::move(heads), [](ModelConfig& shape, const ShapeChoice& choice) { shape.heads = choice.value, shape.kv_heads = choice.kv_heads; });
    if (after.hidden < config.hidden) {
      ShapeAxis hidden{"hidden size", "structured.hidden", config.hidden, str(options.multiple_of == 1 ? std::string("any number") : str("multiples of ", options.multiple_of), held), {}};
      for (const std::int64_t width : valid_hidden(config, options.multiple_of, target)) hidden.choices.push_back({width, 0, 1, {}, width == after.hidden});
      finish(std::move(hidden), [](ModelConfig& shape, const ShapeChoice& choice) { shape.hidden = choice.value; });
    }
    ShapeAxis layers{"layers", "structured.layers", config.layers, "any number", {}};
    for (std::int64_t n = config.layers; n > 0; --n) layers.choices.push_back({n, 0, 1, {}, n == after.layers});
    finish(std::move(layers), [&config](ModelConfig& shape, const ShapeChoice& choice) {
      shape.sliding_window = config.sliding_window, shape.no_rope = config.no_rope;
      shape = with_layers(std::move(shape), choice.value);
    });
  }
  if (options.has_vocabulary && pieces > 0) {
    ShapeAxis vocabulary{"vocabulary", "vocabulary", config.vocab, str("what the texts use", options.vocabulary.multiple_of > 1 ? str(", filled up to a multiple of ", options.vocabulary.multiple_of) : std::string()), {}};
    vocabulary.choices = {{config.vocab, 0, 1, {}, pieces == config.vocab}};
    if (pieces < config.vocab) vocabulary.choices.push_back({pieces, 0, 1, {}, true});
    finish(std::move(vocabulary), [](ModelConfig& shape, const ShapeChoice& choice) { shape.vocab = choice.value; });
  }
  return axes;
}

Json shapes_json(const std::vector<ShapeAxis>& axes) {
  Json out = Json::array();
  for (const ShapeAxis& axis : axes) {
    Json choices = Json::array();
    for (const ShapeChoice& choice : axis.choices) {
      Json row{{"value", choice.value}, {"share", choice.share}};
      if (choice.kv_heads > 0) row["kv_heads"] = choice.kv_heads;
      if (choice.size.bytes > 0) row["bytes"] = choice.size.bytes, row["embedding_bytes"] = choice.size.embedding;
      if (choice.asked) row["asked"] = true;
      choices.push_back(std::move(row));
    }
    out.push_back(Json{{"axis", axis.name}, {"key", axis.key}, {"now", axis.full}, {"valid", axis.rule}, {"choices", choices}});
  }
  return out;
}

std::string shapes_text(const Json& axes, const std::string& indent) {
  std::string out;
  for (const Json& axis : axes) {
    out += str(indent, axis.at("axis").get<std::string>(), ", now ", axis.at("now").dump(), " (", axis.at("key").get<std::string>(), "); valid: ", axis.at("valid").get<std::string>(), "\n");
    for (const Json& choice : axis.at("choices")) {
      const auto cell = [](std::string text, std::size_t width) { return std::string(text.size() < width ? width - text.size() : 0, ' ') + text; };
      out += str(indent, choice.contains("asked") ? "-> " : "   ", cell(choice.at("value").dump(), 7), cell(shortest(std::round(1e4 * choice.at("share").get<double>()) / 1e4), 8));
      if (choice.contains("kv_heads")) out += cell(str(choice.at("kv_heads").dump(), " kv"), 8);
      if (choice.contains("bytes")) {
        const double bytes = choice.at("bytes").get<double>();
        out += str(cell(human_bytes(bytes), 11), ", embedding ", fixed(100 * choice.at("embedding_bytes").get<double>() / bytes, 0), "%");
      }
      out += "\n";
    }
  }
  return out;
}

}  // namespace kompakt
