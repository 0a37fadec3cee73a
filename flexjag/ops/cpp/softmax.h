// Softmax over the rows of each segment, and its gradient. Columns, or columns of several rows, are the lanes.
#pragma once
#include <numeric>

#include "kernels/cpp/elements.h"
#include "kernels/cpp/threads.h"

namespace flexjag {

// Passed from Python; the fields' order and types are those of flexjag/ops/cpp/softmax.py.
struct Softmax {
  const element *x, *grad;  // x: values, or for the gradient the softmax
  element* out;
  const int64_t* offsets;
  int64_t segments, rows, columns, threads;
};

constexpr int AT_ONCE = 4;  // vectors of columns
constexpr real LEAST = -std::numeric_limits<real>::infinity();

// Forward in three steps: the maximum, the sum of powers, the quotient. Powers are kept in `out` between the last two,
// unless that rounds them.
INLINE Vec power(const element* x, Vec top, element* out, int count) {
  const Vec found = exp(load_row(x, count) - top);
  if constexpr (!IS_HALF) store_row(out, found, count);
  return found;
}
INLINE void divide(const element* x, Vec top, Vec inverse, element* out, int count) {
  if constexpr (IS_HALF) store_row(out, exp(load_row(x, count) - top) * inverse, count);
  else store_row(out, load_row(out, count) * inverse, count);
}

// NV vectors of columns of one segment.
template <int NV> static void softmax_columns(const element* x, const element*, element* out, int64_t rows, int64_t step) {
  Vec top[NV], sum[NV];
  UNROLL for (int n = 0; n < NV; n++) top[n] = all_lanes(LEAST), sum[n] = Vec{};
  for (int64_t at = 0; at < rows * step; at += step)
    UNROLL for (int n = 0; n < NV; n++) top[n] = larger(load_row(x + at + n * LANES), top[n]);
  for (int64_t at = 0; at < rows * step; at += step)
    UNROLL for (int n = 0; n < NV; n++) sum[n] += power(x + at + n * LANES, top[n], out + at + n * LANES, LANES);
  UNROLL for (int n = 0; n < NV; n++) sum[n] = 1 / sum[n];
  for (int64_t at = 0; at < rows * step; at += step)
    UNROLL for (int n = 0; n < NV; n++) divide(x + at + n * LANES, top[n], sum[n], out + at + n * LANES, LANES);
  HAS_EFFECTS;
}

template <int NV> static void gradient_columns(const element* y, const element* grad, element* out, int64_t rows, int64_t step) {
  Vec sum[NV];
  UNROLL for (int n = 0; n < NV; n++) sum[n] = Vec{};
  for (int64_t at = 0; at < rows * step; at += step)
    UNROLL for (int n = 0; n < NV; n++) sum[n] += load_row(y + at + n * LANES) * load_row(grad + at + n * LANES);
  for (int64_t at = 0; at < rows * step; at += step)
    UNROLL for (int n = 0; n < NV; n++) {
      const int64_t i = at + n * LANES;
      store_row(out + i, load_row(y + i) * (load_row(grad + i) - sum[n]));
    }
  HAS_EFFECTS;
}

// A segment with fewer columns than lanes, as one row: its vectors repeat the same columns after `period` vectors.
struct Flat {
  int64_t size;
  int columns, period;

  // step(i, count, p) for each vector: its first number, how many numbers, its place in the period.
  template <class Step> INLINE_MEMBER void each(Step step) const {
    int p = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
      step(i, LANES, p);
      p = p + 1 == period ? 0 : p + 1;
    }
    if (i < size) step(i, (int)(size - i), p);
  }
  // Join the lanes of one column by `f`, and give each of them the result.
  template <class Join> void join(Vec* x, real start, Join f) const {
    real found[LANES];
    std::fill(found, found + columns, start);
    for (int i = 0; i < period * LANES; i++) found[i % columns] = f(found[i % columns], x[i / LANES][i % LANES]);
    for (int i = 0; i < period * LANES; i++) x[i / LANES][i % LANES] = found[i % columns];
  }
};
INLINE Vec first_lanes(Vec x, int count, real other) {
  return where(lt(iota<int32_t>(), count), x, all_lanes(other));
}

static void softmax_flat(const element* x, const element*, element* out, Flat flat) {
  Vec top[LANES], sum[LANES];
  for (int p = 0; p < flat.period; p++) top[p] = all_lanes(LEAST), sum[p] = Vec{};
  flat.each([&](int64_t i, int count, int p) {
    top[p] = larger(first_lanes(load_row(x + i, count), count, LEAST), top[p]);
  });
  flat.join(top, LEAST, [](real a, real b) { return b > a ? b : a; });
  flat.each([&](int64_t i, int count, int p) { sum[p] += first_lanes(power(x + i, top[p], out + i, count), count, 0); });
  flat.join(sum, 0, [](real a, real b) { return a + b; });
  for (int p = 0; p < flat.period; p++) sum[p] = 1 / sum[p];
  flat.each([&](int64_t i, int count, int p) { divide(x + i, top[p], sum[p], out + i, count); });
  HAS_EFFECTS;
}

static void gradient_flat(const element* y, const element* grad, element* out, Flat flat) {
  Vec sum[LANES];
  for (int p = 0; p < flat.period; p++) sum[p] = Vec{};
  flat.each([&](int64_t i, int count, int p) { sum[p] += load_row(y + i, count) * load_row(grad + i, count); });
  flat.join(sum, 0, [](real a, real b) { return a + b; });
  flat.each([&](int64_t i, int count, int p) {
    store_row(out + i, load_row(y + i, count) * (load_row(grad + i, count) - sum[p]), count);
  });
  HAS_EFFECTS;
}

using Columns = void (*)(const element*, const element*, element*, int64_t, int64_t);
using Whole = void (*)(const element*, const element*, element*, Flat);

// Some columns of one segment: `many` takes AT_ONCE vectors of them, `one` a vector.
template <Columns many, Columns one, Whole flat> INLINE void work(const Softmax& c, int64_t segment, int64_t block) {
  const int64_t rows = c.offsets[segment + 1] - c.offsets[segment], n = c.columns;
  if (!rows) return;
  const int64_t at = c.offsets[segment] * n;
  const element *x = c.x + at, *grad = c.grad ? c.grad + at : nullptr;
  if (n < LANES) return flat(x, grad, c.out + at, Flat{rows * n, (int)n, (int)(n / std::gcd(n, (int64_t)LANES))});
  const auto run = [&](Columns f, int64_t j) { f(x + j, grad ? grad + j : nullptr, c.out + at + j, rows, n); };
  int64_t j = block * AT_ONCE * LANES;
  const int64_t end = std::min(j + AT_ONCE * LANES, n);
  if (j + AT_ONCE * LANES <= n) return run(many, j);
  for (; j + LANES <= end; j += LANES) run(one, j);
  if (j < end) run(one, n - LANES);  // some columns a second time, with the same result
}

// Each segment's columns in blocks, which threads claim. Returns 0, or 1 if the offsets are none.
template <Columns many, Columns one, Whole flat> static int64_t each_segment(const Softmax& c) {
  for (int64_t s = 0; s < c.segments; s++) if (c.offsets[s] > c.offsets[s + 1]) return 1;
  if (c.offsets[0] != 0 || c.offsets[c.segments] != c.rows) return 1;
  const int64_t blocks = (c.columns + AT_ONCE * LANES - 1) / (AT_ONCE * LANES), all = c.segments * blocks;
  const int64_t some = std::max<int64_t>(all / (c.threads * 16), 1);
  int64_t next = 0;
  on_threads(std::min(c.threads, all), [&](int64_t) {
    for (;;) {
      const int64_t first = __atomic_fetch_add(&next, some, __ATOMIC_RELAXED);
      if (first >= all) break;
      for (int64_t i = first; i < std::min(first + some, all); i++) work<many, one, flat>(c, i / blocks, i % blocks);
    }
  });
  return 0;
}

extern "C" int64_t softmax(const Softmax* c) {
  return each_segment<softmax_columns<AT_ONCE>, softmax_columns<1>, softmax_flat>(*c);
}
extern "C" int64_t softmax_backward(const Softmax* c) {
  return each_segment<gradient_columns<AT_ONCE>, gradient_columns<1>, gradient_flat>(*c);
}

}  // namespace flexjag
