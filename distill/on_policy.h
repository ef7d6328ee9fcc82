// Texts that a model writes in place of the data's: by the student while it learns (on-policy, GKD: Agarwal et al. 2023, arXiv 2306.13649),
// or by the teacher beforehand (sequence-level distillation, Kim and Rush 2016).
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "core/fields.h"
#include "train/batch_sampler.h"
#include "train/context.h"
#include "train/frozen_teacher.h"

namespace kompakt {

class Collective;

struct CompletionOptions {
  std::int64_t max_new_tokens = 128;
  double temperature = 0.9;  // 0 = the likeliest token
  double top_p = 1;
  std::int64_t prompt_tokens = 32;  // beginning of the longest document part of each row; 0 = whole documents are prompts
  bool chat = false;                // whole documents: as one user message in the tokenizer's chat template
};
struct OnPolicyOptions : CompletionOptions {
  double lambda = 0.5;  // share of the steps whose texts the student writes
};
void fields(FieldVisitor& visitor, CompletionOptions& options);
void fields(FieldVisitor& visitor, OnPolicyOptions& options);

// `longest`: tokens of the longest prompt. Errors: prompt and completion longer than the model's positions (0 = no limit); a prompt that leaves
// nothing of a row.
void check_completion_length(const CompletionOptions& options, std::int64_t longest, std::int64_t sequence_length, std::int64_t max_positions, const std::string& place);
// Chat with beginnings of documents is a mistake.
void check_completions(const CompletionOptions& options, const std::string& key, const Place& place, Problems& problems);

// What both samplers need of the training. `data` must outlive the sampler.
struct SamplerFrame {
  const TaskData& data;
  std::int64_t sequence_length = 0;
  std::uint64_t seed = 0;
  std::string title;  // of the stage, for metrics
  Collective* ranks = nullptr;  // that share the writing; null = one process
};
// One decision a step, with probability lambda: then every row is a prompt from the data and what the student, with the weights of that
// step, writes after it. Draws are a function of (seed, step, row). Writes a metric "sampled" for each such step.
// Of several ranks each writes for its share of the step's micro batches, here and below, and then all have all texts.
std::unique_ptr<BatchSampler> on_policy_sampler(const OnPolicyOptions& options, const ModelConfig& student, SamplerFrame frame);
// Every row is replaced by a prompt and the teacher's completion, a function of (seed, row, and the rows of its batch as far as rounding goes),
// written when first asked for and kept in `folder`/texts-<key>.txt, so that a later run reads it.
std::unique_ptr<BatchSampler> teacher_text_sampler(FrozenTeacher teacher, const CompletionOptions& options, std::int64_t batch_size, std::filesystem::path folder, SamplerFrame frame);

}  // namespace kompakt
