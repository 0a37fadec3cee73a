// Functions of numbers with a fraction, scalars or Lanes of float or double: errors of a few units in the last place.
// Polynomials are minimax fits on the ranges that are given with them. NaN stays NaN.
#pragma once
#include "numbers.h"

namespace flexjag {

// factor * (c[0] + c[1] x + c[2] x^2 + ...)
template <class V, class C, int n> INLINE V polynomial(V x, const C (&c)[n], int factor = 1) {
  using T = Element<V>;
  V y = joined<V>((T)(factor * c[n - 1]));
  UNROLL for (int i = n - 2; i >= 0; i--) y = y * x + (T)(factor * c[i]);
  return y;
}

template <class T> struct Format;  // bits of the fraction, the exponent of 1
template <> struct Format<float> {
  static constexpr int fraction = 23, bias = 127;
  static constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: x + rounder - rounder is x rounded to a whole number
  static constexpr float infinity = __builtin_inff(), nan = __builtin_nanf(""), tiny = 1.17549435e-38f;
};
template <> struct Format<double> {
  static constexpr int fraction = 52, bias = 1023;
  static constexpr double rounder = 6755399441055744.0;
  static constexpr double infinity = __builtin_inf(), nan = __builtin_nan(""), tiny = 2.2250738585072014e-308;
};

// 2^(n - 1) from n + rounder, where n is whole and 2^(n - 1) a normal number.
template <class V> INLINE V half_power(V n_rounded) {
  using T = Element<V>;
  using U = Like<V, Unsigned<T>>;
  return bits<V>((bits<U>(n_rounded) << Format<T>::fraction) +
                 ((Unsigned<T>)(Format<T>::bias - 1) << Format<T>::fraction));
}

// 2^x; 0 where that is less than 2^-125 (float) or 2^-1021 (double).
template <class V> INLINE V exp2(V x) {
  using T = Element<V>;
  constexpr bool is_float = sizeof(T) == 4;
  // (2^f - 1) / f for |f| <= 1/2
  constexpr float short_[] = {0.69314697757071735f, 0.24022242066956655f, 0.055507337840684399f,
                              0.0096715134843959579f, 0.0013264714925253491f};
  constexpr double long_[] = {0.69314718055994532581, 0.24022650695910131276, 0.055504108664820082741,
                              0.0096181291075941150384, 0.0013333558146774717063, 0.00015403530457117510823,
                              0.000015252733493047293797, 1.3215435279934951581e-6, 1.0178199601565235495e-7,
                              7.0737836144846418427e-9, 4.4347672341730535168e-10};
  V t = smaller(joined<V>(is_float ? (T)128.4 : (T)1024.4), x);
  V n = t + Format<T>::rounder;
  V f = t - (n - Format<T>::rounder);
  V y;
  if constexpr (is_float) y = polynomial(f, short_, 2); else y = polynomial(f, long_, 2);
  return where(lt(x, is_float ? (T)-125 : (T)-1021), V{}, (y * f + (T)2) * half_power(n));
}

constexpr double LOG2_E = 1.4426950408889634074;
// ln 2 in two parts, of which the first times a whole number below 2^13 (float) or 2^20 (double) is exact
template <class T> constexpr T LN_2_HIGH = sizeof(T) == 4 ? (T)0.693359375 : (T)6.93147180369123816490e-01;
template <class T> constexpr T LN_2_LOW = sizeof(T) == 4 ? (T)-2.12194440054690583e-4 : (T)1.90821492927058770002e-10;

// For exp and expm1: n + rounder with n = x / ln 2 rounded, f = x - n ln 2, and factor * (e^f - 1) / f.
template <class V> struct Powers { V n, f, slope; };
template <class V> INLINE Powers<V> powers(V x, int factor) {
  using T = Element<V>;
  constexpr float short_[] = {1.0f, 0.50000000134658092f, 0.16666505195758111f, 0.041666464925285905f,
                              0.0083691556676973968f, 0.0013933649996309250f};
  constexpr double long_[] = {1.0, 0.49999999999999999998, 0.1666666666666668082, 0.041666666666666676774,
                              0.0083333333333195896163, 0.0013888888888879073994, 0.00019841269890076402829,
                              0.000024801587336442237861, 2.7557240887229868596e-6, 2.7557263279088496905e-7,
                              2.5110049204818659793e-8, 2.0918137737642736429e-9};
  Powers<V> made;
  made.n = x * (T)LOG2_E + Format<T>::rounder;
  V n = made.n - Format<T>::rounder;
  made.f = (x - n * LN_2_HIGH<T>) - n * LN_2_LOW<T>;
  if constexpr (sizeof(T) == 4) {
    made.slope = polynomial(made.f, short_, factor);
  } else {
    made.slope = polynomial(made.f, long_, factor);
  }
  return made;
}

// e^x; 0 where that is less than 2^-125 (float) or 2^-1021 (double).
template <class V> INLINE V exp(V x) {
  using T = Element<V>;
  constexpr T least = sizeof(T) == 4 ? (T)-86.643 : (T)-707.7, most = sizeof(T) == 4 ? (T)89 : (T)710;
  Powers<V> at = powers(smaller(joined<V>(most), x), 2);
  return where(lt(x, least), V{}, (at.slope * at.f + (T)2) * half_power(at.n));
}

template <class V> INLINE V sigmoid(V x) { return (Element<V>)1 / ((Element<V>)1 + exp(-x)); }

template <class V> INLINE V with_sign(V size, V sign) {
  using U = Like<V, Unsigned<Element<V>>>;
  return bits<V>(bits<U>(size) | (bits<U>(sign) ^ bits<U>(abs(sign))));
}

template <class V> INLINE V tanh(V x) {
  using T = Element<V>;
  Powers<V> at = powers(larger(joined<V>((T)-40), abs(x) * (T)-2), 1);
  V power = half_power(at.n) * (T)2;
  V y = at.slope * at.f * power + (power - (T)1);  // e^(-2|x|) - 1
  return with_sign(-y / (y + (T)2), x);
}

// log2(x) if is_binary, else log(x).
template <bool is_binary, class V> INLINE V logarithm(V x) {
  using T = Element<V>;
  using I = Like<V, Signed<T>>;
  using F = Format<T>;
  // (2 atanh(s) - 2 s) / s^3 as a function of s^2, for s = f / (2 + f) and 1 + f from sqrt(1/2) to sqrt(2)
  constexpr float short_[] = {0.6666666655404201243f, 0.40000122211810649396f, 0.28550778633191965434f,
                              0.23331614471843499235f};
  constexpr double long_[] = {0.66666666666666697077, 0.39999999999898890514, 0.28571428626253837606,
                              0.22222211089379496214, 0.18182892432536871201, 0.15331611722055007885,
                              0.14617807153417324964};
  constexpr T up = sizeof(T) == 4 ? (T)33554432 : (T)18014398509481984;  // 2^25, 2^54
  auto is_small = lt(x, F::tiny);
  I raw = bits<I>(where(is_small, x * up, x));
  I exponent = (raw - bits<Signed<T>>((T)0.70710678118654752440)) >> F::fraction;
  V f = bits<V>(raw - exponent * ((Signed<T>)1 << F::fraction)) - (T)1;
  V e = bits<V>(exponent + bits<Signed<T>>(F::rounder)) - F::rounder;  // the exponent as a float
  e = e - where(is_small, joined<V>((T)(sizeof(T) == 4 ? 25 : 54)), V{});
  V s = f / (f + (T)2), square = f * f * (T)0.5, rest;
  if constexpr (sizeof(T) == 4) rest = polynomial(s * s, short_); else rest = polynomial(s * s, long_);
  rest = s * (square + s * s * rest);
  V y;
  if constexpr (is_binary) {
    y = e + (f - (square - rest)) * (T)LOG2_E;
  } else {
    y = e * LN_2_HIGH<T> - ((square - (rest + e * LN_2_LOW<T>)) - f);
  }
  y = where(lt(x, F::infinity), y, x);
  return where(gt(x, (T)0), y, where(eq(x, (T)0), joined<V>(-F::infinity), joined<V>(F::nan)));
}
template <class V> INLINE V log(V x) { return logarithm<false>(x); }
template <class V> INLINE V log2(V x) { return logarithm<true>(x); }

INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
INLINE double sqrt(double x) { return __builtin_sqrt(x); }
template <class V, int... i> INLINE V root(V x, std::integer_sequence<int, i...>) { return V{sqrt(x[i])...}; }
template <class V> INLINE typename std::enable_if<varies<V>, V>::type sqrt(V x) { return root(x, Places()); }
template <class V> INLINE V rsqrt(V x) { return (Element<V>)1 / sqrt(x); }

// cos(x) if is_cosine, else sin(x); of numbers beyond a million lane by lane.
template <bool is_cosine, class V> INLINE V wave(V x) {
  using T = Element<V>;
  using D = Like<V, double>;
  constexpr double sines[] = {-0.16666666666666666665, 0.0083333333333333314699, -0.00019841269841265017028,
                              2.7557319221930198704e-6, -2.5052106219521894233e-8, 1.6058529572267876353e-10,
                              -7.5865765881710724626e-13};
  constexpr double cosines[] = {0.041666666666666666666, -0.0013888888888888887853, 0.000024801587301584619787,
                                -2.7557319221382115583e-7, 2.087675578389403842e-9, -1.1470459749675606144e-11,
                                4.745804889760674174e-14};
  constexpr float short_sines[] = {-0.16666666663832764f, 0.0083333318659594140f, -0.00019840082012765537f,
                                   2.7249314054698805e-6f};
  constexpr float short_cosines[] = {0.041666666664302406f, -0.0013888887664713620f, 0.000024800596435621997f,
                                     -2.7300448619488355e-7f};
  if (any(both(gt(abs(x), (T)1e6), lt(abs(x), Format<T>::infinity)))) {
    if constexpr (varies<V>) {
      V y;
      for (int i = 0; i < LANES; i++) y[i] = (T)(is_cosine ? __builtin_cos(x[i]) : __builtin_sin(x[i]));
      return y;
    } else {
      return (T)(is_cosine ? __builtin_cos(x) : __builtin_sin(x));
    }
  }
  D wide = cast<double>(x);
  D n = wide * 0.63661977236758134308 + Format<double>::rounder;  // quarters of a turn, rounded
  D k = n - Format<double>::rounder;
  D left = wide - k * 1.57079632673412561417e+00;  // pi / 2 in parts of 33 bits, whose products with k are exact
  left = left - k * 6.07710050630396597660e-11;
  left = (left - k * 2.02226624871116645580e-21) - k * 8.47842766036889956997e-32;
  auto quarter = cast<int32_t>(bits<Like<V, int64_t>>(n)) + (int32_t)is_cosine;
  V r = cast<T>(left), z = r * r, s, c;
  if constexpr (sizeof(T) == 4) {
    s = polynomial(z, short_sines);
    c = polynomial(z, short_cosines);
  } else {
    s = polynomial(z, sines);
    c = polynomial(z, cosines);
  }
  s = r + r * z * s;
  c = (T)1 - (z * (T)0.5 - z * z * c);
  V y = where(ne(quarter & (int32_t)1, (int32_t)0), c, s);
  return where(ne(quarter & (int32_t)2, (int32_t)0), -y, y);
}
template <class V> INLINE V sin(V x) { return wave<false>(x); }
template <class V> INLINE V cos(V x) { return wave<true>(x); }

template <class V> INLINE V erf(V x) {
  using T = Element<V>;
  // erf(x) / x - 1 of x^2 for |x| <= 1, and log(erfc(1 + t)) for t >= 0 as far as erf is not 1
  constexpr float short_near[] = {0.12837916584835095f, -0.37612626666720331f, 0.11283594715160218f,
                                  -0.026854212010626412f, 0.0051890874234339740f, -0.00080168642871658695f,
                                  0.000078758750626854883f};
  constexpr double near[] = {0.12837916709551257377, -0.37612638903183748056, 0.11283791670954878666,
                             -0.026866170645076793248, 0.0052239776248180144673, -0.00085483269808337899052,
                             0.00012055331111642710923, -0.000014925595266831181565, 1.6461000484121368033e-6,
                             -1.6350312701054695011e-7, 1.4659775274047435814e-8, -1.137284885679167367e-9,
                             5.9571761477489114044e-11};
  constexpr float short_far[] = {-1.8496055165374043f, -2.6389668150387362f, -0.84311833100194880f,
                                 -0.041500729710024238f, 0.0098909646421178141f, -0.0018262085133657651f,
                                 0.00018558291832830410f};
  constexpr double far[] = {-1.8496055099332482944, -2.6389675142347744546, -0.8431072563594813532,
                            -0.041561098023717746632, 0.010033825165352082136, -0.0019779011337649904015,
                            0.00023731612079156469671, 0.000026297142523607145711, -0.000027200463609354113591,
                            9.6733401809792398766e-6, -2.1338270890767234343e-6, 2.0614285457537521734e-7,
                            5.7325715299941873477e-8, -3.3136631721378359332e-8, 8.4526334068383045965e-9,
                            -1.3077217902786833467e-9, 1.1816267164306731985e-10, -4.8116654465170869624e-12};
  V size = abs(x), square = x * x, inner, outer;
  V t = smaller(joined<V>(sizeof(T) == 4 ? (T)3 : (T)4.9), size - (T)1);
  if constexpr (sizeof(T) == 4) {
    inner = polynomial(square, short_near);
    outer = polynomial(t, short_far);
  } else {
    inner = polynomial(square, near);
    outer = polynomial(t, far);
  }
  return where(lt(size, (T)1), x + x * inner, with_sign((T)1 - exp(outer), x));
}

}  // namespace flexjag
