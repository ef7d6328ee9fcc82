// Scales per channel between what makes an activation and the linears that read it: AWQ's search and SmoothQuant's formula.
// Columns of the readers are multiplied by s, the norm or the linear in front is divided by s: the function stays.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

#include "core/json.h"
#include "model/transformer.h"
#include "quantize/grids.h"
#include "train/calibration.h"

namespace kompakt {

struct ScaleMapping {
  std::string name;               // "model.layers.0.input_layernorm"
  Norm* norm = nullptr;           // what is divided: a norm's gain,
  Linear* producer = nullptr;     // or the rows and the bias of a linear
  std::vector<Linear*> readers;   // whose columns are multiplied; they share their input
  std::int64_t heads = 1;         // channels of `producer` = heads x size; a reader sees each head `repeats` times in a row
  std::int64_t repeats = 1;       // (grouped queries), so that its columns are heads x repeats x size
  // Judged by the parent module, attention or MLP: the linear that ends it, and the tap in front of that linear. Null where
  // the reader ends its module itself.
  Linear* end = nullptr;
  const char* end_tap = "";
};
// Norm -> query, key, value and norm -> gate, up in pre-norm models; value -> output; up -> down of a gated MLP.
std::vector<ScaleMapping> scale_mappings(Transformer& model, std::int64_t layer);

// s double [channels], positive and finite.
void apply_scales(const ScaleMapping& mapping, const at::Tensor& scales);
// s for the columns of the readers: [channels] -> [heads x repeats x size].
at::Tensor reader_scales(const ScaleMapping& mapping, const at::Tensor& scales);

// AWQ (Lin et al. 2023): s = mean|x|^r, with "duo" scaling also / (w^(1-r) + 1e-4), w the mean magnitude of a column relative
// to its group; at least 1e-4, divided by sqrt(max s min s), 1 where not finite.
at::Tensor awq_scales(const at::Tensor& input_mean, const at::Tensor& weight_mean, double ratio, bool duo);
// SmoothQuant (Xiao et al. 2022): s = max|x|^alpha / max|w|^(1-alpha), at least 1e-5; 1 for channels without input or weight.
at::Tensor smoothquant_scales(const at::Tensor& input_max, const at::Tensor& weight_max, double alpha);

struct ScaleSearch {
  const std::map<std::string, GridSpec>& grids;  // by the linear's name; a linear without a grid is not rounded
  const std::map<std::string, at::Tensor>& folded;  // gains that were folded: taking one out again is a candidate too
  std::int64_t points = 5;                       // r = 0 .. 1
  std::int64_t blocks = 0;                       // only the first so many; 0 = all
};
// For every mapping: the candidate with the smallest squared error of the parent module's output, float inputs, identity
// included. Mappings whose readers all stay in float are skipped. Returns a row per mapping: loss of identity, of the choice.
Json search_scales(Transformer& model, const CalibrationSet& set, const ScaleSearch& search);
// Every mapping behind a norm gets SmoothQuant's scales. Returns the number of mappings.
std::int64_t smooth_scales(Transformer& model, const CalibrationSet& set, double alpha);

}  // namespace kompakt
