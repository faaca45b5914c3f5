#include "kernel.h"

namespace moehive {

const Kernel* usable_kernel(int place) {
#if defined(__x86_64__)
  // Every processor with AVX2 and FMA has F16C too.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  if (bf16 && place-- == 0) return &kAvx512Bf16;
  if (vnni && place-- == 0) return &kAvx512Vnni;
  if (avx512 && place-- == 0) return &kAvx512;
  if (avx2 && place-- == 0) return &kAvx2;
#elif defined(__aarch64__)
  if (place-- == 0) return &kNeon;
#endif
  return place == 0 ? &kScalar : nullptr;
}

namespace {

bool fetches_ahead() {
#if defined(__x86_64__)
  __builtin_cpu_init();  // this runs before main
  return !(__builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f"));
#else
  return true;
#endif
}

}  // namespace

const bool kFetchesAhead = fetches_ahead();

}  // namespace moehive
