// The backward: one pass over blocks of queries, whose weights are computed again. The gradients of keys and values are
// summed in a buffer of the item; a segment that was cut has one per item, added in their order afterwards.
#pragma once
#include <tuple>

#include "forward.h"

namespace flexjag {

struct Backward {
  alignas(64) real packed_q[D * QUERIES], packed_g[E * QUERIES];
  alignas(64) real q[QUERIES * WIDTH_D], g[QUERIES * WIDTH_E], dq[QUERIES * WIDTH_D];
  alignas(64) real q_pairs[PAIRED<D> ? D / 2 * QUERIES : 1], g_pairs[PAIRED<E> ? E / 2 * QUERIES : 1];
  alignas(64) real weights[KEY_BLOCK * QUERIES], slopes[KEY_BLOCK * QUERIES];  // P and dS
  alignas(64) real raw[KEYS * QUERIES];                                        // products of a tile
  Pairs ok;
  alignas(64) real lse[QUERIES], delta[QUERIES];
  Block block;
};

// Weights of a tile from its products.
template <bool PARTIAL> static __attribute__((noinline)) void weight_tile(const Call& c, const Tile& t, Backward& w, real* weights) {
  for (int n = 0; n < t.vectors; n++) {
    const int v = t.v + n;
    const Rows rows = rows_of(t.row + v * LANES, t.last);
    const Vec lse = read(w.lse + v * LANES);
    ROLLED for (int m = 0; m < (PARTIAL ? t.keys : KEYS); m++) {
      Vec x = score(read(w.raw + m * QUERIES + n * LANES), t.h, rows, t.first_key + t.key + m, c.captures, c.numbers);
      if (SOFTMAX) x = where(eq(lse, INFINITE), Vec{}, exp2((x - lse) * PER_LOG));  // 0 of rows without keys, also if x is NaN
      if (PARTIAL) {
        x = where(read(w.ok + m * QUERIES + v * LANES), x, Vec{});
      }
      put(weights + m * QUERIES + n * LANES, x);
    }
  }
  HAS_EFFECTS;
}

// Gradients by the products of a tile, in place of those by its weights.
template <bool PARTIAL>
static __attribute__((noinline)) void slope_tile(const Call& c, const Tile& t, Backward& w, const real* weights, real* by_weight, double* const* totals) {
  for (int n = 0; n < t.vectors; n++) {
    const int v = t.v + n;
    const Rows rows = rows_of(t.row + v * LANES, t.last);
    const Vec delta = read(w.delta + v * LANES);
    ROLLED for (int m = 0; m < (PARTIAL ? t.keys : KEYS); m++) {
      const int kv = t.first_key + t.key + m, at = m * QUERIES + n * LANES;
      const Vec raw = read(w.raw + at);
      Vec x = read(by_weight + at);
      if (SOFTMAX) x = read(weights + at) * (x - delta);
      if (PARTIAL) x = where(read(w.ok + m * QUERIES + v * LANES), x, Vec{});  // also if the key is NaN
      slopes(x, raw, t.h, rows, kv, c.captures, c.numbers, totals);
      const Vec ds = dscore(x, raw, t.h, rows, kv, c.captures, c.numbers);
      put(by_weight + at, where(ne(x, (real)0), ds, Vec{}));  // also if the derivative is NaN
    }
  }
  HAS_EFFECTS;
}

// Queries and gradients of a block, as rows and as columns, and what the softmax needs of each query.
INLINE void pack_block(const Call& c, int64_t row, int64_t h, Backward& w) {
  const Block& b = w.block;
  for (int r = 0; r < b.vectors * LANES; r++) {
    real *q = w.q + r * WIDTH_D, *g = w.g + r * WIDTH_E;
    const int64_t at = h * c.num_q + row + r;
    w.lse[r] = INFINITE, w.delta[r] = 0;
    if (r >= b.queries || !b.attends(r) || (SOFTMAX && c.lse[at] == -INFINITE)) {
      for (int i = 0; i < WIDTH_D; i += LANES) put(q + i, Vec{});
      for (int i = 0; i < WIDTH_E; i += LANES) put(g + i, Vec{});
      keep_pairs<D>(nullptr, r, w.q_pairs), keep_pairs<E>(nullptr, r, w.g_pairs);
      continue;
    }
    const element *own_q = c.q.row(row + r, h), *own_g = c.grad.row(row + r, h), *out = c.out.row(row + r, h);
    keep_pairs<D>(own_q, r, w.q_pairs), keep_pairs<E>(own_g, r, w.g_pairs);
    Vec sum{};
    for (int i = 0; i < WIDTH_D; i += LANES) put(q + i, load_row(own_q + i, D - i) * (real)c.scale);
    for (int i = 0; i < WIDTH_E; i += LANES) {
      const Vec x = load_row(own_g + i, E - i);
      put(g + i, SOFTMAX ? x : x * (real)c.factor);
      if (SOFTMAX) sum += x * load_row(out + i, E - i);
    }
    if (SOFTMAX) w.lse[r] = c.lse[at], w.delta[r] = flexjag::sum(sum) - (c.grad_lse ? c.grad_lse[at] : 0);
  }
  pack_columns<D>(w.q, WIDTH_D, w.q_pairs, b.vectors * LANES, 1, w.packed_q);
  pack_columns<E>(w.g, WIDTH_E, w.g_pairs, b.vectors * LANES, 1, w.packed_g);
}

// Add what the keys of a block get from queries and what they give, by their weights and slopes.
static void add_products(const KeyRows& kv, const Live& live, int from, int to, const real* by_key, Backward& w, real* dk, real* dv, Ahead& ahead) {
  const Block& b = w.block;
  const int first = from + live.begin * KEYS, past = std::min(from + live.end * KEYS, to);
  const auto add_keys = [&](auto columns, const real* weights, const real* rows, real* sums) {
    constexpr int COLUMNS = decltype(columns)::value, WIDTH = vectors_of(COLUMNS) * LANES, ROWS = rows_at_once(vectors_of(COLUMNS));
    for (int key = first; key < past; key += ROWS) {
      const int some = std::min(ROWS, past - key);
      int lo, hi;
      live.queries_of(b, from, key, some, lo, hi);
      ahead.step();
      if (lo < hi)
        multiply<COLUMNS, true, false>(some, weights + (key - from) * QUERIES, QUERIES, rows, WIDTH, lo, hi, sums + (int64_t)key * WIDTH, WIDTH, nullptr);
    }
  };
  add_keys(std::integral_constant<int, E>{}, by_key, w.g, dv);
  add_keys(std::integral_constant<int, D>{}, w.slopes, w.q, dk);
  constexpr int ROWS = rows_at_once(vectors_of(D));
  for (int r = 0; r < b.queries; r += ROWS) {
    const int rows = std::min(ROWS, b.queries - r);
    int lo, hi;
    live.keys_of(b, from, to, r, rows, lo, hi);
    ahead.step();
    if (lo < hi)
      multiply<D, IS_HALF, true>(rows, w.slopes + r, QUERIES, kv.k + from * kv.k_step, kv.k_step, lo - from, hi - from, w.dq + r * WIDTH_D, WIDTH_D, nullptr);
  }
}

static void differentiate_block(const Call& c, const KeyRows& kv, int64_t s, int64_t h, int64_t row, int count, real* dk, real* dv,
                                double* const* totals, Backward& w, Ahead& ahead) {
  const int first_key = c.kv_offsets[s], keys = c.kv_offsets[s + 1] - first_key, which = c.mask_of ? c.mask_of[h] : 0;
  const int64_t last = row + count - 1;
  Block& b = w.block;
  b.take(c.outer[which], c.inner[which], c.num_q, row, count, c.segment(s));
  pack_block(c, row, h, w);
  std::memset(w.dq, 0, count * WIDTH_D * sizeof(real));
  for (int from = b.lo / KEYS * KEYS; from < b.hi; from += KEY_BLOCK) {
    const int to = std::min(from + KEY_BLOCK, b.hi);
    Live live;
    for (int key = from, g = 0; key < to; key += KEYS, g++) {
      Tile t{key, std::min(KEYS, keys - key), first_key, row, last, 0, 0, (int)h, false};
      const int at = g * KEYS * QUERIES;
      find_pairs(c, b, t, w.ok);
      live.add(g, t);
      ahead.step();
      for (int v = 0; v < b.vectors; v++)
        if (!live.has(g, v)) for (int m = 0; m < KEYS; m++) put(w.weights + at + m * QUERIES + v * LANES, Vec{}), put(w.slopes + at + m * QUERIES + v * LANES, Vec{});
      if (!t.vectors) continue;
      const Operand<D>* k_rows[KEYS];
      const Operand<E>* v_rows[KEYS];
      for (int m = 0; m < KEYS; m++) {
        const int64_t j = std::min(key + m, keys - 1);
        k_rows[m] = kv.key(j), v_rows[m] = kv.value(j);
      }
      real *weights = w.weights + at + t.v * LANES, *by_weight = w.slopes + at + t.v * LANES;
      product_tile<D>(t.vectors, k_rows, w.packed_q + t.v * LANES, (real)c.scale, w.raw);
      product_tile<E>(t.vectors, v_rows, w.packed_g + t.v * LANES, SOFTMAX ? 1 : (real)c.factor, by_weight);
      if (t.partial) weight_tile<true>(c, t, w, weights), slope_tile<true>(c, t, w, weights, by_weight, totals);
      else weight_tile<false>(c, t, w, weights), slope_tile<false>(c, t, w, weights, by_weight, totals);
    }
    if (live.none()) continue;
    add_products(kv, live, from, to, w.weights, w, dk, dv, ahead);
  }
  for (int r = 0; r < count; r++) put_row(w.dq + r * WIDTH_D, D, (real)c.scale, c.dq.row(row + r, h));
}

// Gradients of keys and values of one item: a range of the segment's keys.
struct Sums {
  int lo = 0, hi = 0;
  real* at = nullptr;  // [hi - lo, WIDTH_D] of keys, then [hi - lo, WIDTH_E] of values

  real* keys() const { return at - (int64_t)lo * WIDTH_D; }
  real* values() const { return at + (int64_t)(hi - lo) * WIDTH_D - (int64_t)lo * WIDTH_E; }
  int64_t size() const { return (int64_t)(hi - lo) * (WIDTH_D + WIDTH_E); }
};

// The range of keys that an item's queries may attend, widened to whole groups of keys.
inline void key_range(const Call& c, const Item& item, int& lo, int& hi) {
  const Segment x = c.segment(item.segment);
  const int64_t heads = c.heads / c.groups;
  lo = x.keys, hi = 0;
  for (int64_t h = 0; h < (c.mask_of ? heads : 1); h++) {
    const SpanRows& o = c.outer[c.mask_of ? c.mask_of[item.group * heads + h] : 0];
    for (int64_t s = 0; s < o.count; s++) for (int64_t r = x.row + item.first; r < x.row + item.end; r++) {
      int32_t a, b;
      o.of_row(s, c.num_q, r, x, a, b);
      if (b > a) lo = std::min(lo, a), hi = std::max(hi, b);
    }
  }
  if (lo >= hi) lo = hi = 0;
  lo = lo / KEYS * KEYS;
}

// The backward by a function of blocks of queries, which computes in `Space`.
template <class Space, void (*block)(const Call&, const KeyRows&, int64_t, int64_t, int64_t, int, real*, real*, double* const*, Space&, Ahead&)>
static Status backward(const Call& c) {
  if (const Status wrong = check(c)) return wrong;
  Schedule work;
  cut(c, true, work);
  int64_t entries = 0;
  for (int64_t i = 0; i < c.num_learned; i++) entries += c.total_sizes[i];
  const int64_t fit = std::max<int64_t>(1, (int64_t)(64 << 20) / std::max<int64_t>(1, entries * 8));
  fill_bins(c.threads, entries ? std::min<int64_t>(4 * c.threads, fit) : 0, work);
  const int64_t bins = work.bins(), n = (int64_t)work.items.size(), heads = c.heads / c.groups;
  const int64_t q_end = c.q_offsets[c.segments], k_end = c.kv_offsets[c.segments];
  fill_rows(c.dq, c.heads, D, 0, c.q_offsets[0]), fill_rows(c.dq, c.heads, D, q_end, c.num_q);
  fill_rows(c.dk, c.groups, D, 0, c.kv_offsets[0]), fill_rows(c.dk, c.groups, D, k_end, c.num_kv);
  fill_rows(c.dv, c.groups, E, 0, c.kv_offsets[0]), fill_rows(c.dv, c.groups, E, k_end, c.num_kv);
  for (int64_t s = 0; s < c.segments; s++)
    if (c.q_offsets[s] == c.q_offsets[s + 1]) {
      fill_rows(c.dk, c.groups, D, c.kv_offsets[s], c.kv_offsets[s + 1]);
      fill_rows(c.dv, c.groups, E, c.kv_offsets[s], c.kv_offsets[s + 1]);
    }
  std::vector<Sums> sums(n);
  for (int64_t i = 0; i < n; i++)
    if (work.items[i].parts > 1) {
      Sums& x = sums[i];
      key_range(c, work.items[i], x.lo, x.hi);
      x.at = (real*)aligned_alloc(64, (std::max<int64_t>(x.size(), 1) * sizeof(real) + 63) / 64 * 64);
    }
  Room<double> all_totals(bins * entries);
  std::memset(all_totals.at, 0, bins * entries * sizeof(double));
  int64_t next = 0;
  on_threads(std::min<int64_t>(c.threads, std::max<int64_t>(bins, 1)), [&](int64_t) {
    Room<Space> room(1);
    Room<real> own((int64_t)work.longest_keys * (WIDTH_D + WIDTH_E));
    KeyRows kv;
    std::vector<double*> totals(std::max<int64_t>(c.num_learned, 1));
    int64_t filled = -1;
    work_through(work, next, [&](int64_t bin, int64_t i, int64_t j) {
      if (bin != filled) {
        double* at = all_totals.at + bin * entries;
        for (int64_t x = 0; x < c.num_learned; x++) totals[x] = c.total_sizes[x] ? at : c.totals[x], at += c.total_sizes[x];
        filled = bin;
      }
      const Item& item = work.items[i];
      Ahead ahead;
      if (j >= 0) {
        const Item& later = work.items[j];
        const int64_t q0 = c.q_offsets[later.segment] + later.first, k0 = c.kv_offsets[later.segment], h = later.group * heads;
        const int64_t queries = later.end - later.first, keys = c.kv_offsets[later.segment + 1] - k0;
        ahead.add(c.q, q0, h, queries, D), ahead.add(c.grad, q0, h, queries, E);
        if (SOFTMAX) ahead.add(c.out, q0, h, queries, E);
        if (later.segment != item.segment || later.group != item.group) ahead.add(c.k, k0, later.group, keys, D), ahead.add(c.v, k0, later.group, keys, E);
        ahead.spread(item, heads, 1 + 2.0 * KEYS / rows_at_once(vectors_of(D)), 1.0 / rows_at_once(vectors_of(D)));
      }
      const int64_t from = c.q_offsets[item.segment], first_key = c.kv_offsets[item.segment];
      Sums mine = sums[i];
      if (item.parts == 1) mine = {0, (int)(c.kv_offsets[item.segment + 1] - first_key), own.at};
      std::memset(mine.at, 0, mine.size() * sizeof(real));
      kv.take<true, !PAIRED<E>>(c, item.segment, item.group);
      for (int64_t x = 0; x < heads; x++)
        for (int64_t a = item.first; a < item.end; a += QUERIES)
          block(c, kv, item.segment, item.group * heads + x, from + a, (int)std::min<int64_t>(QUERIES, item.end - a), mine.keys(), mine.values(),
                totals.data(), *room.at, ahead);
      if (item.parts == 1)
        for (int64_t r = 0; r < mine.hi; r++) {
          put_row(mine.keys() + r * WIDTH_D, D, 1, c.dk.row(first_key + r, item.group));
          put_row(mine.values() + r * WIDTH_E, E, 1, c.dv.row(first_key + r, item.group));
        }
    });
  });
  // The parts of a segment and group, by their order.
  std::vector<int64_t> order(n), heads_of;
  for (int64_t i = 0; i < n; i++) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const Item &x = work.items[a], &y = work.items[b];
    return std::tie(x.segment, x.group, x.part) < std::tie(y.segment, y.group, y.part);
  });
  for (int64_t i = 0; i < n; i++) if (work.items[order[i]].parts > 1 && work.items[order[i]].part == 0) heads_of.push_back(i);
  next = 0;
  if (!heads_of.empty()) on_threads(std::min<int64_t>(c.threads, (int64_t)heads_of.size()), [&](int64_t) {
    Room<real> row(WIDTH_D + WIDTH_E);
    for (int64_t x; (x = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < (int64_t)heads_of.size();) {
      const Item& item = work.items[order[heads_of[x]]];
      const int64_t first_key = c.kv_offsets[item.segment], keys = c.kv_offsets[item.segment + 1] - first_key;
      for (int64_t r = 0; r < keys; r++) {
        real *k = row.at, *v = row.at + WIDTH_D;
        std::memset(row.at, 0, (WIDTH_D + WIDTH_E) * sizeof(real));
        for (int p = 0; p < item.parts; p++) {
          const Sums& from = sums[order[heads_of[x] + p]];
          if (r < from.lo || r >= from.hi) continue;
          for (int i = 0; i < WIDTH_D; i += LANES) put(k + i, read(k + i) + read(from.keys() + r * WIDTH_D + i));
          for (int i = 0; i < WIDTH_E; i += LANES) put(v + i, read(v + i) + read(from.values() + r * WIDTH_E + i));
        }
        put_row(k, D, 1, c.dk.row(first_key + r, item.group));
        put_row(v, E, 1, c.dv.row(first_key + r, item.group));
      }
    }
  });
  for (Sums& x : sums) if (x.at) free(x.at);
  for (int64_t i = 0, at = 0; i < c.num_learned; at += c.total_sizes[i++])
    for (int64_t j = 0; j < c.total_sizes[i]; j++) {
      double sum = 0;
      for (int64_t b = 0; b < bins; b++) sum += all_totals.at[b * entries + at + j];
      c.totals[i][j] = sum;
    }
  return DONE;
}

}  // namespace flexjag
