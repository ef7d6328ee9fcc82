// Models at work: a classifier or a generator opened from an artifact, a model folder or a .gguf file.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace kompakt {

struct RankedLabel {
  std::string label;
  double probability = 0;
};

class Classifier {
 public:
  explicit Classifier(const std::filesystem::path& model);  // Error when the model has no classifier
  ~Classifier();
  // All labels, most probable first; ties keep the order of the labels. Longer texts are cut at the model's limit.
  std::vector<RankedLabel> classify(const std::string& text) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

struct GenerateRequest {
  std::string prompt;
  bool chat = false;  // wrap in the model's chat template
  std::int64_t max_new_tokens = 128, top_k = 0;
  double temperature = 0, top_p = 1;
  std::uint64_t seed = 0;
};
struct GenerateAnswer {
  std::string text;
  std::int64_t prompt_tokens = 0, new_tokens = 0;
  double seconds = 0;
};
// `on_text` gets the text as it grows, whole UTF-8 characters only.
GenerateAnswer generate_text(const std::filesystem::path& model, const GenerateRequest& request, const std::function<void(const std::string&)>& on_text = {});

}  // namespace kompakt
