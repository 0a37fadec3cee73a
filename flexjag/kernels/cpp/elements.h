// Rows of tensors in memory as vectors of `real`.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

// Bytes of the widest registers of numbers, and at least 32. Clang's alignment is 16 for every CPU.
#if __BIGGEST_ALIGNMENT__ >= 64 || defined(__AVX512F__)
#define WIDEST 64
#else
#define WIDEST 32
#endif
// Lanes of a vector: as many numbers of `real` as those registers hold.
#define LANES (WIDEST / (int)sizeof(real))
// The CPU multiplies pairs of bfloat16 and adds the products to float32, at twice the rate of float32.
#if defined(ELEMENT_IS_BFLOAT16) && defined(__AVX512BF16__) && WIDEST == 64
#define MULTIPLIES_PAIRS
#include <immintrin.h>
#endif
#include "lanes.h"
#include "math.h"

namespace flexjag {

// Ends a function that is not inlined and writes vectors. GCC 12 (its passes modref and pure-const) takes some of them
// for functions without effects, and drops their calls.
#define HAS_EFFECTS asm volatile("" ::: "memory")
#define ROLLED _Pragma("GCC unroll 1")
#define INLINE_MEMBER inline __attribute__((always_inline))

using Vec = Lanes<real>;
using Int = Lanes<int32_t>;
constexpr int vectors_of(int columns) { return (columns + LANES - 1) / LANES; }
constexpr bool IS_HALF = is_half<element>;  // of 16 bits: computed as float

INLINE Vec read(const real* p) { return read_lanes(p); }
INLINE Int read(const int32_t* p) { return read_lanes(p); }
INLINE void put(real* p, Vec x) { write_lanes(p, x); }
INLINE void put(int32_t* p, Int x) { write_lanes(p, x); }
INLINE Vec all_lanes(real x) { return spread<real>(x); }

#ifdef MULTIPLIES_PAIRS
// sum plus both products of each lane's pair of bfloat16, whose bits a float holds in `b`.
INLINE Vec add_pairs(Vec sum, Int a, Vec b) { return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
#endif

// The first COUNT columns of a vector in memory; the others are 0. COUNT 0 stands for all.
template <int COUNT> INLINE Vec read_part(const real* p) {
  if constexpr (COUNT == 0) return read(p);
  Vec x{};
  std::memcpy(&x, p, COUNT * sizeof(real));
  return x;
}

// Copy a row to `real`, with zeros up to a whole vector.
INLINE void copy_row(const element* from, int columns, real* to) {
  for (int i = 0; i < columns; i += LANES) put(to + i, load_row(from + i, columns - i));
}
// Write factor times a row of `real`.
INLINE void put_row(const real* from, int columns, real factor, element* to) {
  for (int i = 0; i < columns; i += LANES) store_row(to + i, read(from + i) * factor, columns - i);
}

}  // namespace flexjag
