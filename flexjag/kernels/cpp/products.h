// Products of small matrices that stay in registers.
//
// Scores are computed transposed, S^T = K Q^T: keys are rows, queries are the lanes of vectors. Nothing but Q (and dO)
// is packed: P^T is the left operand of P V as it is, and of the gradients of K and V along its rows.
#pragma once
#include <type_traits>

#include "elements.h"

namespace flexjag {

// Vectors of queries of a block, keys of a tile of scores, and sums that other products keep in registers. A register
// file of 16 vectors holds less than one of 32.
#if WIDEST == 64 || defined(__aarch64__)
constexpr int KEYS = 8, SUMS = 24;
#else
constexpr int KEYS = 4, SUMS = 8;
#endif
constexpr int VECTORS = LANES < 8 ? 4 : 3;
constexpr int QUERIES = VECTORS * LANES;
static_assert(QUERIES % 8 == 0, "queries are transposed eight at a time");
constexpr int KEY_BLOCK = 96;  // keys of a step: a multiple of KEYS

// Whether a product of rows of DIM columns takes them as they are in memory, as pairs; else as `real`.
#ifdef MULTIPLIES_PAIRS
template <int DIM> constexpr bool PAIRED = DIM % 2 == 0;
#else
template <int DIM> constexpr bool PAIRED = false;
#endif
template <int DIM> using Operand = std::conditional_t<PAIRED<DIM>, element, real>;

// sums[key][n] += sum over DIM of rows[key][d] * packed[d][n]: a tile of scores. `packed` has QUERIES columns.
template <int DIM, int NV> INLINE void multiply_transposed(const real* const* rows, const real* packed, Vec (&sums)[KEYS][NV]) {
  constexpr int AT_ONCE = NV == 1 && DIM % 2 == 0 ? 2 : 1;  // one sum per key would wait for the sums before
  Vec more[KEYS] = {};
  for (int d = 0; d < DIM; d += AT_ONCE) {
    Vec x[NV];
    UNROLL for (int n = 0; n < NV; n++) x[n] = read(packed + d * QUERIES + n * LANES);
    UNROLL for (int m = 0; m < KEYS; m++) {
      const Vec y = all_lanes(rows[m][d]);
      UNROLL for (int n = 0; n < NV; n++) sums[m][n] += y * x[n];
    }
    if constexpr (AT_ONCE == 2) {
      const Vec z = read(packed + (d + 1) * QUERIES);
      UNROLL for (int m = 0; m < KEYS; m++) more[m] += all_lanes(rows[m][d + 1]) * z;
    }
  }
  if constexpr (AT_ONCE == 2) UNROLL for (int m = 0; m < KEYS; m++) sums[m][0] += more[m];
}

#ifdef MULTIPLIES_PAIRS
// The same of pairs: `packed` has DIM / 2 rows of them.
template <int DIM, int NV> INLINE void multiply_transposed(const element* const* rows, const real* packed, Vec (&sums)[KEYS][NV]) {
  constexpr int AT_ONCE = NV == 1 && DIM % 4 == 0 ? 2 : 1;
  Vec more[KEYS] = {};
  const auto pair = [&](int m, int d) { int32_t x; memcpy(&x, rows[m] + 2 * d, sizeof(x)); return spread<int32_t>(x); };
  for (int d = 0; d < DIM / 2; d += AT_ONCE) {
    Vec x[NV];
    UNROLL for (int n = 0; n < NV; n++) x[n] = read(packed + d * QUERIES + n * LANES);
    UNROLL for (int m = 0; m < KEYS; m++) {
      const Int y = pair(m, d);
      UNROLL for (int n = 0; n < NV; n++) sums[m][n] = add_pairs(sums[m][n], y, x[n]);
    }
    if constexpr (AT_ONCE == 2) {
      const Vec z = read(packed + (d + 1) * QUERIES);
      UNROLL for (int m = 0; m < KEYS; m++) more[m] = add_pairs(more[m], pair(m, d + 1), z);
    }
  }
  if constexpr (AT_ONCE == 2) UNROLL for (int m = 0; m < KEYS; m++) sums[m][0] += more[m];
}
#endif

// The products, times `factor` if they are of pairs: other columns are packed with their factor.
template <int DIM, int NV>
static __attribute__((noinline)) void multiply_to(const Operand<DIM>* const* rows, const real* packed, real factor, real* to) {
  Vec sums[KEYS][NV] = {};
  multiply_transposed<DIM, NV>(rows, packed, sums);
  UNROLL for (int m = 0; m < KEYS; m++) UNROLL for (int n = 0; n < NV; n++)
    put(to + m * QUERIES + n * LANES, PAIRED<DIM> ? sums[m][n] * factor : sums[m][n]);
  HAS_EFFECTS;
}

// The same for at most FEW queries, kept as rows of whole vectors and not as columns: columns are lanes, of which none is
// wasted. Missing lanes of the queries' vector are 0. PADDED: the rows of keys are whole vectors, too, if not of pairs.
constexpr int FEW = 2;
template <int DIM> constexpr int WORDS = PAIRED<DIM> ? DIM / 2 : DIM;  // of a row
template <int DIM, bool PADDED>
static __attribute__((noinline)) void multiply_few(const Operand<DIM>* const* rows, const real* queries, int count, real factor, real* to) {
  constexpr int NV = vectors_of(WORDS<DIM>), TAIL = PADDED && !PAIRED<DIM> ? 0 : WORDS<DIM> % LANES;
  Vec found[KEYS] = {};
  for (int r = 0; r < count; r++, queries += NV * LANES) {
    Vec sums[KEYS] = {};
    for (int n = 0; n < NV; n++) {
      const Vec x = read(queries + n * LANES);
      UNROLL for (int m = 0; m < KEYS; m++) {
        const real* row = (const real*)rows[m] + n * LANES;
        const Vec y = n == NV - 1 ? read_part<TAIL>(row) : read(row);
#ifdef MULTIPLIES_PAIRS
        if constexpr (PAIRED<DIM>) { sums[m] = add_pairs(sums[m], (Int)y, x); continue; }
#endif
        sums[m] += x * y;
      }
    }
    UNROLL for (int m = 0; m < KEYS; m++) found[m][r] = factor * sum(sums[m]);
  }
  UNROLL for (int m = 0; m < KEYS; m++) put(to + m * QUERIES, found[m]);
  HAS_EFFECTS;
}
// Keep query r of DIM columns for that.
template <int DIM> INLINE void keep_few(const element* row, int r, real* queries) {
  constexpr int NV = vectors_of(WORDS<DIM>);
  queries += r * NV * LANES;
  if constexpr (PAIRED<DIM>) {
    put(queries + (NV - 1) * LANES, Vec{});
    std::memcpy(queries, row, DIM * sizeof(element));
  } else {
    copy_row(row, DIM, queries);
  }
}

// c[m][:] = alpha[m] c[m][:] + sum over r in [lo, hi) of a[m * a_row + r * a_column] b[r][:], for M rows and NV vectors
// of columns, of which the last has TAIL columns in b (0: all). alpha null: 1.
template <int M, int NV, int TAIL>
static void multiply_rows(const real* a, int64_t a_row, int64_t a_column, const real* b, int64_t b_row, int lo, int hi, real* c,
                          int64_t c_row, const real* alpha) {
  Vec sums[M][NV];
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < NV; n++) {
    sums[m][n] = read(c + m * c_row + n * LANES);
    if (alpha) sums[m][n] *= alpha[m];
  }
  a += lo * a_column, b += lo * b_row;
  for (int r = lo; r < hi; r++, a += a_column, b += b_row) {
    Vec x[NV];
    UNROLL for (int n = 0; n < NV; n++) x[n] = n == NV - 1 ? read_part<TAIL>(b + n * LANES) : read(b + n * LANES);
    UNROLL for (int m = 0; m < M; m++) {
      const Vec y = all_lanes(a[m * a_row]);
      UNROLL for (int n = 0; n < NV; n++) sums[m][n] += y * x[n];
    }
  }
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < NV; n++) put(c + m * c_row + n * LANES, sums[m][n]);
  HAS_EFFECTS;
}

// Vectors of columns that a product takes at once, and rows of it.
constexpr int columns_at_once(int vectors) { return vectors < 4 ? vectors : 4; }
constexpr int rows_at_once(int vectors) {
  const int rows = SUMS / columns_at_once(vectors);
  return rows < 12 ? rows : 12;
}

// As multiply_rows, for `rows` <= M rows and COLUMNS columns. ALONG: a_row is 1, else a_column is 1.
template <int COLUMNS, bool PADDED, bool ALONG, int FIRST = 0, int M = rows_at_once(vectors_of(COLUMNS))>
INLINE void multiply(int rows, const real* a, int64_t step, const real* b, int64_t b_row, int lo, int hi, real* c, int64_t c_row,
                     const real* alpha) {
  constexpr int ALL = vectors_of(COLUMNS), LEFT = ALL - FIRST, NV = LEFT < 4 ? LEFT : 4;
  if constexpr (M > 1)
    if (rows < M) return multiply<COLUMNS, PADDED, ALONG, FIRST, M - 1>(rows, a, step, b, b_row, lo, hi, c, c_row, alpha);
  constexpr int TAIL = PADDED || FIRST + NV < ALL ? 0 : COLUMNS % LANES;
  multiply_rows<M, NV, TAIL>(a, ALONG ? 1 : step, ALONG ? step : 1, b + FIRST * LANES, b_row, lo, hi, c + FIRST * LANES, c_row, alpha);
  if constexpr (FIRST + NV < ALL)
    multiply<COLUMNS, PADDED, ALONG, FIRST + NV, M>(rows, a, step, b, b_row, lo, hi, c, c_row, alpha);
}

typedef real Eight __attribute__((vector_size(8 * sizeof(real))));
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE
using Place = std::conditional_t<sizeof(real) == 8, int64_t, int32_t>;
typedef Place Eights __attribute__((vector_size(8 * sizeof(Place))));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Eights{__VA_ARGS__})
#endif

// Eight rows as eight columns.
INLINE void transpose_eight(Eight (&a)[8]) {
  Eight b[8];
  UNROLL for (int i = 0; i < 4; i++) {
    b[2 * i] = SHUFFLE(a[2 * i], a[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[2 * i + 1] = SHUFFLE(a[2 * i], a[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  UNROLL for (int i = 0; i < 2; i++) UNROLL for (int j = 0; j < 2; j++) {
    a[4 * i + 2 * j] = SHUFFLE(b[4 * i + j], b[4 * i + 2 + j], 0, 1, 8, 9, 4, 5, 12, 13);
    a[4 * i + 2 * j + 1] = SHUFFLE(b[4 * i + j], b[4 * i + 2 + j], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  UNROLL for (int j = 0; j < 4; j++) {
    b[j] = SHUFFLE(a[j], a[4 + j], 0, 1, 2, 3, 8, 9, 10, 11);
    b[j + 4] = SHUFFLE(a[j], a[4 + j], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  UNROLL for (int j = 0; j < 8; j++) a[j] = b[j];
}

// to[column][row] = factor * from[row][column] for `rows` <= QUERIES rows; missing lanes of their last vector are 0. BITS:
// no number but bits are moved, without a factor.
template <int COLUMNS, bool BITS = false> static void transpose(const real* from, int64_t from_row, int rows, real factor, real* to) {
  for (int i = 0; i < (rows + LANES - 1) / LANES * LANES; i += 8)
    for (int j = 0; j < COLUMNS; j += 8) {
      Eight tile[8] = {};
      const int high = rows - i < 8 ? rows - i : 8, broad = COLUMNS - j < 8 ? COLUMNS - j : 8;
      for (int r = 0; r < high; r++) {
        const real* row = from + (i + r) * from_row + j;
        if (COLUMNS % 8 == 0 || broad == 8) memcpy(&tile[r], row, sizeof(Eight));
        else for (int c = 0; c < broad; c++) tile[r][c] = row[c];
      }
      transpose_eight(tile);
      UNROLL for (int c = 0; c < 8; c++)
        if (COLUMNS % 8 == 0 || c < broad) {
          if (!BITS) tile[c] *= factor;
          memcpy(to + (j + c) * QUERIES + i, &tile[c], sizeof(Eight));
        }
    }
  HAS_EFFECTS;
}

// Rows as columns for the products of `multiply_to`: pairs of `pairs`, whose rows have DIM / 2, or `from` times a factor.
template <int DIM> INLINE void pack_columns(const real* from, int64_t from_row, const real* pairs, int rows, real factor, real* to) {
  if constexpr (PAIRED<DIM>) transpose<DIM / 2, true>(pairs, DIM / 2, rows, 1, to);
  else transpose<DIM>(from, from_row, rows, factor, to);
}
// Keep row r of DIM columns as pairs; null: zeros.
template <int DIM> INLINE void keep_pairs(const element* row, int r, real* pairs) {
  if constexpr (!PAIRED<DIM>) return;
  if (row) std::memcpy(pairs + r * (DIM / 2), row, DIM * sizeof(element));
  else std::memset(pairs + r * (DIM / 2), 0, DIM * sizeof(element));
}

}  // namespace flexjag
