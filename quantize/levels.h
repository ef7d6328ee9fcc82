// Grids whose codes stand for uneven levels: w = scale * level[code]. GGUF's IQ4_NL, the small floats E2M1 (MXFP4, NVFP4) and
// E4M3 (FP8). Also the forms in which a scale is stored. CPU only, one thread, a fixed order of operations.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "quantize/group_fit.h"

namespace kompakt {

class LevelTable {
 public:
  // `levels` ascending; the first has the code `low`. `tie_up(k)`: a value half way between levels k and k + 1 takes k + 1.
  LevelTable(int low, std::vector<float> levels, bool (*tie_up)(int k));

  int low() const { return low_; }
  int high() const { return low_ + static_cast<int>(level_.size()) - 1; }
  float value(int code) const { return level_[static_cast<std::size_t>(code - low_)]; }
  // Code of the nearest level. A NaN gives the lowest code.
  int nearest(float x) const {
    if (!(x > level_.front())) return low_;
    const float at = (x - level_.front()) * rate_;
    std::size_t k = start_[at < static_cast<float>(start_.size() - 1) ? static_cast<std::size_t>(at) : start_.size() - 1];
    while (x >= threshold_[k]) ++k;
    return low_ + static_cast<int>(k);
  }
  // At most 16 levels: few enough for whole vectors of values to be looked up.
  bool few() const { return level_.size() <= few_levels; }
  // Codes of (w - offset) * inverse.
  void nearest_few(const float* w, std::int64_t n, float offset, float inverse, std::int8_t* codes) const;
  static constexpr std::size_t few_levels = 16;
  std::span<const float> levels() const { return level_; }
  std::span<const float> thresholds() const { return {threshold_.data(), threshold_.size() - 1}; }  // from [k] on the code is k + 1

 private:
  int low_;
  std::vector<float> level_, threshold_;  // from threshold_[k] on the code is k + 1; nothing reaches the last
  std::vector<std::uint8_t> start_;       // a level at or below every value of one of the equal parts of the range
  float rate_ = 0;                        // parts per unit
};

const LevelTable& iq4_levels();   // codes 0..15, the table of IQ4_NL and IQ4_XS, -127..113; ties upwards as in ggml
const LevelTable& e2m1_levels();  // codes -7..7: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives (E2M1 doubled); ties to even
const LevelTable& e4m3_levels();  // codes -126..126: sign and the seven other bits of FP8 E4M3, up to 448; ties to even

// A scale as it is stored, zero for zero, sign kept.
float store_normal_half(float scale);  // half, not below its smallest normal number
float store_half(float scale);         // half, subnormals allowed: scales of 8-bit codes are small by nature
float store_power(float scale);        // the nearest power of two (E8M0) that half holds
float store_e4m3(float scale);         // three bits after the leading one (E4M3 times a power of two), as half holds them

struct LevelRule {
  const LevelTable& table;
  bool both_signs;                 // a negative scale gives the longer side of the levels to the other tail
  std::span<const float> starts;   // shares of the scale that clips nothing
  int iterations;                  // alternations of codes and least-squares scale per start
  float (*store)(float);
};
// The candidate with the least weighted squared error, judged with its scale as stored.
float fit_levels(FitScratch& group, const LevelRule& rule);

}  // namespace kompakt
