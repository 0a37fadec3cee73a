// Rows of a kernel's queries, and lookups of tensors by them: load, add_at, bucketize.
#pragma once
#include "numbers.h"

namespace flexjag {

// The query rows of a vector: first, first + 1, ... if `run`; else the lanes after the last valid row repeat it.
struct Rows {
  int32_t first;
  bool run;
  Lanes<int32_t> index;
};

// ---- numbers in memory ----

struct float16 { uint16_t bits; };
struct bfloat16 { uint16_t bits; };

// What a T is in memory, to be read as a whole vector.
template <class T> struct InMemory { using type = T; };
template <> struct InMemory<bool> { using type = uint8_t; };
template <> struct InMemory<float16> { using type = uint16_t; };
template <> struct InMemory<bfloat16> { using type = uint16_t; };
template <class T> using Memory = typename InMemory<T>::type;
template <class T> constexpr bool is_half = std::is_same<T, float16>::value || std::is_same<T, bfloat16>::value;

// A half-precision number, given by its bits, as float.
template <class T, class V> INLINE Like<V, float> widened(V raw) {
  using F = Like<V, float>;
  using U = Like<V, uint32_t>;
  U x = cast<uint32_t>(raw);
  if constexpr (std::is_same<T, bfloat16>::value) {
    return bits<F>(x << 16);
  } else {
    U size = (x & 0x7fffu) << 13, sign = (x & 0x8000u) << 16;
    U small = bits<U>(bits<F>(size) * 5.192296858534828e33f);  // times 2^112, which normalizes
    return bits<F>(where(ge(size, 0x0f800000u), size | 0x7f800000u, small) | sign);
  }
}

// The bits of a float rounded to the nearest half-precision number, to the even one in a tie.
template <class T, class V> INLINE Like<V, uint16_t> narrowed(V x) {
  using U = Like<V, uint32_t>;
  U raw = bits<U>(x), sign = raw & 0x80000000u, size = raw ^ sign;
  if constexpr (std::is_same<T, bfloat16>::value) {
    U rounded = (raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16;
    return cast<uint16_t>(where(gt(size, 0x7f800000u), 0x7fc0u, rounded));
  } else {
    U normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
    U small = bits<U>(bits<V>(size) + 0.5f) - 0x3f000000u;  // the sum rounds at 2^-24
    U large = where(gt(size, 0x7f800000u), joined<U>(0x7e00u), joined<U>(0x7c00u));
    U found = where(ge(size, 0x47800000u), large, where(lt(size, 0x38800000u), small, normal));
    return cast<uint16_t>(found | (sign >> 16));
  }
}

// x rounded to half precision, as float.
template <class T, class V> INLINE Like<V, float> rounded(V x) {
  return widened<T>(narrowed<T>(cast<float>(x)));
}

// A number read as Memory<T>, for computing: bools as conditions, half precision as float.
template <class T, class V> INLINE auto value_of(V raw) {
  if constexpr (std::is_same<T, bool>::value) {
    return ne(raw, (uint8_t)0);
  } else if constexpr (is_half<T>) {
    return widened<T>(raw);
  } else {
    return raw;
  }
}

// LANES numbers from any address.
template <class T> INLINE Lanes<T> read_lanes(const T* from) { return *(const typename VectorOf<T>::anywhere*)from; }
template <class T> INLINE void write_lanes(T* to, Lanes<T> x) { *(typename VectorOf<T>::anywhere*)to = x; }

// LANES numbers of a row of float, double, float16 or bfloat16 as real; with `count`, the first ones, then zeros.
template <class T> INLINE Lanes<real> load_row(const T* from) {
  return cast<real>(value_of<T>(read_lanes((const Memory<T>*)from)));
}
template <class T> INLINE Lanes<real> load_row(const T* from, int count) {
  if (count >= LANES) return load_row(from);
  Memory<T> buffer[LANES] = {};
  for (int i = 0; i < count; i++) buffer[i] = ((const Memory<T>*)from)[i];
  return load_row((const T*)buffer);
}

// Write LANES numbers, or the first `count` ones, to a row of float, double, float16 or bfloat16.
template <class T> INLINE void store_row(T* to, Lanes<real> x) {
  if constexpr (is_half<T>) {
    write_lanes((uint16_t*)to, narrowed<T>(cast<float>(x)));
  } else {
    write_lanes(to, cast<T>(x));
  }
}
template <class T> INLINE void store_row(T* to, Lanes<real> x, int count) {
  if (count >= LANES) return store_row(to, x);
  T buffer[LANES];
  store_row(buffer, x);
  for (int i = 0; i < count; i++) to[i] = buffer[i];
}

// ---- places: the sum of each index times its stride ----

struct None {};  // no index varies

// A uniform offset, and one varying index with its stride.
template <class Index> struct Spot {
  int64_t base;
  Index index;
  int64_t stride;
};
INLINE Lanes<int32_t> lanes_of(const Rows& rows) { return rows.index; }
template <class V> INLINE auto lanes_of(V index) {
  return cast<typename std::conditional<sizeof(Element<V>) == 8, int64_t, int32_t>::type>(index);
}
template <class Index> constexpr bool is_uniform = !varies<Index> && !std::is_same<Index, Rows>::value;

INLINE Spot<None> spot() { return {0, {}, 0}; }
template <class Index, class... Others>
INLINE auto spot(const Index& index, int64_t stride, const Others&... others) {
  auto rest = spot(others...);
  if constexpr (is_uniform<Index>) {
    rest.base += (int64_t)index * stride;
    return rest;
  } else if constexpr (std::is_same<decltype(rest), Spot<None>>::value) {
    if constexpr (std::is_same<Index, Rows>::value) {
      return Spot<Rows>{rest.base, index, stride};
    } else {
      auto lanes = lanes_of(index);
      return Spot<decltype(lanes)>{rest.base, lanes, stride};
    }
  } else {
    auto total = cast<int64_t>(lanes_of(index)) * stride + cast<int64_t>(lanes_of(rest.index)) * rest.stride;
    return Spot<decltype(total)>{rest.base, total, 1};
  }
}

enum class Pattern { scattered, same, forwards, backwards };

// How the entries at a spot lie in memory, and the place of lane 0.
template <class Index> INLINE Pattern pattern(const Spot<Index>& at, int64_t& first) {
  if constexpr (std::is_same<Index, Rows>::value) {
    first = at.base + at.index.first * at.stride;
    return at.index.run && at.stride == 1 ? Pattern::forwards : Pattern::scattered;
  } else {
    using T = Element<Index>;
    T start = at.index[0], step = (T)((Unsigned<T>)at.index[1] - (Unsigned<T>)start);
    first = at.base + (int64_t)start * at.stride;
    if (step != 0 && (at.stride != 1 || (step != 1 && step != -1))) return Pattern::scattered;
    if (any(ne(at.index, add(start, mul(step, iota<T>()))))) return Pattern::scattered;
    return step == 0 ? Pattern::same : step == 1 ? Pattern::forwards : Pattern::backwards;
  }
}

template <class M, class Index, int... i>
INLINE Lanes<M> gathered(const M* from, Index index, int64_t stride, std::integer_sequence<int, i...>) {
  return Lanes<M>{from[(int64_t)index[i] * stride]...};
}

// The entry of a tensor of T at (index, stride, index, stride, ...): a scalar if all indices are.
template <class T, class... Indices> INLINE auto load(const void* tensor, const Indices&... indices) {
  const auto at = spot(indices...);
  auto from = (const Memory<T>*)tensor;
  if constexpr (std::is_same<decltype(at), const Spot<None>>::value) {
    return value_of<T>(from[at.base]);
  } else {
    int64_t first;
    Lanes<Memory<T>> raw;
    Pattern found = pattern(at, first);
    if (found == Pattern::forwards) {
      raw = read_lanes(from + first);
    } else if (found == Pattern::same) {
      raw = spread<Memory<T>>(from[first]);
    } else if (found == Pattern::backwards) {
      raw = reversed(read_lanes(from + first - (LANES - 1)));
    } else {
      raw = gathered(from + at.base, lanes_of(at.index), at.stride, Places());
    }
    return value_of<T>(raw);
  }
}

// Add each lane to the total at its place. Lanes at one place are added in their order.
template <class V, class... Indices> INLINE void add_at(double* totals, V x, const Indices&... indices) {
  const auto at = spot(indices...);
  Lanes<double> wide = cast<double>(spread<Element<V>>(x));
  if constexpr (std::is_same<decltype(at), const Spot<None>>::value) {
    totals[at.base] += sum(wide);
  } else {
    int64_t first;
    Pattern found = pattern(at, first);
    if (found == Pattern::forwards) {
      write_lanes(totals + first, read_lanes(totals + first) + wide);
    } else if (found == Pattern::same) {
      totals[first] += sum(wide);
    } else if (found == Pattern::backwards) {
      double* to = totals + first - (LANES - 1);
      write_lanes(to, read_lanes(to) + reversed(wide));
    } else {
      const auto lanes = lanes_of(at.index);
      for (int i = 0; i < LANES; i++) totals[at.base + (int64_t)lanes[i] * at.stride] += wide[i];
    }
  }
}

// ---- bucketize ----

// How many of `count` boundaries of T, ascending, are at most x; all of them for NaN.
template <class T, class V> INLINE Like<V, int32_t> bucketize(const void* boundaries, V x, int64_t count) {
  auto from = (const Memory<T>*)boundaries;
  if constexpr (!varies<V>) {
    int64_t found = 0;
    while (count > 0) {  // the boundaries before `found` are at most x, those from found + count on are larger
      int64_t half = count / 2;
      bool below = !(value_of<T>(from[found + half]) > x);
      found = below ? found + half + 1 : found;
      count = below ? count - half - 1 : half;
    }
    return (int32_t)found;
  } else {  // lanes close together share most of the search
    int32_t low = bucketize<T>(boundaries, smallest(x), count), high = bucketize<T>(boundaries, largest(x), count);
    Lanes<int32_t> found = spread<int32_t>(low);
    if (high - low <= 64 && !any(ne(x, x))) {
      for (int32_t i = low; i < high; i++) found -= le(value_of<T>(from[i]), x);
    } else {
      for (int i = 0; i < LANES; i++) found[i] = bucketize<T>(boundaries, (Element<V>)x[i], count);
    }
    return found;
  }
}

}  // namespace flexjag
