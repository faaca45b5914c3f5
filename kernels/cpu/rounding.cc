// The schedule of a rounding over rows and threads; and its C interface.
#include "rounding.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "pool.h"

namespace {

using namespace moehive;

const RoundingKernel& best() {
#if defined(__x86_64__) || defined(_M_X64)
  if (__builtin_cpu_supports("avx2")) return kRoundingAvx2;
#endif
  return kRoundingPlain;
}

struct alignas(64) Line {
  float floats[kRoundedRows];
};

bool sound(const MoehiveRounding& job) {
  return grid_of(static_cast<Format>(job.format)).columns > 0 && job.rows >= 0 && job.columns >= 0 &&
         (!job.factor || job.stride >= rounded_width(job));
}

}  // namespace

int32_t moehive_quantize(const MoehiveRounding* job, int32_t threads) {
  if (!job || threads < 1 || !sound(*job)) return 1;
  const int64_t width = rounded_width(*job), groups = (job->rows + kRoundedRows - 1) / kRoundedRows;
  if (width == 0 || groups == 0) return 0;
  try {
    const RoundingKernel& kernel = best();
    const int64_t workers = std::min<int64_t>(threads, groups);
    std::vector<Line> left(workers * width);
    std::atomic<int64_t> next{0};
    Pool::of(workers == 1 ? 1 : threads)->run(workers, [&](int64_t worker) {
      for (int64_t group; (group = next.fetch_add(1, std::memory_order_relaxed)) < groups;)
        kernel.round(*job, group * kRoundedRows, left[worker * width].floats);
    });
  } catch (const std::exception&) {
    return 2;
  }
  return 0;
}
