// One model's part of the report: size, scores with intervals, latency. The schema is report/'s MODEL.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "core/json.h"
#include "evaluate/classify.h"
#include "evaluate/language.h"
#include "model/transformer.h"
#include "pipeline/task_data.h"
#include "train/objective.h"

namespace kompakt {

struct MeasureOptions {
  bool latency = true;
  std::int64_t latency_tokens = 32;
  std::int64_t latency_repeats = 50;
  std::int64_t batch_size = 64;
};

// What the next models are compared with, per example.
struct TeacherScores {
  Predictions test, previous;                      // classification
  std::vector<double> window_nll, previous_nll;    // text: of each window
  std::int64_t window_tokens = 0, previous_tokens = 0;  // scored in each
  std::string tokenizer;                           // fingerprint: windows of other tokens are no pairs
  at::Tensor vectors;                              // encoders without classes: [N,d], rows of length 1 (evaluate/embeddings.h)
};
// Without logits and vectors: labels and sums are what comparisons need, and a file of their own holds vectors.
Json scores_to_json(const TeacherScores& scores);
TeacherScores scores_from_json(const Json& json);

struct Baselines {
  const TeacherScores* teacher = nullptr;      // null: the teacher itself, or none
  const Transformer* teacher_model = nullptr;  // of text: KL and same-top-1 need both models at once,
  TeacherSource* teacher_cache = nullptr;      // or what a cache knows of the teacher on the test windows
  const TeacherScores* start = nullptr;        // the model that the run begins with, where a task before is measured
};

// Size and shape of a model on disk. `files` is the folder or file that would be deployed.
Json describe_size(const Transformer& model, const std::filesystem::path& files, const std::vector<std::pair<std::string, std::int64_t>>& embedding_bytes);

// Fills model["tasks"], model["language"] or model["embeddings"], latency, nulls with reasons; of the task before ("previous") in them too.
// Returns the predictions for later comparisons.
TeacherScores measure(const Transformer& model, const TokenizedData& data, const MeasureOptions& options, const Baselines& baselines, const std::string& title, Json& out);

// Share of requests that the small model keeps when it hands those below a confidence threshold to the teacher, against accuracy.
Json cascade_curve(const Predictions& small, const Predictions& teacher, const std::vector<std::int64_t>& truth);

}  // namespace kompakt
