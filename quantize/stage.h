// The stage `quantize`: which tensors take which grid, by which method.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/fields.h"
#include "quantize/activation_options.h"
#include "quantize/basis.h"
#include "quantize/budget.h"
#include "quantize/grids.h"
#include "train/constraint.h"
#include "train/context.h"
#include "train/options.h"
#include "train/sparsity.h"

namespace kompakt {

// Rung after the method: every block by gradients towards the output of the float block (quantize/block_tune.h).
struct BlockTuneOptions {
  std::int64_t iterations = 200;
  std::int64_t batch = 8;             // sequences
  double learning_rate = 0;           // 0 = 1 / iterations
  double margin = 0.3;                // of the latents at the start, in codes
  std::int64_t evaluate_every = 25;
  double fisher = 0;                  // share of the gradients' second moment in the metric of a block's output
  std::string precision = "float32";  // of the passes that learn: auto | float32 | bf16; errors are float32
};
void fields(FieldVisitor& visitor, BlockTuneOptions& options);

// Last rung: the whole model on its grid, towards the teacher's predictions (quantize/kl_tune.h).
struct KlTuneOptions {
  std::int64_t steps = 0;             // 0 = as many as `epochs` make
  double epochs = 4;                  // passes over the calibration text that is left
  std::int64_t batch = 8;             // windows a step
  double learning_rate = 0;           // 0 = the mode's own
  double scale_learning_rate = 0;     // tune: weights; 0 = a share of learning_rate
  double norm_learning_rate = 0;      // the same of norms and biases
  double margin = 0.3;                // tune: weights; of the latents at the start, in codes
  std::int64_t evaluations = 6;       // checkpoints scored on held-out text
  std::int64_t patience = 3;          // of them without a better one
  double holdout = 0.05;              // share of the calibration text
  std::string precision = "float32";  // of the passes that learn: auto | float32 | bf16; scores are float32
};
void fields(FieldVisitor& visitor, KlTuneOptions& options);

struct QuantizeOptions {
  std::string weights = "int4";     // grid of all linears in blocks
  std::int64_t group = -1;          // -1 = the grid's own
  std::string embedding = "int8";   // grid of the token embedding (and the tied head), or "none"
  std::int64_t embedding_group = -1;
  std::string method = "rtn";       // row of the table of methods: rtn | gptq | trifit | qad
  std::string head = "none";        // grid of the classifier, or "none"
  std::vector<std::string> keep_float;  // patterns of tensors left in float
  bool has_budget = false;              // grids of all tensors are chosen under a byte budget
  BudgetOptions budget;
  std::string others = "f32";           // type of tensors without a grid: f32 | f16
  bool has_activations = false;         // inputs of quantized linears in blocks are rounded
  ActivationOptions activations;
  bool has_kv_cache = false;            // keys and values are rounded
  KvCacheOptions kv_cache;
  BasisOptions basis;
  bool allow_fallback = false;      // where a row does not fit the group: take the fallback grid and list it
  std::string fallback = "int8";
  // gptq
  double damping = 0.01;
  bool act_order = true;
  double teacher_target = 0;        // alpha of the teacher-activation target; 0 = off
  std::int64_t polish_rounds = 0;   // refit + coordinate descent
  std::int64_t calibration_sequences = 128;
  std::string token_weights = "uniform";    // row of the table of token weights (quantize/token_weights.h)
  std::string sweep_precision = "float32";  // of moments, factorization and sweep: float32 | float64
  std::string calibration_precision = "float32";  // of passes over calibration text and of products of moments (train/calibration.h)
  bool calibrate_head = true;               // the output matrix by its inputs, behind the last block
  bool bias_correction = true;              // a bias takes the mean error of its layer's outputs
  bool spill = false;                       // activations of the calibration set in the working folder instead of in memory
  bool layer_table = false;                 // print the table of layers at the end
  bool has_sparse = false;                  // single weights of linears in blocks become zero in the same sweep
  SparsityOptions sparse;
  // tuning by gradients, on the grid
  bool has_block_tune = false;
  BlockTuneOptions block_tune;
  std::string tune = "none";                // row of the table of tune modes: none | scales | weights
  bool has_tuning = false;
  KlTuneOptions tuning;
  bool tunes_blocks() const { return has_block_tune && block_tune.iterations > 0; }
  bool tunes_model() const { return tune != "none"; }
  // qad
  bool subln = false;                   // sub-norms in front of output and down projections (quantize/sub_norms.h)
  double gradual = 0;                   // share of the steps over which quantization fades in, of pretrain's where that is given
  std::string gradual_schedule = "linear";  // row of the table of gradual schedules (quantize/fake_quant.h)
  bool has_pretrain = false;            // text: next-token training on the grid before the training under the teacher
  TrainOptions pretrain;
  TrainOptions train;
  Node objective;                   // of method qad and of tune, as in distill
};
void fields(FieldVisitor& visitor, QuantizeOptions& options);

// How every tensor of the model is stored after the stage: name of the Linear or Embedding -> grid.
struct QuantizationPlan {
  std::map<std::string, GridSpec> tensors;  // absent = float
  std::vector<std::string> fallbacks;       // sentences for the report
  std::map<std::string, at::Tensor> row_importance;  // [N] by name, for entropy-coded grids; empty = rows count all the same
};
// Tuning that the options ask for and that the model, the method or a grid named in them cannot have.
void check_tuning(const ModelConfig& config, const QuantizeOptions& options, Problems& problems);
// Keys that the method would not use or the model has nothing for.
void check_method_keys(const ModelConfig& config, const QuantizeOptions& options, Problems& problems);
// A sparsity that the method, the grid, the model or another key does not allow.
void check_sparse(const ModelConfig& config, const QuantizeOptions& options, Problems& problems);
// Keys of a training on the grid that the method, the data or each other do not allow. `classification`: whether the run has class
// labels, where that is known.
void check_grid_training(const QuantizeOptions& options, std::optional<bool> classification, const std::string& place, Problems& problems);
// `config`: the shape before the change of basis.
QuantizationPlan plan_quantization(const ModelConfig& config, const QuantizeOptions& options);

// What the stage leaves behind, beside the float master weights set to the decoded values.
struct QuantizedModel {
  QuantizationPlan plan;
  std::map<std::string, Quantized> tensors;  // codes and scales by name
};

// What comes before grids are chosen: sub-norms where the options ask for them, then the change of basis.
void prepare_model(Transformer& model, const QuantizeOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives, StageContext& context);

// Puts decoded weights into `model` (so that it computes what will be deployed) and returns codes and scales.
// The objective list for method qad and for tune is built by the pipeline from options.objective and handed in. tune without a
// teacher in the context takes the float model that comes in.
// `plan`: which tensor takes which grid, where that is not plan_quantization's choice (a byte budget).
QuantizedModel quantize(Transformer& model, const QuantizeOptions& options, const std::vector<std::shared_ptr<Objective>>& objectives, StageContext& context,
                        const QuantizationPlan* plan = nullptr);

// quantization.safetensors of a stage folder: packed codes, scales, plan. Lossless.
void save_quantized(const QuantizedModel& quantized, const std::filesystem::path& folder);
QuantizedModel load_quantized(const std::filesystem::path& folder);
bool has_quantized(const std::filesystem::path& folder);

}  // namespace kompakt
