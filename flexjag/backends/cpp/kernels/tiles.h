// Tiles of scores: KEYS keys by vectors of queries. Spans say which of them have pairs; the plan's printed mask, where
// spans do not say it all, is evaluated before a tile's products, so that tiles without pairs cost no more than that.
#pragma once
#include "schedule.h"

namespace flexjag {

constexpr int KEY_GROUPS = KEY_BLOCK / KEYS;  // of keys in a block

// KEYS keys, of which `keys` exist, and the vectors [v, v + vectors) of a block's queries.
struct Tile {
  int key, keys;      // the first key, relative to the segment
  int first_key;      // of the segment (packed)
  int64_t row, last;  // the block's first and last query (packed)
  int v, vectors, h;
  bool partial;       // it has pairs that are masked, which `ok` says
};

// Pairs of a tile that are allowed, -1 or 0.
using Pairs = int32_t[KEYS * QUERIES];

// Find the vectors of queries with pairs in a tile of keys; none: vectors is 0. If some pairs are masked, fill `ok`.
// ASK: spans are not the mask, so the predicate is evaluated.
template <bool ASK> static __attribute__((noinline)) void find_pairs_by(const Call& c, const Block& b, Tile& t, Pairs& ok) {
  int lo = 0, hi = b.vectors;
  while (lo < hi && !b.any(lo, t.key, t.key + t.keys)) lo++;
  while (hi > lo && !b.any(hi - 1, t.key, t.key + t.keys)) hi--;
  t.partial = t.keys < KEYS || !b.all(lo, hi, t.key, t.key + KEYS);
  if (t.partial) {
    int first = hi, past = lo;
    for (int v = lo; v < hi; v++) {
      const Rows rows = rows_of(t.row + v * LANES, t.last);
      Int some{};
      ROLLED for (int m = 0; m < t.keys; m++) {
        Int pairs = b.allowed(v, t.key + m);
        if (ASK) pairs &= mask(t.h, rows, t.first_key + t.key + m, c.captures, c.numbers);
        put(ok + m * QUERIES + v * LANES, pairs);
        some |= pairs;
      }
      if (any(some)) first = std::min(first, v), past = v + 1;
    }
    lo = first, hi = std::max(first, past);
  }
  t.v = lo, t.vectors = hi - lo;
  HAS_EFFECTS;
}
INLINE void find_pairs(const Call& c, const Block& b, Tile& t, Pairs& ok) {
  if (b.exact) find_pairs_by<false>(c, b, t, ok);
  else find_pairs_by<true>(c, b, t, ok);
}

// Tiles with pairs among a block of keys.
struct Live {
  int begin = KEY_GROUPS, end = 0;                 // groups of keys
  int lo[KEY_GROUPS], hi[KEY_GROUPS];                  // vectors of queries of each group
  int first[VECTORS], past[VECTORS];           // groups of keys of each vector

  Live() { for (int v = 0; v < VECTORS; v++) first[v] = KEY_GROUPS, past[v] = 0; }

  void add(int g, const Tile& t) {
    lo[g] = t.v, hi[g] = t.v + t.vectors;
    if (t.vectors) begin = std::min(begin, g), end = std::max(end, g + 1);
    for (int v = lo[g]; v < hi[g]; v++) first[v] = std::min(first[v], g), past[v] = std::max(past[v], g + 1);
  }
  bool none() const { return begin >= end; }
  bool has(int g, int v) const { return v >= lo[g] && v < hi[g]; }

  // The keys [first, end) of a block at `from` that queries [r, r + rows) may attend.
  void keys_of(const Block& b, int from, int to, int r, int rows, int& a, int& z) const {
    b.keys_of(r, rows, a, z);
    int one = KEY_GROUPS, last = 0;
    for (int v = r / LANES; v <= (r + rows - 1) / LANES; v++) one = std::min(one, first[v]), last = std::max(last, past[v]);
    a = std::max(a, from + one * KEYS), z = std::min(z, std::min(from + last * KEYS, to));
  }
  // The queries [first, end) that may attend one of the keys [key, key + count).
  void queries_of(const Block& b, int from, int key, int count, int& a, int& z) const {
    a = 0, z = b.queries;
    if (!b.all(0, b.vectors, key, key + count)) b.queries_of(key, key + count, a, z);
    int one = VECTORS, last = 0;
    for (int g = (key - from) / KEYS; g <= (key - from + count - 1) / KEYS; g++)
      if (lo[g] < hi[g]) one = std::min(one, lo[g]), last = std::max(last, hi[g]);
    a = std::max(a, one * LANES), z = std::min(z, last * LANES);
  }
};

// Products of a tile to `raw`, which has QUERIES columns; `factor` as for `multiply_to`.
template <int DIM, int NV = VECTORS> INLINE void product_tile(int vectors, const Operand<DIM>* const* rows, const real* packed, real factor, real* raw) {
  if constexpr (NV > 1)
    if (vectors < NV) return product_tile<DIM, NV - 1>(vectors, rows, packed, factor, raw);
  multiply_to<DIM, NV>(rows, packed, factor, raw);
}

}  // namespace flexjag
