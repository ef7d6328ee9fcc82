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

struct UnstructuredOptions {
  double sparsity = 0;              // share of every row (sparsegpt: of every block of columns) that goes; 0 = `pattern` says it
  std::string pattern;              // "2:4"
  std::string criterion = "wanda";  // row of the table of weight criteria
  std::string refit = "none";       // none | exact
  double damping = 0.01;
  std::int64_t block = 128;
  bool true_sequential = true;      // inputs of a matrix behind the pruned matrices of its own block; false: behind those of earlier blocks
  std::vector<std::string> skip;    // patterns of linear names that stay dense
};
void fields(FieldVisitor& visitor, UnstructuredOptions& options);

// Error when neither or both of sparsity and pattern are given, or when rows of the model do not divide into groups.
SparsityPattern unstructured_pattern(const UnstructuredOptions& options);
void check_unstructured(const ModelConfig& config, const UnstructuredOptions& options);

// Linears of the blocks that `skip` keeps dense. Error for a pattern that matches none, and when all would be.
std::set<std::string> dense_linears(Transformer& model, const UnstructuredOptions& options);

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
