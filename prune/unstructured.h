// Unstructured and n:m pruning of a whole model: the table of criteria, and the walk over its blocks. Shapes stay; the masks go
// into context.masks and are kept by every stage that follows.
#pragma once

#include <cstdint>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/fields.h"
#include "prune/sparsegpt.h"
#include "train/calibration.h"
#include "train/context.h"

namespace kompakt {

struct UnstructuredOptions : SparsityOptions {  // sparsity: of every row, sparsegpt: of every block of columns
  std::string criterion = "wanda";  // row of the table of weight criteria
  std::string refit = "none";       // none | exact
  double damping = 0.01;
  std::int64_t block = 128;
  std::string calibration_precision = "float32";  // of passes over calibration text and of products of moments (train/calibration.h)
  bool true_sequential = true;      // inputs of a matrix behind the pruned matrices of its own block; false: behind those of earlier blocks
};
void fields(FieldVisitor& visitor, UnstructuredOptions& options);

// What a criterion has to know about the inputs of a matrix.
enum class InputStatistics { none, squares, moments };

struct WeightCriterion {
  std::string_view name, summary;
  InputStatistics needs;
  SparseMatrix (*prune)(const at::Tensor& weight, const SecondMoments& moments, const InputMetric& metric, const SparsityPattern& pattern, const UnstructuredOptions& options);
};
std::span<const WeightCriterion> weight_criteria();
const WeightCriterion* find_weight_criterion(std::string_view name);
std::vector<std::string> weight_criterion_names();

// Linears of blocks, block by block and, with true_sequential, part by part: inputs are those of the model pruned so far; one block of weights and the
// activations in front of it are in memory. `sequences`: calibration windows or training examples.
void prune_unstructured(Transformer& model, const UnstructuredOptions& options, std::int64_t sequences, StageContext& context);

}  // namespace kompakt
