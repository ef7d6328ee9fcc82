// Token by token with a key/value cache. Sampling draws come from CounterRandom: same seed and prompt, same text.
#include "model/generate.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <stdexcept>

#include "core/error.h"
#include "core/random.h"
#include "core/system.h"
#include "core/text.h"
#include "model/families.h"
#include "model/transformer.h"

namespace kompakt {

namespace {

std::int64_t generate_argmax(std::span<const float> logits) {
  return std::max_element(logits.begin(), logits.end()) - logits.begin();  // the first of equals
}

// Temperature, then top-k, then the smallest set of tokens whose probability reaches top-p, then one draw. Without a cut tokens are
// drawn in the order of their ids; with one, only as many are sorted as the cut may keep.
std::int64_t generate_sample(std::span<const float> logits, const GenerateOptions& options, double uniform) {
  const double highest = *std::max_element(logits.begin(), logits.end());
  const auto weight = [&](std::size_t id) { return std::exp((logits[id] - highest) / options.temperature); };
  const std::size_t all = logits.size();
  const bool cut = options.top_k > 0 || options.top_p < 1;
  std::vector<std::size_t> order(all);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::size_t kept = all;
  double total = 0;
  if (!cut) {
    for (std::size_t id = 0; id < all; ++id) total += weight(id);
  } else {
    const auto above = [&](std::size_t a, std::size_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
    if (options.top_k > 0) kept = std::min(kept, static_cast<std::size_t>(options.top_k));
    std::size_t sorted = 0;
    const auto sort_to = [&](std::size_t count) {
      std::partial_sort(order.begin() + static_cast<std::ptrdiff_t>(sorted), order.begin() + static_cast<std::ptrdiff_t>(count), order.end(), above);
      sorted = count;
    };
    double mass = 0;  // of what top-p is a share of
    if (options.top_k > 0) sort_to(kept);
    for (std::size_t i = 0; i < kept; ++i) mass += weight(order[i]);
    std::size_t count = 0;
    while (count < kept && (options.top_p >= 1 || total < options.top_p * mass)) {
      if (count == sorted) sort_to(std::min(kept, std::max<std::size_t>(64, 4 * sorted)));
      total += weight(order[count++]);
    }
    kept = std::max<std::size_t>(count, 1);
  }
  double left = uniform * total;
  for (std::size_t i = 0; i < kept; ++i) {
    left -= weight(order[i]);
    if (left < 0) return static_cast<std::int64_t>(order[i]);
  }
  return static_cast<std::int64_t>(order[kept - 1]);
}

std::int64_t generate_next(std::span<const float> logits, const GenerateOptions& options, const CounterRandom& random, std::size_t step) {
  if (options.vocabulary > 0) logits = logits.first(std::min(logits.size(), static_cast<std::size_t>(options.vocabulary)));
  return options.temperature == 0 ? generate_argmax(logits) : generate_sample(logits, options, random.uniform(step));
}

bool generate_stops(const GenerateOptions& options, std::int64_t token) { return std::find(options.stop.begin(), options.stop.end(), token) != options.stop.end(); }

// Logits [B,V] on the host of the token after ids [B,T].
at::Tensor generate_logits(const Transformer& model, const at::Tensor& ids, KvCache& cache) {
  ModelInput input;
  input.ids = ids.to(model.device());
  const at::Tensor hidden = model.hidden(input, nullptr, &cache);
  return model.head(hidden.select(1, hidden.size(1) - 1)).to(at::kCPU, at::kFloat).contiguous();
}

void generate_check(const Transformer& model, const std::vector<std::int64_t>& prompt, const GenerateOptions& options) {
  if (model.config().family->encoder) throw Error("an encoder cannot generate text").allowed("a decoder");
  if (prompt.empty()) throw Error("the prompt has no tokens");
  for (std::int64_t id : prompt) {
    if (id < 0 || id >= model.config().vocab) throw Error(str("token id ", id, " is outside of the vocabulary")).allowed(str("0 to ", model.config().vocab - 1));
  }
  if (!(options.temperature >= 0)) throw Error(str("temperature is ", options.temperature)).allowed("0 or more");
  if (!(options.top_p > 0 && options.top_p <= 1)) throw Error(str("top_p is ", options.top_p)).allowed("above 0, at most 1");
  if (options.top_k < 0) throw Error(str("top_k is ", options.top_k)).allowed("0 (all) or more");
}

}  // namespace

std::vector<std::int64_t> generate(const Transformer& model, const std::vector<std::int64_t>& prompt, const GenerateOptions& options,
                                   const std::function<bool(std::int64_t)>& on_token) {
  generate_check(model, prompt, options);
  const at::NoGradGuard no_grad;
  const CounterRandom random(options.seed, "generate");
  KvCache cache;
  std::vector<std::int64_t> text, next = prompt;
  for (std::int64_t step = 0; step < options.max_new_tokens; ++step) {
    check_interrupted();
    const at::Tensor logits = generate_logits(model, at::tensor(next, at::kLong).unsqueeze(0), cache);
    const std::int64_t token = generate_next({logits.const_data_ptr<float>(), static_cast<std::size_t>(logits.numel())}, options, random, static_cast<std::size_t>(step));
    if (generate_stops(options, token)) break;
    text.push_back(token);
    if (on_token && !on_token(token)) break;
    next = {token};
  }
  return text;
}

std::vector<std::vector<std::int64_t>> generate_batch(const Transformer& model, const std::vector<std::vector<std::int64_t>>& prompts, const GenerateOptions& options,
                                                      const std::vector<std::uint64_t>& seeds) {
  if (seeds.size() != prompts.size()) throw std::logic_error("generate_batch: one seed for each prompt is needed");
  for (const auto& prompt : prompts) generate_check(model, prompt, options);
  std::vector<std::vector<std::int64_t>> texts(prompts.size());
  if (prompts.empty() || options.max_new_tokens < 1) return texts;
  const at::NoGradGuard no_grad;
  std::vector<CounterRandom> random;
  for (const std::uint64_t seed : seeds) random.emplace_back(seed, "generate");
  std::vector<std::size_t> rows(prompts.size());  // that still write, in order
  std::iota(rows.begin(), rows.end(), std::size_t{0});
  std::size_t known = prompts[0].size();  // tokens of every row that the next pass reads up to
  for (const auto& prompt : prompts) known = std::min(known, prompt.size());
  const auto token_at = [&](std::size_t row, std::size_t place) { return place < prompts[row].size() ? prompts[row][place] : texts[row][place - prompts[row].size()]; };
  KvCache cache;
  for (std::size_t read = 0; !rows.empty(); ++known) {
    check_interrupted();
    std::vector<std::int64_t> next;
    for (const std::size_t row : rows)
      for (std::size_t place = read; place < known; ++place) next.push_back(token_at(row, place));
    const at::Tensor logits = generate_logits(model, at::tensor(next, at::kLong).view({static_cast<std::int64_t>(rows.size()), -1}), cache);
    read = known;
    const auto vocabulary = static_cast<std::size_t>(logits.size(1));
    std::vector<std::size_t> left;
    std::vector<std::int64_t> places;  // of them in the batch
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const std::size_t row = rows[i];
      auto& text = texts[row];
      if (known >= prompts[row].size()) {
        text.push_back(generate_next({logits.const_data_ptr<float>() + i * vocabulary, vocabulary}, options, random[row], text.size()));
        if (generate_stops(options, text.back()) || static_cast<std::int64_t>(text.size()) == options.max_new_tokens) continue;
      }
      left.push_back(row);
      places.push_back(static_cast<std::int64_t>(i));
    }
    if (left.size() < rows.size() && !left.empty()) {
      const at::Tensor index = at::tensor(places, at::kLong).to(model.device());
      for (auto& [keys, values] : cache.layers) keys = keys.index_select(0, index), values = values.index_select(0, index);
    }
    rows = std::move(left);
  }
  return texts;
}

}  // namespace kompakt
