// Counter-based random numbers: value i of stream (seed, name) is a pure function, so order, resume and thread count
// never change a draw. Philox4x32-10 (Salmon et al. 2011), whose published test vectors are in the tests.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

namespace kompakt {

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key);

class CounterRandom {
 public:
  // Streams with different names are independent: CounterRandom(seed, "data-order/epoch-3").
  CounterRandom(std::uint64_t seed, std::string_view stream);
  std::uint64_t bits(std::uint64_t index) const;    // 64 uniform bits
  double uniform(std::uint64_t index) const;        // [0, 1)
  double normal(std::uint64_t index) const;         // N(0, 1), Box-Muller
  std::uint64_t below(std::uint64_t index, std::uint64_t n) const;  // [0, n), n >= 1
  // Fisher-Yates permutation of 0..n-1, the same on every platform.
  std::vector<std::int64_t> permutation(std::int64_t n) const;
  std::uint64_t key() const { return key_; }

 private:
  std::uint64_t key_;
};

}  // namespace kompakt
