// Elements of tensors in memory, and rows of them as vectors of `real`.
#pragma once
#include <cstring>

#include "lanes.h"

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

using Vec = Lanes<real>;
using Int = Lanes<int32_t>;
constexpr int vectors_of(int columns) { return (columns + LANES - 1) / LANES; }

INLINE Vec read(const real* p) {
  Vec x;
  memcpy(&x, p, sizeof x);
  return x;
}
INLINE void put(real* p, Vec x) { memcpy(p, &x, sizeof x); }
INLINE Int read(const int32_t* p) {
  Int x;
  memcpy(&x, p, sizeof x);
  return x;
}
INLINE void put(int32_t* p, Int x) { memcpy(p, &x, sizeof x); }
INLINE Vec spread(real x) { return x - Vec{}; }

// The first COUNT columns of a vector in memory; the others are 0. COUNT 0 stands for all.
template <int COUNT> INLINE Vec read_part(const real* p) {
  if constexpr (COUNT == 0) return read(p);
  Vec x{};
  memcpy(&x, p, COUNT * sizeof(real));
  return x;
}

#if ELEMENT_BITS == 16
using element = uint16_t;
#ifdef ELEMENT_BFLOAT16
INLINE Lanes<float> widened(Lanes<uint32_t> x) { return (Lanes<float>)(x << 16); }
INLINE Lanes<uint32_t> narrowed(Lanes<float> x) {  // to nearest, ties to even; a NaN stays one
  Lanes<uint32_t> bits = (Lanes<uint32_t>)x;
  Lanes<uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : (bits >> 16) | 0x40;
}
#else
INLINE Lanes<float> widened(Lanes<uint32_t> x) {
  Lanes<uint32_t> magnitude = (x & 0x7fff) << 13;
  Lanes<float> scaled = (Lanes<float>)magnitude * 0x1p112f;  // subnormal numbers, too
  Lanes<uint32_t> special = magnitude | 0x7f800000;          // inf and NaN
  Lanes<uint32_t> bits = magnitude >= (0x7c00u << 13) ? special : (Lanes<uint32_t>)scaled;
  return (Lanes<float>)(bits | (x & 0x8000) << 16);
}
INLINE Lanes<uint32_t> narrowed(Lanes<float> x) {
  Lanes<uint32_t> bits = (Lanes<uint32_t>)x, sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
  Lanes<uint32_t> normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
  Lanes<uint32_t> small = (Lanes<uint32_t>)((Lanes<float>)size + 0.5f) - 0x3f000000u;  // below 2^-14: a sum rounds
  Lanes<uint32_t> large = size > 0x7f800000u ? Lanes<uint32_t>{} + 0x7e00u : Lanes<uint32_t>{} + 0x7c00u;
  Lanes<uint32_t> found = size < (113u << 23) ? small : normal;
  return sign | (size >= 0x477ff000u ? large : found);
}
#endif
INLINE real wide(element x) { return widened(Lanes<uint32_t>{} + x)[0]; }
INLINE void copy_row(const element* from, int columns, real* to) {
  int i = 0;
  for (; i + LANES <= columns; i += LANES) {
    Lanes<uint16_t> x;
    memcpy(&x, from + i, sizeof x);
    put(to + i, widened(__builtin_convertvector(x, Lanes<uint32_t>)));
  }
  for (; i < columns; i++) to[i] = wide(from[i]);
}
INLINE void put_row(const real* from, int columns, real factor, element* to) {
  for (int i = 0; i < columns; i += LANES) {
    Lanes<uint16_t> x = __builtin_convertvector(narrowed(read(from + i) * factor), Lanes<uint16_t>);
    const int count = columns - i < LANES ? columns - i : LANES;
    memcpy(to + i, &x, count * sizeof(element));
  }
}
#else
using element = real;
INLINE void copy_row(const element* from, int columns, real* to) { memcpy(to, from, columns * sizeof(real)); }
INLINE void put_row(const real* from, int columns, real factor, element* to) {
  int i = 0;
  for (; i + LANES <= columns; i += LANES) put(to + i, read(from + i) * factor);
  for (; i < columns; i++) to[i] = from[i] * factor;
}
#endif
