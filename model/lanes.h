// Vector registers by GCC's vector types, for kernels whose sums must have a fixed order: the compiler splits no reduction by itself.
// Multiplications and additions may fuse, so that last bits are a processor's own; core/lanes.h is for what must be the same everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
// A feature and not "arch=haswell", which asks for that very processor and leaves all others to the default.
#define KOMPAKT_LANES_CLONES __attribute__((target_clones("fma", "default")))
#else
#define KOMPAKT_LANES_CLONES
#endif
#define KOMPAKT_LANES_INLINE inline __attribute__((always_inline))

namespace kompakt {

template <class R>
struct Registers {
  typedef R Type __attribute__((vector_size(32)));
  static constexpr std::int64_t count = 32 / sizeof(R);
};

// e^x of a register for x <= 0: 2^n e^r with |r| <= ln(2)/2 (Cephes, relative error below 2e-7). Below the smallest normal
// number the result stays there, which is nothing beside the largest term of a sum. NaN stays NaN.
template <class R>
KOMPAKT_LANES_INLINE void lanes_exp(typename Registers<R>::Type& x) {
  using Register = typename Registers<R>::Type;
  if constexpr (std::is_same_v<R, float>) {
    typedef std::int32_t Integers __attribute__((vector_size(32)));
    constexpr float magic = 12582912.0f;  // adding it rounds to an integer
    Register lowest = {};
    lowest += -87.0f;
    x = x < lowest ? lowest : x;  // in this order: of a comparison with NaN, x is what is left
    const Register n = (x * 1.44269504088896341f + magic) - magic;
    const Register r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Register p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Integers exponent = (__builtin_convertvector(n, Integers) + 127) << 23;
    Register power;
    __builtin_memcpy(&power, &exponent, sizeof power);
    x = p * power;
  } else {
    for (std::int64_t i = 0; i < Registers<R>::count; ++i) x[i] = std::exp(x[i]);
  }
}

template <class R>
KOMPAKT_LANES_INLINE R lanes_sum(const typename Registers<R>::Type& x) {
  R total = 0;
  for (std::int64_t i = 0; i < Registers<R>::count; ++i) total += x[i];
  return total;
}

}  // namespace kompakt
