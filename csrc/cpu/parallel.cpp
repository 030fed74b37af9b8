#include "parallel.h"

#include <pthread.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

namespace comoe {
namespace {

// How long an idle thread spins before it sleeps. A wake-up costs 5 to 50 us, so the gap between
// the phases of one call is worth spinning through; longer spinning would steal the core from
// torch, unless torch is known to use one thread.
std::atomic<int64_t> spin_microseconds{Parallel::kSpinMicroseconds};

// Spins for spin_microseconds; true as soon as `ready()`.
template <class Ready>
bool spin_until(Ready&& ready) {
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::microseconds(spin_microseconds.load(std::memory_order_relaxed));
  for (;;) {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      pause_cpu();
    }
    if (std::chrono::steady_clock::now() >= end) return ready();
  }
}

// Workers wait for `epoch_` to change and run the body, but only while its gate is open: when the
// caller has run out of work it closes the gate and waits for those inside, not for a worker that
// the system has not let run yet. With one other busy process on 2 cores that wait was 16 ms a
// call, and is what makes spin barriers slow. Bodies share their work out dynamically, so nobody is
// missed.
class Workers {
 public:
  explicit Workers(int num_threads) {
    for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { loop(i); });
  }

  ~Workers() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      epoch_.fetch_add(1);
    }
    work_.notify_all();
    for (auto& t : threads_) t.join();
  }

  int num_threads() const { return static_cast<int>(threads_.size()) + 1; }

  void run(Parallel::Body body, void* context) {
    body_ = body;
    context_ = context;
    {
      std::lock_guard<std::mutex> lock(
          mutex_);  // or a worker could miss the wake-up on its way to sleep
      gate_.store(epoch_.fetch_add(1) + 1);
      if (sleeping_ > 0) work_.notify_all();
    }
    body(context, 0, num_threads());
    gate_.store(kClosed);
    auto finished = [this] { return inside_.load() == 0; };
    if (spin_until(finished)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, finished);
  }

 private:
  void loop(int thread) {
    uint64_t seen = 0;
    for (;;) {
      auto changed = [&] { return epoch_.load(std::memory_order_acquire) != seen; };
      if (!spin_until(changed)) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleeping_;
        work_.wait(lock, changed);
        --sleeping_;
      }
      seen = epoch_.load(std::memory_order_acquire);
      if (stop_) return;
      // First inside, then the look at the gate; the caller does it the other way round, so one of
      // the two always sees the other.
      inside_.fetch_add(1);
      if (gate_.load() == seen) body_(context_, thread, num_threads_seen());
      if (inside_.fetch_sub(1) == 1) {
        std::lock_guard<std::mutex> lock(
            mutex_);  // the caller may be between its test and its sleep
        done_.notify_one();
      }
    }
  }

  // threads_ is still growing while the first workers start, but no body runs before it is
  // complete.
  int num_threads_seen() const { return static_cast<int>(threads_.size()) + 1; }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable work_, done_;
  std::atomic<uint64_t> epoch_{0};
  static constexpr uint64_t kClosed = 0;  // epochs start at 1
  std::atomic<uint64_t> gate_{kClosed};   // the epoch whose body may be entered
  std::atomic<int> inside_{0};
  int sleeping_ = 0;  // under mutex_
  bool stop_ = false;
  Parallel::Body body_ = nullptr;
  void* context_ = nullptr;
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct State {
  std::mutex mutex;  // settings
  std::atomic<int> num_threads{0};
  std::atomic<GompParallel> gomp{nullptr};
  std::atomic<bool> busy{false};
  Workers* workers = nullptr;  // only touched by the owner of `busy`
};

State& state() {
  static State* s = [] {
    auto* created = new State;  // never destroyed: workers may outlive static destructors
    const unsigned cores = std::thread::hardware_concurrency();
    created->num_threads = cores ? static_cast<int>(cores) : 1;
    // A forked child has the pool's memory but not its threads: it starts a pool of its own.
    pthread_atfork(nullptr, nullptr, [] {
      State& child = state();
      child.workers = nullptr;
      child.busy = false;
    });
    return created;
  }();
  return *s;
}

}  // namespace

Parallel& Parallel::instance() {
  static Parallel parallel;
  return parallel;
}

void Parallel::set_num_threads(int num_threads) {
  if (num_threads < 1)
    throw std::invalid_argument("set_num_threads: num_threads must be at least 1");
  state().num_threads = num_threads;
}

int Parallel::num_threads() const { return state().num_threads.load(std::memory_order_relaxed); }

void Parallel::use_gomp(void* gomp_parallel) {
  state().gomp = reinterpret_cast<GompParallel>(gomp_parallel);
}

void Parallel::set_spin(int64_t microseconds) {
  if (microseconds < 0) throw std::invalid_argument("set_spin: microseconds must be at least 0");
  spin_microseconds = microseconds;
}

void Parallel::run(Body body, void* context) {
  State& s = state();
  const int n = num_threads();
  if (n == 1) return body(context, 0, 1);
  if (GompParallel gomp = s.gomp.load(std::memory_order_acquire)) {
    // libgomp keeps one team per calling thread, so concurrent callers are fine. Thread numbers are
    // handed out here because the team may be smaller than asked.
    struct Call {
      Body body;
      void* context;
      int num_threads;
      std::atomic<int> next{0};
    } call{body, context, n};
    gomp(
        [](void* raw) {
          auto& c = *static_cast<Call*>(raw);
          c.body(c.context, c.next.fetch_add(1, std::memory_order_relaxed), c.num_threads);
        },
        &call, static_cast<unsigned>(n), 0);
    return;
  }
  // A second caller, or a body that calls back in, does its work alone instead of waiting.
  if (s.busy.exchange(true, std::memory_order_acquire)) return body(context, 0, 1);
  if (!s.workers || s.workers->num_threads() != n) {
    delete s.workers;
    s.workers = new Workers(n);
  }
  s.workers->run(body, context);
  s.busy.store(false, std::memory_order_release);
}

}  // namespace comoe
