// The stage `distill`: a student made from the teacher, trained under it.
#pragma once

#include <memory>
#include <vector>

#include "core/fields.h"
#include "train/context.h"
#include "train/loop.h"
#include "train/options.h"

namespace kompakt {

struct StudentOptions {
  std::vector<std::int64_t> keep_layers;  // teacher layers, from 0; empty = all
};

struct DistillOptions {
  StudentOptions student;
  Node objective;  // list of maps: {logits: forward_kl, temperature: 2, weight: 1}, {relation: minilm, weight: 0.5}, {hidden: mse, weight: 10}, {labels: cross_entropy, weight: 0.5}
  TrainOptions train;
};
void fields(FieldVisitor& visitor, DistillOptions& options);

// A copy of the chosen layers of `teacher` with its embedding, norms and head.
std::unique_ptr<Transformer> make_student(const Transformer& teacher, const StudentOptions& options);

// Objectives from a recipe's list. `layer_map[i]` = teacher layer (from 0) whose output student layer i must match.
// Mistakes are collected with their places.
std::vector<std::shared_ptr<Objective>> build_objectives(const Node& list, const std::vector<std::int64_t>& layer_map, Problems& problems);
// Student layer -> teacher layer: the last dropped layer that follows the copied one (the next kept layer sees its original input).
std::vector<std::int64_t> default_layer_map(const std::vector<std::int64_t>& keep_layers, std::int64_t teacher_layers);

TrainResult distill(Transformer& student, const DistillOptions& options, StageContext& context);

}  // namespace kompakt
