// Items of work, longest first, and the threads that claim them.
#pragma once
#include "call.h"
#include "kernels/cpp/threads.h"

namespace flexjag {

constexpr bool SOFTMAX = NORMALIZER == Normalizer::softmax;

// Queries [first, end) of a segment, for all heads of a group.
struct Item {
  int32_t segment, group, first, end;
  int32_t part, parts;  // of the segment's items in this group; their order is that of the queries or keys
  int32_t key, key_end;  // of the segment; a few queries with many keys are cut along the keys
  double cost;          // estimated number of scores
};

// Bins of items; one thread works through a bin in order.
struct Schedule {
  std::vector<Item> items;
  std::vector<int32_t> starts;  // of the bins, and the end of the last
  int longest_keys = 0;

  int64_t bins() const { return (int64_t)starts.size() - 1; }
};

constexpr int32_t MANY_KEYS = 2048;  // of a piece, where a few queries have many keys

// Number of keys that a query of a segment may attend, at most.
inline double keys_of_row(const SpanRows& o, int64_t num_q, int64_t row, const Segment& x) {
  double n = 0;
  int32_t from, to;
  for (int64_t s = 0; s < o.count; s++) o.of_row(s, num_q, row, x, from, to), n += std::max(0, to - from);
  return n;
}

// Estimated scores of queries [first, end) (packed) of a segment and one head, from those of the first and the last.
inline double scores_of(const Call& c, const Segment& x, int64_t first, int64_t end) {
  const SpanRows& o = c.outer[0];
  return (end - first) * (0.5 * (keys_of_row(o, c.num_q, first, x) + keys_of_row(o, c.num_q, end - 1, x)) + LANES);
}

// Cut segments into items. A segment whose items must be few (their gradients of keys are summed afterwards) is only
// cut as often as its own size and the number of threads ask for, so that other segments do not matter.
inline void cut(const Call& c, bool few, Schedule& out) {
  const double heads = (double)(c.heads / c.groups);
  double total = 0;
  std::vector<double> blocks;
  if (!few)
    for (int64_t s = 0; s < c.segments; s++)
      for (int64_t a = c.q_offsets[s]; a < c.q_offsets[s + 1]; a += QUERIES)
        total += scores_of(c, c.segment(s), a, std::min<int64_t>(a + QUERIES, c.q_offsets[s + 1]));
  const double most = total * c.groups / (8.0 * c.threads);  // of an item, if they may be many
  std::vector<Item> parts_of;                                // of all segments, for the first group
  for (int64_t s = 0; s < c.segments; s++) {
    const int64_t from = c.q_offsets[s], to = c.q_offsets[s + 1], n = to - from;
    if (n == 0) continue;
    out.longest_keys = std::max(out.longest_keys, c.kv_offsets[s + 1] - c.kv_offsets[s]);
    const int32_t keys = c.kv_offsets[s + 1] - c.kv_offsets[s];
    const int32_t pieces = few || !SOFTMAX || n > QUERIES ? 1 : (int32_t)std::min<int64_t>(keys / MANY_KEYS, 2 * c.threads);
    if (pieces > 1) {
      const int32_t step = (keys / pieces + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK, count = (keys + step - 1) / step;
      for (int32_t p = 0; p < count; p++)
        parts_of.push_back({(int32_t)s, 0, 0, (int32_t)n, p, count, p * step, std::min(keys, (p + 1) * step), heads * n * step});
      continue;
    }
    blocks.clear();
    double sum = 0;
    for (int64_t a = from; a < to; a += QUERIES) {
      const int64_t end = std::min<int64_t>(a + QUERIES, to);
      sum += scores_of(c, c.segment(s), a, end);
      blocks.push_back(sum);
    }
    int64_t parts = few ? std::min<int64_t>((int64_t)(sum * heads / 65536), (2 * c.threads + c.groups - 1) / c.groups)
                        : (int64_t)std::ceil(sum / std::max(most, 1.0));
    if (c.threads == 1 && few) parts = 1;
    parts = std::max<int64_t>(1, std::min<int64_t>(parts, (int64_t)blocks.size()));
    std::vector<int64_t> cuts{0};
    for (int64_t b = 0; b + 1 < (int64_t)blocks.size(); b++)
      if (blocks[b] >= sum * cuts.size() / parts) cuts.push_back(b + 1);
    cuts.push_back((int64_t)blocks.size());
    const int32_t count = (int32_t)cuts.size() - 1;
    for (int32_t p = 0; p < count; p++) {
      const double cost = blocks[cuts[p + 1] - 1] - (cuts[p] ? blocks[cuts[p] - 1] : 0.0);
      const int64_t end = std::min<int64_t>(cuts[p + 1] * QUERIES, n);
      parts_of.push_back({(int32_t)s, 0, (int32_t)(cuts[p] * QUERIES), (int32_t)end, p, count, 0, keys, cost * heads});
    }
  }
  std::stable_sort(parts_of.begin(), parts_of.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
  out.items.reserve(parts_of.size() * c.groups);
  for (Item x : parts_of)
    for (x.group = 0; x.group < c.groups; x.group++) out.items.push_back(x);
}

constexpr double FEW_SCORES = 8192;  // of a bin: a claim takes about as long as a hundred scores

// Put items in bins: small ones together, so that threads claim less often; or, if sums over items are kept per bin,
// at most `most` bins of about the same cost.
inline void fill_bins(int64_t threads, int64_t most, Schedule& x) {
  const int64_t n = (int64_t)x.items.size();
  if (most <= 0 || most >= n) {
    double total = 0, sum = 0;
    for (const Item& item : x.items) total += item.cost;
    const double enough = most > 0 ? 0 : std::min(FEW_SCORES, total / (16 * threads));
    x.starts.push_back(0);
    for (int64_t i = 0; i < n; i++)
      if ((sum += x.items[i].cost) >= enough || i + 1 == n) x.starts.push_back((int32_t)(i + 1)), sum = 0;
    return;
  }
  std::vector<std::vector<Item>> bins(most);
  std::vector<std::pair<double, int64_t>> load;  // a heap whose top has the least cost
  for (int64_t b = 0; b < most; b++) load.push_back({0.0, -b});
  const auto more = [](const std::pair<double, int64_t>& a, const std::pair<double, int64_t>& b) { return a > b; };
  std::make_heap(load.begin(), load.end(), more);
  for (const Item& item : x.items) {
    std::pop_heap(load.begin(), load.end(), more);
    load.back().first += item.cost;
    bins[-load.back().second].push_back(item);
    std::push_heap(load.begin(), load.end(), more);
  }
  x.items.clear();
  for (const auto& bin : bins) {
    x.starts.push_back((int32_t)x.items.size());
    x.items.insert(x.items.end(), bin.begin(), bin.end());
  }
  x.starts.push_back(n);
}

// Run work(bin, item, next item) for all items on a thread; the next one is -1 at the end. Bins are claimed one ahead.
template <class Work> void work_through(const Schedule& x, int64_t& next, Work work) {
  const int64_t bins = x.bins();
  int64_t bin = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
  while (bin < bins) {
    const int64_t claimed = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
    const int64_t later = claimed < bins && x.starts[claimed] < x.starts[claimed + 1] ? x.starts[claimed] : -1;
    for (int64_t i = x.starts[bin], end = x.starts[bin + 1]; i < end; i++) work(bin, i, i + 1 < end ? i + 1 : later);
    bin = claimed;
  }
}

// Rows that the next item will read, fetched into the cache while this one computes.
struct Ahead {
  struct Part {
    const char* at;
    int64_t step, rows;
    int bytes;
  } part[8];
  int parts = 0, now = 0;
  int64_t row = 0, total = 0, bytes = 0, pace = 0;
  bool near = false;  // all of it fits beside what is computed on, into the first cache

  void add(const Rows3& x, int64_t token, int64_t head, int64_t rows, int columns) {
    part[parts++] = {(const char*)x.row(token, head), x.token * (int64_t)sizeof(element), rows, columns * (int)sizeof(element)};
    total += rows, bytes += rows * part[parts - 1].bytes;
    if (rows == 0) parts--;
  }
  // Spread the rows over an item's steps: `by_keys` of each block of queries and group of keys, and `by_rows` of each
  // query of a block and block of keys. A few more at a step than that would be, as items differ.
  void spread(const Item& item, int64_t heads, double by_keys, double by_rows) {
    const double queries = item.end - item.first, blocks = std::ceil(queries / QUERIES);
    const double groups = std::min(item.cost / (heads * queries * KEYS), std::ceil((item.key_end - item.key) / (double)KEYS));
    const double steps = heads * blocks * (groups * by_keys + queries / blocks * by_rows * (1 + groups * KEYS / KEY_BLOCK));
    pace = (int64_t)std::ceil(1.25 * total / std::max(steps, 1.0)), near = bytes <= (64 << 10);
  }
  INLINE_MEMBER void step() {
    for (int64_t n = pace; n > 0 && now < parts; n--) {
      const char* p = part[now].at + row * part[now].step;
      if (near) for (int i = 0; i < part[now].bytes; i += 64) __builtin_prefetch(p + i, 0, 3);
      else for (int i = 0; i < part[now].bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
      if (++row == part[now].rows) row = 0, now++;
    }
  }
};

// Keys and values of a segment and group as rows of `real`: in place, or in a copy that a thread keeps. And as rows in
// memory, which products of pairs take.
struct KeyRows {
  const real *k = nullptr, *v = nullptr;
  int64_t k_step = 0, v_step = 0;
  const element *own_k = nullptr, *own_v = nullptr;
  int64_t own_k_step = 0, own_v_step = 0;
  int64_t segment = -1, group = -1, room = 0;
  real* own = nullptr;
  ~KeyRows() { free(own); }

  // Row j as the left operand of a product with columns of queries, or of their gradients.
  template <int DIM = D> INLINE_MEMBER const Operand<DIM>* key(int64_t j) const {
    if constexpr (PAIRED<DIM>) return own_k + j * own_k_step;
    else return k + j * k_step;
  }
  template <int DIM = E> INLINE_MEMBER const Operand<DIM>* value(int64_t j) const {
    if constexpr (PAIRED<DIM>) return own_v + j * own_v_step;
    else return v + j * v_step;
  }

  // KEYS_TOO, VALUES_TOO: which of them are also read as rows of `real`.
  template <bool KEYS_TOO, bool VALUES_TOO> void take(const Call& c, int64_t s, int64_t g) {
    const int64_t first = c.kv_offsets[s];
    own_k = c.k.row(first, g), own_v = c.v.row(first, g), own_k_step = c.k.token, own_v_step = c.v.token;
    if constexpr (!IS_HALF) {
      k = (const real*)c.k.row(first, g), v = (const real*)c.v.row(first, g);
      k_step = c.k.token, v_step = c.v.token;
    } else if (s != segment || g != group) {
      const int64_t n = c.kv_offsets[s + 1] - first;
      segment = s, group = g;
      k_step = vectors_of(D) * LANES, v_step = vectors_of(E) * LANES;
      if (n > room) {
        free(own);
        room = n;
        own = (real*)aligned_alloc(64, (n * (k_step + v_step) * sizeof(real) + 63) / 64 * 64);
      }
      real *to_k = own, *to_v = own + n * k_step;
      for (int64_t r = 0; r < n; r++) {
        if (KEYS_TOO) copy_row(c.k.row(first + r, g), D, to_k + r * k_step);
        if (VALUES_TOO) copy_row(c.v.row(first + r, g), E, to_v + r * v_step);
      }
      k = to_k, v = to_v;
    }
  }
};

// The status of a call's offsets, which every loop relies on.
inline Status check(const Call& c) {
  for (int64_t s = 0; s < c.segments; s++)
    if (c.q_offsets[s] > c.q_offsets[s + 1] || c.kv_offsets[s] > c.kv_offsets[s + 1]) return BAD_OFFSETS;
  if (c.q_offsets[0] < 0 || c.kv_offsets[0] < 0) return BAD_OFFSETS;
  if (c.q_offsets[c.segments] > c.num_q || c.kv_offsets[c.segments] > c.num_kv) return BAD_OFFSETS;
  return DONE;
}

// Set rows of a result that belong to no segment to a value.
inline void fill_rows(const Rows3& x, int64_t heads, int columns, int64_t first, int64_t end) {
  for (int64_t t = first; t < end; t++) for (int64_t h = 0; h < heads; h++) std::memset(x.row(t, h), 0, columns * sizeof(element));
}

}  // namespace flexjag
