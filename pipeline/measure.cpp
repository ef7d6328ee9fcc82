#include "pipeline/measure.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <map>
#include <numeric>

#include "core/files.h"
#include "core/log.h"
#include "core/system.h"
#include "core/text.h"
#include "evaluate/embeddings.h"
#include "evaluate/latency.h"
#include "evaluate/statistics.h"
#include "model/parallel.h"
#include "train/sparse_divergence.h"

namespace kompakt {
namespace {

Json interval_json(const Interval& interval) { return Json{{"value", interval.value}, {"low", interval.low}, {"high", interval.high}}; }

// Largest softmax probability of every example.
std::vector<double> confidences(const Predictions& predictions) {
  std::vector<double> out;
  const auto classes = static_cast<std::size_t>(predictions.classes);
  for (std::size_t row = 0; row < predictions.labels.size(); ++row) {
    const float* logits = predictions.logits.data() + row * classes;
    const double top = *std::max_element(logits, logits + classes);
    double sum = 0;
    for (std::size_t c = 0; c < classes; ++c) sum += std::exp(static_cast<double>(logits[c]) - top);
    out.push_back(1.0 / sum);
  }
  return out;
}

// Labels numbered among those that occur in any of the lists: F1 is averaged over these (scikit-learn's convention), not over labels that a
// model knows and the data lack.
struct OccurringLabels {
  std::vector<std::vector<std::int64_t>> lists;
  std::int64_t classes = 0;
  OccurringLabels(std::initializer_list<const std::vector<std::int64_t>*> all) {
    std::map<std::int64_t, std::int64_t> numbers;
    for (const auto* list : all)
      for (const std::int64_t label : *list) numbers[label] = 0;
    for (auto& [label, number] : numbers) number = classes++;
    for (const auto* list : all) {
      lists.emplace_back();
      for (const std::int64_t label : *list) lists.back().push_back(numbers.at(label));
    }
  }
};

Json measure_pairs(const Predictions& predictions, const Predictions& other, const std::vector<std::int64_t>& truth) {
  const auto& predicted = predictions.labels;
  const OccurringLabels own{&predicted, &other.labels, &truth};
  const Discordant pairs = discordant(predicted, other.labels, truth);
  return Json{{"accuracy_difference", interval_json(accuracy_difference(predicted, other.labels, truth))},
              {"macro_f1_difference", interval_json(macro_f1_difference(own.lists[0], own.lists[1], own.lists[2], own.classes))},
              {"mcnemar_p", mcnemar_exact(pairs.first_only, pairs.second_only)},
              {"agreement", static_cast<double>(pairs.agree) / static_cast<double>(truth.size())}};
}

// `teacher` and `start` may be null.
Json measure_task(const Predictions& predictions, const std::vector<std::int64_t>& truth, const std::vector<std::string>& labels, const Predictions* teacher, const Predictions* start) {
  const auto classes = static_cast<std::int64_t>(labels.size());
  const auto& predicted = predictions.labels;
  std::vector<std::int64_t> right(truth.size());
  for (std::size_t i = 0; i < truth.size(); ++i) right[i] = predicted[i] == truth[i];
  const OccurringLabels own{&predicted, &truth};
  Json task{{"n", truth.size()}, {"accuracy", interval_json(accuracy(predicted, truth))}, {"macro_f1", interval_json(macro_f1_interval(own.lists[0], own.lists[1], own.classes))},
            {"ece", expected_calibration_error(confidences(predictions), right)}};
  const auto scores = class_scores(predicted, truth, classes);
  if (teacher) task["versus_teacher"] = measure_pairs(predictions, *teacher, truth);
  if (start) task["versus_start"] = measure_pairs(predictions, *start, truth);
  const Predictions* other = teacher ? teacher : start;
  const auto other_scores = other ? class_scores(other->labels, truth, classes) : std::vector<ClassScore>();
  // The classes that lost most against the other model come first; without one, the weakest.
  std::vector<std::size_t> order(scores.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  if (!teacher && start) std::erase_if(order, [&](std::size_t c) { return scores[c].n == 0; });  // labels that the task before does not have
  const auto badness = [&](std::size_t c) { return other ? scores[c].f1 - other_scores[c].f1 : scores[c].f1; };
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return badness(a) < badness(b); });
  Json worst = Json::array();
  for (std::size_t i = 0; i < std::min<std::size_t>(order.size(), 8); ++i) {
    Json row{{"label", labels[order[i]]}, {"f1", scores[order[i]].f1}, {"n", scores[order[i]].n}};
    if (other) row[teacher ? "f1_teacher" : "f1_start"] = other_scores[order[i]].f1;
    worst.push_back(std::move(row));
  }
  task["worst_classes"] = std::move(worst);
  return task;
}

// exp of the mean difference of log-likelihoods over the same windows.
Json measure_ratio(const std::vector<double>& mine, const std::vector<double>& start, std::int64_t tokens) {
  return Json{{"perplexity_ratio", interval_json(perplexity_ratio(mine, start, std::vector<std::int64_t>(mine.size(), tokens)))}};
}

Json measure_language(const LanguageScores& scores, bool has_teacher) {
  const std::vector<std::int64_t> tokens(scores.window_nll.size(), scores.scored_per_window);
  Json out{{"perplexity", interval_json(perplexity_interval(scores.window_nll, tokens))}, {"protocol", language_protocol},
           {"tokens", static_cast<std::int64_t>(scores.window_nll.size()) * scores.scored_per_window}};
  if (!has_teacher) return out;
  const std::vector<double> kl(scores.kl.begin(), scores.kl.end());
  const Spread kl_spread = spread(kl);
  // Positions of a window depend on each other: the interval resamples windows.
  std::vector<double> window_kl, window_same;
  const auto length = static_cast<std::size_t>(scores.scored_per_window);
  for (std::size_t w = 0; w * length < kl.size(); ++w) {
    double sum = 0, same = 0;
    for (std::size_t i = w * length; i < (w + 1) * length; ++i) sum += kl[i], same += scores.same_top1[i];
    window_kl.push_back(sum / static_cast<double>(length));
    window_same.push_back(same / static_cast<double>(length));
  }
  const Interval mean = mean_interval(window_kl);
  out["kl"] = Json{{"mean", mean.value}, {"low", mean.low}, {"high", mean.high}, {"median", kl_spread.median}, {"p99", kl_spread.p99}};
  out["top1_agreement"] = interval_json(mean_interval(window_same));
  return out;
}

// At most so many texts, evenly spread: every one is compared with every other.
constexpr std::size_t most_embedded = 4096;

TokenizedExamples spread_examples(const TokenizedExamples& all, std::size_t most) {
  const std::size_t count = std::min(most, all.ids.size());
  TokenizedExamples out;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t at = i * all.ids.size() / count;
    out.ids.push_back(all.ids[at]), out.labels.push_back(all.labels[at]);
  }
  return out;
}

// `teacher` may be undefined. Texts are resampled: each has its correlation over all others.
Json measure_embeddings(const at::Tensor& vectors, const at::Tensor& teacher, Json& nulls) {
  Json out{{"n", vectors.size(0)}, {"width", vectors.size(1)}, {"protocol", str("similarities: cosines between the vectors of ", vectors.size(0), " texts, each with all others")}};
  if (!teacher.defined()) return out;
  if (vectors.size(0) < 3) {
    for (const char* key : {"rank_correlation", "same_nearest", "cosine"}) nulls[key] = "similarities need at least 3 test texts";
    return out;
  }
  const EmbeddingComparison pair = compare_embeddings(vectors, teacher);
  out["rank_correlation"] = interval_json(mean_interval(pair.rank_correlation));
  out["same_nearest"] = interval_json(wilson_interval(std::accumulate(pair.same_nearest.begin(), pair.same_nearest.end(), std::int64_t{0}), static_cast<std::int64_t>(pair.same_nearest.size())));
  if (pair.cosine.empty()) nulls["cosine"] = str("the model's vectors have ", vectors.size(1), " numbers, the teacher's ", teacher.size(1));
  else out["cosine"] = interval_json(mean_interval(pair.cosine));
  return out;
}

// What is known of the distance between a KL from the cache and the exact one, of the mean (train/sparse_divergence.h).
void measure_cached(const SparseScores& sparse, Json& kl) {
  kl["source"] = sparse.sampled ? "cache: likeliest tokens as they are stored, the rest by draws" : "cache: likeliest tokens as they are stored, the rest as one: a lower bound";
  kl["standard_error"] = sparse.standard_error, kl["code_error"] = sparse.code_error;
  kl["at_least"] = sparse.at_least, kl["at_most"] = sparse.at_most;
}

}  // namespace

Json describe_size(const Transformer& model, const std::filesystem::path& files, const std::vector<std::pair<std::string, std::int64_t>>& embedding_bytes) {
  const ModelConfig& config = model.config();
  const ParameterCount count = count_parameters(config);
  const auto bytes = static_cast<std::int64_t>(bytes_on_disk(files));
  std::int64_t embedding = 0;
  for (const auto& [name, size] : embedding_bytes) embedding += size;
  Json out{{"bytes", bytes}, {"parameters", count.total}, {"bits_per_weight", 8.0 * static_cast<double>(bytes) / static_cast<double>(count.total)},
           {"shape", {{"layers", config.layers}, {"hidden", config.hidden}, {"ffn", config.ffn}, {"heads", config.heads}, {"vocabulary", config.vocab}}}};
  out["embedding_share"] = embedding > 0 ? static_cast<double>(embedding) / static_cast<double>(bytes) : static_cast<double>(count.embedding) / static_cast<double>(count.total);
  return out;
}

Json scores_to_json(const TeacherScores& scores) {
  Json out{{"labels", scores.test.labels}, {"classes", scores.test.classes}};
  if (!scores.previous.labels.empty()) out["previous"] = Json{{"labels", scores.previous.labels}, {"classes", scores.previous.classes}};
  if (scores.vectors.defined()) out["vectors"] = scores.vectors.sizes().vec();
  if (!scores.previous_nll.empty()) {
    out["tokenizer"] = scores.tokenizer;
    out["windows"] = Json{{"nll", scores.window_nll}, {"tokens", scores.window_tokens}};
    out["previous_windows"] = Json{{"nll", scores.previous_nll}, {"tokens", scores.previous_tokens}};
  }
  return out;
}

TeacherScores scores_from_json(const Json& json) {
  TeacherScores out;
  const auto predictions = [](const Json& from, Predictions& into) {
    into.labels = from.at("labels").get<std::vector<std::int64_t>>();
    into.classes = from.at("classes").get<std::int64_t>();
  };
  predictions(json, out.test);
  if (json.contains("vectors")) out.vectors = at::empty(json.at("vectors").get<std::vector<std::int64_t>>());
  if (json.contains("previous")) predictions(json.at("previous"), out.previous);
  if (json.contains("previous_windows")) {
    out.tokenizer = json.at("tokenizer").get<std::string>();
    out.window_nll = json.at("windows").at("nll").get<std::vector<double>>();
    out.window_tokens = json.at("windows").at("tokens").get<std::int64_t>();
    out.previous_nll = json.at("previous_windows").at("nll").get<std::vector<double>>();
    out.previous_tokens = json.at("previous_windows").at("tokens").get<std::int64_t>();
  }
  return out;
}

TeacherScores measure(const Transformer& model, const TokenizedData& data, const MeasureOptions& options, const Baselines& baselines, const std::string& title, Json& out) {
  const auto& [teacher, teacher_model, teacher_cache, start] = baselines;
  TeacherScores scores;
  scores.tokenizer = data.task.tokenizer->fingerprint();
  const bool same_tokens = start && start->tokenizer == scores.tokenizer;
  Json nulls = Json::object();
  nulls["joules_per_token"] = "no energy counter was read on this machine";
  const std::int64_t pad = std::max<std::int64_t>(data.task.tokenizer->special().pad, 0);
  if (data.task.kind == TaskData::Kind::classification && !data.test.ids.empty() && model.config().is_classifier()) {
    Progress progress(str(title, ": test"), static_cast<std::int64_t>(data.test.ids.size()), "text");
    scores.test = predict(model, data.test, pad, options.batch_size, [&](std::int64_t done) { progress.update(done); });
    progress.finish();
    out["tasks"]["test"] = measure_task(scores.test, data.test.labels, data.task.labels, teacher ? &teacher->test : nullptr, start ? &start->test : nullptr);
    if (!data.task.dev.ids.empty()) out["tasks"]["dev"] = measure_task(predict(model, data.task.dev, pad, options.batch_size), data.task.dev.labels, data.task.labels, nullptr, nullptr);
  } else if (data.task.kind == TaskData::Kind::text && !data.test_windows.empty()) {
    Progress progress(str(title, ": test"), static_cast<std::int64_t>(data.test_windows.size()), "window");
    const auto advance = [&](std::int64_t done) { progress.update(done); };
    const SparseScores sparse = teacher_cache ? score_language(model, *teacher_cache, data.test_windows, 128, advance) : SparseScores{score_language(model, teacher_model, data.test_windows, 128, advance)};
    const LanguageScores& language = sparse.scores;
    progress.finish();
    scores.window_nll = language.window_nll;
    scores.window_tokens = language.scored_per_window;
    out["language"]["test"] = measure_language(language, teacher_model || teacher_cache);
    if (teacher_cache) measure_cached(sparse, out["language"]["test"]["kl"]);
    if (same_tokens) out["language"]["test"]["versus_start"] = measure_ratio(scores.window_nll, start->window_nll, scores.window_tokens);
  } else if (data.task.kind == TaskData::Kind::classification && !data.test.ids.empty() && model.config().family->encoder && data.task.labels.empty()) {
    nulls["accuracy"] = "the texts have no labels";
    const TokenizedExamples some = spread_examples(data.test, most_embedded);
    Progress progress(str(title, ": test"), static_cast<std::int64_t>(some.ids.size()), "text");
    const auto number = [&](std::int64_t text) { return static_cast<std::int64_t>(static_cast<std::size_t>(text) * data.test.ids.size() / some.ids.size()) + 1; };
    scores.vectors = embed_texts(model, some, pad, options.batch_size, [&](std::int64_t done) { progress.update(done); }, number);
    progress.finish();
    out["embeddings"]["test"] = measure_embeddings(scores.vectors, teacher ? teacher->vectors : at::Tensor(), nulls);
  } else {
    nulls["accuracy"] = model.config().is_classifier() ? "the recipe has no test data" : "the model has no classifier yet";
  }
  if (data.task.kind == TaskData::Kind::classification && !data.previous.ids.empty() && model.config().is_classifier()) {
    Progress progress(str(title, ": task before"), static_cast<std::int64_t>(data.previous.ids.size()), "text");
    scores.previous = predict(model, data.previous, pad, options.batch_size, [&](std::int64_t done) { progress.update(done); });
    progress.finish();
    out["tasks"]["previous"] = measure_task(scores.previous, data.previous.labels, data.task.labels, nullptr, start ? &start->previous : nullptr);
  } else if (data.task.kind == TaskData::Kind::text && !data.previous_windows.empty()) {
    Progress progress(str(title, ": text before"), static_cast<std::int64_t>(data.previous_windows.size()), "window");
    const LanguageScores language = score_language(model, nullptr, data.previous_windows, 128, [&](std::int64_t done) { progress.update(done); });
    progress.finish();
    scores.previous_nll = language.window_nll, scores.previous_tokens = language.scored_per_window;
    out["language"]["previous"] = measure_language(language, false);
    if (same_tokens) out["language"]["previous"]["versus_start"] = measure_ratio(scores.previous_nll, start->previous_nll, scores.previous_tokens);
    else if (start) nulls["previous_perplexity"] = "the tokens are others than those of the model that the run begins with";
  }
  if (options.latency) {
    const std::int64_t tokens = std::min(options.latency_tokens, model.config().max_positions > 0 ? model.config().max_positions : options.latency_tokens);
    const Latency latency = measure_latency(model, tokens, 1, static_cast<int>(options.latency_repeats));
    out["latency_ms"] = Json{{"value", latency.median_ms}, {"fastest", latency.fastest_ms}, {"protocol", latency.protocol}};
    out["tokens_per_second"] = latency.tokens_per_second;
  } else {
    nulls["latency_ms"] = "evaluate: {latency: false}";
  }
  out["nulls"] = std::move(nulls);
  return scores;
}

Json cascade_curve(const Predictions& small, const Predictions& teacher, const std::vector<std::int64_t>& truth) {
  const std::vector<double> sure = confidences(small);
  std::vector<std::size_t> order(sure.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return sure[a] > sure[b]; });
  Json curve = Json::array();
  for (const double share : {1.0, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.25, 0.0}) {
    const auto kept = static_cast<std::size_t>(std::llround(share * static_cast<double>(order.size())));
    std::int64_t right = 0;
    for (std::size_t i = 0; i < order.size(); ++i) right += (i < kept ? small.labels : teacher.labels)[order[i]] == truth[order[i]];
    curve.push_back(Json{{"kept", share}, {"threshold", kept == 0 ? 1.0 : kept == order.size() ? 0.0 : sure[order[kept - 1]]}, {"accuracy", static_cast<double>(right) / static_cast<double>(truth.size())}});
  }
  return curve;
}

}  // namespace kompakt
