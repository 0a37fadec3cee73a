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

// Queries and keys of a segment: packed rows [row, row + queries) and [key, key + keys).
struct Segment {
  int64_t row;
  int queries, key, keys;
};

constexpr int32_t UNBOUNDED = std::numeric_limits<int32_t>::max();

// Keys that queries may attend: `count` disjoint spans [lo, hi) of packed keys per packed query, rows of length T_q. Or,
// if these are null, one span, from `left` keys before the key on the query's diagonal to `right` keys after it.
struct SpanRows {
  const int32_t *lo, *hi;
  int64_t count;
  int64_t left, right;  // UNBOUNDED: all keys on that side
  int64_t from_end;     // the diagonal ends at the segment's last key; else it begins at its first

  // The diagonal's key of packed query `row`, relative to the segment's first key.
  INLINE_MEMBER int32_t diagonal(int64_t row, const Segment& x) const {
    return (int32_t)(row - x.row) + (from_end ? x.keys - x.queries : 0);
  }
  // Span `s` of packed query `row`, relative to the segment's first key and cut to its keys.
  INLINE_MEMBER void of_row(int64_t s, int64_t num_q, int64_t row, const Segment& x, int32_t& from, int32_t& to) const {
    if (lo) {
      from = std::max(lo[s * num_q + row] - x.key, 0), to = std::min(hi[s * num_q + row] - x.key, x.keys);
    } else {
      const int64_t at = diagonal(row, x);
      from = (int32_t)std::max<int64_t>(left == UNBOUNDED ? 0 : at - left, 0);
      to = (int32_t)std::min<int64_t>(right == UNBOUNDED ? x.keys : at + right + 1, x.keys);
    }
  }
  // Spans `s` of LANES queries from `row` on, of which the first `rows` exist, before they are cut to the segment's keys.
  INLINE_MEMBER void of_rows(int64_t s, int64_t num_q, int64_t row, int rows, const Segment& x, Int& from, Int& to) const {
    if (!lo) {
      const int32_t at = diagonal(row, x), last = at + LANES - 1;  // no sum leaves int32: it is near the diagonal
      const Int lane = iota<int32_t>();
      from = left >= last ? Int{} : lane + (int32_t)(at - left);
      to = right >= (int64_t)x.keys - at ? Int{} + x.keys : lane + (int32_t)(at + right + 1);
      return;
    }
    const int32_t *lows = lo + s * num_q + row, *highs = hi + s * num_q + row;
    from = Int{}, to = Int{};
    if (row + LANES <= num_q) from = read(lows), to = read(highs);
    else for (int r = 0; r < rows; r++) from[r] = lows[r], to[r] = highs[r];
    from -= x.key, to -= x.key;
  }
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

  INLINE_MEMBER Segment segment(int64_t s) const {
    return {q_offsets[s], q_offsets[s + 1] - q_offsets[s], kv_offsets[s], kv_offsets[s + 1] - kv_offsets[s]};
  }
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

  // Take queries row, row + 1, … (packed) of a segment.
  void take(const SpanRows& o, const SpanRows& i, int64_t num_q, int64_t row, int count, const Segment& x) {
    queries = count, vectors = (count + LANES - 1) / LANES;
    outer_count = (int)o.count, inner_count = (int)i.count;
    lo = x.keys, hi = 0;
    for (int s = 0; s < outer_count; s++)
      for (int v = 0; v < vectors; v++) {
        outer_at[s][v] = reach(o, s, num_q, row + v * LANES, count - v * LANES, x, span_lo[s] + v * LANES, span_hi[s] + v * LANES);
        lo = std::min(lo, outer_at[s][v].min_lo), hi = std::max(hi, outer_at[s][v].max_hi);
      }
    inner = outer_at, exact = true;
    if (i.lo == o.lo && i.hi == o.hi) return;
    int32_t from[LANES], to[LANES];
    for (int s = 0; s < inner_count; s++)
      for (int v = 0; v < vectors; v++) {
        inner_at[s][v] = reach(i, s, num_q, row + v * LANES, count - v * LANES, x, from, to);
        const int32_t *lo_of = span_lo[s] + v * LANES, *hi_of = span_hi[s] + v * LANES;
        exact = exact && s < outer_count && !flexjag::any((read(from) != read(lo_of)) | (read(to) != read(hi_of)));
      }
    exact = exact && inner_count == outer_count;
    if (!exact) inner = inner_at;
  }

  // Spans with number s of the `rows` first of LANES rows from `row` on, clipped to the segment, and their bounds. Other
  // rows have empty ones.
  static Reach reach(const SpanRows& spans, int s, int64_t num_q, int64_t row, int rows, const Segment& x, int32_t* from, int32_t* to) {
    constexpr int32_t most = std::numeric_limits<int32_t>::max();
    const Int none = Int{}, end = none + x.keys;
    Int a, b;
    spans.of_rows(s, num_q, row, rows, x, a, b);
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
