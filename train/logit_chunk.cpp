#include "train/logit_chunk.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace kompakt {
namespace {

struct LogitBudget {
  c10::DeviceType device;
  int sides;
  std::int64_t bytes;              // of float32 logits, all sides together
  std::int64_t smallest, largest;  // tokens
};
constexpr std::int64_t mebibyte = std::int64_t{1} << 20;
constexpr LogitBudget logit_budgets[] = {
    {c10::DeviceType::CPU, 1, 64 * mebibyte, 16, std::numeric_limits<std::int64_t>::max()},
    {c10::DeviceType::CPU, 2, 64 * mebibyte, 32, 1024},
    {c10::DeviceType::CUDA, 1, 512 * mebibyte, 128, 16384},
    {c10::DeviceType::CUDA, 2, 512 * mebibyte, 128, 16384},
};

}  // namespace

std::int64_t logit_chunk(c10::DeviceType device, std::int64_t vocabulary, int sides) {
  for (const LogitBudget& row : logit_budgets)
    if (row.device == device && row.sides == sides) return std::clamp(row.bytes / (4 * sides * std::max<std::int64_t>(1, vocabulary)), row.smallest, row.largest);
  throw std::logic_error("logit_chunk: no budget for this device");
}

}  // namespace kompakt
