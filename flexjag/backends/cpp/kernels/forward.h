// The forward: blocks of queries over blocks of keys, with a running maximum and sum for a softmax.
#pragma once
#include <map>

#include "tiles.h"

namespace flexjag {

constexpr real NO_KEYS = NORMALIZER == Normalizer::stick_breaking ? 1 : -std::numeric_limits<real>::infinity();  // lse of such a row
constexpr real PER_LOG = (real)1.4426950408889634;  // exp(x) = exp2(PER_LOG x)
constexpr real LOWEST = std::numeric_limits<real>::lowest();
constexpr real INFINITE = std::numeric_limits<real>::infinity();
constexpr int WIDTH_D = vectors_of(D) * LANES, WIDTH_E = vectors_of(E) * LANES;

// Scores of a tile from its products, in place: -inf where masked (0 without a softmax); tops: the queries' maxima.
template <bool PARTIAL> static __attribute__((noinline)) void score_tile(const Call& c, const Tile& t, const Pairs& ok, real* scores, real* tops) {
  for (int n = 0; n < t.vectors; n++) {
    const Rows rows = rows_of(t.row + (t.v + n) * LANES, t.last);
    Vec top = SOFTMAX ? read(tops + n * LANES) : Vec{};
    ROLLED for (int m = 0; m < (PARTIAL ? t.keys : KEYS); m++) {
      real* at = scores + m * QUERIES + n * LANES;
      Vec x = score(read(at), t.h, rows, t.first_key + t.key + m, c.captures, c.numbers);
      if (PARTIAL) x = where(read(ok + m * QUERIES + (t.v + n) * LANES), x, all_lanes(SOFTMAX ? -INFINITE : 0));
      put(at, x);
      if (SOFTMAX) top = x > top ? x : top;
    }
    if (SOFTMAX) put(tops + n * LANES, top);
  }
  HAS_EFFECTS;
}

// What a block of queries found in some of the keys: maxima, sums and outputs before the division by the sums.
struct Found {
  alignas(64) real top[QUERIES], sum[QUERIES], out[QUERIES * WIDTH_E];
};

struct Forward {
  Found found;
  alignas(64) real packed[D * QUERIES], scores[KEY_BLOCK * QUERIES];
  alignas(64) real own[QUERIES * WIDTH_D];  // queries as rows of `real`, if they are of 16 bits, or few
  alignas(64) real before[QUERIES], shrink[QUERIES];
  Pairs ok;
  Block block;
};

// Queries as columns: of `real`, times the scale, or of pairs.
INLINE void pack_queries(const Rows3& q, int64_t row, int64_t h, int count, real scale, real* own, real* packed) {
  if constexpr (IS_HALF) {
    for (int r = 0; r < count; r++) {
      if constexpr (PAIRED<D>) keep_pairs<D>(q.row(row + r, h), r, own);
      else copy_row(q.row(row + r, h), D, own + r * WIDTH_D);
    }
    pack_columns<D>(own, WIDTH_D, own, count, scale, packed);
  } else {
    transpose<D>((const real*)q.row(row, h), q.token, count, scale, packed);
  }
}

// Write the results of a block of queries.
static void finish_block(const Call& c, int64_t h, int64_t row, int count, Found& f) {
  real factor[QUERIES];
  if (SOFTMAX) {
    for (int i = 0; i < count; i += LANES) {
      const Vec sum = read(f.sum + i), nothing{};
      put(factor + i, sum == nothing ? nothing : 1 / sum);
      put(f.top + i, sum == nothing ? nothing - INFINITE : read(f.top + i) + log(sum));
    }
    std::memcpy(c.lse + h * c.num_q + row, f.top, count * sizeof(real));
  }
  for (int r = 0; r < count; r++) put_row(f.out + r * WIDTH_E, E, SOFTMAX ? factor[r] : (real)c.factor, c.out.row(row + r, h));
}

// Add what was found in later keys.
static void merge(Found& f, const Found& other, int count) {
  real mine[QUERIES], theirs[QUERIES];
  for (int i = 0; i < count; i += LANES) {
    const Vec a = read(f.top + i), b = read(other.top + i), top = b > a ? b : a;
    const Vec x = exp2((a - top) * PER_LOG), y = exp2((b - top) * PER_LOG);
    put(mine + i, x), put(theirs + i, y), put(f.top + i, top);
    put(f.sum + i, read(f.sum + i) * x + read(other.sum + i) * y);
  }
  for (int r = 0; r < count; r++)
    for (int i = r * WIDTH_E; i < (r + 1) * WIDTH_E; i += LANES) put(f.out + i, read(f.out + i) * mine[r] + read(other.out + i) * theirs[r]);
}

// Attend the keys of an item. If they are a piece of the segment's, what was found is left in `piece`.
static void attend_block(const Call& c, const KeyRows& kv, const Item& item, int64_t h, int64_t row, int count, Forward& w, Found* piece, Ahead& ahead) {
  Found& f = piece ? *piece : w.found;
  const int64_t s = item.segment;
  const int first_key = c.kv_offsets[s], keys = c.kv_offsets[s + 1] - first_key, which = c.mask_of ? c.mask_of[h] : 0;
  const int64_t last = row + count - 1;
  Block& b = w.block;
  b.take(c.outer[which], c.inner[which], c.num_q, row, count, c.segment(s));
  if (count > FEW) pack_queries(c.q, row, h, count, (real)c.scale, w.own, w.packed);
  else for (int r = 0; r < count; r++) keep_few<D>(c.q.row(row + r, h), r, w.own);
  for (int i = 0; i < b.vectors * LANES; i += LANES) put(f.top + i, all_lanes(LOWEST)), put(f.sum + i, Vec{});
  std::memset(f.out, 0, count * WIDTH_E * sizeof(real));
  bool first = true;
  const int last_key = std::min(b.hi, item.key_end);
  for (int from = std::max(b.lo / KEYS * KEYS, item.key); from < last_key; from += KEY_BLOCK) {
    const int to = std::min(from + KEY_BLOCK, last_key);
    Live live;
    if (SOFTMAX) std::memcpy(w.before, f.top, b.vectors * LANES * sizeof(real));
    for (int key = from, g = 0; key < to; key += KEYS, g++) {
      Tile t{key, std::min(KEYS, keys - key), first_key, row, last, 0, 0, (int)h, false};
      find_pairs(c, b, t, w.ok);
      live.add(g, t);
      ahead.step();
      if (!t.vectors) continue;
      const Operand<D>* rows[KEYS];
      for (int m = 0; m < KEYS; m++) rows[m] = kv.key(std::min(key + m, keys - 1));
      real *scores = w.scores + g * KEYS * QUERIES + t.v * LANES, *tops = f.top + t.v * LANES;
      if (count > FEW) product_tile<D>(t.vectors, rows, w.packed + t.v * LANES, (real)c.scale, scores);
      else multiply_few<D, IS_HALF>(rows, w.own, count, (real)c.scale, scores);
      if (t.partial) score_tile<true>(c, t, w.ok, scores, tops);
      else score_tile<false>(c, t, w.ok, scores, tops);
    }
    if (live.none()) continue;
    if (SOFTMAX && !first)
      for (int i = 0; i < b.vectors * LANES; i += LANES) {
        const Vec factor = exp2((read(w.before + i) - read(f.top + i)) * PER_LOG);
        put(w.shrink + i, factor);
        put(f.sum + i, read(f.sum + i) * factor);
      }
    for (int g = live.begin; g < live.end; g++) {
      const int some = std::min(KEYS, to - from - g * KEYS);
      for (int v = 0; v < b.vectors; v++) {
        real* x = w.scores + g * KEYS * QUERIES + v * LANES;
        if (!live.has(g, v)) {
          for (int m = 0; m < KEYS; m++) put(x + m * QUERIES, Vec{});
        } else if (SOFTMAX) {
          const Vec top = read(f.top + v * LANES);
          Vec sum = read(f.sum + v * LANES);
          if (some == KEYS)
            UNROLL for (int m = 0; m < KEYS; m++) {
              const Vec p = exp2((read(x + m * QUERIES) - top) * PER_LOG);
              put(x + m * QUERIES, p);
              sum += p;
            }
          else
            for (int m = 0; m < some; m++) {
              const Vec p = exp2((read(x + m * QUERIES) - top) * PER_LOG);
              put(x + m * QUERIES, p);
              sum += p;
            }
          put(f.sum + v * LANES, sum);
        }
      }
    }
    constexpr int ROWS = rows_at_once(vectors_of(E));
    for (int r = 0; r < count; r += ROWS) {
      const int rows = std::min(ROWS, count - r);
      int lo, hi;
      live.keys_of(b, from, to, r, rows, lo, hi);
      ahead.step();
      if (lo < hi || !first)
        multiply<E, IS_HALF, true>(rows, w.scores + r, QUERIES, kv.v + from * kv.v_step, kv.v_step, lo - from, std::max(lo, hi) - from,
                                              f.out + r * WIDTH_E, WIDTH_E, SOFTMAX && !first ? w.shrink + r : nullptr);
    }
    first = false;
  }
  if (!piece) finish_block(c, h, row, count, f);
}

// True if an item has a part of its segment's keys only.
inline bool is_piece(const Call& c, const Item& x) { return x.key > 0 || x.key_end < c.kv_offsets[x.segment + 1] - c.kv_offsets[x.segment]; }

// Merge the pieces of each segment and group, by their order.
static void merge_pieces(const Call& c, const Schedule& work, const std::vector<int64_t>& slots, Found* pieces) {
  const int64_t heads = c.heads / c.groups;
  std::map<std::pair<int32_t, int32_t>, std::vector<int64_t>> parts;
  for (int64_t i = 0; i < (int64_t)slots.size(); i++)
    if (slots[i] >= 0) {
      const Item& item = work.items[i];
      std::vector<int64_t>& mine = parts[{item.segment, item.group}];
      mine.resize(item.parts);
      mine[item.part] = slots[i];
    }
  for (const auto& [at, mine] : parts) {
    const int64_t row = c.q_offsets[at.first];
    const int count = (int)(c.q_offsets[at.first + 1] - row);
    for (int64_t x = 0; x < heads; x++) {
      for (size_t p = 1; p < mine.size(); p++) merge(pieces[mine[0] + x], pieces[mine[p] + x], count);
      finish_block(c, at.second * heads + x, row, count, pieces[mine[0] + x]);
    }
  }
}

// The forward by a function of blocks of queries, which computes in `Space`.
template <class Space, void (*block)(const Call&, const KeyRows&, const Item&, int64_t, int64_t, int, Space&, Found*, Ahead&)> static Status forward(const Call& c) {
  if (const Status wrong = check(c)) return wrong;
  Schedule work;
  cut(c, false, work);
  fill_bins(c.threads, 0, work);
  const int64_t end = c.q_offsets[c.segments], n = (int64_t)work.items.size(), heads = c.heads / c.groups;
  fill_rows(c.out, c.heads, E, 0, c.q_offsets[0]), fill_rows(c.out, c.heads, E, end, c.num_q);
  for (int64_t h = 0; h < c.heads; h++) {
    real* lse = c.lse + h * c.num_q;
    std::fill(lse, lse + c.q_offsets[0], NO_KEYS), std::fill(lse + end, lse + c.num_q, NO_KEYS);
  }
  std::vector<int64_t> slots(n, -1);  // of items that are pieces, by their place
  int64_t num_pieces = 0;
  for (int64_t i = 0; i < n; i++)
    if (is_piece(c, work.items[i])) slots[i] = num_pieces, num_pieces += heads;
  Room<Found> pieces(num_pieces);
  int64_t next = 0;
  on_threads(std::min<int64_t>(c.threads, work.bins()), [&](int64_t) {
    Room<Space> room(1);
    KeyRows kv;
    work_through(work, next, [&](int64_t, int64_t i, int64_t j) {
      const Item& item = work.items[i];
      Ahead ahead;
      if (j >= 0) {
        const Item& later = work.items[j];
        const int64_t q0 = c.q_offsets[later.segment] + later.first, k0 = c.kv_offsets[later.segment];
        for (int64_t x = 0; x < std::min<int64_t>(heads, 2); x++) ahead.add(c.q, q0, later.group * heads + x, later.end - later.first, D);
        if (later.segment != item.segment || later.group != item.group) {
          const int64_t keys = c.kv_offsets[later.segment + 1] - k0;
          ahead.add(c.k, k0, later.group, keys, D), ahead.add(c.v, k0, later.group, keys, E);
        }
        ahead.spread(item, heads, 1, 1.0 / rows_at_once(vectors_of(E)));
      }
      kv.take<!PAIRED<D>, true>(c, item.segment, item.group);
      const int64_t from = c.q_offsets[item.segment];
      for (int64_t x = 0; x < heads; x++)
        for (int64_t a = (item.end - 1) / QUERIES * QUERIES; a >= item.first; a -= QUERIES)
          block(c, kv, item, item.group * heads + x, from + a, (int)std::min<int64_t>(QUERIES, item.end - a), *room.at, slots[i] < 0 ? nullptr : pieces.at + slots[i] + x,
                ahead);
    });
  });
  if (num_pieces) merge_pieces(c, work, slots, pieces.at);
  return DONE;
}

}  // namespace flexjag
