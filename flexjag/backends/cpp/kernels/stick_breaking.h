// Stick-breaking: w_ij = b_ij prod_{k > j} (1 - b_ik) over allowed keys, b = sigmoid(s). Keys are walked from the last
// to the first, as each breaks its share off what the later ones left of a query's stick.
//
// What they took is summed while it is less than a half, and what they left is 1 minus that; from there on what they left
// is multiplied. So neither loses digits: shares that are tiny add up, and a stick that is almost gone stays exact.
// Nothing is left of it below the smallest normal number, and keys before that get exactly 0, forward and
// backward: a block of queries is done where no query has anything left.
//
// With g_ij = w_ij (do_i . v_j) and r_i the remainder, ds_ij = g_ij - b_ij (r_i dr_i + sum_{k <= j} g_ik): these sums run
// from the first key to the last. So the backward walks down the keys to find the weights, and up again. It holds those
// of HELD blocks of keys; where there are more, it notes the sticks every HELD blocks, and walks down from there again.
#pragma once
#include "backward.h"

namespace flexjag {

constexpr real TINY = Format<real>::tiny;

// What keys left and took of each query's stick, in two steps: sums along all keys would lose digits.
struct Sticks {
  alignas(64) real left[QUERIES], taken[QUERIES];            // by the keys of the blocks before, of the stick
  alignas(64) real block_left[QUERIES], block_taken[QUERIES];  // by those of the present block, of `left`

  // Whole sticks for `count` queries, and none for lanes behind them.
  void reset(int count) {
    for (int i = 0; i < QUERIES; i++) {
      left[i] = block_left[i] = i < count;
      taken[i] = block_taken[i] = i >= count;
    }
  }
  // True if nothing is left of the vectors [0, vectors). NaN is something.
  bool gone(int vectors) const {
    Int some{};
    for (int v = 0; v < vectors; v++) some |= ne(read(block_left + v * LANES), (real)0);
    return !any(some);
  }
  // End a block of keys.
  void settle(int vectors) {
    for (int i = 0; i < vectors * LANES; i += LANES) {
      const Vec whole = read(left + i), sum = read(taken + i) + whole * read(block_taken + i);
      const Vec rest = sum < (real)0.5 ? 1 - sum : whole * read(block_left + i);
      const auto is_gone = rest == Vec{};
      put(left + i, rest), put(taken + i, sum);
      put(block_left + i, is_gone ? Vec{} : all_lanes(1)), put(block_taken + i, is_gone ? all_lanes(1) : Vec{});
    }
    HAS_EFFECTS;
  }
};

// Weights of a tile from its products, which may lie in the same place, and shares b if they are kept; 0 where masked.
template <bool PARTIAL, bool KEEP>
static __attribute__((noinline)) void break_tile(const Call& c, const Tile& t, const Pairs& ok, const real* raw, real* weights, real* shares, Sticks& sticks) {
  for (int n = 0; n < t.vectors; n++) {
    const int v = t.v + n;
    const Rows rows = rows_of(t.row + v * LANES, t.last);
    const Vec whole = read(sticks.left + v * LANES);
    Vec left = read(sticks.block_left + v * LANES), taken = read(sticks.block_taken + v * LANES);
    ROLLED for (int m = (PARTIAL ? t.keys : KEYS) - 1; m >= 0; m--) {
      const int at = m * QUERIES + n * LANES;
      Vec x = score(read(raw + at), t.h, rows, t.first_key + t.key + m, c.captures, c.numbers);
      if (PARTIAL) x = where(read(ok + m * QUERIES + v * LANES), x, all_lanes(-INFINITE));
      x = whole == Vec{} ? all_lanes(-INFINITE) : x;  // also if it is NaN, as it may be in a lane without a query
      const Vec power = exp(-abs(x)), larger_part = 1 / (1 + power), smaller_part = power * larger_part;
      const auto is_positive = x >= Vec{};
      const Vec share = is_positive ? larger_part : smaller_part, part = share * left, weight = whole * part;
      taken += part;
      left = taken < (real)0.5 ? 1 - taken : left * (is_positive ? smaller_part : larger_part);
      put(weights + at, weight < TINY ? Vec{} : weight);
      if (KEEP) put(shares + at, share);
    }
    const auto is_gone = whole * left < TINY;
    put(sticks.block_left + v * LANES, is_gone ? Vec{} : left), put(sticks.block_taken + v * LANES, is_gone ? all_lanes(1) : taken);
  }
  HAS_EFFECTS;
}

// A walk of one block of queries along blocks of keys, which are counted from the last key on.
struct Walk {
  const Call& c;
  const KeyRows& kv;
  const Block& block;
  Ahead& ahead;
  const real* packed;   // queries as columns
  int first_key, keys;  // of the segment
  int64_t row, last;    // the block's first and last query (packed)
  int h;

  int start() const { return block.lo / KEYS * KEYS; }
  int end() const { return (block.hi + KEYS - 1) / KEYS * KEYS; }
  int blocks() const { return std::max(0, end() - start() + KEY_BLOCK - 1) / KEY_BLOCK; }
  int from(int n) const { return std::max(start(), end() - (n + 1) * KEY_BLOCK); }
  int to(int n) const { return std::min(end() - n * KEY_BLOCK, block.hi); }

  // Break the sticks by the keys of block n, the last one first, as long as anything is left. `raw` are their products,
  // which may be overwritten by the weights.
  template <bool KEEP> void down(int n, real* raw, real* weights, real* shares, Sticks& sticks, Pairs& ok, Live& live) const {
    for (int g = (to(n) - from(n) - 1) / KEYS; g >= 0 && !sticks.gone(block.vectors); g--) {
      const int key = from(n) + g * KEYS, at = g * KEYS * QUERIES;
      Tile t{key, std::min(KEYS, keys - key), first_key, row, last, 0, 0, h, false};
      find_pairs(c, block, t, ok);
      live.add(g, t);
      ahead.step();
      for (int v = 0; v < block.vectors; v++)
        if (!live.has(g, v)) for (int m = 0; m < KEYS; m++) put(weights + at + m * QUERIES + v * LANES, Vec{});
      if (!t.vectors) continue;
      const Operand<D>* rows[KEYS];
      for (int m = 0; m < KEYS; m++) rows[m] = kv.key(std::min(key + m, keys - 1));
      const int first = at + t.v * LANES;
      product_tile<D>(t.vectors, rows, packed + t.v * LANES, (real)c.scale, raw + first);
      real* kept = KEEP ? shares + first : nullptr;
      if (t.partial) break_tile<true, KEEP>(c, t, ok, raw + first, weights + first, kept, sticks);
      else break_tile<false, KEEP>(c, t, ok, raw + first, weights + first, kept, sticks);
    }
    sticks.settle(block.vectors);
  }
};

struct SticksForward : Forward {
  Sticks sticks;
};

static void break_block(const Call& c, const KeyRows& kv, const Item& item, int64_t h, int64_t row, int count, SticksForward& w, Found*, Ahead& ahead) {
  const int64_t s = item.segment;
  const int first_key = c.kv_offsets[s], keys = c.kv_offsets[s + 1] - first_key, which = c.mask_of ? c.mask_of[h] : 0;
  Block& b = w.block;
  b.take(c.outer[which], c.inner[which], c.num_q, row, count, c.segment(s));
  pack_queries(c.q, row, h, count, (real)c.scale, w.own, w.packed);
  std::memset(w.found.out, 0, count * WIDTH_E * sizeof(real));
  w.sticks.reset(count);
  const Walk walk{c, kv, b, ahead, w.packed, first_key, keys, row, row + count - 1, (int)h};
  for (int n = 0; n < walk.blocks() && !w.sticks.gone(b.vectors); n++) {
    const int from = walk.from(n);
    Live live;
    walk.down<false>(n, w.scores, w.scores, nullptr, w.sticks, w.ok, live);
    constexpr int ROWS = rows_at_once(vectors_of(E));
    for (int r = 0; r < count; r += ROWS) {
      const int rows = std::min(ROWS, count - r);
      int lo, hi;
      live.keys_of(b, from, walk.to(n), r, rows, lo, hi);
      if (lo < hi)
        multiply<E, IS_HALF, true>(rows, w.scores + r, QUERIES, kv.v + from * kv.v_step, kv.v_step, lo - from, hi - from, w.found.out + r * WIDTH_E, WIDTH_E, nullptr);
    }
  }
  for (int r = 0; r < count; r++) put_row(w.found.out + r * WIDTH_E, E, 1, c.out.row(row + r, h));
  std::memcpy(c.lse + h * c.num_q + row, w.sticks.left, count * sizeof(real));
}

constexpr int HELD = 6;

// Of a block of keys: products, weights and shares b, and its tiles with pairs.
struct Broken {
  alignas(64) real products[KEY_BLOCK * QUERIES], weights[KEY_BLOCK * QUERIES], shares[KEY_BLOCK * QUERIES];
  Live live;
};

struct SticksBackward : Backward {
  Broken broken[HELD];
  // Of each query, sums of g over the keys before: those of the remainder and earlier blocks, and of the present block.
  alignas(64) real before[QUERIES], block_before[QUERIES];
  Sticks sticks;
};

// Gradients by the products of a tile, which is at `first` in the block of keys, in place of those by its weights.
static __attribute__((noinline)) void mend_tile(const Call& c, const Tile& t, SticksBackward& w, const Broken& x, int first, double* const* totals) {
  const real *raw = x.products + first, *weights = x.weights + first, *shares = x.shares + first;
  real* by_weight = w.slopes + first;
  for (int n = 0; n < t.vectors; n++) {
    const Rows rows = rows_of(t.row + (t.v + n) * LANES, t.last);
    const Vec before = read(w.before + (t.v + n) * LANES);
    Vec sum = read(w.block_before + (t.v + n) * LANES);
    ROLLED for (int m = 0; m < t.keys; m++) {
      const int kv = t.first_key + t.key + m, at = m * QUERIES + n * LANES;
      const Vec product = read(raw + at), share = read(shares + at);
      const auto some = share != Vec{};  // a key that takes nothing has no gradient, also if its value is NaN
      const Vec flow = some ? read(weights + at) * read(by_weight + at) : Vec{};
      sum += flow;
      const Vec x = some ? flow - share * (before + sum) : Vec{};
      slopes(x, product, t.h, rows, kv, c.captures, c.numbers, totals);
      const Vec ds = dscore(x, product, t.h, rows, kv, c.captures, c.numbers);
      put(by_weight + at, x != Vec{} ? ds : Vec{});  // also if the derivative is NaN
    }
    put(w.block_before + (t.v + n) * LANES, sum);
  }
  HAS_EFFECTS;
}

// Add the gradients by block n of keys.
static void mend(const Walk& walk, int n, const Broken& x, SticksBackward& w, real* dk, real* dv, double* const* totals) {
  const Block& b = walk.block;
  const Live& live = x.live;
  const int from = walk.from(n);
  if (live.none()) return;
  std::fill(w.block_before, w.block_before + QUERIES, (real)0);
  for (int g = live.begin; g < live.end; g++) {
    const int key = from + g * KEYS, at = g * KEYS * QUERIES, first = at + live.lo[g] * LANES;
    for (int v = 0; v < b.vectors; v++)
      if (!live.has(g, v)) for (int m = 0; m < KEYS; m++) put(w.slopes + at + m * QUERIES + v * LANES, Vec{});
    const Tile t{key, std::min(KEYS, walk.keys - key), walk.first_key, walk.row, walk.last, live.lo[g], live.hi[g] - live.lo[g], walk.h, false};
    if (!t.vectors) continue;
    const Operand<E>* rows[KEYS];
    for (int m = 0; m < KEYS; m++) rows[m] = walk.kv.value(std::min(key + m, walk.keys - 1));
    product_tile<E>(t.vectors, rows, w.packed_g + t.v * LANES, (real)walk.c.factor, w.slopes + first);
    mend_tile(walk.c, t, w, x, first, totals);
  }
  for (int i = 0; i < QUERIES; i += LANES) put(w.before + i, read(w.before + i) + read(w.block_before + i));
  add_products(walk.kv, live, from, walk.to(n), x.weights, w, dk, dv, walk.ahead);
}

static void mend_block(const Call& c, const KeyRows& kv, int64_t s, int64_t h, int64_t row, int count, real* dk, real* dv,
                       double* const* totals, SticksBackward& w, Ahead& ahead) {
  const int first_key = c.kv_offsets[s], keys = c.kv_offsets[s + 1] - first_key, which = c.mask_of ? c.mask_of[h] : 0;
  Block& b = w.block;
  b.take(c.outer[which], c.inner[which], c.num_q, row, count, c.segment(s));
  pack_block(c, row, h, w);
  std::memset(w.dq, 0, count * WIDTH_D * sizeof(real));
  const int64_t at = h * c.num_q + row;
  for (int r = 0; r < QUERIES; r++) w.before[r] = c.grad_lse && r < count ? c.grad_lse[at + r] * c.lse[at + r] : 0;
  const Walk walk{c, kv, b, ahead, w.packed_q, first_key, keys, row, row + count - 1, (int)h};
  const auto down = [&](int n) {
    Broken& x = w.broken[n % HELD];
    x.live = Live();
    walk.down<true>(n, x.products, x.weights, x.shares, w.sticks, w.ok, x.live);
  };
  std::vector<Sticks> notes;
  w.sticks.reset(count);
  int n = 0;
  for (; n < walk.blocks() && !w.sticks.gone(b.vectors); n++) {
    if (n % HELD == 0) notes.push_back(w.sticks);
    down(n);
  }
  for (bool held = true; n > 0; held = false) {
    const int first = (n - 1) / HELD * HELD;
    if (!held) {
      w.sticks = notes[first / HELD];
      for (int i = first; i < n; i++) down(i);
    }
    for (; n > first; n--) mend(walk, n - 1, w.broken[(n - 1) % HELD], w, dk, dv, totals);
  }
  for (int r = 0; r < count; r++) put_row(w.dq + r * WIDTH_D, D, (real)c.scale, c.dq.row(row + r, h));
}

}  // namespace flexjag
