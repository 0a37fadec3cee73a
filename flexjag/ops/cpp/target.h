// Attention of a few dense queries per segment to its packed keys, with a bias, forward and backward.
//
// Queries are the lanes of scores, and keys their rows, in blocks. D, E and the number of queries are known at run time.
#pragma once
#include <limits>

#include "kernels/cpp/products.h"
#include "kernels/cpp/threads.h"

namespace flexjag {

// Rows of `columns` adjacent numbers.
struct Table {
  element* at;
  int64_t step;
  INLINE_MEMBER element* row(int64_t i) const { return at + i * step; }
};

// Passed from Python; the fields' order and types are those of flexjag/ops/cpp/target.py.
struct Target {
  Table query, key, value;    // [S M, D], [T, D], [T, E]
  Table bias;                 // [S N, M], or null
  Table out, grad;            // [S M, E]
  Table dq, dk, dv, db;       // as query, key, value, bias
  real* lse;                  // [S M]
  const int64_t* offsets;
  int64_t segments, rows, queries, longest, dim, value_dim, threads;
  double scale;
};

INLINE int64_t whole(int64_t columns) { return (columns + LANES - 1) / LANES * LANES; }

// Rows of `real` that whole vectors can be read from.
struct Matrix {
  const real* at;
  int64_t step;
};

// Rows [first, first + count) of a table: in place, or copied to `room`.
static Matrix matrix(const Table& from, int64_t first, int64_t count, int64_t columns, real* room) {
  if constexpr (!IS_HALF)
    if (columns % LANES == 0) return {(const real*)from.row(first), from.step};
  for (int64_t r = 0; r < count; r++) copy_row(from.row(first + r), (int)columns, room + r * whole(columns));
  return {room, whole(columns)};
}

// to[column][row] = factor * from[row][column] for `count` <= QUERIES rows; missing lanes of their last vector are 0.
static void pack(const Matrix& from, int64_t columns, int count, real factor, real* to) {
  for (int64_t c = 0; c < columns; c++, to += QUERIES) {
    put(to + (vectors_of(count) - 1) * LANES, Vec{});
    for (int i = 0; i < count; i++) to[i] = factor * from.at[i * from.step + c];
  }
  HAS_EFFECTS;
}

// to[row][n] = sum of rows[row][column] * packed[column][n] over columns, for KEYS rows from `first` on.
template <int NV>
static __attribute__((noinline)) void dots_of(const Matrix& m, int64_t first, int64_t rows, int64_t columns,
                                              const real* packed, real* to) {
  const real* at[KEYS];
  UNROLL for (int k = 0; k < KEYS; k++) at[k] = m.at + std::min(first + k, rows - 1) * m.step;
  Vec sums[KEYS][NV] = {};
  for (int64_t c = 0; c < columns; c++) {
    Vec x[NV];
    UNROLL for (int n = 0; n < NV; n++) x[n] = read(packed + c * QUERIES + n * LANES);
    UNROLL for (int k = 0; k < KEYS; k++) {
      const Vec y = all_lanes(at[k][c]);
      UNROLL for (int n = 0; n < NV; n++) sums[k][n] += y * x[n];
    }
  }
  UNROLL for (int k = 0; k < KEYS; k++) UNROLL for (int n = 0; n < NV; n++)
    put(to + (first + k) * QUERIES + n * LANES, sums[k][n]);
  HAS_EFFECTS;
}
static void dots(int vectors, const Matrix& m, int64_t rows, int64_t columns, const real* packed, real* to) {
  const auto run = vectors == 1 ? dots_of<1> : vectors == 2 ? dots_of<2> : vectors == 3 ? dots_of<3> : dots_of<VECTORS>;
  for (int64_t r = 0; r < rows; r += KEYS) run(m, r, rows, columns, packed, to);
}

// The left factor of a product: entry (m, r) is at[m * row + r * column].
struct Factor {
  const real* at;
  int64_t row, column;
};

// c[m][:] = alpha[m] c[m][:] + sum over r < count of a(m, r) b[r][:], for NV vectors of columns. alpha null: 1.
template <int NV>
static void add_columns(int rows, const Factor& a, int count, const real* b, int64_t b_row, real* c, int64_t c_row,
                        const real* alpha) {
  constexpr int MOST = NV == 4 ? SUMS / 4 : 8;
  int m = 0;
  const auto run = [&](auto some) {
    constexpr int M = decltype(some)::value;
    for (; m + M <= rows; m += M)
      multiply_rows<M, NV, 0>(a.at + m * a.row, a.row, a.column, b, b_row, 0, count, c + m * c_row, c_row,
                              alpha ? alpha + m : nullptr);
  };
  run(std::integral_constant<int, MOST>()), run(std::integral_constant<int, 2>()), run(std::integral_constant<int, 1>());
}
static void add_product(int rows, const Factor& a, int count, const Matrix& b, int64_t columns, real* c,
                        const real* alpha) {
  const int64_t c_row = whole(columns);
  int64_t j = 0;
  for (; j + 4 * LANES <= columns; j += 4 * LANES) add_columns<4>(rows, a, count, b.at + j, b.step, c + j, c_row, alpha);
  for (; j < columns; j += LANES) add_columns<1>(rows, a, count, b.at + j, b.step, c + j, c_row, alpha);
}

// Places in a thread's memory.
struct Space {
  real *packed, *packed_grad, *scores, *by_score, *q, *k, *v, *g, *out, *dq, *dk, *dv, *inner;
  int64_t size = 0;

  Space(const Target& c, bool backward, real* room) {
    const int64_t most = backward ? (c.queries + QUERIES - 1) / QUERIES * QUERIES : QUERIES;
    const int64_t d = whole(c.dim), e = whole(c.value_dim), more = backward ? most : 0, block = backward ? KEY_BLOCK : 0;
    const auto take = [&](int64_t count) {
      real* at = room ? room + size : nullptr;
      size += whole(count);
      return at;
    };
    packed = take(most * c.dim), packed_grad = take(more * c.value_dim);
    scores = take(KEY_BLOCK * QUERIES), by_score = take(block * QUERIES);
    q = take(most * d), k = take(KEY_BLOCK * d), v = take(KEY_BLOCK * e), g = take(more * e);
    out = take(backward ? 0 : QUERIES * e), dq = take(more * d), dk = take(block * d), dv = take(block * e);
    inner = take(more);
  }
};

// A row of the bias for the lanes from n on. Behind the last query, lanes are those of the next row, or 0.
INLINE Vec bias_of(const Target& c, int64_t row, int64_t n, int lanes) {
  const element *at = c.bias.row(row) + n, *end = c.bias.row(c.segments * c.longest - 1) + c.queries;
  return at + LANES <= end ? load_row(at) : load_row(at, lanes);
}

static void attend(const Target& c, int64_t s, const Space& w) {
  const int64_t first = c.offsets[s], keys = c.offsets[s + 1] - first, d = c.dim, e = c.value_dim;
  for (int64_t q = 0; q < c.queries; q += QUERIES) {
    const int64_t row = s * c.queries + q;
    const int count = (int)std::min<int64_t>(QUERIES, c.queries - q), vectors = vectors_of(count);
    if (!keys) {
      for (int i = 0; i < count; i++) std::memset((void*)c.out.row(row + i), 0, e * sizeof(element));
      std::fill(c.lse + row, c.lse + row + count, -std::numeric_limits<real>::infinity());
      continue;
    }
    pack(matrix(c.query, row, count, d, w.q), d, count, (real)c.scale, w.packed);
    alignas(64) real top[QUERIES], sum[QUERIES], shrink[QUERIES];
    for (int n = 0; n < vectors * LANES; n += LANES)
      put(top + n, all_lanes(std::numeric_limits<real>::lowest())), put(sum + n, Vec{});
    std::memset(w.out, 0, count * whole(e) * sizeof(real));
    for (int64_t from = 0; from < keys; from += KEY_BLOCK) {
      const int some = (int)std::min<int64_t>(KEY_BLOCK, keys - from);
      dots(vectors, matrix(c.key, first + from, some, d, w.k), some, d, w.packed, w.scores);
      for (int n = 0; n < count; n += LANES) {
        const int lanes = std::min(LANES, count - n);
        const Vec before = read(top + n);
        Vec most = before, total{};
        for (int r = 0; r < some; r++) {
          real* at = w.scores + r * QUERIES + n;
          Vec x = read(at);
          if (c.bias.at) put(at, x = x + bias_of(c, s * c.longest + from + r, q + n, lanes));
          most = larger(x, most);
        }
        for (int r = 0; r < some; r++) {
          real* at = w.scores + r * QUERIES + n;
          const Vec p = exp(read(at) - most);
          put(at, p);
          total += p;
        }
        const Vec less = exp(before - most);
        put(shrink + n, less), put(top + n, most), put(sum + n, read(sum + n) * less + total);
      }
      add_product(count, {w.scores, 1, QUERIES}, some, matrix(c.value, first + from, some, e, w.v), e, w.out, shrink);
    }
    for (int n = 0; n < count; n += LANES) {
      const Vec all = read(sum + n), lse = read(top + n) + log(all);
      put(sum + n, 1 / all);
      for (int i = n; i < std::min(n + LANES, count); i++) c.lse[row + i] = lse[i - n];
    }
    for (int i = 0; i < count; i++) put_row(w.out + i * whole(e), (int)e, sum[i], c.out.row(row + i));
  }
}

// Weights of queries [q, q + count) in w.scores, and the gradients by their scores in w.by_score and c.db.
static void differentiate_scores(const Target& c, const Space& w, int64_t s, int64_t from, int some, int64_t q, int count) {
  const element* end = c.db.at ? c.db.row((s + 1) * c.longest - 1) + c.queries : nullptr;
  for (int n = 0; n < count; n += LANES) {
    const int lanes = std::min(LANES, count - n);
    Vec lse{};
    for (int i = 0; i < lanes; i++) lse[i] = c.lse[s * c.queries + q + n + i];
    const Vec inner = read(w.inner + q + n);
    for (int r = 0; r < some; r++) {
      real *at = w.scores + r * QUERIES + n, *by = w.by_score + r * QUERIES + n;
      const int64_t row = s * c.longest + from + r;
      const Vec x = c.bias.at ? read(at) + bias_of(c, row, q + n, lanes) : read(at);
      const Vec p = exp(x - lse), ds = p * (read(by) - inner);
      put(at, p), put(by, ds);
      if (!c.db.at) continue;
      element* to = c.db.row(row) + q + n;
      // The lanes behind a row that is shorter than a vector are written again with the next row.
      if (c.queries < LANES && to + LANES <= end) store_row(to, ds);
      else store_row(to, ds, lanes);
    }
  }
}

static void differentiate(const Target& c, int64_t s, const Space& w) {
  const int64_t first = c.offsets[s], keys = c.offsets[s + 1] - first, d = c.dim, e = c.value_dim, m = c.queries;
  const Matrix q = matrix(c.query, s * m, m, d, w.q), g = matrix(c.grad, s * m, m, e, w.g);
  for (int64_t i = 0; i < m; i++) {
    Vec x{};
    for (int64_t j = 0; j < e; j += LANES) {
      const int lanes = (int)std::min<int64_t>(LANES, e - j);
      x += load_row(c.grad.row(s * m + i) + j, lanes) * load_row(c.out.row(s * m + i) + j, lanes);
    }
    w.inner[i] = sum(x);
  }
  for (int64_t at = 0; at < m; at += QUERIES) {
    const int count = (int)std::min<int64_t>(QUERIES, m - at);
    pack({q.at + at * q.step, q.step}, d, count, (real)c.scale, w.packed + at * d);
    pack({g.at + at * g.step, g.step}, e, count, 1, w.packed_grad + at * e);
  }
  std::memset(w.dq, 0, m * whole(d) * sizeof(real));
  for (int64_t from = 0; from < keys; from += KEY_BLOCK) {
    const int some = (int)std::min<int64_t>(KEY_BLOCK, keys - from);
    const Matrix k = matrix(c.key, first + from, some, d, w.k), v = matrix(c.value, first + from, some, e, w.v);
    std::memset(w.dk, 0, some * whole(d) * sizeof(real)), std::memset(w.dv, 0, some * whole(e) * sizeof(real));
    for (int64_t at = 0; at < m; at += QUERIES) {
      const int count = (int)std::min<int64_t>(QUERIES, m - at), vectors = vectors_of(count);
      dots(vectors, k, some, d, w.packed + at * d, w.scores);
      dots(vectors, v, some, e, w.packed_grad + at * e, w.by_score);
      differentiate_scores(c, w, s, from, some, at, count);
      add_product(some, {w.scores, QUERIES, 1}, count, {g.at + at * g.step, g.step}, e, w.dv, nullptr);
      add_product(some, {w.by_score, QUERIES, 1}, count, {q.at + at * q.step, q.step}, d, w.dk, nullptr);
      add_product(count, {w.by_score, 1, QUERIES}, some, k, d, w.dq + at * whole(d), nullptr);
    }
    for (int r = 0; r < some; r++) {
      put_row(w.dk + r * whole(d), (int)d, (real)c.scale, c.dk.row(first + from + r));
      put_row(w.dv + r * whole(e), (int)e, 1, c.dv.row(first + from + r));
    }
  }
  for (int64_t i = 0; i < m; i++) put_row(w.dq + i * whole(d), (int)d, (real)c.scale, c.dq.row(s * m + i));
  if (c.db.at && keys < c.longest)
    std::memset((void*)c.db.row(s * c.longest + keys), 0, (c.longest - keys) * m * sizeof(element));
}

// Threads claim segments. Returns 0, or 1 if the offsets are none, or 2 if a segment is longer than the bias.
template <void (*segment)(const Target&, int64_t, const Space&)>
static int64_t each_segment(const Target& c, bool backward) {
  for (int64_t s = 0; s < c.segments; s++) {
    if (c.offsets[s] > c.offsets[s + 1]) return 1;
    if (c.bias.at && c.offsets[s + 1] - c.offsets[s] > c.longest) return 2;
  }
  if (c.offsets[0] != 0 || c.offsets[c.segments] != c.rows) return 1;
  int64_t next = 0;
  on_threads(std::min(c.threads, c.segments), [&](int64_t) {
    Room<real> room(Space(c, backward, nullptr).size);
    const Space space(c, backward, room.at);
    for (;;) {
      const int64_t s = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (s >= c.segments) break;
      segment(c, s, space);
    }
  });
  return 0;
}

extern "C" int64_t target(const Target* c) { return each_segment<attend>(*c, false); }
extern "C" int64_t target_backward(const Target* c) { return each_segment<differentiate>(*c, true); }

}  // namespace flexjag
