// CPU twins of the CUDA kernels. Plain loops; torch threads are not used, the callers split rows.
#include "quantize/kernels.h"

#include <algorithm>

#include "quantize/grid_math.h"
#include "quantize/group_fit.h"

namespace kompakt::cpu {

void packed_matvec(const PackedMatrix& w, const float* x, std::int64_t batch, float* y) {
  const std::int64_t stride = w.layout.row_bytes(w.columns), groups = w.groups();
  std::vector<std::int8_t> row(static_cast<std::size_t>(w.columns));
  for (std::int64_t r = 0; r < w.rows; ++r) {
    unpack_codes(w.layout, w.codes + r * stride, 1, w.columns, row.data());
    for (std::int64_t b = 0; b < batch; ++b) {
      const float* input = x + b * w.columns;
      float total = 0;
      for (std::int64_t g = 0; g < groups; ++g) {
        float products = 0, inputs = 0;
        const std::int64_t end = std::min(w.columns, (g + 1) * w.group);
        for (std::int64_t k = g * w.group; k < end; ++k) products += static_cast<float>(row[static_cast<std::size_t>(k)]) * input[k], inputs += input[k];
        total += grid::half_value(w.scales[r * groups + g]) * products;
        if (w.offsets) total += w.offsets[r * groups + g] * inputs;
      }
      y[b * w.rows + r] = total;
    }
  }
}

void fake_quantize(const float* w, const float* scales, const float* offsets, std::int64_t rows, std::int64_t columns, std::int64_t group, int code_min, int code_max,
                   float* out) {
  const std::int64_t groups = (columns + group - 1) / group;
  for (std::int64_t i = 0; i < rows * columns; ++i) {
    const std::int64_t g = i / columns * groups + i % columns / group;
    const float offset = offsets ? offsets[g] : 0.0f;
    const float code = grid::nearest_code(w[i], grid::inverse_scale(scales[g]), offset, static_cast<float>(code_min), static_cast<float>(code_max));
    out[i] = grid::decode_value(code, scales[g], offset);
  }
}

namespace {

template <class Fit>
void kernel_fit_groups(const float* w, std::int64_t rows, std::int64_t columns, std::int64_t group, float smallest, float* scales, Fit&& fit) {
  FitScratch scratch;
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t first = 0; first < columns; first += group) {
      scratch.load(w + r * columns + first, nullptr, std::min(group, columns - first));
      *scales++ = grid::stored_scale(fit(scratch), smallest);
    }
}

}  // namespace

void fit_absmax(const float* w, std::int64_t rows, std::int64_t columns, std::int64_t group, int code_max, float smallest, float* scales) {
  kernel_fit_groups(w, rows, columns, group, smallest, scales, [&](FitScratch& s) { return kompakt::fit_absmax(s, code_max); });
}

void fit_ternary(const float* w, std::int64_t rows, std::int64_t columns, std::int64_t group, float smallest, float* scales) {
  kernel_fit_groups(w, rows, columns, group, smallest, scales, [](FitScratch& s) { return kompakt::fit_ternary(s); });
}

void pack(const CodeLayout& layout, const std::int8_t* codes, std::int64_t rows, std::int64_t columns, std::uint8_t* bytes) { pack_codes(layout, codes, rows, columns, bytes); }

void unpack(const CodeLayout& layout, const std::uint8_t* bytes, std::int64_t rows, std::int64_t columns, std::int8_t* codes) { unpack_codes(layout, bytes, rows, columns, codes); }

}  // namespace kompakt::cpu
