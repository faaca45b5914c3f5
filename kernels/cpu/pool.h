// A few threads, made once, that run the items of one job after the other.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace moehive {

// Something that a thread of the pool does while its owner goes on. Of one owner, who may not let it go before it is
// over.
class Aside {
 public:
  bool over() const { return over_.load(std::memory_order_acquire); }

 private:
  friend class Pool;
  void (*work_)(void*) = nullptr;
  void* context_ = nullptr;
  std::atomic<bool> over_{true};
};

class Pool {
 public:
  // The pool of this process with so many threads: all who compute here share it, for more threads than cores would
  // take each other's time. It lives as long as someone holds it.
  static std::shared_ptr<Pool> of(int threads);

  // Threads beside the caller's own: with threads = 1 there are none, and run() is a loop.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(threads_.size()) + 1; }

  // Calls work(item) once for each item < items, on any thread, and returns when all are done. Jobs of several callers
  // wait in line. `work` must not throw.
  template <class Work>
  void run(int64_t items, Work&& work) {
    std::unique_lock<std::mutex> line(line_, std::defer_lock);
    if (!threads_.empty()) line.lock();  // else all is done on the caller's own thread: nobody is in the way
    run(static_cast<uint32_t>(items), [](void* self, uint32_t item) { (*static_cast<std::remove_reference_t<Work>*>(self))(item); },
        &work);
  }

  // Has a thread that is awake call work(context), which may call run() in its turn, and returns at once. False: none
  // is awake, or they have another one to begin. `work` must not throw.
  bool begin(Aside& aside, void (*work)(void*), void* context);

  // Takes back what nobody has begun yet; false: it is too late.
  bool withdraw(Aside& aside);

  // Helps with what has begun, until it is over or nothing of it is left for others to do.
  void help(const Aside& aside);

  // Returns when what has begun is over.
  void wait(const Aside& aside);

  // The next job is not near: threads that watch for it sleep at once, and leave their cores to other processes.
  void rest() { watch_us_.store(0, std::memory_order_relaxed); }

 private:
  void run(uint32_t items, void (*work)(void*, uint32_t), void* context);
  bool run_one();
  bool run_aside();
  bool has_work() const;
  void learn_gap();
  void make_way();
  bool watch();
  void serve();
  void stop();

  // Upper half: the job's number; lower half: its items that nobody has taken yet. One word, so that a thread that
  // takes an item knows of which job. A job is over when all its items are done; hence `work_` and `context_` do
  // not change between the taking of an item and its end.
  std::atomic<uint64_t> ticket_{0};
  std::atomic<uint32_t> done_{0};
  uint32_t items_ = 0;
  void (*work_)(void*, uint32_t) = nullptr;
  void* context_ = nullptr;

  std::atomic<Aside*> aside_{nullptr};  // that nobody has begun

  std::atomic<int64_t> watch_us_;  // how long a thread without work stays awake, in microseconds
  std::chrono::steady_clock::time_point last_end_{};  // of the job before

  std::mutex line_;  // of those who want to run a job

  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  std::vector<int> cpus_;  // of each thread, if pinned: all but one, which is the caller's
  int callers_cpu_ = -1;
};

}  // namespace moehive
