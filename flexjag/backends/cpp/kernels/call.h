// What a call computes on, its division into items of work, and the spans of keys that queries may attend.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <vector>

#include "kernels/cpp/products.h"

namespace flexjag {

// Rows [tokens, heads, columns] of a tensor; the columns are adjacent.
struct Rows3 {
  element* at;
  int64_t token, head;  // strides
  INLINE_MEMBER element* row(int64_t t, int64_t h) const { return at + t * token + h * head; }
};

// Disjoint spans [lo, hi) of packed keys of each packed query: `count` rows of length T_q.
struct SpanRows {
  const int32_t *lo, *hi;
  int64_t count;
};

// What becomes of scores; a unit says which as NORMALIZER.
enum class Normalizer { softmax, pointwise, stick_breaking };

// Passed from Python; the fields' order and types are those of flexjag/backends/cpp/library.py.
struct Call {
  Rows3 q, k, v, out, grad, dq, dk, dv;
  real *lse, *grad_lse;  // [H, T_q], log-sum-exp of the scores or remainder, and the gradient by it; null: none
  const int32_t *q_offsets, *kv_offsets;
  const SpanRows *outer, *inner;  // per mask: keys that may be allowed, and keys that certainly are; the mask if equal
  const int32_t* mask_of;         // [H]: the mask of a head; null: the first
  const void* const* captures;
  const int64_t* numbers;
  double* const* totals;         // per learned capture, its gradient, first 0
  const int64_t* total_sizes;    // its entries; 0 if no two items add to the same one
  int64_t segments, num_q, num_kv, heads, groups, num_learned, threads;
  double scale, factor;
};

enum Status : int64_t { DONE = 0, BAD_OFFSETS = 1 };

constexpr int MOST_SPANS = 16;

// Bounds of the spans with one number in each of some rows, relative to the segment's first key.
struct Reach {
  int min_lo, max_lo, min_hi, max_hi;
};

// Keys of a block of queries of one segment and head. Lanes behind the last query have empty spans.
struct Block {
  int queries, vectors;  // of the block
  int lo, hi;            // keys that any query may attend
  int outer_count, inner_count;
  bool exact;  // the spans are the mask: there is nothing to ask the predicate
  Reach outer_at[MOST_SPANS][VECTORS], inner_at[MOST_SPANS][VECTORS];
  const Reach (*inner)[VECTORS];
  alignas(64) int32_t span_lo[MOST_SPANS][QUERIES], span_hi[MOST_SPANS][QUERIES];  // of the outer spans

  // Take queries row, row + 1, … (packed) of a segment with keys [first_key, first_key + keys).
  void take(const SpanRows& o, const SpanRows& i, int64_t num_q, int64_t row, int count, int first_key, int keys) {
    queries = count, vectors = (count + LANES - 1) / LANES;
    outer_count = (int)o.count, inner_count = (int)i.count;
    lo = keys, hi = 0;
    for (int s = 0; s < outer_count; s++)
      for (int v = 0; v < vectors; v++) {
        outer_at[s][v] = reach(o, s, num_q, row + v * LANES, count - v * LANES, first_key, keys, span_lo[s] + v * LANES, span_hi[s] + v * LANES);
        lo = std::min(lo, outer_at[s][v].min_lo), hi = std::max(hi, outer_at[s][v].max_hi);
      }
    inner = outer_at, exact = true;
    if (i.lo == o.lo && i.hi == o.hi) return;
    int32_t from[LANES], to[LANES];
    for (int s = 0; s < inner_count; s++)
      for (int v = 0; v < vectors; v++) {
        inner_at[s][v] = reach(i, s, num_q, row + v * LANES, count - v * LANES, first_key, keys, from, to);
        const int32_t *lo_of = span_lo[s] + v * LANES, *hi_of = span_hi[s] + v * LANES;
        exact = exact && s < outer_count && !flexjag::any((read(from) != read(lo_of)) | (read(to) != read(hi_of)));
      }
    exact = exact && inner_count == outer_count;
    if (!exact) inner = inner_at;
  }

  // Spans with number s of the `rows` first of LANES rows from `row` on, clipped to the segment, and their bounds. Other
  // rows have empty ones.
  static Reach reach(const SpanRows& spans, int s, int64_t num_q, int64_t row, int rows, int first_key, int keys, int32_t* from, int32_t* to) {
    const int32_t *lo = spans.lo + s * num_q + row, *hi = spans.hi + s * num_q + row;
    constexpr int32_t most = std::numeric_limits<int32_t>::max();
    const Int none = Int{}, end = none + keys;
    Int a{}, b{};
    if (row + LANES <= num_q) a = read(lo), b = read(hi);
    else for (int r = 0; r < rows; r++) a[r] = lo[r], b[r] = hi[r];
    a -= first_key, b -= first_key;
    a = a > none ? a : none, b = b < end ? b : end;
    const Int inside = iota<int32_t>() < none + rows, some = (b > a) & inside;
    put(from, some ? a : none), put(to, some ? b : none);
    return Reach{smallest(some ? a : none + most), largest(inside ? a : none), smallest(inside ? b : none + most), largest(some ? b : none)};
  }

  // True if a query of vector v may attend one of the keys [a, b).
  bool any(int v, int a, int b) const {
    for (int s = 0; s < outer_count; s++) if (outer_at[s][v].min_lo < b && outer_at[s][v].max_hi > a) return true;
    return false;
  }
  // True if every query of the vectors [v, end) certainly attends all keys [a, b).
  bool all(int v, int end, int a, int b) const {
    for (; v < end; v++) {
      bool covered = false;
      for (int s = 0; s < inner_count; s++) covered |= inner[s][v].max_lo <= a && inner[s][v].min_hi >= b;
      if (!covered) return false;
    }
    return true;
  }
  // The keys that queries [r, r + rows) may attend, as a range.
  void keys_of(int r, int rows, int& first, int& end) const {
    first = hi, end = lo;
    for (int s = 0; s < outer_count; s++) for (int i = r; i < r + rows; i++)
      if (span_hi[s][i] > span_lo[s][i]) first = std::min(first, span_lo[s][i]), end = std::max(end, span_hi[s][i]);
  }
  // The queries that may attend one of the keys [a, b), as a range.
  void queries_of(int a, int b, int& first, int& end) const {
    first = queries, end = 0;
    for (int v = 0; v < vectors; v++) {
      Int found{};
      for (int s = 0; s < outer_count; s++) found |= (read(span_lo[s] + v * LANES) < b) & (read(span_hi[s] + v * LANES) > a);
      for (int r = 0; r < LANES; r++) if (found[r]) first = std::min(first, v * LANES + r), end = v * LANES + r + 1;
    }
    end = std::min(end, queries);
  }
  // The lanes of vector v that may attend a key, -1 or 0.
  INLINE_MEMBER Int allowed(int v, int key) const {
    Int found = (read(span_lo[0] + v * LANES) <= key) & (read(span_hi[0] + v * LANES) > key);
    for (int s = 1; s < outer_count; s++) found |= (read(span_lo[s] + v * LANES) <= key) & (read(span_hi[s] + v * LANES) > key);
    return found;
  }
  // True if a query has a key.
  bool attends(int r) const {
    for (int s = 0; s < outer_count; s++) if (span_hi[s][r] > span_lo[s][r]) return true;
    return false;
  }
};

// The query rows of a vector, for printed functions.
INLINE Rows rows_of(int64_t first, int64_t last) {
  const Int at = iota<int32_t>() + (int32_t)first;
  const bool run = first + LANES - 1 <= last;
  return Rows{(int32_t)first, run, run ? at : (at < (int32_t)last ? at : Int{} + (int32_t)last)};
}

}  // namespace flexjag
