// Whose threads do the work: those of the OpenMP runtime that torch uses, where it has GNU's
// interface, or else a pool of our own.
//
// The threads of such a runtime go on spinning for milliseconds after each of torch's parallel loops:
// a pool beside it would share their cores, while they themselves take up work at once. The runtime
// is called through a pointer (lst_use_team), for linking one could bring a second into the process.
// It hangs in a forked child, a data loader worker for one, so there the pool does the work.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "common.h"

namespace lst {
namespace {

class Job {
 public:
  Job(int64_t num_items, int64_t items_per_chunk,
      const std::function<void(int64_t, int64_t)>& body, const std::function<bool()>& prepare)
      : num_items_(num_items), items_per_chunk_(items_per_chunk), body_(body), prepare_(prepare) {}

  // Takes chunks until none is left. Any number of threads may be in here at once.
  void work() {
    if (!prepare_()) return;
    for (;;) {
      const int64_t first = next_.fetch_add(items_per_chunk_, std::memory_order_relaxed);
      if (first >= num_items_) return;
      body_(first, std::min(first + items_per_chunk_, num_items_));
    }
  }

 private:
  const int64_t num_items_;
  const int64_t items_per_chunk_;
  const std::function<void(int64_t, int64_t)>& body_;
  const std::function<bool()>& prepare_;
  std::atomic<int64_t> next_{0};
};

class ThreadPool {
 public:
  // Works on the job with up to num_helpers threads beside the caller's. A helper that wakes after
  // the work is gone is not waited for. While another thread's job is running, or inside one, the
  // caller works alone.
  void run(Job& job, int num_helpers) {
    std::unique_lock<std::mutex> entry(entry_, std::try_to_lock);
    if (!entry.owns_lock()) return job.work();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      grow(num_helpers);
      job_ = &job;
      open_seats_ = std::min<int>(num_helpers, static_cast<int>(threads_.size()));
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    open_seats_ = 0;
    left_.wait(lock, [this] { return num_seated_ == 0; });
    job_ = nullptr;
  }

 private:
  void grow(int num_threads) {
    try {
      while (static_cast<int>(threads_.size()) < num_threads) {
        threads_.emplace_back([this] { serve(); });
      }
    } catch (const std::system_error&) {
      // The system gives no more threads: those there are do the work.
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return open_seats_ > 0; });
      --open_seats_;
      ++num_seated_;
      Job* const job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--num_seated_ == 0) left_.notify_one();
    }
  }

  std::mutex entry_;  // held by the thread whose job is running
  std::mutex mutex_;  // guards everything below
  std::condition_variable wake_, left_;
  Job* job_ = nullptr;
  int open_seats_ = 0;
  int num_seated_ = 0;
  std::vector<std::thread> threads_;
};

// GOMP_parallel: calls body(data) on num_threads threads, the caller's among them.
using Team = void (*)(void (*body)(void* data), void* data, unsigned num_threads, unsigned flags);
std::atomic<Team> shared_team{nullptr};

// Never destroyed: its threads sleep until the process ends.
std::atomic<ThreadPool*> shared_pool{nullptr};

// A forked child has none of the threads, and perhaps a locked mutex: it starts a pool of its own.
void leave_threads_to_parent() {
#if !defined(_WIN32)
  static std::atomic<bool> registered{false};
  if (registered.exchange(true)) return;
  pthread_atfork(nullptr, nullptr, [] {
    shared_team = nullptr;
    shared_pool = nullptr;
  });
#endif
}

ThreadPool* make_pool() {
  leave_threads_to_parent();
  ThreadPool* expected = nullptr;
  ThreadPool* const fresh = new ThreadPool;
  if (shared_pool.compare_exchange_strong(expected, fresh)) return fresh;
  delete fresh;  // another thread was first; this one has started no threads
  return expected;
}

}  // namespace

void parallel_for(int64_t num_items, int64_t items_per_chunk, int num_threads,
                  const std::function<void(int64_t, int64_t)>& body,
                  const std::function<bool()>& prepare) {
  if (num_items <= 0) return;
  items_per_chunk = std::max<int64_t>(items_per_chunk, 1);
  const int64_t num_chunks = (num_items - 1) / items_per_chunk + 1;
  const int64_t num_workers = std::min<int64_t>(num_threads, num_chunks);
  if (num_workers <= 1) return body(0, num_items);
  Job job(num_items, items_per_chunk, body, prepare);
  if (const Team team = shared_team) {
    // All of them, with work or without: a runtime may end threads that a smaller team leaves out.
    return team([](void* data) { static_cast<Job*>(data)->work(); }, &job,
                static_cast<unsigned>(num_threads), 0);
  }
  ThreadPool* pool = shared_pool;
  if (pool == nullptr) pool = make_pool();
  pool->run(job, static_cast<int>(num_workers) - 1);
}

}  // namespace lst

// The GOMP_parallel of the OpenMP runtime that the process uses; null for a pool of our own.
LST_EXPORT void lst_use_team(lst::Team team) {
  lst::leave_threads_to_parent();
  lst::shared_team = team;
}
