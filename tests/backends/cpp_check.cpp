// Follows a unit whose functions are those of test_cpp_compilers.py: causal, score + 1/2, no learned captures. Prints
// the largest error of the output and of each gradient as a multiple of the type's precision times the largest value.
#include <cstdio>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#ifdef WITHOUT_RUNTIME
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned, unsigned) { body(data); }
#endif

using namespace flexjag;

constexpr int SEGMENTS = 4, LENGTHS[SEGMENTS] = {5, 0, 1, 70}, HEADS = 4, GROUPS = 2, TOKENS = 76;

struct Values {
  std::vector<real> found;
  std::vector<double> expected;
  Values(int columns, double step) : found(TOKENS * columns), expected(TOKENS * columns) {
    for (size_t i = 0; i < found.size(); i++) found[i] = (real)std::sin(step * (i % 977) + 0.3 * (i % 31));
  }
  Rows3 rows(int heads) { return Rows3{found.data(), (int64_t)found.size() / TOKENS, (int64_t)found.size() / TOKENS / heads}; }
  real* at(int token, int heads, int head) { return &found[(token * heads + head) * (found.size() / TOKENS / heads)]; }
  double* want(int token, int heads, int head) { return &expected[at(token, heads, head) - found.data()]; }
  double error() const {
    double most = 0, largest = 0;
    for (size_t i = 0; i < found.size(); i++) {
      const double e = std::fabs(found[i] - expected[i]);
      most = e <= most ? most : e, largest = std::max(largest, std::fabs(expected[i]));  // a NaN stays
    }
    return most / largest / std::numeric_limits<real>::epsilon();
  }
};

template <class A, class B> double dot(const A* a, const B* b, int n) {
  double sum = 0;
  for (int i = 0; i < n; i++) sum += (double)a[i] * b[i];
  return sum;
}

int main() {
  Values q(HEADS * D, 0.7), k(GROUPS * D, 1.1), v(GROUPS * E, 1.7), out(HEADS * E, 0), grad(HEADS * E, 2.3);
  Values dq(HEADS * D, 0), dk(GROUPS * D, 0), dv(GROUPS * E, 0), lse(HEADS, 0), grad_lse(HEADS, 0.9);
  int32_t offsets[SEGMENTS + 1] = {}, lo[TOKENS], hi[TOKENS];
  for (int s = 0; s < SEGMENTS; s++) {
    offsets[s + 1] = offsets[s] + LENGTHS[s];
    for (int i = offsets[s]; i < offsets[s + 1]; i++) lo[i] = offsets[s], hi[i] = i + 1;
  }
  const SpanRows spans{lo, hi, 1};
  Call c{};
  c.q = q.rows(HEADS), c.k = k.rows(GROUPS), c.v = v.rows(GROUPS), c.out = out.rows(HEADS), c.grad = grad.rows(HEADS);
  c.dq = dq.rows(HEADS), c.dk = dk.rows(GROUPS), c.dv = dv.rows(GROUPS);
  c.lse = lse.found.data(), c.grad_lse = SOFTMAX ? grad_lse.found.data() : nullptr;
  c.q_offsets = c.kv_offsets = offsets, c.outer = c.inner = &spans;
  c.segments = SEGMENTS, c.num_q = c.num_kv = TOKENS, c.heads = HEADS, c.groups = GROUPS, c.threads = 2;
  c.scale = 0.125, c.factor = 1;
  if (attend(&c) != 0 || differentiate(&c) != 0) return 1;
  for (int s = 0; s < SEGMENTS; s++)
    for (int h = 0; h < HEADS; h++)
      for (int i = offsets[s]; i < offsets[s + 1]; i++) {
        const int g = h / (HEADS / GROUPS), first = offsets[s], keys = i + 1 - first;
        std::vector<double> weights(keys);
        double top = -INFINITY, sum = 0;
        for (int j = 0; j < keys; j++) weights[j] = dot(q.at(i, HEADS, h), k.at(first + j, GROUPS, g), D) / 8 + 0.5, top = std::max(top, weights[j]);
        if (SOFTMAX) {
          for (double& w : weights) w = std::exp(w - top), sum += w;
          for (double& w : weights) w /= sum;
          lse.expected[h * TOKENS + i] = top + std::log(sum);
        }
        for (int j = 0; j < keys; j++)
          for (int e = 0; e < E; e++) out.want(i, HEADS, h)[e] += weights[j] * v.at(first + j, GROUPS, g)[e];
        const double delta = dot(out.want(i, HEADS, h), grad.at(i, HEADS, h), E) - grad_lse.found[h * TOKENS + i];
        for (int j = 0; j < keys; j++) {
          const double by_weight = dot(grad.at(i, HEADS, h), v.at(first + j, GROUPS, g), E);
          const double by_score = (SOFTMAX ? weights[j] * (by_weight - delta) : by_weight) / 8;
          for (int e = 0; e < E; e++) dv.want(first + j, GROUPS, g)[e] += weights[j] * grad.at(i, HEADS, h)[e];
          for (int d = 0; d < D; d++) dq.want(i, HEADS, h)[d] += by_score * k.at(first + j, GROUPS, g)[d];
          for (int d = 0; d < D; d++) dk.want(first + j, GROUPS, g)[d] += by_score * q.at(i, HEADS, h)[d];
        }
      }
  if (!SOFTMAX) lse.expected.assign(lse.found.begin(), lse.found.end());
  std::printf("%g %g %g %g %g\n", out.error(), SOFTMAX ? lse.error() : 0.0, dq.error(), dk.error(), dv.error());
}
