// Which ggml block type holds a grid exactly, and codes with scales as blocks of that type.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "formats/ggml_blocks.h"
#include "quantize/grids.h"

namespace kompakt {

// The smallest type whose codes cover the grid's and whose block divides group and row (a longer group repeats its scale).
// Null when there is none; `why` then says what does not fit.
const GgmlType* exact_ggml_type(const GridSpec& spec, std::int64_t columns, std::string& why);
// Rows of codes as blocks, [rows, columns]. decode of the result equals decode(spec, values) bit for bit.
std::vector<std::byte> to_ggml_blocks(const GgmlType& type, const GridSpec& spec, const Quantized& values);

}  // namespace kompakt
