// The data of a recipe: read once, tokenized anew for every tokenizer on the way.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/json.h"
#include "data/dataset.h"
#include "data/tokenizer.h"
#include "model/config.h"
#include "pipeline/recipe.h"
#include "train/context.h"

namespace kompakt {

struct LoadedData {
  TaskData::Kind kind = TaskData::Kind::classification;
  ClassificationSet train, dev, test, previous;          // classification; rehearsed examples are in train
  TextSet train_text, calibration, heldout, test_text, previous_text, rehearsal_text;  // text
  std::int64_t truncated_train = 0, truncated_test = 0;  // of the last tokenization
  std::int64_t rehearsed = 0;                            // examples or documents of data.rehearsal in the training data
  bool has_test() const { return !test.examples.empty() || !test_text.documents.empty(); }
  bool has_previous() const { return !previous.examples.empty() || !previous_text.documents.empty(); }
  // For the manifest: sizes and hashes.
  Json describe() const;
  std::string hash() const;
};

// Reads all files; labels are numbered as pipeline/earlier_task.h says. Errors: empty set, unknown label in dev, test, previous or rehearsal,
// the same text in calibration and test.
LoadedData load_data(const Recipe& recipe);

struct TokenizedData {
  TaskData task;                                     // what stages see: no test set in it
  TokenizedExamples test, previous;                  // classification
  std::vector<std::vector<std::int64_t>> test_windows, previous_windows;  // text
  std::int64_t max_length = 0;
  std::int64_t truncated_train = 0, truncated_test = 0;
};

// `config` gives the length limit and must fit the tokenizer (Error otherwise).
std::unique_ptr<TokenizedData> tokenize_data(const Recipe& recipe, const LoadedData& data, const Tokenizer& tokenizer, const ModelConfig& config);

// A tokenizer whose ids reach past the embedding is an Error that names both sizes.
void check_tokenizer_fits(const Tokenizer& tokenizer, const ModelConfig& config, const std::string& place);

}  // namespace kompakt
