// What a report says in words: the one-sentence verdict, regressions, what was not measured. Private to report/.
#pragma once

#include <string>
#include <vector>

#include "core/json.h"

namespace kompakt {

// Reasons for figures that no model of the run can have; they are not listed among what was not measured.
inline constexpr const char* no_task_reason = "no task is evaluated in this run";
inline constexpr const char* no_text_reason = "no text is evaluated in this run";
inline constexpr const char* no_embedding_reason = "no vectors of texts are evaluated in this run";
inline constexpr const char* no_earlier_reason = "no task before is evaluated in this run";

// "2.1 MB, 43× smaller than the teacher, 0.3 points below it (95%: −0.9 … +0.3)."
std::string verdict(const Json& report);
// Sentences: unmet gates, models whose paired interval lies below the teacher's score, an artifact slower or larger than it.
Json regressions(const Json& report);
// "latency: not measured in this run (01-finetune, 02-distill)", one line for each metric and reason.
std::vector<std::string> not_measured(const Json& report);

// The model that the run begins with where it is measured apart, teacher, stages with a model and artifact, in this order: the rows of a table.
std::vector<const Json*> model_rows(const Json& report);
// A stage whose folder is the teacher: the same point twice.
bool same_as_teacher(const Json& report, const Json& row);
// Anything but cost was stated: size or a score.
bool makes_model(const Json& row);
// The model that the run made: the artifact, else the last stage with a model, else nullptr.
const Json* final_model(const Json& report);

}  // namespace kompakt
