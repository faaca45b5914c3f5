#include "pool.h"

#include <chrono>

namespace moehive {
namespace {

// How long an idle thread watches for the next job before it sleeps. The two halves of a layer follow each other
// within microseconds; the next layer's message is most often further away than it is worth to burn a core.
constexpr std::chrono::microseconds kWatch{50};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline uint32_t left(uint64_t ticket) { return static_cast<uint32_t>(ticket); }

}  // namespace

Pool::Pool(int threads) {
  try {
    for (int i = 1; i < threads; ++i) threads_.emplace_back([this] { serve(); });
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
    if (i < 1000) {
      pause();
    } else {  // a thread with an item in hand does not run: leave it this core
      std::this_thread::yield();
    }
  }
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

void Pool::serve() {
  while (!stop_.load(std::memory_order_relaxed)) {
    if (run_one()) continue;
    const auto until = std::chrono::steady_clock::now() + kWatch;
    bool found = false;
    while (!found && std::chrono::steady_clock::now() < until) {
      for (int i = 0; i < 32 && !found; ++i) {
        pause();
        found = left(ticket_.load(std::memory_order_relaxed)) > 0;
      }
    }
    if (found) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers_;  // before the look at the ticket, as run() looks at the two in the other order
    wake_.wait(lock, [this] { return stop_.load() || left(ticket_.load()) > 0; });
    --sleepers_;
  }
}

}  // namespace moehive
