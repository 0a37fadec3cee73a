// The spans of a mask that a predicate decides. The predicate is asked once for each (query, key) pair, and for all heads
// if it does not read the head, so that the kernels of attention need not ask it again in each head and direction.
#pragma once
#include "schedule.h"

namespace flexjag {

constexpr int MOST_RUNS = 8;     // spans of a query, and bounds
constexpr int PATIENCE = 16;     // runs of keys after which a query's further ones are joined without looking for gaps

// Passed from Python; the fields' order and types are those of flexjag/backends/cpp/narrow.py.
struct Narrowing {
  SpanRows outer;                   // bounds, at most MOST_RUNS
  const void* const* captures;
  const int64_t* numbers;
  const int32_t* head;              // [heads], those that are asked for
  int32_t *lo, *hi, *inner_hi;      // results, [heads, MOST_RUNS, T_q]
  int64_t num_q, num_kv, heads, threads;
  int64_t most, joined;             // results: the most spans of a query, and whether a span has keys that are masked
};

// Spans of one query, each in one of its bounds. If there are more than MOST_RUNS, those of a bound with the least gap
// between them are joined. Never those of two bounds: kernels ask the predicate about a joined span, not the bounds.
struct Runs {
  int count = 0, seen = 0;
  bool joined[MOST_RUNS];
  int32_t lo[MOST_RUNS], hi[MOST_RUNS], bound[MOST_RUNS];

  void add(int32_t from, int32_t to, int32_t in, bool has_gaps = false) {
    seen++;
    if (count == MOST_RUNS) {
      int at = 0, gap = std::numeric_limits<int32_t>::max();  // the one behind a span; bounds are no more than MOST_RUNS
      for (int i = 0; i < MOST_RUNS; i++) {
        const bool is_last = i + 1 == MOST_RUNS;
        if ((is_last ? in : bound[i + 1]) != bound[i]) continue;
        const int32_t size = (is_last ? from : lo[i + 1]) - hi[i];
        if (size < gap) at = i, gap = size;
      }
      joined[at] = true;
      if (at == MOST_RUNS - 1) {
        hi[at] = to;
        return;
      }
      hi[at] = hi[at + 1];
      for (int i = at + 1; i + 1 < MOST_RUNS; i++)
        lo[i] = lo[i + 1], hi[i] = hi[i + 1], bound[i] = bound[i + 1], joined[i] = joined[i + 1];
      count--;
    }
    lo[count] = from, hi[count] = to, bound[count] = in, joined[count] = has_gaps;
    count++;
  }
  // Join what follows in a bound, without looking for gaps.
  void stretch(int32_t from, int32_t to, int32_t in) {
    const int last = count - 1;
    if (to <= hi[last]) return;
    if (bound[last] == in) hi[last] = to, joined[last] = true;
    else if (from < to) add(from, to, in, true);
  }
};

// Spans of the queries of a vector, for a head.
inline void narrow_vector(const Narrowing& c, int64_t row, int64_t h, Runs (&runs)[LANES]) {
  const Rows rows = rows_of(row, c.num_q - 1);
  const int some = (int)std::min<int64_t>(LANES, c.num_q - row);
  int32_t began[LANES], now[LANES], before[LANES];
  Int open{}, last{};                          // queries whose run goes on, and the key after their last one
  Int waiting = iota<int32_t>() < Int{} + some;  // queries that look for gaps
  Int lo[MOST_RUNS] = {}, hi[MOST_RUNS] = {};
  for (int64_t s = 0; s < c.outer.count; s++)
    for (int r = 0; r < some; r++) lo[s][r] = c.outer.lo[s * c.num_q + row + r], hi[s][r] = c.outer.hi[s * c.num_q + row + r];
  const auto bound_of = [&](int r, int32_t key) {
    int32_t s = 0;
    while (s + 1 < c.outer.count && (lo[s][r] > key || hi[s][r] <= key)) s++;
    return s;
  };
  const auto change = [&](Int pairs, int32_t key) {
    put(now, pairs), put(before, open);
    open = pairs;
    for (int r = 0; r < some; r++) {
      if (now[r] == before[r] || runs[r].seen >= PATIENCE) continue;
      if (now[r]) began[r] = key;
      else runs[r].add(began[r], key, bound_of(r, began[r]));
      if (runs[r].seen >= PATIENCE) waiting[r] = 0;
    }
  };
  // Ranges of keys that hold a span of each number. They may be in any order: a query's first spans may be empty.
  std::pair<int32_t, int32_t> ranges[MOST_RUNS];
  for (int64_t s = 0; s < c.outer.count; s++) {
    int32_t first = (int32_t)c.num_kv, past = 0;
    for (int r = 0; r < some; r++)
      if (lo[s][r] < hi[s][r]) first = std::min(first, (int32_t)lo[s][r]), past = std::max(past, (int32_t)hi[s][r]);
    ranges[s] = {first, std::min(past, (int32_t)c.num_kv)};
  }
  std::sort(ranges, ranges + c.outer.count);
  int32_t key = 0;
  for (int64_t s = 0; s < c.outer.count; s++) {
    const auto [first, past] = ranges[s];
    if (first > key && any(open)) change(Int{}, key);
    for (key = std::max(key, first); key < past; key++) {
      Int inside{};
      for (int64_t x = 0; x < c.outer.count; x++) inside |= (lo[x] <= key) & (hi[x] > key);
      const Int pairs = inside & mask(h, rows, key, c.captures, c.numbers);
      last = pairs ? Int{} + (key + 1) : last;
      if (any((pairs ^ open) & waiting)) change(pairs, key);
    }
  }
  change(Int{}, key);
  for (int r = 0; r < some; r++)
    if (runs[r].seen >= PATIENCE)
      for (int32_t s = 0; s < c.outer.count; s++) runs[r].stretch(lo[s][r], std::min<int32_t>(hi[s][r], last[r]), s);
  HAS_EFFECTS;
}

static void narrow_spans(Narrowing& c) {
  const int64_t vectors = (c.num_q + LANES - 1) / LANES, n = vectors * c.heads;
  int64_t next = 0;
  on_threads(std::min<int64_t>(c.threads, n), [&](int64_t) {
    for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < n;) {
      const int64_t row = i % vectors * LANES, place = i / vectors, some = std::min<int64_t>(LANES, c.num_q - row);
      Runs runs[LANES];
      narrow_vector(c, row, c.head[place], runs);
      int64_t most = 0, joined = 0;
      for (int64_t r = 0; r < some; r++) {
        const Runs& x = runs[r];
        most = std::max<int64_t>(most, x.count);
        for (int s = 0; s < MOST_RUNS; s++) {
          const int64_t at = (place * MOST_RUNS + s) * c.num_q + row + r;
          const int32_t end = x.count ? x.hi[x.count - 1] : 0;
          c.lo[at] = s < x.count ? x.lo[s] : end, c.hi[at] = s < x.count ? x.hi[s] : end;
          c.inner_hi[at] = s < x.count && x.joined[s] ? x.lo[s] : c.hi[at];
          joined |= s < x.count && x.joined[s];
        }
      }
      for (int64_t seen = __atomic_load_n(&c.most, __ATOMIC_RELAXED); seen < most;)
        if (__atomic_compare_exchange_n(&c.most, &seen, most, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) break;
      if (joined) __atomic_store_n(&c.joined, 1, __ATOMIC_RELAXED);
    }
  });
}

}  // namespace flexjag
