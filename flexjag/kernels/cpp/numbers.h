// Numbers of a kernel: scalars, which all queries of a vector share, and Lanes, which hold one for each query.
//
// The unit that includes this file defines LANES, a power of two, and the type `real`, float or double. A function
// here takes scalars and Lanes, in any mixture with equal element types. A condition is a bool or Lanes<int32_t> of
// 0 and -1, whatever was compared. Only the vector extensions of GCC and Clang are used: no instruction set is named.
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>

namespace flexjag {

#pragma GCC diagnostic ignored "-Wpsabi"  // all that passes vectors is inlined

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

template <class T> struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * LANES)));
  typedef T anywhere __attribute__((vector_size(sizeof(T) * LANES), aligned(alignof(T)), may_alias));
};
template <class T> using Lanes = typename VectorOf<T>::type;

template <class V> struct Kind {
  using Element = V;
  static constexpr bool varies = false;
};
#define KIND(T)                             \
  template <> struct Kind<Lanes<T>> {       \
    using Element = T;                      \
    static constexpr bool varies = true;    \
  };
KIND(uint8_t) KIND(uint16_t) KIND(uint32_t) KIND(uint64_t)
KIND(int8_t) KIND(int16_t) KIND(int32_t) KIND(int64_t) KIND(float) KIND(double)
#undef KIND

template <class V> using Element = typename Kind<V>::Element;
template <class... V> constexpr bool varies = (Kind<V>::varies || ...);
// Lanes of T if V is Lanes, else T.
template <class V, class T> using Like = typename std::conditional<varies<V>, VectorOf<T>, std::enable_if<true, T>>::type::type;
template <class A, class B> using Joint = Like<typename std::conditional<varies<A>, A, B>::type, Element<A>>;
template <int size> using SignedOfSize = typename std::conditional<
    size == 1, int8_t, typename std::conditional<size == 2, int16_t,
    typename std::conditional<size == 4, int32_t, int64_t>::type>::type>::type;
template <class T> using Signed = SignedOfSize<sizeof(T)>;
template <class T> using Unsigned = typename std::make_unsigned<Signed<T>>::type;

// The bits of x as another type of the same size.
template <class To, class From> INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bits");
  if constexpr (varies<To>) {
    return (To)x;
  } else {
    To y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
  }
}

// ---- one number in all lanes, and conversions ----

// x in all lanes; spread<bool> makes a condition of lanes.
template <class T, class V> INLINE auto spread(V x) {
  if constexpr (varies<V>) {
    return x;
  } else if constexpr (std::is_same<T, bool>::value) {
    return Lanes<int32_t>{} - (int32_t)x;
  } else if constexpr (std::is_floating_point<T>::value) {
    return (T)x - Lanes<T>{};
  } else {
    return (T)x + Lanes<T>{};
  }
}
template <class J, class V> INLINE J joined(V x) {
  if constexpr (varies<J>) {
    return spread<Element<J>>(x);
  } else {
    return (J)x;
  }
}

// 0, 1, 2, ...
template <class T> INLINE Lanes<T> iota() {
  Lanes<T> x;
  UNROLL for (int i = 0; i < LANES; i++) x[i] = (T)i;
  return x;
}

// x as T: numbers with a fraction are cut towards zero, whole ones keep their low bits. x is no condition.
template <class T, class V> INLINE Like<V, T> cast(V x) {
  using From = Element<V>;
  if constexpr (std::is_same<T, From>::value) {
    return x;
  } else if constexpr (std::is_floating_point<From>::value && !std::is_floating_point<T>::value && sizeof(T) < 4) {
    return cast<T>(cast<typename std::conditional<std::is_signed<T>::value, int32_t, int64_t>::type>(x));
  } else if constexpr (varies<V>) {
    return __builtin_convertvector(x, Lanes<T>);
  } else {
    return (T)x;
  }
}

// A condition with lanes as wide as T's.
template <class T> INLINE Lanes<Signed<T>> condition(Lanes<int32_t> c) { return cast<Signed<T>>(c); }

template <class C, class A, class B> INLINE auto where(C c, A a, B b) {
  if constexpr (std::is_same<A, bool>::value && std::is_same<B, bool>::value && !varies<C>) {
    return c ? a : b;
  } else if constexpr (std::is_same<A, bool>::value || std::is_same<B, bool>::value) {
    return where(c, spread<bool>(a), spread<bool>(b));
  } else {
    using T = Element<A>;
    static_assert(std::is_same<T, Element<B>>::value, "both of one type");
    if constexpr (varies<C>) {
      return condition<T>(c) ? spread<T>(a) : spread<T>(b);
    } else {
      using J = Joint<A, B>;
      return c ? joined<J>(a) : joined<J>(b);
    }
  }
}

// ---- conditions, and bits of whole numbers ----

#define LOGICAL(name, operation)                                                                     \
  template <class A, class B> INLINE auto name(A a, B b) {                                            \
    if constexpr (varies<A, B> && (std::is_same<A, bool>::value || std::is_same<B, bool>::value)) {   \
      return spread<bool>(a) operation spread<bool>(b);                                               \
    } else if constexpr (std::is_same<A, bool>::value) {                                              \
      return (bool)((int)a operation (int)b);                                                         \
    } else {                                                                                          \
      using J = Joint<A, B>;                                                                          \
      return (J)(joined<J>(a) operation joined<J>(b));                                                \
    }                                                                                                 \
  }
LOGICAL(both, &)
LOGICAL(either, |)
LOGICAL(differ, ^)
#undef LOGICAL
INLINE bool opposite(bool c) { return !c; }
INLINE Lanes<int32_t> opposite(Lanes<int32_t> c) { return ~c; }

#define COMPARISON(name, operation)                                                 \
  template <class A, class B> INLINE auto name(A a, B b) {                           \
    static_assert(std::is_same<Element<A>, Element<B>>::value, "both of one type");  \
    if constexpr (varies<A, B>) {                                                    \
      using J = Joint<A, B>;                                                         \
      return cast<int32_t>((Lanes<Signed<Element<A>>>)(joined<J>(a) operation joined<J>(b))); \
    } else {                                                                         \
      return a operation b;                                                          \
    }                                                                                \
  }
COMPARISON(eq, ==)
COMPARISON(ne, !=)
COMPARISON(lt, <)
COMPARISON(le, <=)
COMPARISON(gt, >)
COMPARISON(ge, >=)
#undef COMPARISON

// ---- lanes together ----

template <class V, int... from> INLINE V shuffled(V x, std::integer_sequence<int, from...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, x, from...);
#else
  return __builtin_shuffle(x, Lanes<Signed<Element<V>>>{from...});
#endif
}
template <int by, class V, int... i> INLINE V rotated(V x, std::integer_sequence<int, i...>) {
  return shuffled(x, std::integer_sequence<int, (i + by) % LANES...>());
}
template <class V, int... i> INLINE V reversed(V x, std::integer_sequence<int, i...>) {
  return shuffled(x, std::integer_sequence<int, (LANES - 1 - i)...>());
}
using Places = std::make_integer_sequence<int, LANES>;
template <class V> INLINE V reversed(V x) { return reversed(x, Places()); }

// Fold x upon itself until the first `left` lanes hold the result.
template <int by, int left, class V, class F> INLINE V folded(V x, F f) {
  if constexpr (by >= left) {
    return folded<by / 2, left>(f(x, rotated<by>(x, Places())), f);
  } else {
    return x;
  }
}
// The sum of the lanes, in a fixed order.
template <class V> INLINE Element<V> sum(V x) {
  return folded<LANES / 2, 1>(x, [](V a, V b) __attribute__((always_inline)) { return a + b; })[0];
}
// The larger and the smaller number: one instruction. b where either is NaN.
template <class V> INLINE V larger(V a, V b) { return a > b ? a : b; }
template <class V> INLINE V smaller(V a, V b) { return a < b ? a : b; }
// The largest and the smallest lane; unspecified if one is NaN.
template <class V> INLINE Element<V> largest(V x) {
  return folded<LANES / 2, 1>(x, [](V a, V b) __attribute__((always_inline)) { return larger(a, b); })[0];
}
template <class V> INLINE Element<V> smallest(V x) {
  return folded<LANES / 2, 1>(x, [](V a, V b) __attribute__((always_inline)) { return smaller(a, b); })[0];
}

INLINE bool any(bool c) { return c; }
// Whether a bit is set, for registers that the CPU tests by one instruction.
#if defined(__AVX512F__) && !defined(__clang__)
constexpr bool tests(int bytes) { return bytes == 64 || bytes == 32; }
#elif defined(__AVX__)
constexpr bool tests(int bytes) { return bytes == 32; }
#else
constexpr bool tests(int) { return false; }
#endif
template <class C> INLINE bool has_bits([[maybe_unused]] C c) {
#if defined(__AVX512F__) && !defined(__clang__)
  typedef int Numbers __attribute__((vector_size(64)));
  if constexpr (sizeof(C) == 64) return __builtin_ia32_ptestmd512((Numbers)c, (Numbers)c, (unsigned short)0xffff) != 0;
#endif
#if defined(__AVX__)
  typedef long long Quarters __attribute__((vector_size(32)));
  if constexpr (sizeof(C) == 32) return !__builtin_ia32_ptestz256((Quarters)c, (Quarters)c);
#endif
  return true;
}
INLINE bool any(Lanes<int32_t> c) {
  if (tests(sizeof c)) return has_bits(c);
  c = folded<LANES / 2, 4>(c, [](auto a, auto b) __attribute__((always_inline)) { return a | b; });
  typedef int64_t Words __attribute__((vector_size(sizeof c)));
  return (((Words)c)[0] | ((Words)c)[1]) != 0;
}
template <class C> INLINE bool all(C c) { return !any(opposite(c)); }

// ---- arithmetic ----

// Whole numbers wrap around, as torch's do.
#define WRAPPING(name, operation)                                                              \
  template <class A, class B> INLINE Joint<A, B> name(A a, B b) {                               \
    static_assert(std::is_same<Element<A>, Element<B>>::value, "both of one type");             \
    using J = Joint<A, B>;                                                                      \
    using U = Like<J, typename std::conditional<varies<J>, Unsigned<Element<J>>, uint64_t>::type>; \
    return (J)((U)joined<J>(a) operation (U)joined<J>(b));                                      \
  }
WRAPPING(add, +)
WRAPPING(sub, -)
WRAPPING(mul, *)
#undef WRAPPING
template <class V> INLINE V shifted_right(V x, Element<V> by) { return (V)(x >> by); }
template <class V> INLINE V neg(V x) { return sub(V{}, x); }

template <class V> INLINE V abs(V x) {
  using T = Element<V>;
  if constexpr (std::is_floating_point<T>::value) {
    using U = Like<V, Unsigned<T>>;
    return bits<V>(bits<U>(x) & (Unsigned<T>)((Unsigned<T>)-1 >> 1));
  } else {
    return where(lt(x, (T)0), neg(x), x);
  }
}
// The smaller and the larger number, NaN if either is.
template <class A, class B> INLINE Joint<A, B> minimum(A a, B b) {
  return where(either(lt(a, b), ne(a, a)), a, b);
}
template <class A, class B> INLINE Joint<A, B> maximum(A a, B b) {
  return where(either(gt(a, b), ne(a, a)), a, b);
}

// The gradient by an argument, from the one by the result and a slope that may be no number where that is 0.
template <class V, class S> INLINE Joint<V, S> by_chain(V gradient, S slope) {
  return where(ne(gradient, (Element<V>)0), gradient * slope, V{});
}

// x rounded down and up, of numbers with a fraction.
template <class V> INLINE V floor(V x) {
  using T = Element<V>;
  constexpr T whole = sizeof(T) == 4 ? (T)8388608 : (T)4503599627370496;  // from here on, all numbers are whole
  using U = Like<V, Unsigned<T>>;
  U sign = bits<U>(x) ^ bits<U>(abs(x));
  V nearest = bits<V>(bits<U>((abs(x) + whole) - whole) | sign);
  return where(lt(abs(x), whole), nearest - where(gt(nearest, x), joined<V>((T)1), V{}), x);
}
template <class V> INLINE V ceil(V x) { return -floor(-x); }

// a / b of whole numbers, rounded down; unspecified where b is 0.
template <class A, class B> INLINE Joint<A, B> floor_divide(A a, B b) {
  using J = Joint<A, B>;
  using T = Element<J>;
  static_assert(std::is_same<Element<A>, Element<B>>::value, "both of one type");
  if constexpr (!varies<J>) {
    if (b == (T)0) return (T)0;
    if (std::is_signed<T>::value && b == (T)-1) return neg(a);  // the only quotient that overflows
    T quotient = (T)(a / b), rest = (T)(a % b);
    return (T)(quotient - (T)(rest != 0 && (rest < 0) != (b < 0)));
  } else if constexpr (sizeof(T) <= 4) {  // exact: quotients of 32-bit numbers that are not whole are 2^-32 from one
    return cast<T>(cast<int64_t>(floor(cast<double>(joined<J>(a)) / cast<double>(joined<J>(b)))));
  } else {
    J x = joined<J>(a), y = joined<J>(b), z;
    for (int i = 0; i < LANES; i++) z[i] = floor_divide((T)x[i], (T)y[i]);
    return z;
  }
}

}  // namespace flexjag
