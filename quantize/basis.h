// The basis in which a model is quantized: a change that leaves its function as it was, made before the first layer is
// rounded. quantize/invariance.h has the changes themselves.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/fields.h"
#include "core/json.h"
#include "model/transformer.h"
#include "train/context.h"

namespace kompakt {

struct QuantizeOptions;

struct BasisOptions {
  std::string basis = "none";  // row of the table of bases
  bool untie = false;          // hadamard: a tied head gets its own matrix, so that the residual stream can be rotated
};
void fields(FieldVisitor& visitor, BasisOptions& options);

struct BasisChange {
  Transformer& model;
  const QuantizeOptions& options;
  StageContext& context;
  Json parts = Json::array();  // what was done, one sentence each
  Json notes = Json::array();  // what was left out, with the reason
};

struct Basis {
  std::string_view name, summary;
  void (*apply)(BasisChange& change);
};
std::span<const Basis> bases();
const Basis* find_basis(std::string_view name);
std::vector<std::string> basis_names();

// The shape after the change: an untied head is a matrix more. What `plan` and plan_quantization see.
ModelConfig basis_config(const ModelConfig& config, const BasisOptions& options);

// Changes `model` and writes context.details["basis"]. Checks on a text of the calibration set that the logits stayed what
// they were: a difference above 1e-3 of the largest logit is a bug (Error with exit code 1). Error where no part of the
// change is legal for the model, or where a loss of `objectives` compares states that the change rotates.
void change_basis(Transformer& model, const QuantizeOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives, StageContext& context);

}  // namespace kompakt
