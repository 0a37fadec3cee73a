// Threads of torch's OpenMP runtime, and their memory.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace flexjag {

extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);

// Run work(thread) on each thread.
template <class Work> void on_threads(int64_t threads, Work work) {
  struct Shared {
    Work* work;
    int64_t next;
  } shared{&work, 0};
  const auto body = [](void* at) {
    Shared* s = (Shared*)at;
    (*s->work)(__atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED));
  };
  if (threads <= 1) body(&shared);
  else GOMP_parallel(body, &shared, (unsigned)threads, 0);
}

// Memory that is aligned for vectors and released with its scope.
template <class T> struct Room {
  T* at;
  explicit Room(int64_t count) : at((T*)aligned_alloc(64, (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64)) {}
  ~Room() { free(at); }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
};

}  // namespace flexjag
