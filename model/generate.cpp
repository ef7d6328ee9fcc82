// Token by token with a key/value cache. Sampling draws come from CounterRandom: same seed and prompt, same text.
#include "model/generate.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"
#include "core/random.h"
#include "core/system.h"
#include "core/text.h"
#include "model/families.h"
#include "model/transformer.h"

namespace kompakt {

namespace {

std::int64_t generate_argmax(const std::vector<float>& logits) {
  return std::max_element(logits.begin(), logits.end()) - logits.begin();  // the first of equals
}

// Temperature, then top-k, then the smallest set of tokens whose probability reaches top-p, then one draw.
std::int64_t generate_sample(const std::vector<float>& logits, const GenerateOptions& options, double uniform) {
  std::vector<std::int64_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto above = [&](std::int64_t a, std::int64_t b) {
    const float la = logits[static_cast<std::size_t>(a)], lb = logits[static_cast<std::size_t>(b)];
    return la != lb ? la > lb : a < b;
  };
  std::size_t kept = order.size();
  if (options.top_k > 0) kept = std::min(kept, static_cast<std::size_t>(options.top_k));
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(kept), order.end(), above);
  order.resize(kept);
  std::vector<double> weights(kept);
  const double highest = logits[static_cast<std::size_t>(order[0])];
  double total = 0;
  for (std::size_t i = 0; i < kept; ++i) {
    weights[i] = std::exp((logits[static_cast<std::size_t>(order[i])] - highest) / options.temperature);
    total += weights[i];
  }
  if (options.top_p < 1) {
    double sum = 0;
    std::size_t count = 0;
    while (count < kept && sum < options.top_p * total) sum += weights[count++];
    kept = std::max<std::size_t>(count, 1);
    total = sum;
  }
  double left = uniform * total;
  for (std::size_t i = 0; i < kept; ++i) {
    left -= weights[i];
    if (left < 0) return order[i];
  }
  return order[kept - 1];
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
    ModelInput input;
    input.ids = at::tensor(next, at::kLong).unsqueeze(0).to(model.device());
    const at::Tensor hidden = model.hidden(input, nullptr, &cache);
    const at::Tensor last = model.head(hidden.select(1, hidden.size(1) - 1)).reshape(-1).to(at::kCPU, at::kFloat).contiguous();
    const float* begin = last.const_data_ptr<float>();
    const std::vector<float> logits(begin, begin + last.numel());
    const std::int64_t token = options.temperature == 0 ? generate_argmax(logits) : generate_sample(logits, options, random.uniform(static_cast<std::uint64_t>(step)));
    if (std::find(options.stop.begin(), options.stop.end(), token) != options.stop.end()) break;
    text.push_back(token);
    if (on_token && !on_token(token)) break;
    next = {token};
  }
  return text;
}

}  // namespace kompakt
