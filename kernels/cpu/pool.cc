#include "pool.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include <algorithm>
#include <map>
#include <utility>

namespace moehive {
namespace {

using std::chrono::microseconds;
using std::chrono::steady_clock;

// How long an idle thread watches for the next job before it sleeps: as long as recent gaps between jobs justify.
//
// The two halves of a layer follow each other within microseconds; the layers of one step within 0.2 to 1 ms, the time
// of a round trip and the trunk's part. A gap shorter than kLongestGap raises the watch to twice that gap at once; a
// longer one halves it. So while a step runs the threads are awake, and a node that is asked now and then spends 50 us
// of a core on each call, never more than 2 ms. After kSpin a watcher leaves its core to whoever wants it (yield) with
// each look: several nodes on one machine then do not take each other's time.
//
// Measured on two busy Zen 3 cores: a layer of two halves, 60 us of work on two threads, every 0.3 ms, median / p99 in
// us, and seconds of processor a second. Asleep after 50 us: alone 62 - 122 / 142, two processes 147 / 425, 0.35.
// Like here: alone 60 - 128 / 158, two processes 77 / 312, 0.42. The same without yield: alone 83 - 141 / 4723, two
// processes 139 / 9240: the spinners take the cores from threads that have work. Not pinned: alone 136 - 145 / 3005,
// two processes 127 / 338. With 5 ms between layers all use 0.05 of a core.
constexpr microseconds kSpin{50};
constexpr microseconds kLongestGap{1000};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether this thread is a pool's own, which stays where the pool has put it.
thread_local bool of_a_pool = false;

// Looks for something to do before a waiting thread leaves its processor to others: some 20 us.
constexpr int kLooks = 1000;

inline uint32_t left(uint64_t ticket) { return static_cast<uint32_t>(ticket); }

// The processors that this process may use (containers and taskset restrict them); empty if the system can't say.
std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
#endif
  return cpus;
}

void pin(std::thread& thread, int cpu) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);  // if refused, the thread stays where it may be
#else
  (void)thread, (void)cpu;
#endif
}

}  // namespace

Pool::Pool(int threads) : watch_us_(kSpin.count()) {
  // Pinned only where each processor gets one thread: two pools of fewer threads, in two processes, would choose the
  // same processors and leave others idle. The caller's own thread belongs to others; see make_way.
  const std::vector<int> cpus = threads > 1 ? allowed_cpus() : std::vector<int>{};
  const bool pinned = static_cast<int>(cpus.size()) == threads;
  if (pinned) {
    callers_cpu_ = cpus[0];
    cpus_.assign(cpus.begin() + 1, cpus.end());
  }
  try {
    for (int i = 1; i < threads; ++i) {
      threads_.emplace_back([this] { serve(); });
      if (pinned) pin(threads_.back(), cpus_[i - 1]);
    }
  } catch (...) {  // the system refuses another thread
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Pool::run(uint32_t items, void (*work)(void*, uint32_t), void* context) {
  if (threads_.empty() || items <= 1) {
    for (uint32_t item = 0; item < items; ++item) work(context, item);
    return;
  }
  learn_gap();
  if (!of_a_pool) make_way();
  items_ = items;
  work_ = work;
  context_ = context;
  done_.store(0, std::memory_order_relaxed);
  const uint64_t job = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
  ticket_.store(job << 32 | items);
  if (sleepers_.load() > 0) {
    { std::lock_guard<std::mutex> lock(mutex_); }  // whoever counted itself a sleeper is now really asleep
    wake_.notify_all();
  }
  while (run_one()) {
  }
  for (int i = 0; done_.load(std::memory_order_acquire) != items; ++i) {
    if (i < kLooks) {
      pause();
    } else {  // a thread with an item in hand does not run: leave it this core
      std::this_thread::yield();
    }
  }
  last_end_ = steady_clock::now();
}

bool Pool::begin(Aside& aside, void (*work)(void*), void* context) {
  if (sleepers_.load() >= static_cast<int>(threads_.size())) return false;  // waking one takes the caller's time
  aside.work_ = work;
  aside.context_ = context;
  aside.over_.store(false, std::memory_order_relaxed);
  Aside* none = nullptr;
  if (aside_.compare_exchange_strong(none, &aside)) return true;
  aside.over_.store(true, std::memory_order_relaxed);
  return false;
}

bool Pool::withdraw(Aside& aside) {
  Aside* waiting = &aside;
  if (!aside_.compare_exchange_strong(waiting, nullptr)) return false;
  aside.over_.store(true, std::memory_order_relaxed);
  return true;
}

void Pool::help(const Aside& aside) {
  for (int looks = 0; !aside.over() && looks < kLooks; ++looks) {
    if (run_one()) {
      looks = 0;
    } else {
      pause();
    }
  }
}

void Pool::wait(const Aside& aside) {
  for (help(aside); !aside.over(); help(aside)) std::this_thread::yield();
}

bool Pool::run_aside() {
  if (aside_.load(std::memory_order_relaxed) == nullptr) return false;
  Aside* const aside = aside_.exchange(nullptr);
  if (aside == nullptr) return false;
  aside->work_(aside->context_);
  aside->over_.store(true, std::memory_order_release);  // from here on its owner may let it go
  return true;
}

bool Pool::has_work() const {
  return left(ticket_.load(std::memory_order_relaxed)) > 0 || aside_.load(std::memory_order_relaxed) != nullptr;
}

// Sets how long threads watch after the job that starts now.
void Pool::learn_gap() {
  const auto gap = std::chrono::duration_cast<microseconds>(steady_clock::now() - last_end_);
  const int64_t before = watch_us_.load(std::memory_order_relaxed);
  const int64_t wanted = gap <= kLongestGap ? std::max<int64_t>(before, 2 * gap.count()) : before / 2;
  watch_us_.store(std::max<int64_t>(wanted, kSpin.count()), std::memory_order_relaxed);
}

// The caller runs where the system has put it. A thread that is pinned there takes the processor that is free instead:
// a system moves a thread that never sleeps only after milliseconds, and two of one job would take turns until then.
void Pool::make_way() {
#if defined(__linux__)
  if (cpus_.empty()) return;
  const int here = sched_getcpu();
  if (here == callers_cpu_) return;
  const auto found = std::find(cpus_.begin(), cpus_.end(), here);
  if (found == cpus_.end()) return;
  *found = std::exchange(callers_cpu_, here);
  pin(threads_[found - cpus_.begin()], *found);
#endif
}

bool Pool::run_one() {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  do {
    if (left(ticket) == 0) return false;
  } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acquire));
  work_(context_, items_ - left(ticket));
  done_.fetch_add(1, std::memory_order_release);
  return true;
}

// Waits for something to do for as long as recent gaps justify; true if one came.
bool Pool::watch() {
  const auto start = steady_clock::now();
  for (;;) {
    for (int i = 0; i < 32; ++i) {
      pause();
      if (has_work()) return true;
    }
    const auto waited = steady_clock::now() - start;
    const microseconds longest{watch_us_.load(std::memory_order_relaxed)};
    if (waited >= longest || stop_.load(std::memory_order_relaxed)) return false;
    if (waited >= kSpin) std::this_thread::yield();
  }
}

std::shared_ptr<Pool> Pool::of(int threads) {
  static std::mutex mutex;
  static std::map<int, std::weak_ptr<Pool>> pools;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Pool> pool = pools[threads].lock();
  if (!pool) pools[threads] = pool = std::make_shared<Pool>(threads);
  return pool;
}

void Pool::serve() {
  of_a_pool = true;
  while (!stop_.load(std::memory_order_relaxed)) {
    if (run_one() || run_aside() || watch()) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers_;  // before the look at the ticket, as run() looks at the two in the other order
    wake_.wait(lock, [this] { return stop_.load() || left(ticket_.load()) > 0 || aside_.load() != nullptr; });
    --sleepers_;
  }
}

}  // namespace moehive
