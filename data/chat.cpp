// One user message wrapped for an instruction model. Not a Jinja interpreter: five template families are recognised by the
// markers in their text. The begin token is left to encode(…, add_special), which would otherwise add it twice.
#include <algorithm>
#include <vector>

#include "core/error.h"
#include "core/text.h"
#include "data/tokenizer.h"

namespace kompakt {
namespace {

struct ChatMessage {
  std::string user, system;
};

// The system message that a ChatML template brings along when the caller gives none.
std::string chatml_default_system(const std::string& jinja) {
  const std::string open = "<|im_start|>system", close = "<|im_end|>";
  for (std::size_t at = jinja.find(open); at != std::string::npos; at = jinja.find(open, at + 1)) {
    std::size_t start = at + open.size();
    if (jinja.compare(start, 1, "\n") == 0) start += 1;
    else if (jinja.compare(start, 2, "\\n") == 0) start += 2;
    else continue;
    const std::size_t end = jinja.find(close, start);
    if (end == std::string::npos) return "";
    const std::string text = jinja.substr(start, end - start);
    // Quotes and braces are Jinja: the text is composed there, not given. A literal one that only serves tools has line breaks.
    if (!text.empty() && text.find_first_of("'\"{}+") == std::string::npos) return text;
  }
  return "";
}

std::string chatml(const std::string& jinja, const ChatMessage& message) {
  const std::string system = message.system.empty() ? chatml_default_system(jinja) : message.system;
  return (system.empty() ? "" : "<|im_start|>system\n" + system + "<|im_end|>\n") + "<|im_start|>user\n" + message.user + "<|im_end|>\n<|im_start|>assistant\n";
}

std::string llama3_chat(const std::string&, const ChatMessage& message) {
  const auto turn = [](const std::string& role, const std::string& text) { return "<|start_header_id|>" + role + "<|end_header_id|>\n\n" + text; };
  return (message.system.empty() ? "" : turn("system", trim(message.system) + "<|eot_id|>")) + turn("user", trim(message.user) + "<|eot_id|>") + turn("assistant", "");
}

std::string gemma_chat(const std::string&, const ChatMessage& message) {
  return "<start_of_turn>user\n" + (message.system.empty() ? "" : message.system + "\n\n") + trim(message.user) + "<end_of_turn>\n<start_of_turn>model\n";
}

std::string phi_chat(const std::string&, const ChatMessage& message) {
  return (message.system.empty() ? "" : "<|system|>\n" + message.system + "<|end|>\n") + "<|user|>\n" + message.user + "<|end|>\n<|assistant|>\n";
}

std::string llama2_chat(const std::string&, const ChatMessage& message) {
  return "[INST] " + (message.system.empty() ? "" : "<<SYS>>\n" + message.system + "\n<</SYS>>\n\n") + trim(message.user) + " [/INST]";
}

struct ChatRow {
  const char* name;
  std::vector<const char*> markers;  // all must stand in the template
  std::string (*compose)(const std::string& jinja, const ChatMessage& message);
};

const ChatRow chat_rows[] = {
    {"ChatML", {"<|im_start|>", "<|im_end|>"}, chatml},
    {"Llama-3", {"<|start_header_id|>", "<|eot_id|>"}, llama3_chat},
    {"Gemma", {"<start_of_turn>", "<end_of_turn>"}, gemma_chat},
    {"Phi", {"<|user|>", "<|end|>"}, phi_chat},
    {"Llama-2", {"[INST]", "[/INST]"}, llama2_chat},
};

}  // namespace

std::string apply_chat(const Tokenizer& tokenizer, std::string_view user_message, std::string_view system_message) {
  const std::string jinja = tokenizer.chat_template();
  if (jinja.empty()) throw Error("the tokenizer has no chat template").hint("give the text as it is, without a chat");
  std::vector<std::string> names;
  for (const ChatRow& row : chat_rows) {
    if (std::all_of(row.markers.begin(), row.markers.end(), [&](const char* marker) { return jinja.find(marker) != std::string::npos; }))
      return row.compose(jinja, {std::string(user_message), std::string(system_message)});
    names.push_back(row.name);
  }
  throw Error("the chat template of the tokenizer is of no known family").given(jinja.substr(0, 100)).allowed(join(names, ", ")).hint("wrap the message yourself");
}

}  // namespace kompakt
