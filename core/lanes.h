// Eight float lanes by the compiler's vector extension: the order of a reduction is fixed by the source and not by the
// instruction set, so every machine gives the same bits. Functions marked KOMPAKT_LANES are compiled for AVX2 as well; what they
// call is marked KOMPAKT_INLINE, or it would run in the baseline instruction set.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
// No "fma": a fused product would change bits between machines.
#define KOMPAKT_LANES __attribute__((target_clones("avx2", "default")))
#else
#define KOMPAKT_LANES
#endif
#define KOMPAKT_INLINE inline __attribute__((always_inline))

namespace kompakt {

constexpr std::int64_t lane_count = 8;
typedef float Lanes __attribute__((vector_size(32)));
typedef std::int32_t LaneMask __attribute__((vector_size(32)));

// Macros and not functions: passing 32-byte vectors by value has no stable ABI without AVX.
#define KOMPAKT_LOAD(lanes, pointer) __builtin_memcpy(&(lanes), (pointer), sizeof(Lanes))
#define KOMPAKT_STORE(pointer, lanes) __builtin_memcpy((pointer), &(lanes), sizeof(Lanes))

// Whole numbers of -128..127 in eight lanes to as many bytes.
KOMPAKT_INLINE void store_bytes(std::int8_t* out, const Lanes& lanes) {
  typedef std::int8_t Bytes __attribute__((vector_size(32)));
  const LaneMask whole = __builtin_convertvector(lanes, LaneMask);
  Bytes bytes;
  __builtin_memcpy(&bytes, &whole, sizeof bytes);
  const Bytes front = __builtin_shuffle(bytes, Bytes{0, 4, 8, 12, 16, 20, 24, 28});  // a conversion would go lane by lane
  __builtin_memcpy(out, &front, 8);
}

// Pairwise, in double: the one way in which lanes are summed.
KOMPAKT_INLINE double sum_lanes(const Lanes& lanes) {
  return ((static_cast<double>(lanes[0]) + lanes[1]) + (static_cast<double>(lanes[2]) + lanes[3])) +
         ((static_cast<double>(lanes[4]) + lanes[5]) + (static_cast<double>(lanes[6]) + lanes[7]));
}

}  // namespace kompakt
