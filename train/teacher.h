// Teacher sources: a cache of a frozen model's outputs on the training set, and a live model. A cache loads the weights when something
// is missing, and only then.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>

#include "data/tokenizer.h"
#include "train/context.h"
#include "train/frozen_teacher.h"

namespace kompakt {

// Classification: logits (float32) and taps per token (bfloat16) of every training example, computed once in a fixed order,
// written to `folder`/teacher-<hash>.safetensors and memory-mapped. Aligned by example; a tap is only usable when the student
// splits the text into as many tokens (checked, Error otherwise).
// `examples` are tokenized by the teacher's own tokenizer and must outlive the source.
std::unique_ptr<TeacherSource> cached_teacher(FrozenTeacher teacher, const TokenizedExamples& examples, std::int64_t pad, std::filesystem::path folder);

// Text, in short: what `sparse_teacher` keeps of every position.
struct SparseCacheOptions {
  std::int64_t top = 64;   // likeliest tokens, exact to the step of their code
  std::int64_t tail = 32;  // draws from the rest, an even number; 0 = none
  std::string fill = "teacher";  // who computes rows that are missing: teacher, or elsewhere (scripts/capture_teacher.py): then they are an Error
  std::int64_t columns = 0;  // of the teacher's logits, those in front: what is behind the tokenizer's ids is padding, and a student with fewer rows knows no others; 0 = all
};

// Text: the distribution of every position as SparseTargets, computed when a row of packed text is first asked for and kept in
// `folder`/teacher-<key>/part-*.h5 (see sparse_cache.cpp for the format); a row that is there is not computed again, by whichever run.
// The key: teacher, data (tokenizer included), sequence length, options. What a row gives is a function of these alone, in float32
// whatever the precision of the training: a killed and resumed run sees the same targets. Several processes may read and
// write one cache at a time; parts of theirs that appear are used.
// `data.hash` and the packing (TextBatches) decide which text a row number stands for; a row whose text differs is an Error.
std::unique_ptr<TeacherSource> sparse_teacher(FrozenTeacher teacher, const TaskData& data, std::int64_t sequence_length, const SparseCacheOptions& options,
                                              std::filesystem::path folder);

// Text: the teacher runs on every batch, without gradients; gives hidden states and its head.
std::unique_ptr<TeacherSource> live_teacher(FrozenTeacher teacher);

// TokenBatch -> tensors on a device.
ModelInput to_input(const TokenBatch& batch, c10::Device device);

}  // namespace kompakt
