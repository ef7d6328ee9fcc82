// Rows of the table of grids. Each row is a small struct of constants and a group fit; encode, rounding and packing are
// one template each. Rows of a matrix are independent, so the result does not depend on the number of threads.
#include "quantize/grids.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/text.h"
#include "model/parallel.h"
#include "quantize/code_rule.h"
#include "quantize/grid_math.h"
#include "quantize/group_fit.h"
#include "quantize/kquant.h"
#include "quantize/levels.h"
#include "quantize/vector_lanes.h"

namespace kompakt {
namespace {

// ---- starts of the searches: shares of the scale that clips nothing ----
constexpr float grid_starts_fine[] = {1.0f, 0.92f, 0.84f, 0.76f, 0.68f, 0.6f};       // 4 bits and more
constexpr float grid_starts_coarse[] = {1.0f, 0.85f, 0.7f, 0.58f, 0.46f, 0.36f};     // 3 bits
constexpr float grid_starts_twice[] = {2.0f, 1.0f, 0.5f};                             // scales that are powers of two
constexpr float grid_shrink_fine[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f, 0.65f};
constexpr float grid_shrink_coarse[] = {1.0f, 0.88f, 0.76f, 0.64f, 0.52f, 0.4f};

// ---- the rows: constants and fit ----

template <int Low, int High, int Bits>
struct GridCodes {
  static constexpr int low = Low, high = High;
  static constexpr bool asymmetric = false, integer_zero = false, signed_scale = false, coarse_scale = false;
  static constexpr std::string_view scale_type = "f16";
  static constexpr CodeLayout layout{Packing::bits, Bits, Low, High};
  static constexpr const KQuant* kquant = nullptr;
  static constexpr double entropy_step = 0;
  static const LevelTable* levels() { return nullptr; }
  static float store(float scale) { return store_normal_half(scale); }
};

struct TernaryCodes : GridCodes<-1, 1, 2> {
  static constexpr CodeLayout layout{Packing::trits, 2, -1, 1};
};

struct TernaryGrid : TernaryCodes {
  static GroupScale fit(FitScratch& group) { return {store(fit_ternary(group)), 0}; }
};

struct AbsmeanGrid : TernaryCodes {
  static GroupScale fit(FitScratch& group) { return {store(fit_absmean(group)), 0}; }
};

// One scale that covers everything.
struct AbsmaxGrid : GridCodes<-127, 127, 8> {
  static float store(float scale) { return store_half(scale); }
  static GroupScale fit(FitScratch& group) { return {store(fit_absmax(group, 127)), 0}; }
};

struct Iq4Grid : GridCodes<0, 15, 4> {
  static constexpr bool signed_scale = true;
  static const LevelTable* levels() { return &iq4_levels(); }
  static GroupScale fit(FitScratch& group) { return {fit_levels(group, {iq4_levels(), true, grid_starts_fine, 3, store}), 0}; }
};

// Four-bit floats E2M1 with a power of two, or with a scale of four significant bits.
struct Mxfp4Grid : GridCodes<-7, 7, 4> {
  static constexpr bool coarse_scale = true;
  static constexpr std::string_view scale_type = "power of two";
  static const LevelTable* levels() { return &e2m1_levels(); }
  static float store(float scale) { return store_power(scale); }
  static GroupScale fit(FitScratch& group) { return {fit_levels(group, {e2m1_levels(), false, grid_starts_twice, 0, store}), 0}; }
};

struct Nvfp4Grid : GridCodes<-7, 7, 4> {
  static constexpr bool coarse_scale = true;
  static constexpr std::string_view scale_type = "e4m3";
  static const LevelTable* levels() { return &e2m1_levels(); }
  static float store(float scale) { return store_e4m3(scale); }
  static GroupScale fit(FitScratch& group) { return {fit_levels(group, {e2m1_levels(), false, grid_starts_fine, 3, store}), 0}; }
};

struct Fp8Grid : GridCodes<-126, 126, 8> {
  static const LevelTable* levels() { return &e4m3_levels(); }
  static float store(float scale) { return store_half(scale); }
  static GroupScale fit(FitScratch& group) { return {store(fit_absmax(group, 448)), 0}; }
};

template <int Low, int High, int Bits, bool BothSigns>
struct UniformGrid : GridCodes<Low, High, Bits> {
  static constexpr bool signed_scale = BothSigns;
  static GroupScale fit(FitScratch& group) {
    if constexpr (High - Low <= 3) return {fit_two_bits(group, Low, High, BothSigns, grid::smallest_normal_half), 0};
    const UniformRule rule{Low, High, BothSigns, Bits == 3 ? std::span<const float>(grid_starts_coarse) : grid_starts_fine, Bits == 3 ? 8 : 3, grid::smallest_normal_half};
    return {fit_uniform(group, rule), 0};
  }
};

template <int High, int Bits, bool IntegerZero>
struct OffsetGrid : GridCodes<0, High, Bits> {
  static constexpr bool asymmetric = true, integer_zero = IntegerZero;
  static GroupScale fit(FitScratch& group) {
    OffsetRule rule{High, IntegerZero, grid_shrink_fine, false, 6, grid::smallest_normal_half};
    if (Bits == 2) rule.starts = grid_shrink_coarse, rule.pairs = true;
    return fit_offset(group, rule);
  }
};

// Steps of a fixed share of the row's root mean square, no clipping, codes stored by their entropy. Equal steps everywhere are what
// rate-distortion theory asks for at high rates; the share, in ten-thousandths, gives a normal distribution an entropy of .06 bits
// less than the row's code_bits, room for what a Huffman code wastes and for what error feedback adds to the spread of the weights.
template <int Share>
struct EntropyGrid : GridCodes<-127, 127, 8> {
  static constexpr double entropy_step = Share * 1e-4;
  static GroupScale fit(FitScratch& group) {
    double squares = 0;
    for (std::int64_t i = 0; i < group.size; ++i) squares += static_cast<double>(group.values[static_cast<std::size_t>(i)]) * group.values[static_cast<std::size_t>(i)];
    const double rms = std::sqrt(squares / static_cast<double>(std::max<std::int64_t>(group.size, 1)));
    const float step = static_cast<float>(entropy_step * rms);
    return {store(std::max(step, group.largest / 127)), 0};
  }
};

// Super-blocks: a fit of 256 weights takes the place of one of a group.
template <const KQuant& Type, int Low, int High, int Bits, bool Minima>
struct KQuantGrid : GridCodes<Low, High, Bits> {
  static constexpr bool asymmetric = Minima, signed_scale = !Minima;
  static constexpr std::string_view scale_type = "f16 times a small integer";
  static constexpr const KQuant* kquant = &Type;
  static constexpr GroupScale (*fit)(FitScratch&) = nullptr;
};

struct Iq4XsGrid : KQuantGrid<kquant_iq4_xs, 0, 15, 4, false> {
  static const LevelTable* levels() { return &iq4_levels(); }
};

// ---- the templates ----

struct GridShape {
  std::int64_t rows, columns, group, groups;
};

GridShape grid_shape(const at::Tensor& w, std::int64_t group) {
  TORCH_CHECK(w.dim() == 2, "a grid takes a matrix, got ", w.dim(), " dimensions");
  const std::int64_t columns = w.size(1), width = group > 0 ? std::min(group, std::max<std::int64_t>(columns, 1)) : std::max<std::int64_t>(columns, 1);
  return {w.size(0), columns, width, (columns + width - 1) / width};
}

at::Tensor grid_input(const at::Tensor& t) { return t.detach().to(at::kCPU, at::kFloat).contiguous(); }

const float* grid_importance(const at::Tensor& importance, at::Tensor& holder, std::int64_t columns) {
  if (!importance.defined()) return nullptr;
  TORCH_CHECK(importance.numel() == columns, "importance has ", importance.numel(), " values for ", columns, " columns");
  holder = grid_input(importance);
  return holder.data_ptr<float>();
}

// Rows a task: about 64k weights, a split that does not depend on the number of threads.
std::int64_t grid_grain(const GridShape& shape) { return std::max<std::int64_t>(1, 65536 / std::max<std::int64_t>(shape.columns, 1)); }

Error grid_not_finite(std::int64_t row) { return Error(str("row ", row, " holds a weight that is not finite")).hint("check the checkpoint or the training that made it: the loss or a weight has overflowed"); }

Error grid_too_wide(std::int64_t row, float scale) {
  return Error(str("row ", row, " needs a scale of ", scale, ", more than half precision holds")).allowed("scales below 65504").hint("keep this tensor in float (option keep_float) or rescale the layer before it");
}

template <class Fit>
GroupScale grid_fit_checked(Fit&& fit, FitScratch& scratch, const float* w, const float* importance, std::int64_t n, std::int64_t row) {
  if (!scratch.load(w, importance, n)) throw grid_not_finite(row);
  const GroupScale g = fit(scratch);
  if (!(std::fabs(g.scale) < grid::largest_half) || !(std::fabs(g.offset) < grid::largest_half)) throw grid_too_wide(row, g.scale);
  return g;
}

// Weights that are fitted at once: a group, or a super-block.
template <class Row>
std::int64_t grid_span(const GridShape& shape) {
  return Row::kquant != nullptr ? kquant_span : shape.group;
}

// Scales (and offsets) of the groups of one such span.
template <class Row>
void grid_fit_span(FitScratch& scratch, const float* w, const float* importance, std::int64_t n, std::int64_t row, float* scales, float* offsets) {
  if constexpr (Row::kquant != nullptr) {
    const float needed = Row::kquant->fit(w, importance, scales, offsets);
    if (std::isnan(needed)) throw grid_not_finite(row);
    if (!(needed < grid::largest_half)) throw grid_too_wide(row, needed);
  } else {
    const GroupScale s = grid_fit_checked(Row::fit, scratch, w, importance, n, row);
    *scales = s.scale;
    if (Row::asymmetric) *offsets = s.offset;
  }
}

// The two loops below are nearest_code and decode_value of grid_math.h in lanes, the same operations in the same order.
KOMPAKT_LANES void grid_round_group(const float* w, std::int64_t n, float scale, float inverse, float offset, float low, float high, float* out) {
  Lanes bottom = {}, top = {};
  bottom += low, top += high;
  const float magic = 12582912.0f;
  std::int64_t i = 0;
  for (; i + lane_count <= n; i += lane_count) {
    Lanes x;
    KOMPAKT_LOAD(x, w + i);
    x = (x + -offset) * inverse;
    x = x > bottom ? x : bottom;
    x = x < top ? x : top;
    x = (x + magic) + -magic;
    x = x * scale + offset;
    KOMPAKT_STORE(out + i, x);
  }
  for (; i < n; ++i) out[i] = grid::decode_value(grid::nearest_code(w[i], inverse, offset, low, high), scale, offset);
}

KOMPAKT_LANES void grid_code_group(const float* w, std::int64_t n, float inverse, float offset, float low, float high, std::int8_t* out) {
  Lanes bottom = {}, top = {};
  bottom += low, top += high;
  const float magic = 12582912.0f;
  std::int64_t i = 0;
  for (; i + lane_count <= n; i += lane_count) {
    Lanes x;
    KOMPAKT_LOAD(x, w + i);
    x = (x + -offset) * inverse;
    x = x > bottom ? x : bottom;
    x = x < top ? x : top;
    x = (x + magic) + -magic;
    store_bytes(out + i, x);
  }
  for (; i < n; ++i) out[i] = static_cast<std::int8_t>(static_cast<int>(grid::nearest_code(w[i], inverse, offset, low, high)));
}

template <class Row>
void grid_code_row(const float* w, std::int64_t n, const GroupScale& s, std::int8_t* codes) {
  const LevelTable* levels = Row::levels();
  const float inverse = grid::inverse_scale(s.scale);
  if (!levels) return grid_code_group(w, n, inverse, s.offset, Row::low, Row::high, codes);
  if (levels->few()) return levels->nearest_few(w, n, s.offset, inverse, codes);
  for (std::int64_t i = 0; i < n; ++i) codes[i] = static_cast<std::int8_t>(levels->nearest(grid::multiply_rounded(grid::add_rounded(w[i], -s.offset), inverse)));
}

template <class Row>
void grid_round_row(const float* w, std::int64_t n, const GroupScale& s, float* out) {
  const LevelTable* levels = Row::levels();
  const float inverse = grid::inverse_scale(s.scale);
  if (!levels) return grid_round_group(w, n, s.scale, inverse, s.offset, Row::low, Row::high, out);
  for (std::int64_t i = 0; i < n; ++i) out[i] = grid::decode_value(levels->value(levels->nearest(grid::multiply_rounded(grid::add_rounded(w[i], -s.offset), inverse))), s.scale, s.offset);
}

template <class Row>
Quantized grid_encode(const at::Tensor& w, std::int64_t group, const at::Tensor& importance) {
  const GridShape shape = grid_shape(w, group);
  const at::Tensor input = grid_input(w);
  at::Tensor holder;
  const float* weights = grid_importance(importance, holder, shape.columns);
  Quantized q;
  q.codes = at::empty({shape.rows, shape.columns}, at::kChar);
  q.scales = at::empty({shape.rows, shape.groups}, at::kFloat);
  if (Row::asymmetric) q.offsets = at::empty({shape.rows, shape.groups}, at::kFloat);
  const float* in = input.data_ptr<float>();
  std::int8_t* codes = q.codes.data_ptr<std::int8_t>();
  float* scales = q.scales.data_ptr<float>();
  float* offsets = Row::asymmetric ? q.offsets.data_ptr<float>() : nullptr;
  at::parallel_for(0, shape.rows, grid_grain(shape), [&](std::int64_t begin, std::int64_t end) {
    FitScratch scratch;
    for (std::int64_t r = begin; r < end; ++r) {
      const float* row = in + r * shape.columns;
      for (std::int64_t first = 0; first < shape.columns; first += grid_span<Row>(shape)) {
        const std::int64_t n = std::min(grid_span<Row>(shape), shape.columns - first), from = r * shape.groups + first / shape.group;
        grid_fit_span<Row>(scratch, row + first, weights ? weights + first : nullptr, n, r, scales + from, offsets ? offsets + from : nullptr);
      }
      for (std::int64_t g = 0; g < shape.groups; ++g) {
        const std::int64_t first = g * shape.group, n = std::min(shape.group, shape.columns - first), at = r * shape.groups + g;
        grid_code_row<Row>(row + first, n, {scales[at], offsets ? offsets[at] : 0.0f}, codes + r * shape.columns + first);
      }
    }
  });
  if (w.device().is_cpu()) return q;
  q.codes = q.codes.to(w.device()), q.scales = q.scales.to(w.device());
  if (q.offsets.defined()) q.offsets = q.offsets.to(w.device());
  return q;
}

template <class Row>
at::Tensor grid_round(const at::Tensor& w, std::int64_t group, const at::Tensor& importance) {
  const GridShape shape = grid_shape(w, group);
  const at::Tensor input = grid_input(w);
  at::Tensor holder, result = at::empty({shape.rows, shape.columns}, at::kFloat);
  const float* weights = grid_importance(importance, holder, shape.columns);
  const float* in = input.data_ptr<float>();
  float* out = result.data_ptr<float>();
  at::parallel_for(0, shape.rows, grid_grain(shape), [&](std::int64_t begin, std::int64_t end) {
    FitScratch scratch;
    for (std::int64_t r = begin; r < end; ++r)
      for (std::int64_t first = 0; first < shape.columns; first += grid_span<Row>(shape)) {
        const std::int64_t n = std::min(grid_span<Row>(shape), shape.columns - first), at = r * shape.columns + first;
        float scales[16], offsets[16] = {};
        grid_fit_span<Row>(scratch, in + at, weights ? weights + first : nullptr, n, r, scales, offsets);
        for (std::int64_t i = 0; i < n; i += shape.group) grid_round_row<Row>(in + at + i, std::min(shape.group, n - i), {scales[i / shape.group], offsets[i / shape.group]}, out + at + i);
      }
  });
  return w.device().is_cpu() ? result : result.to(w.device());
}

template <class Row>
at::Tensor grid_codes_for(const at::Tensor& w, const at::Tensor& scales, const at::Tensor& offsets, std::int64_t group) {
  const GridShape shape = grid_shape(w, group);
  TORCH_CHECK(scales.size(0) == shape.rows && scales.size(1) == shape.groups, "scales do not fit the matrix");
  const at::Tensor input = grid_input(w), s = grid_input(scales), o = offsets.defined() ? grid_input(offsets) : at::Tensor();
  at::Tensor result = at::empty({shape.rows, shape.columns}, at::kChar);
  const float* in = input.data_ptr<float>();
  const float* scale = s.data_ptr<float>();
  const float* offset = o.defined() ? o.data_ptr<float>() : nullptr;
  std::int8_t* codes = result.data_ptr<std::int8_t>();
  at::parallel_for(0, shape.rows, grid_grain(shape), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r)
      for (std::int64_t g = 0; g < shape.groups; ++g) {
        const std::int64_t first = g * shape.group, n = std::min(shape.group, shape.columns - first), k = r * shape.groups + g;
        grid_code_row<Row>(in + r * shape.columns + first, n, {scale[k], offset ? offset[k] : 0.0f}, codes + r * shape.columns + first);
      }
  });
  return w.device().is_cpu() ? result : result.to(w.device());
}

template <class Row>
std::vector<std::byte> grid_pack(const at::Tensor& codes) {
  const at::Tensor c = codes.to(at::kCPU, at::kChar).contiguous();
  TORCH_CHECK(c.dim() == 2, "codes are a matrix");
  if (c.numel() > 0) {
    const auto range = c.aminmax();
    TORCH_CHECK(std::get<0>(range).item<int>() >= Row::low && std::get<1>(range).item<int>() <= Row::high, "a code lies outside of the grid");
  }
  std::vector<std::byte> bytes(static_cast<std::size_t>(c.size(0) * Row::layout.row_bytes(c.size(1))));
  pack_codes(Row::layout, c.data_ptr<std::int8_t>(), c.size(0), c.size(1), reinterpret_cast<std::uint8_t*>(bytes.data()));
  return bytes;
}

template <class Row>
at::Tensor grid_unpack(std::span<const std::byte> bytes, std::int64_t rows, std::int64_t columns) {
  if (rows < 0 || columns < 0 || static_cast<std::int64_t>(bytes.size()) != rows * Row::layout.row_bytes(columns))
    throw Error(str("packed codes of ", rows, " x ", columns, " weights have ", bytes.size(), " bytes")).allowed(str(rows * Row::layout.row_bytes(columns), " bytes")).hint("the file is damaged or was written with another grid");
  at::Tensor codes = at::empty({rows, columns}, at::kChar);
  if (!unpack_codes(Row::layout, reinterpret_cast<const std::uint8_t*>(bytes.data()), rows, columns, codes.data_ptr<std::int8_t>()))
    throw Error("packed codes hold a value outside of the grid").allowed(str(Row::low, " to ", Row::high)).hint("the file is damaged or was written with another grid");
  return codes;
}

struct GridText {
  std::string_view name, summary;
  double code_bits;
  std::int64_t default_group;
  bool group_fixed;
  std::string_view ggml_type;
  bool for_embeddings;
  double gaussian_error;
};

template <class Row>
Grid grid_row(const GridText& text) {
  return {text.name, text.summary, text.code_bits, Row::low, Row::high, Row::asymmetric, text.default_group, text.group_fixed, Row::scale_type, text.ggml_type,
          text.for_embeddings, text.gaussian_error, grid_encode<Row>, grid_codes_for<Row>, grid_pack<Row>, grid_unpack<Row>, grid_round<Row>, Row::layout,
          Row::fit, Row::signed_scale, Row::levels(), Row::store, Row::coarse_scale, Row::integer_zero, Row::kquant, Row::entropy_step};
}

using Int4Grid = UniformGrid<-8, 7, 4, false>;
using Int4SignedGrid = UniformGrid<-8, 7, 4, true>;
using FourLevelGrid = UniformGrid<-1, 2, 2, true>;

// gaussian_error: upper bound of |w - decode(encode(w))|^2 / |w|^2 for N(0,1) at the default group (whole rows: 512 columns).
const std::vector<Grid>& grid_table() {
  static const std::vector<Grid> table = {
      grid_row<AbsmaxGrid>({"int8", "8 bits, symmetric, scale from the largest weight of the row", 8, 0, false, "Q8_0", true, 8e-5}),
      grid_row<Int4Grid>({"int4", "4 bits, symmetric, scale by least squares with clipping", 4, 64, false, "", true, 0.0098}),
      grid_row<Int4SignedGrid>({"int4_signed", "4 bits, symmetric, signed scale: the extra code serves the longer tail", 4, 64, false, "", true, 0.0093}),
      grid_row<UniformGrid<-4, 3, 3, false>>({"int3", "3 bits, symmetric, scale by least squares", 3, 64, false, "", false, 0.038}),
      grid_row<UniformGrid<-4, 3, 3, true>>({"int3_signed", "3 bits, symmetric, signed scale", 3, 64, false, "", false, 0.035}),
      grid_row<UniformGrid<-2, 1, 2, false>>({"int2", "2 bits, symmetric, scale by least squares", 2, 64, false, "", false, 0.16}),
      grid_row<OffsetGrid<15, 4, true>>({"int4_asym", "4 bits with an integer zero point", 4, 64, false, "", true, 0.0098}),
      grid_row<OffsetGrid<7, 3, true>>({"int3_asym", "3 bits with an integer zero point", 3, 64, false, "", false, 0.042}),
      grid_row<OffsetGrid<3, 2, true>>({"int2_asym", "2 bits with an integer zero point", 2, 64, false, "", false, 0.16}),
      grid_row<TernaryGrid>({"ternary", "-1, 0, 1 times a scale: the exact least-squares fit of every group", 1.6, 64, false, "", false, 0.190}),
      grid_row<AbsmeanGrid>({"ternary_absmean", "-1, 0, 1 times the mean magnitude (the rule of BitNet b1.58): a control, not for use", 1.6, 0, false, "", false, 0.28}),
      grid_row<FourLevelGrid>({"four_level", "-1, 0, 1, 2 times a signed scale, as GGUF Q2_0 stores it", 2, 64, false, "Q2_0", false, 0.130}),
      grid_row<AbsmaxGrid>({"q8_0", "GGUF Q8_0: 8 bits, groups of 32", 8, 32, true, "Q8_0", true, 5e-5}),
      grid_row<UniformGrid<-16, 15, 5, true>>({"q5_0", "GGUF Q5_0: 5 bits, signed scale, groups of 32", 5, 32, true, "Q5_0", true, 0.0022}),
      grid_row<OffsetGrid<31, 5, false>>({"q5_1", "GGUF Q5_1: 5 bits with a minimum, groups of 32", 5, 32, true, "Q5_1", true, 0.0018}),
      grid_row<Int4SignedGrid>({"q4_0", "GGUF Q4_0: 4 bits, signed scale, groups of 32", 4, 32, true, "Q4_0", true, 0.0078}),
      grid_row<OffsetGrid<15, 4, false>>({"q4_1", "GGUF Q4_1: 4 bits with a minimum, groups of 32", 4, 32, true, "Q4_1", true, 0.0070}),
      grid_row<Iq4Grid>({"iq4_nl", "GGUF IQ4_NL: 16 uneven levels, denser near zero, signed scale, groups of 32", 4, 32, true, "IQ4_NL", true, 0.0068}),
      grid_row<Mxfp4Grid>({"mxfp4", "MXFP4: floats E2M1 times a power of two, groups of 32", 4, 32, true, "MXFP4", true, 0.016}),
      grid_row<Nvfp4Grid>({"nvfp4", "NVFP4: floats E2M1 times an E4M3 scale, groups of 16", 4, 16, true, "", true, 0.0095}),
      grid_row<Fp8Grid>({"fp8_e4m3", "floats E4M3, scale from the largest weight of the row", 8, 0, false, "", true, 0.0009}),
      grid_row<FourLevelGrid>({"q2_0", "GGUF Q2_0: -1, 0, 1, 2 times a signed scale, groups of 64", 2, 64, true, "Q2_0", false, 0.130}),
      grid_row<TernaryGrid>({"tq1_0", "GGUF TQ1_0: ternary, groups of 256, 1.69 bits", 1.6, 256, true, "TQ1_0", false, 0.194}),
      grid_row<TernaryGrid>({"tq2_0", "GGUF TQ2_0: ternary, groups of 256, 2.06 bits", 1.6, 256, true, "TQ2_0", false, 0.194}),
      grid_row<KQuantGrid<kquant_q6_k, -32, 31, 6, false>>({"q6_k", "GGUF Q6_K: 6 bits, groups of 16 in super-blocks of 256, 6.56 bits", 6, 16, true, "Q6_K", true, 0.00032}),
      grid_row<KQuantGrid<kquant_q5_k, 0, 31, 5, true>>({"q5_k", "GGUF Q5_K: 5 bits with minima, groups of 32 in super-blocks of 256, 5.5 bits", 5, 32, true, "Q5_K", true, 0.0013}),
      grid_row<KQuantGrid<kquant_q4_k, 0, 15, 4, true>>({"q4_k", "GGUF Q4_K: 4 bits with minima, groups of 32 in super-blocks of 256, 4.5 bits", 4, 32, true, "Q4_K", true, 0.0053}),
      grid_row<KQuantGrid<kquant_q3_k, -4, 3, 3, false>>({"q3_k", "GGUF Q3_K: 3 bits, groups of 16 in super-blocks of 256, 3.44 bits", 3, 16, true, "Q3_K", true, 0.0225}),
      grid_row<KQuantGrid<kquant_q2_k, 0, 3, 2, true>>({"q2_k", "GGUF Q2_K: 2 bits with minima, groups of 16 in super-blocks of 256, 2.63 bits", 2, 16, true, "Q2_K", true, 0.072}),
      grid_row<Iq4XsGrid>({"iq4_xs", "GGUF IQ4_XS: the uneven levels of IQ4_NL, groups of 32 in super-blocks of 256, 4.25 bits", 4, 32, true, "IQ4_XS", true, 0.006}),
      grid_row<EntropyGrid<16929>>({"ecq1_5", "even steps without clipping, codes stored by their entropy: about 1.5 bits", 1.5, 0, false, "", true, 0.245}),
      grid_row<EntropyGrid<11332>>({"ecq2", "even steps without clipping, codes stored by their entropy: about 2 bits", 2, 0, false, "", true, 0.111}),
      grid_row<EntropyGrid<7807>>({"ecq2_5", "even steps without clipping, codes stored by their entropy: about 2.5 bits", 2.5, 0, false, "", true, 0.053}),
      grid_row<EntropyGrid<5452>>({"ecq3", "even steps without clipping, codes stored by their entropy: about 3 bits", 3, 0, false, "", true, 0.026}),
      grid_row<EntropyGrid<3831>>({"ecq3_5", "even steps without clipping, codes stored by their entropy: about 3.5 bits", 3.5, 0, false, "", true, 0.0127}),
      grid_row<EntropyGrid<2701>>({"ecq4", "even steps without clipping, codes stored by their entropy: about 4 bits", 4, 0, false, "", true, 0.0064}),
      grid_row<EntropyGrid<1347>>({"ecq5", "even steps without clipping, codes stored by their entropy: about 5 bits", 5, 0, false, "", true, 0.0016}),
      grid_row<EntropyGrid<673>>({"ecq6", "even steps without clipping, codes stored by their entropy: about 6 bits", 6, 0, false, "", true, 0.0004}),
  };
  return table;
}

}  // namespace

std::span<const Grid> grids() { return grid_table(); }

const Grid* find_grid(std::string_view name) {
  for (const Grid& row : grids())
    if (row.name == name) return &row;
  return nullptr;
}

std::vector<std::string> grid_names() {
  std::vector<std::string> names;
  for (const Grid& row : grids()) names.emplace_back(row.name);
  return names;
}

namespace {

void grid_check(const GridSpec& spec, const at::Tensor& w) {
  TORCH_CHECK(spec.grid != nullptr, "a grid spec without a grid");
  TORCH_CHECK(w.dim() == 2, "a grid takes a matrix, got ", w.dim(), " dimensions");
  if (!spec.grid->group_fixed) return;
  const std::int64_t group = spec.grid->default_group;
  TORCH_CHECK(spec.group == group, "grid ", std::string(spec.grid->name), " has groups of ", group);
  if (const std::int64_t span = spec.span_for(w.size(1)); w.size(1) % span != 0)
    throw Error(str("a row of ", w.size(1), " weights does not divide into the ", grid_span_name(spec), " of grid \"", spec.grid->name, "\"")).allowed(str("row lengths that are multiples of ", span)).hint("take a grid with smaller groups, such as q8_0, q4_0 (32) or four_level (64)");
}

}  // namespace

Quantized encode(const GridSpec& spec, const at::Tensor& w, const at::Tensor& importance) {
  grid_check(spec, w);
  return spec.grid->encode(w, spec.group, importance);
}

at::Tensor round_to_grid(const GridSpec& spec, const at::Tensor& w, const at::Tensor& importance) {
  grid_check(spec, w);
  return spec.grid->round(w, spec.group, importance);
}

at::Tensor decode(const GridSpec& spec, const Quantized& q) {
  const std::int64_t rows = q.codes.size(0), columns = q.codes.size(1);
  const GridShape shape = grid_shape(q.codes, spec.group);
  TORCH_CHECK(q.scales.size(0) == rows && q.scales.size(1) == shape.groups, "scales do not fit the codes");
  const at::Tensor c = q.codes.to(at::kCPU).contiguous(), s = grid_input(q.scales), o = q.offsets.defined() ? grid_input(q.offsets) : at::Tensor();
  at::Tensor result = at::empty({rows, columns}, at::kFloat);
  const CodeRule rule(*spec.grid);
  const std::int8_t* codes = c.data_ptr<std::int8_t>();
  const float* scales = s.data_ptr<float>();
  const float* offsets = o.defined() ? o.data_ptr<float>() : nullptr;
  float* out = result.data_ptr<float>();
  at::parallel_for(0, rows, grid_grain(shape), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r)
      for (std::int64_t k = 0; k < columns; ++k) {
        const std::int64_t g = r * shape.groups + k / shape.group;
        out[r * columns + k] = grid::decode_value(rule.value(static_cast<float>(codes[r * columns + k])), scales[g], offsets ? offsets[g] : 0.0f);
      }
  });
  return q.codes.device().is_cpu() ? result : result.to(q.codes.device());
}

at::Tensor code_values(const Grid& grid, const at::Tensor& codes) {
  if (!grid.levels) return codes.to(at::kFloat);
  const at::Tensor c = codes.to(at::kCPU).contiguous();
  at::Tensor result = at::empty(c.sizes(), at::kFloat);
  for (std::int64_t i = 0; i < c.numel(); ++i) result.data_ptr<float>()[i] = grid.levels->value(c.data_ptr<std::int8_t>()[i]);
  return result;
}

}  // namespace kompakt
