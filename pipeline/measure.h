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

namespace kompakt {

struct MeasureOptions {
  bool latency = true;
  std::int64_t latency_tokens = 32;
  std::int64_t latency_repeats = 50;
  std::int64_t batch_size = 64;
};

// What the next models are compared with, per example.
struct TeacherScores {
  Predictions test;          // classification
  std::vector<double> window_nll;
};

// Size and shape of a model on disk. `files` is the folder or file that would be deployed.
Json describe_size(const Transformer& model, const std::filesystem::path& files, const std::vector<std::pair<std::string, std::int64_t>>& embedding_bytes);

// Fills model["tasks"] or model["language"], latency, nulls with reasons. `teacher` may be null (the teacher itself, or none).
// `teacher_model` for text: KL and same-top-1 need both models at once.
// Returns the predictions for later comparisons.
TeacherScores measure(const Transformer& model, const TokenizedData& data, const MeasureOptions& options, const TeacherScores* teacher,
                      const Transformer* teacher_model, const std::string& title, Json& out);

// Share of requests that the small model keeps when it hands those below a confidence threshold to the teacher, against accuracy.
Json cascade_curve(const Predictions& small, const Predictions& teacher, const std::vector<std::int64_t>& truth);

}  // namespace kompakt
