// Threads for the CPU kernels. The caller always takes part. By default a small pool of our own;
// `use_gomp` hands the work to an OpenMP runtime that the process already has (torch's), because
// two pools that both spin on the same cores cost up to 10x.
#pragma once

#include <atomic>
#include <cstdint>

namespace comoe {

// In a loop that waits for another thread.
inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Parallel {
 public:
  using Body = void (*)(void* context, int thread, int num_threads);

  static Parallel& instance();

  void set_num_threads(int num_threads);  // >= 1
  int num_threads() const;
  // `gomp_parallel`: address of libgomp's GOMP_parallel(fn, data, num_threads, flags), or null to
  // go back to the pool of our own.
  void use_gomp(void* gomp_parallel);
  // How long an idle thread spins before it sleeps.
  static constexpr int64_t kSpinMicroseconds = 20;
  void set_spin(int64_t microseconds);

  // Runs body(context, thread, n) once per thread and returns when all have ended.
  void run(Body body, void* context);
};

// f(begin, end, thread) over [0, count) in chunks of at most `grain`, taken dynamically.
template <class F>
void parallel_for(int64_t count, int64_t grain, F&& f) {
  if (count <= 0) return;
  Parallel& pool = Parallel::instance();
  if (count <= grain || pool.num_threads() == 1) {
    f(int64_t{0}, count, 0);
    return;
  }
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t count, grain;
    F* f;
  } context;
  context.count = count;
  context.grain = grain;
  context.f = &f;
  pool.run(
      [](void* raw, int thread, int) {
        auto& c = *static_cast<Context*>(raw);
        for (;;) {
          const int64_t begin = c.next.fetch_add(c.grain, std::memory_order_relaxed);
          if (begin >= c.count) return;
          const int64_t end = begin + c.grain < c.count ? begin + c.grain : c.count;
          (*c.f)(begin, end, thread);
        }
      },
      &context);
}

}  // namespace comoe
