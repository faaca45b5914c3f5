// What a handle of moehive_trunk_create is: the process's threads, and the kernel chosen for this processor.
#pragma once

#include <cstdint>
#include <memory>

#include "pool.h"
#include "trunk.h"

namespace moehive {

// Waking another thread costs a few microseconds: less work than this many multiplications stays on the caller's.
constexpr int64_t kLongWork = 1 << 18;

class Trunk {
 public:
  Trunk(const TrunkKernel& kernel, int threads) : kernel_(kernel), pool_(Pool::of(threads)) {}

  // run(i) for each i < items, on this thread alone if `work` (multiplications, in all) is little.
  template <class Work>
  void each(int64_t items, int64_t work, Work&& run) {
    if (work < kLongWork || items < 2) {
      for (int64_t i = 0; i < items; ++i) run(i);
      return;
    }
    pool_->run(items, [&](uint32_t i) { run(i); });
  }

  Pool& pool() { return *pool_; }
  void rest() { pool_->rest(); }
  int threads() const { return pool_->threads(); }
  const TrunkKernel& kernel() const { return kernel_; }

 private:
  const TrunkKernel& kernel_;
  std::shared_ptr<Pool> pool_;
};

}  // namespace moehive
