// Options of pruning and quantization in one sweep, and what they ask of a plan.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/fields.h"
#include "train/sparsity.h"

namespace kompakt {

struct QuantizeOptions;
struct QuantizationPlan;

struct JointOptions {
  double sparsity = 0;            // share of every block of columns that goes; 0 = `pattern` says it
  std::string pattern;            // "2:4"
  std::vector<std::string> skip;  // patterns of linear names that stay dense
};
void fields(FieldVisitor& visitor, JointOptions& options);

// Error when neither or both of sparsity and pattern are given.
SparsityPattern joint_pattern(const JointOptions& options);
// Whether a linear is pruned in its sweep.
bool prunes_jointly(const JointOptions& options, const std::string& linear);
// Problems of the options alone: a method that has no such sweep, keys that do not go together with it. Of a plan: rows and grids
// of `linears` (of the blocks, with their columns) that cannot hold the pattern.
void check_joint(const QuantizeOptions& options, Problems& problems);
void check_joint_plan(const QuantizeOptions& options, const QuantizationPlan& plan, const std::vector<std::pair<std::string, std::int64_t>>& linears, Problems& problems);

}  // namespace kompakt
