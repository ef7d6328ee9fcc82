#include "pipeline/answer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <numeric>

#include "core/error.h"
#include "core/text.h"
#include "data/tokenizer.h"
#include "export/exporters.h"
#include "model/generate.h"
#include "pipeline/task_data.h"

namespace kompakt {
namespace fs = std::filesystem;
namespace {

std::unique_ptr<Tokenizer> answer_tokenizer(const fs::path& path) {
  return load_tokenizer(fs::is_directory(path) && !fs::exists(path / "config.json") && fs::exists(path / "model.gguf") ? path / "model.gguf" : path);
}

}  // namespace

struct Classifier::State {
  std::unique_ptr<Transformer> model;
  std::unique_ptr<Tokenizer> tokenizer;
};

Classifier::Classifier(const fs::path& path) : state_(std::make_unique<State>()) {
  state_->model = open_any_model(path);
  state_->tokenizer = answer_tokenizer(path);
  check_tokenizer_fits(*state_->tokenizer, state_->model->config(), path.string());
  if (!state_->model->config().is_classifier()) throw Error("this model has no classifier").at(path.string()).hint("give an artifact of a classification recipe, for example runs/quickstart/artifact");
}

Classifier::~Classifier() = default;

std::vector<RankedLabel> Classifier::classify(const std::string& text) const {
  const at::NoGradGuard no_grad;
  const ModelConfig& config = state_->model->config();
  ClassificationSet one;
  one.examples.push_back({text, 0});
  one.label_names = config.labels;
  const std::int64_t limit = config.max_positions > 0 ? config.max_positions : INT64_MAX;
  const std::vector<std::int64_t> ids = tokenize(one, *state_->tokenizer, limit, false).ids.front();
  ModelInput input;
  input.ids = at::tensor(ids, at::kLong).unsqueeze(0);
  const at::Tensor probabilities = at::softmax(state_->model->forward(input).to(at::kDouble).squeeze(0), -1).contiguous();
  std::vector<RankedLabel> ranked;
  for (std::size_t i = 0; i < config.labels.size(); ++i) ranked.push_back({config.labels[i], probabilities.const_data_ptr<double>()[i]});
  std::stable_sort(ranked.begin(), ranked.end(), [](const RankedLabel& a, const RankedLabel& b) { return a.probability > b.probability; });
  return ranked;
}

GenerateAnswer generate_text(const fs::path& path, const GenerateRequest& request, const std::function<void(const std::string&)>& on_text) {
  const std::unique_ptr<Transformer> model = open_any_model(path);
  const std::unique_ptr<Tokenizer> tokenizer = answer_tokenizer(path);
  check_tokenizer_fits(*tokenizer, model->config(), path.string());
  if (model->config().is_classifier() || model->tokens.weight.numel() == 0 || model->final_norm.weight.defined() == false) throw Error("this model does not write text").at(path.string()).hint("give a decoder, for example a Llama-type folder or .gguf file");
  const std::string prompt = request.chat ? apply_chat(*tokenizer, request.prompt) : request.prompt;
  const std::vector<std::int64_t> ids = tokenizer->encode(prompt, !request.chat, true);
  if (ids.empty()) throw Error("the prompt has no tokens").given(request.prompt).hint("give some text");
  GenerateOptions options;
  options.max_new_tokens = request.max_new_tokens;
  options.temperature = request.temperature;
  options.top_k = request.top_k;
  options.top_p = request.top_p;
  options.seed = request.seed;
  if (tokenizer->special().eos >= 0) options.stop.push_back(tokenizer->special().eos);
  GenerateAnswer answer;
  answer.prompt_tokens = static_cast<std::int64_t>(ids.size());
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::int64_t> made;
  std::size_t shown = 0;
  const auto show = [&](bool last) {
    answer.text = tokenizer->decode(made);
    // A character may still be half a token: wait for the rest.
    std::size_t whole = answer.text.size();
    if (!last && ends_with(answer.text, "\xEF\xBF\xBD")) whole -= 3;
    if (on_text && whole > shown) on_text(answer.text.substr(shown, whole - shown)), shown = whole;
  };
  generate(*model, ids, options, [&](std::int64_t token) {
    made.push_back(token);
    show(false);
    return true;
  });
  show(true);
  answer.new_tokens = static_cast<std::int64_t>(made.size());
  answer.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return answer;
}

}  // namespace kompakt
