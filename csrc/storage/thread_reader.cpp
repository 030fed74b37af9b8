// Requests in flight by threads: each reads one chunk at a time.
#include <signal.h>

#include <cerrno>
#include <condition_variable>
#include <thread>

#include "reader.h"

namespace comoe {
namespace {

class ThreadReader final : public Reader {
 public:
  ThreadReader(const ReaderConfig& config, BackendEvents* events) : Reader(config, events) {
    for (int i = 0; i < config.num_threads; ++i) threads_.emplace_back([this] { work(); });
  }
  ~ThreadReader() override { stop(); }
  const char* kind() const override { return "threads"; }

  void stop() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    work_to_do_.notify_all();
    for (std::thread& thread : threads_)
      if (thread.joinable()) thread.join();
  }

 private:
  int depth() const override { return config_.num_threads; }
  void wake() override { work_to_do_.notify_all(); }

  void work() {
    sigset_t all;  // signals are for the program's own threads
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);
    std::vector<iovec> iovecs;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Chunk chunk;
      while (!next_chunk(chunk)) {
        if (stopping_) return;
        work_to_do_.wait(lock);
      }
      lock.unlock();
      int64_t result;
      do {
        fill_iovecs(chunk, iovecs);
        const ssize_t n = config_.preadv(chunk.task->file->fd, iovecs.data(),
                                         static_cast<int>(iovecs.size()), file_offset(chunk));
        result = n < 0 ? -int64_t{errno} : n;
      } while (!handle_result(chunk, result));
      finish_chunk(chunk);
      lock.lock();
    }
  }

  std::condition_variable work_to_do_;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Reader> make_thread_reader(const ReaderConfig& config, BackendEvents* events) {
  return std::make_unique<ThreadReader>(config, events);
}

}  // namespace comoe
