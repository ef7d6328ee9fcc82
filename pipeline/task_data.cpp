#include "pipeline/task_data.h"

#include <algorithm>

#include "core/error.h"
#include "core/hash.h"
#include "core/text.h"
#include "data/calibration.h"

namespace kompakt {
namespace {

// Windows of text data are 512 tokens unless the recipe says otherwise.
constexpr std::int64_t default_window = 512;

TokenWindows task_windows(const TextSet& set, const DataSource& source, const std::string& name, const Tokenizer& tokenizer, std::int64_t limit) {
  const std::int64_t length = source.max_length > 0 ? source.max_length : std::min<std::int64_t>(default_window, limit);
  if (length > limit) throw Error(str("windows of data set \"", name, "\" are longer than the model allows")).given(str(length, " tokens")).allowed(str("at most ", limit));
  if (length < 2) throw Error(str("windows of data set \"", name, "\" are too short")).given(str(length, " tokens")).allowed("at least 2");
  try {
    return token_windows(set, tokenizer, length, source.tokens > 0 ? std::max<std::int64_t>(1, source.tokens / length) : 0);
  } catch (Error& error) {
    throw error.place().empty() ? error.at(str("data set \"", name, "\"")) : error;
  }
}

std::vector<std::vector<std::int64_t>> task_documents(const TextSet& set, const DataSource& source, const Tokenizer& tokenizer) {
  std::vector<std::vector<std::int64_t>> documents;
  std::int64_t count = 0;
  for (const std::string& document : set.documents) {
    if (source.tokens > 0 && count >= source.tokens) break;
    documents.push_back(tokenizer.encode(document, false, false));
    count += static_cast<std::int64_t>(documents.back().size());
  }
  return documents;
}

}  // namespace

LoadedData load_data(const Recipe& recipe) {
  LoadedData data;
  data.kind = recipe.is_classification() ? TaskData::Kind::classification : TaskData::Kind::text;
  const auto source = [&](const char* name) { return recipe.find_data(name); };
  if (data.kind == TaskData::Kind::classification) {
    if (const DataSource* train = source("train")) data.train = read_classification(*train, recipe.base);
    const std::vector<std::string> labels = data.train.label_names;
    if (const DataSource* dev = source("dev")) data.dev = read_classification(*dev, recipe.base, labels);
    else if (const DataSource* train = source("train"); train && train->holdout > 0) std::tie(data.train, data.dev) = hold_out(data.train, train->holdout, recipe.seed);
    if (const DataSource* test = source("test")) data.test = read_classification(*test, recipe.base, labels);
  } else {
    if (const DataSource* train = source("train")) data.train_text = read_text_set(*train, recipe.base);
    if (const DataSource* heldout = source("heldout")) data.heldout = read_text_set(*heldout, recipe.base);
    if (const DataSource* test = source("test")) data.test_text = read_text_set(*test, recipe.base);
  }
  if (const DataSource* calibration = source("calibration")) data.calibration = read_text_set(*calibration, recipe.base);
  return data;
}

Json LoadedData::describe() const {
  Json out = Json::object();
  const auto labelled = [&](const char* name, const ClassificationSet& set, std::int64_t truncated) {
    if (!set.examples.empty()) out[name] = Json{{"examples", set.examples.size()}, {"labels", set.label_names.size()}, {"hash", set.hash}, {"truncated", truncated}};
  };
  labelled("train", train, truncated_train);
  labelled("dev", dev, 0);
  labelled("test", test, truncated_test);
  const auto text = [&](const char* name, const TextSet& set) {
    if (!set.documents.empty()) out[name] = Json{{"documents", set.documents.size()}, {"hash", set.hash}};
  };
  text("train", train_text);
  text("calibration", calibration);
  text("heldout", heldout);
  text("test", test_text);
  return out;
}

std::string LoadedData::hash() const {
  return sha256(str(train.hash, "\n", dev.hash, "\n", train_text.hash, "\n", calibration.hash, "\n", heldout.hash));
}

void check_tokenizer_fits(const Tokenizer& tokenizer, const ModelConfig& config, const std::string& place) {
  if (tokenizer.vocab_size() <= config.vocab) return;
  throw Error("the tokenizer does not fit the model's embedding").at(place).given(str("tokenizer with ", tokenizer.vocab_size(), " ids, embedding with ", config.vocab, " rows")).hint("give the tokenizer that belongs to these weights (teacher.tokenizer)");
}

std::unique_ptr<TokenizedData> tokenize_data(const Recipe& recipe, const LoadedData& data, const Tokenizer& tokenizer, const ModelConfig& config) {
  check_tokenizer_fits(tokenizer, config, recipe.teacher.path);
  auto out = std::make_unique<TokenizedData>();
  out->task.kind = data.kind;
  out->task.tokenizer = &tokenizer;
  const std::int64_t limit = config.max_positions > 0 ? config.max_positions : INT64_MAX;
  TokenWindows heldout, test, calibration;
  if (data.kind == TaskData::Kind::classification) {
    const DataSource* train = recipe.find_data("train");
    const DataSource* test_source = recipe.find_data("test");
    const DataSource& first = train ? *train : test_source ? *test_source : *recipe.find_data("dev");
    out->max_length = std::min(first.max_length > 0 ? first.max_length : limit, limit);
    out->task.labels = train ? data.train.label_names : data.test.label_names;
    if (train) out->task.train = tokenize(data.train, tokenizer, out->max_length, train->refuse_long);
    if (!data.dev.examples.empty()) out->task.dev = tokenize(data.dev, tokenizer, out->max_length, first.refuse_long);
    if (test_source) out->test = tokenize(data.test, tokenizer, test_source->max_length > 0 ? std::min(test_source->max_length, limit) : out->max_length, test_source->refuse_long);
    out->truncated_train = out->task.train.truncated;
    out->truncated_test = out->test.truncated;
  } else {
    if (const DataSource* source = recipe.find_data("train")) out->task.train_documents = task_documents(data.train_text, *source, tokenizer);
    if (const DataSource* source = recipe.find_data("heldout")) heldout = task_windows(data.heldout, *source, "heldout", tokenizer, limit);
    if (const DataSource* source = recipe.find_data("test")) test = task_windows(data.test_text, *source, "test", tokenizer, limit);
  }
  if (const DataSource* source = recipe.find_data("calibration")) calibration = task_windows(data.calibration, *source, "calibration", tokenizer, limit);
  // Figures measured on text that a stage has looked at are no evidence.
  if (!test.windows.empty() && !calibration.windows.empty()) check_no_overlap(calibration, test, "data set \"calibration\"", "data set \"test\"");
  if (!test.windows.empty() && !heldout.windows.empty()) check_no_overlap(heldout, test, "data set \"heldout\"", "data set \"test\"");
  out->task.heldout = std::move(heldout.windows);
  out->task.calibration = std::move(calibration.windows);
  out->test_windows = std::move(test.windows);
  out->task.hash = sha256(str(data.hash(), "\n", tokenizer.fingerprint(), "\n", out->max_length));
  return out;
}

}  // namespace kompakt
