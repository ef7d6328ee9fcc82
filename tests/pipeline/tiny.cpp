#include "tests/pipeline/tiny.h"

#include <algorithm>
#include <vector>

#include "core/text.h"
#include "model/checkpoint.h"
#include "model/config.h"

namespace kompakt::testing {
namespace fs = std::filesystem;
namespace {

constexpr const char* words[] = {"card", "lost", "money", "sent", "where", "my", "is", "rate", "fee", "high", "exchange", "arrived", "not", "has", "the", "why", "how", "much", "transfer", "stolen"};

std::string tiny_rows(int first, int count) {
  // The label is a function of the words: a model can learn it.
  struct Kind {
    const char* label;
    const char* texts[3];
  };
  constexpr Kind kinds[] = {{"card", {"my card is lost", "where is my card", "card not arrived"}},
                            {"rate", {"why is the exchange rate high", "how much is the rate", "exchange fee high"}},
                            {"transfer", {"where is the money sent", "transfer has not arrived", "money transfer not sent"}}};
  std::string out = "text,category\n";
  for (int i = first; i < first + count; ++i) {
    const Kind& kind = kinds[i % 3];
    out += str(kind.texts[i / 3 % 3], " ", words[i * 7 % 20], ",", kind.label, "\n");
  }
  return out;
}

}  // namespace

TinySetting::TinySetting() {
  std::string vocabulary = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n";
  int count = 5;
  for (char c = 'a'; c <= 'z'; ++c) vocabulary += str(c, "\n##", c, "\n"), count += 2;
  for (const char* word : words) vocabulary += str(word, "\n"), ++count;
  const Json config = {{"architectures", {"BertModel"}}, {"model_type", "bert"}, {"vocab_size", count}, {"hidden_size", 32}, {"num_hidden_layers", 3}, {"num_attention_heads", 4},
                       {"intermediate_size", 64}, {"hidden_act", "gelu"}, {"max_position_embeddings", 64}, {"type_vocab_size", 2}, {"layer_norm_eps", 1e-12}, {"pad_token_id", 0}};
  fs::create_directories(folder() / "teacher");
  const Transformer model(config_from_json(config, "tiny"), 3);
  save_model(model, folder() / "teacher");
  write_text(folder() / "teacher" / "vocab.txt", vocabulary);
  write_text(folder() / "train.csv", tiny_rows(0, 90));
  write_text(folder() / "test.csv", tiny_rows(200, 45));
  write_recipe();
}

void TinySetting::write_recipe(const std::string& stages, const std::string& extra) {
  const std::string chain = R"(
  - finetune: {epochs: 2, batch_size: 8, learning_rate: 1.0e-3, save_every_steps: 3}
  - distill: {student: {keep_layers: [0, 2]}, epochs: 1, batch_size: 8, learning_rate: 1.0e-3, save_every_steps: 3}
  - prune: {structured: {ffn: 0.5}, vocabulary: {first_ids: 0}, criterion: taylor, samples: 24, recover: {epochs: 1, batch_size: 8, save_every_steps: 3}}
  - quantize: {weights: ternary, group: 0, embedding: int8, method: qad, epochs: 1, batch_size: 8, learning_rate: 1.0e-3, save_every_steps: 3}
  - export: {formats: [kompakt]}
  - evaluate: {latency: false, cascade: true}
)";
  write_text(recipe(), str("name: tiny\nseed: 5\nstore: store\nteacher: {path: teacher}\ndata:\n  train: {files: [train.csv], text: text, label: category, max_length: 24, holdout: 0.2}\n"
                           "  test: {files: [test.csv], text: text, label: category, max_length: 24}\nstages:", stages.empty() ? chain : stages, extra));
}

std::string folder_bytes(const fs::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    if (entry.is_regular_file()) names.push_back(entry.path().lexically_relative(folder).generic_string());
  std::sort(names.begin(), names.end());
  std::string all;
  for (const std::string& name : names) all += str(name, "\n", read_text(folder / name), "\n");
  return all;
}

}  // namespace kompakt::testing
