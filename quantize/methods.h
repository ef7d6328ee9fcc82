// The table of quantization methods, and the pure functions behind the rows: one weight matrix and the second moment of its
// inputs in, codes and scales out. Where the statistics come from is train/calibration.h; the order of layers is the stage's.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "quantize/grids.h"
#include "train/sparsity.h"

namespace kompakt {

constexpr std::int64_t gptq_block = 128;  // columns per blocked update of the stage

struct LayerOptions {
  double damping = 0.01;       // share of mean(diag H) added to the diagonal
  bool act_order = true;
  std::int64_t block = gptq_block;
  bool float64 = false;
  double teacher_target = 0;   // alpha
  std::int64_t polish_rounds = 0;
  std::optional<SparsityPattern> sparsity = {};  // weights that become zero in the same sweep (gptq, trifit)
};

struct InputFactors;  // quantize/factors.h

struct LayerInput {
  at::Tensor weight;   // [N,K] float32
  at::Tensor hessian;  // [K,K] E[x x^T], inputs of the quantized prefix; float32 or float64; undefined for data-free methods
  at::Tensor cross;    // [K,K] E[x~ x^T], x~ = the teacher's input; undefined = no teacher target
  // Given to every linear with this input, so that what depends on the input alone is computed once; null = nothing is kept.
  std::shared_ptr<InputFactors> factors = {};
  at::Tensor mask = {};  // [N,K] bool, false = the weight is zero and stays so; undefined = all may differ from zero
  at::Tensor row_importance = {};  // [N] what an error of a row costs; entropy-coded grids choose their steps by it; undefined = all the same
  bool dense = false;    // no weight of this matrix goes, whatever LayerOptions::sparsity says
};

struct LayerResult {
  Quantized quantized;
  double damping = 0;        // share that the factorization needed
  std::string path;          // "rtn", "cholesky", "cholesky, damping raised", "float64", "diagonal"
  std::int64_t dead = 0;     // input columns that never fire
  double sweep_loss = 0;     // sum of e_j^2 of the sweep: tr(E H E^T) of the damped H
  at::Tensor mask;           // [N,K] bool, false = became or stayed zero; undefined without LayerOptions::sparsity
  std::vector<double> objective;  // tr(E H E^T) of the damped H before and after every polish step
};

LayerResult quantize_rtn(const LayerInput& input, const GridSpec& spec, const LayerOptions& options);
// encode() with the diagonal of the Hessian as importance.
LayerResult quantize_imatrix(const LayerInput& input, const GridSpec& spec, const LayerOptions& options);
// Round to nearest with HQQ's zero points on asymmetric grids; other grids as quantize_rtn.
LayerResult quantize_hqq(const LayerInput& input, const GridSpec& spec, const LayerOptions& options);
// GPTQ (Frantar et al. 2022) with scales refitted on the compensated weights at the start of every group. With act_order
// groups are visited by falling input energy and columns likewise inside a group, so that no index has to be stored.
// With sparsity the same sweep prunes (SparseGPT, Frantar and Alistarh 2023, section 3.5): of every block of columns and 64 rows the
// share of weights with the least w^2 / U_jj^2 goes, or of every m columns of a row all but n, and the columns to come make up for
// both errors at once. Columns of a group then stay in their order for n:m.
LayerResult quantize_gptq(const LayerInput& input, const GridSpec& spec, const LayerOptions& options);
// GPTQ towards the teacher's activations, then polish.
LayerResult quantize_trifit(const LayerInput& input, const GridSpec& spec, const LayerOptions& options);

// Alternates two exact subproblems in the metric of H, row by row: joint least squares of all scales of a row, and cyclic
// coordinate descent over its codes. The objective never rises. Ends with stored (half) scales and one descent under them.
// `weight` is the target; `hessian` must be positive definite on its diagonal (damped). Codes of weights that `mask` [N,K] removes
// must stand for zero and stay as they are.
void polish(const at::Tensor& weight, const at::Tensor& hessian, const GridSpec& spec, std::int64_t rounds, Quantized& quantized, std::vector<double>& objective, const at::Tensor& mask = {});

// W + alpha W (C - H)(H + damping)^-1: the weight whose product with the quantized prefix's inputs comes closest to W times
// the teacher's inputs.
at::Tensor teacher_target(const LayerInput& input, double alpha, double damping);

// tr(E H E^T) / tr(W H W^T) with E = W - decode(q).
double output_error(const at::Tensor& weight, const at::Tensor& decoded, const at::Tensor& hessian);

struct QuantizationMethod {
  std::string_view name, summary;
  bool needs_calibration, needs_train, needs_asymmetric;
  LayerResult (*quantize)(const LayerInput&, const GridSpec&, const LayerOptions&);  // the final encode for trained methods
};
std::span<const QuantizationMethod> quantization_methods();
const QuantizationMethod* find_quantization_method(std::string_view name);
std::vector<std::string> quantization_method_names();

}  // namespace kompakt
