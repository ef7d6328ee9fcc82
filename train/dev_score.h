// The score that picks the best epoch: accuracy of a classifier, minus the mean loss per token of a language model.
// Only for the loop; figures of a report come from evaluate/.
#pragma once

#include <vector>

#include "model/transformer.h"
#include "train/context.h"
#include "train/teacher.h"

namespace kompakt {

// NaN when there is no dev data. Forward passes only, with whatever transforms the model carries.
double dev_score(const Transformer& model, const TaskData& data);

// Share of examples whose largest logit (the first of equal ones) is their label.
double accuracy(const Transformer& model, const TokenizedExamples& examples, std::int64_t pad);

// Mean negative log likelihood in nats per predicted token. Windows may differ in length.
double mean_loss(const Transformer& model, const std::vector<std::vector<std::int64_t>>& windows, std::int64_t batch_size = 4);

// Held-out windows as rows that `teacher` can be asked for, one a batch, numbered from -1 downwards: no rows of the training text. Those
// that are too long for a cache of rows of `length` tokens are cut into such rows, and what is left of a window goes; shorter ones are
// filled up behind their end, where nothing is scored and a decoder's tokens do not look. Windows of one token are left out.
std::vector<TokenBatch> held_out_batches(const std::vector<std::vector<std::int64_t>>& windows, const TeacherSource& teacher, std::int64_t length);

}  // namespace kompakt
