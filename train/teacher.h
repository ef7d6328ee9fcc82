// Teacher sources: a cache of a frozen model's outputs on the training set, and a live model.
#pragma once

#include <filesystem>
#include <memory>

#include "data/tokenizer.h"
#include "train/objective.h"

namespace kompakt {

// Classification: logits (float32) and taps per token (bfloat16) of every training example, computed once in a fixed order,
// written to `folder`/teacher-<hash>.safetensors and memory-mapped. Aligned by example; a tap is only usable when the student
// splits the text into as many tokens (checked, Error otherwise).
// `examples` are tokenized by the teacher's own tokenizer and must outlive the source.
std::unique_ptr<TeacherSource> cached_teacher(std::shared_ptr<const Transformer> teacher, const TokenizedExamples& examples, std::int64_t pad, std::filesystem::path folder);

// Text: the teacher runs on every batch, without gradients.
std::unique_ptr<TeacherSource> live_teacher(std::shared_ptr<const Transformer> teacher);

// TokenBatch -> tensors on a device.
ModelInput to_input(const TokenBatch& batch, c10::Device device);

}  // namespace kompakt
