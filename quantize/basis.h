// The basis in which a model is quantized: a change that leaves its function as it was, made before the first layer is
// rounded. model/invariance.h has the changes themselves.
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
  double alpha = 0.5;          // smoothquant: share of the activations in the scales
  std::int64_t points = 5;     // awq: exponents r = 0 .. 1 that are tried for every mapping
  std::int64_t tokens = 4096;  // calibration tokens that awq, smoothquant and the probes of auto look at
  std::int64_t blocks = 6;     // auto: the first so many blocks are quantized to compare the bases
};
void fields(FieldVisitor& visitor, BasisOptions& options);

struct BasisChange {
  Transformer& model;
  const QuantizeOptions& options;
  StageContext& context;
  Json parts = Json::array();  // what was done, one sentence each
  Json notes = Json::array();  // what was left out, with the reason
  Json figures = Json::object();  // per mapping (awq), per candidate (auto)
  std::int64_t search_blocks = 0; // blocks whose scales are searched; 0 = all (auto's probes look at the first alone)
};

struct Basis {
  std::string_view name, summary;
  bool candidate;  // basis: auto tries it
  void (*apply)(BasisChange& change);
};
std::span<const Basis> bases();
const Basis* find_basis(std::string_view name);
std::vector<std::string> basis_names();

// The shape after the change: an untied head is a matrix more. What `plan` and plan_quantization see.
ModelConfig basis_config(const ModelConfig& config, const BasisOptions& options);

// basis: auto. Every candidate is made on a copy of the model, the first `blocks` blocks of it are quantized as the stage would
// (data-free where the stage trains), and the divergence of the whole from the untouched model is measured on texts that the
// probe did not calibrate on: held-out windows, or the last quarter of the calibration set or training examples. The least
// divergence wins; a later row of the table has to be better by 1%. Fills change.figures with the divergences.
std::string choose_basis(BasisChange& change);

// Changes `model` and writes context.details["basis"]. Checks on a text of the calibration set that the logits stayed what
// they were: a difference above 1e-3 of the largest logit is a bug (Error with exit code 1). Error where no part of the
// change is legal for the model, or where a loss of `objectives` compares states that the change rotates.
void change_basis(Transformer& model, const QuantizeOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives, StageContext& context);

}  // namespace kompakt
