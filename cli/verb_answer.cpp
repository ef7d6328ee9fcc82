// Verbs that use a model: classify and generate. The models behind them are opened by pipeline/answer.h.
#include <cstdio>
#include <iostream>

#include "cli/verbs.h"
#include "core/json.h"
#include "core/text.h"
#include "pipeline/answer.h"
#include "pipeline/device.h"

namespace kompakt {
namespace {

std::int64_t whole_number(const Arguments& arguments, const std::string& name, std::int64_t fallback, std::int64_t least) {
  if (!arguments.has(name)) return fallback;
  const auto value = parse_int(arguments.get(name));
  if (!value || *value < least) throw Error(str("--", name, " needs a whole number")).given(arguments.get(name)).allowed(str("at least ", least));
  return *value;
}

double real_number(const Arguments& arguments, const std::string& name, double fallback, double least, double most) {
  if (!arguments.has(name)) return fallback;
  const auto value = parse_double(arguments.get(name));
  if (!value || *value < least || *value > most) throw Error(str("--", name, " is out of range or no number")).given(arguments.get(name)).allowed(str(least, " to ", most));
  return *value;
}

}  // namespace

ExitCode verb_classify(const Arguments& arguments) {
  set_threads();
  const Classifier classifier(arguments.positional[0]);
  const std::int64_t top = whole_number(arguments, "top", 3, 1);
  Json all = Json::array();
  const auto answer = [&](const std::string& text) {
    const auto ranked = classifier.classify(text);
    const auto shown = std::min<std::size_t>(ranked.size(), static_cast<std::size_t>(top));
    if (arguments.has("json")) {
      Json labels = Json::array();
      for (std::size_t i = 0; i < shown; ++i) labels.push_back(Json{{"label", ranked[i].label}, {"probability", ranked[i].probability}});
      all.push_back(Json{{"text", text}, {"labels", labels}});
      return;
    }
    for (std::size_t i = 0; i < shown; ++i) std::printf("%5.1f%%  %s\n", ranked[i].probability * 100, ranked[i].label.c_str());
  };
  if (arguments.has("text")) {
    for (const std::string& text : arguments.all("text")) answer(text);
  } else {
    for (std::string line; std::getline(std::cin, line);)
      if (!trim(line).empty()) answer(line);
  }
  if (arguments.has("json")) std::fputs(dump_json(all).c_str(), stdout);
  return ExitCode::ok;
}

ExitCode verb_generate(const Arguments& arguments) {
  set_threads();
  if (!arguments.has("prompt")) throw Error("--prompt is missing").at("kompakt generate").hint("kompakt generate MODEL --prompt TEXT");
  GenerateRequest request;
  request.prompt = arguments.get("prompt");
  request.chat = arguments.has("chat");
  request.max_new_tokens = whole_number(arguments, "tokens", 128, 1);
  request.temperature = real_number(arguments, "temperature", 0, 0, 100);
  request.top_k = whole_number(arguments, "top-k", 0, 0);
  request.top_p = real_number(arguments, "top-p", 1, 0, 1);
  request.seed = static_cast<std::uint64_t>(whole_number(arguments, "seed", 0, 0));
  const bool json = arguments.has("json");
  const GenerateAnswer answer = generate_text(arguments.positional[0], request, [&](const std::string& piece) {
    if (!json) std::fputs(piece.c_str(), stdout), std::fflush(stdout);
  });
  if (json) std::fputs(dump_json(Json{{"prompt", request.prompt}, {"text", answer.text}, {"prompt_tokens", answer.prompt_tokens}, {"new_tokens", answer.new_tokens}, {"seconds", answer.seconds}}).c_str(), stdout);
  else std::printf("\n");
  return ExitCode::ok;
}

}  // namespace kompakt
