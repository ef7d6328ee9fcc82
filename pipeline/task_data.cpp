#include "pipeline/task_data.h"

#include <algorithm>
#include <set>
#include <tuple>

#include "core/error.h"
#include "core/hash.h"
#include "core/log.h"
#include "core/text.h"
#include "data/calibration.h"
#include "pipeline/earlier_task.h"

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

// The same text in what is trained on and in what is measured: counted in a warning, as natural data repeat themselves.
void warn_of_repeats(const ClassificationSet& trained, const ClassificationSet& measured, const char* trained_name, const char* measured_name) {
  std::set<std::string> texts;
  for (const Example& example : trained.examples) texts.insert(example.text);
  const auto count = std::count_if(measured.examples.begin(), measured.examples.end(), [&](const Example& example) { return texts.count(example.text) > 0; });
  if (count > 0) log_warning(str(count, " of the ", measured.examples.size(), " texts of data set \"", measured_name, "\" stand in data set \"", trained_name, "\" too"));
}

void load_examples(const Recipe& recipe, LoadedData& data) {
  const auto source = [&](const char* name) { return recipe.find_data(name); };
  std::vector<std::string> labels;
  if (!recipe.has_labels()) {
    for (const auto& [name, set] : {std::pair("train", &data.train), std::pair("dev", &data.dev), std::pair("test", &data.test)})
      if (source(name)) *set = read_classification(*source(name), recipe.base);
    if (const DataSource* train = source("train"); train && train->holdout > 0 && !source("dev")) std::tie(data.train, data.dev) = hold_out(data.train, train->holdout, recipe.seed);
    return;
  }
  if (const DataSource* train = source("train")) {
    data.train = read_classification(*train, recipe.base);
    labels = continued_labels(recipe, data.train.label_names);
    data.train = relabel(std::move(data.train), labels, "the model");
  }
  if (const DataSource* dev = source("dev")) data.dev = read_classification(*dev, recipe.base, labels);
  else if (const DataSource* train = source("train"); train && train->holdout > 0) std::tie(data.train, data.dev) = hold_out(data.train, train->holdout, recipe.seed);
  if (const DataSource* test = source("test")) {
    data.test = read_classification(*test, recipe.base, labels);
    if (labels.empty()) data.test = relabel(std::move(data.test), continued_labels(recipe, data.test.label_names), "the model");
  }
  if (const DataSource* previous = source("previous")) {
    const std::vector<std::string> known = earlier_labels(recipe);
    data.previous = relabel(read_classification(*previous, recipe.base), known, "data set \"previous\": the model that the run begins with");
  }
  if (const DataSource* rehearsal = source("rehearsal")) {
    const ClassificationSet old = relabel(read_classification(*rehearsal, recipe.base), labels, "data set \"rehearsal\": the task");
    if (!data.previous.examples.empty()) warn_of_repeats(old, data.previous, "rehearsal", "previous");
    const auto before = static_cast<std::int64_t>(data.train.examples.size());
    data.train = with_rehearsal(std::move(data.train), old, recipe.rehearsal_share, recipe.seed);
    data.rehearsed = static_cast<std::int64_t>(data.train.examples.size()) - before;
  }
}

void load_texts(const Recipe& recipe, LoadedData& data) {
  for (const auto& [name, set] : {std::pair("train", &data.train_text), std::pair("heldout", &data.heldout), std::pair("test", &data.test_text), std::pair("previous", &data.previous_text), std::pair("rehearsal", &data.rehearsal_text)})
    if (const DataSource* source = recipe.find_data(name)) *set = read_text_set(*source, recipe.base);
  data.rehearsed = static_cast<std::int64_t>(data.rehearsal_text.documents.size());
}

}  // namespace

LoadedData load_data(const Recipe& recipe) {
  LoadedData data;
  data.kind = recipe.is_classification() ? TaskData::Kind::classification : TaskData::Kind::text;
  const auto source = [&](const char* name) { return recipe.find_data(name); };
  if (data.kind == TaskData::Kind::classification) load_examples(recipe, data);
  else load_texts(recipe, data);
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
  labelled("previous", previous, 0);
  if (rehearsed > 0 && !train.examples.empty()) out["train"]["rehearsed"] = rehearsed;
  const auto text = [&](const char* name, const TextSet& set) {
    if (!set.documents.empty()) out[name] = Json{{"documents", set.documents.size()}, {"hash", set.hash}};
  };
  text("train", train_text);
  text("calibration", calibration);
  text("heldout", heldout);
  text("test", test_text);
  text("previous", previous_text);
  text("rehearsal", rehearsal_text);
  return out;
}

std::string LoadedData::hash() const {
  return sha256(str(train.hash, "\n", dev.hash, "\n", train_text.hash, "\n", calibration.hash, "\n", heldout.hash, rehearsal_text.hash.empty() ? "" : "\n", rehearsal_text.hash));
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
  TokenWindows heldout, test, calibration, previous;
  if (data.kind == TaskData::Kind::classification) {
    const DataSource* train = recipe.find_data("train");
    const DataSource* test_source = recipe.find_data("test");
    const DataSource* previous = recipe.find_data("previous");
    const DataSource& first = train ? *train : test_source ? *test_source : recipe.find_data("dev") ? *recipe.find_data("dev") : *previous;
    out->max_length = std::min(first.max_length > 0 ? first.max_length : limit, limit);
    out->task.labels = train ? data.train.label_names : test_source ? data.test.label_names : data.dev.examples.empty() ? data.previous.label_names : data.dev.label_names;
    if (train) out->task.train = tokenize(data.train, tokenizer, out->max_length, train->refuse_long);
    if (!data.dev.examples.empty()) out->task.dev = tokenize(data.dev, tokenizer, out->max_length, first.refuse_long);
    if (test_source) out->test = tokenize(data.test, tokenizer, test_source->max_length > 0 ? std::min(test_source->max_length, limit) : out->max_length, test_source->refuse_long);
    if (previous) out->previous = tokenize(data.previous, tokenizer, previous->max_length > 0 ? std::min(previous->max_length, limit) : out->max_length, previous->refuse_long);
    out->truncated_train = out->task.train.truncated;
    out->truncated_test = out->test.truncated;
  } else {
    if (const DataSource* source = recipe.find_data("train")) out->task.train_documents = task_documents(data.train_text, *source, tokenizer);
    if (const DataSource* source = recipe.find_data("rehearsal"))
      for (auto& document : task_documents(data.rehearsal_text, *source, tokenizer)) out->task.train_documents.push_back(std::move(document));
    if (const DataSource* source = recipe.find_data("previous")) previous = task_windows(data.previous_text, *source, "previous", tokenizer, limit);
    if (const DataSource* source = recipe.find_data("heldout")) heldout = task_windows(data.heldout, *source, "heldout", tokenizer, limit);
    if (const DataSource* source = recipe.find_data("test")) test = task_windows(data.test_text, *source, "test", tokenizer, limit);
  }
  const auto& documents = out->task.train_documents;
  if (!documents.empty() && std::all_of(documents.begin(), documents.end(), [](const auto& ids) { return ids.size() < 2; }))
    throw Error("the training text has nothing to predict: no document has two tokens").at("data set \"train\"").given(str(documents.size(), " documents")).hint("check the data and where documents end (split)");
  if (const DataSource* source = recipe.find_data("calibration")) calibration = task_windows(data.calibration, *source, "calibration", tokenizer, limit);
  // Figures measured on text that a stage has looked at are no evidence.
  if (!test.windows.empty() && !calibration.windows.empty()) check_no_overlap(calibration, test, "data set \"calibration\"", "data set \"test\"");
  if (!test.windows.empty() && !heldout.windows.empty()) check_no_overlap(heldout, test, "data set \"heldout\"", "data set \"test\"");
  if (!previous.windows.empty() && !calibration.windows.empty()) check_no_overlap(calibration, previous, "data set \"calibration\"", "data set \"previous\"");
  if (!previous.windows.empty() && !heldout.windows.empty()) check_no_overlap(heldout, previous, "data set \"heldout\"", "data set \"previous\"");
  out->previous_windows = std::move(previous.windows);
  out->task.heldout = std::move(heldout.windows);
  out->task.calibration = std::move(calibration.windows);
  out->test_windows = std::move(test.windows);
  const DataSource* windows = recipe.find_data("heldout");
  const std::int64_t heldout_length = windows ? windows->max_length : 0;
  out->task.hash = sha256(str(data.hash(), "\n", tokenizer.fingerprint(), "\n", out->max_length, heldout_length > 0 ? str("\nheldout ", heldout_length) : std::string()));
  return out;
}

}  // namespace kompakt
