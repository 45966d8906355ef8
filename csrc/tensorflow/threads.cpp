// Implements threads.h.
#include "threads.h"

#include <sched.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>

namespace qk::tensorflow {
namespace {

int64_t thread_count() {
  if (const char* const wanted = std::getenv("TF_NUM_INTRAOP_THREADS")) {
    const long count = std::strtol(wanted, nullptr, 10);
    if (count > 0) return count;
  }
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
  return std::max(1u, std::thread::hardware_concurrency());
}

// One job at a time, cut into parts that the caller and the workers take in turn. The caller takes what nobody else
// does, so that a job ends in a forked process too, where the workers are missing.
class Pool {
 public:
  // A thread that the system holds up then holds up a small part only.
  static constexpr int64_t kPartsPerThread = 4;

  Pool() : threads_(thread_count()) {
    for (int64_t i = 1; i < threads_; ++i) std::thread([this] { serve(); }).detach();
  }

  void run(int64_t begin, int64_t end, int64_t grain, cpu::ParallelBody body, void* context) {
    const int64_t grains = (end - begin + grain - 1) / std::max<int64_t>(grain, 1);
    const int64_t parts = std::min(grains, threads_ > 1 ? kPartsPerThread * threads_ : 1);
    const std::unique_lock<std::mutex> mine(in_use_, std::try_to_lock);
    if (parts <= 1 || !mine) return body(begin, end, context);
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = {begin, end, (end - begin + parts - 1) / parts, body, context};
    next_ = begin;
    unfinished_ = end - begin;
    wake_.notify_all();
    take_parts(lock);
    done_.wait(lock, [this] { return unfinished_ == 0; });
  }

 private:
  struct Job {
    int64_t begin, end, part;
    cpu::ParallelBody body;
    void* context;
  };

  void serve() {
    const DefaultArithmetic arithmetic;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return next_ < job_.end; });
      take_parts(lock);
    }
  }

  void take_parts(std::unique_lock<std::mutex>& lock) {
    while (next_ < job_.end) {
      const Job job = job_;
      const int64_t begin = next_;
      const int64_t end = std::min(begin + job.part, job.end);
      next_ = end;
      lock.unlock();
      job.body(begin, end, job.context);
      lock.lock();
      unfinished_ -= end - begin;
      if (unfinished_ == 0) done_.notify_one();
    }
  }

  const int64_t threads_;
  std::mutex in_use_;
  std::mutex mutex_;  // guards all below
  std::condition_variable wake_, done_;
  Job job_{};
  int64_t next_ = 0;
  int64_t unfinished_ = 0;
};

}  // namespace

void parallel_for(int64_t begin, int64_t end, int64_t grain, cpu::ParallelBody body, void* context) {
  if (begin >= end) return;
  // Never destroyed: its threads wait in it until the process ends.
  static Pool* const pool = new Pool;
  pool->run(begin, end, grain, body, context);
}

}  // namespace qk::tensorflow
