// Matrices of super-blocks as bytes of ggml's types, and back.
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "core/error.h"
#include "core/text.h"
#include "quantize/grids.h"
#include "quantize/kquant.h"

namespace kompakt {

std::vector<std::byte> kquant_blocks(const Grid& grid, const Quantized& values) {
  const KQuant& kquant = *grid.kquant;
  const std::int64_t rows = values.codes.size(0), columns = values.codes.size(1), blocks = rows * columns / kquant_span, groups = kquant.groups();
  if (columns % kquant_span != 0 || values.scales.numel() != blocks * groups || values.offsets.defined() != kquant.minimum()) throw std::logic_error("kquant_blocks: these are no super-blocks");
  const at::Tensor c = values.codes.to(at::kCPU, at::kChar).contiguous(), s = values.scales.to(at::kCPU, at::kFloat).contiguous();
  const at::Tensor o = kquant.minimum() ? values.offsets.to(at::kCPU, at::kFloat).contiguous() : at::Tensor();
  std::vector<std::byte> out(static_cast<std::size_t>(blocks * kquant.bytes));
  KQuantBlock block;
  for (std::int64_t b = 0; b < blocks; ++b) {
    if (!kquant_factor(kquant, s.const_data_ptr<float>() + b * groups, o.defined() ? o.const_data_ptr<float>() + b * groups : nullptr, block))
      throw std::logic_error(str("kquant_blocks: the scales of a block are not those of ", kquant.type));
    std::copy_n(c.const_data_ptr<std::int8_t>() + b * kquant_span, kquant_span, block.codes);
    kquant.pack(block, out.data() + b * kquant.bytes);
  }
  return out;
}

Quantized kquant_values(const Grid& grid, std::span<const std::byte> bytes, std::int64_t rows, std::int64_t columns) {
  const KQuant& kquant = *grid.kquant;
  const std::int64_t blocks = rows * columns / kquant_span, groups = kquant.groups();
  if (rows < 0 || columns < 0 || columns % kquant_span != 0 || static_cast<std::int64_t>(bytes.size()) != blocks * kquant.bytes)
    throw Error(str("blocks of ", rows, " x ", columns, " weights have ", bytes.size(), " bytes")).allowed(str(blocks * kquant.bytes, " bytes, rows that are multiples of ", kquant_span)).hint("the file is damaged or was written with another grid");
  Quantized q;
  q.codes = at::empty({rows, columns}, at::kChar), q.scales = at::empty({rows, columns / kquant.group});
  if (kquant.minimum()) q.offsets = at::empty_like(q.scales);
  KQuantBlock block;
  for (std::int64_t b = 0; b < blocks; ++b) {
    kquant.unpack(bytes.data() + b * kquant.bytes, block);
    if (!std::isfinite(block.d) || !std::isfinite(block.e)) throw Error("a block has a scale that is not finite").hint("the file is damaged");
    std::copy_n(block.codes, kquant_span, q.codes.data_ptr<std::int8_t>() + b * kquant_span);
    for (std::int64_t j = 0; j < groups; ++j) {
      q.scales.data_ptr<float>()[b * groups + j] = block.d * static_cast<float>(block.steps[j]);
      if (kquant.minimum()) q.offsets.data_ptr<float>()[b * groups + j] = -(block.e * static_cast<float>(block.minima[j]));
    }
  }
  return q;
}

}  // namespace kompakt
