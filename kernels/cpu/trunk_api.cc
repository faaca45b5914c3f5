// The C interface of the trunk's arithmetic, for ctypes (kernels/trunk_ops.py), and its schedule over threads.
#include <cmath>
#include <cstring>
#include <exception>
#include <vector>

#include "trunk.h"
#include "trunk_threads.h"

#define MOEHIVE_API extern "C" __attribute__((visibility("default")))

namespace {

using namespace moehive;

const TrunkKernel& best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return __builtin_cpu_supports("avx512f") ? kTrunkAvx512 : kTrunkAvx2;
#endif
  return kTrunkPlain;
}

}  // namespace

// Raised with every change of this file's functions or of trunk.h's structs, or of layer.cc's.
MOEHIVE_API int32_t moehive_trunk_abi() { return 6; }

// Null without memory or threads. To be freed by moehive_trunk_destroy.
MOEHIVE_API void* moehive_trunk_create(int32_t threads) {
  try {
    return threads < 1 ? nullptr : new Trunk(best(), threads);
  } catch (const std::exception&) {
    return nullptr;
  }
}

MOEHIVE_API void moehive_trunk_destroy(void* trunk) { delete static_cast<Trunk*>(trunk); }

// Others compute now, perhaps on this machine: threads without work sleep instead of watching for the next call.
MOEHIVE_API void moehive_trunk_rest(void* trunk) { static_cast<Trunk*>(trunk)->rest(); }

// See AddNorm in trunk.h. Any of add, more, gate, norm (with out), half_out may be null.
MOEHIVE_API void moehive_trunk_add_norm(void* trunk, int64_t tokens, int64_t width, float* hidden, const void* add,
                                        int32_t add_half, const float* more, const float* gate, int64_t gate_stride,
                                        const float* norm, float eps, float* out, uint16_t* half_out) {
  Trunk& self = *static_cast<Trunk*>(trunk);
  const AddNorm p{tokens, width, hidden, add, more, gate, norm, out, half_out, gate_stride, eps, add_half};
  self.each(tokens, tokens * width, [&](int64_t token) { self.kernel().add_norm(p, token); });
}

// cos and sin [tokens, half] of a token's position * inverse[i], times `scaling`, as transformers computes them in f32.
MOEHIVE_API void moehive_trunk_rope(const MoehiveSequence* sequences, int64_t count, const float* inverse, int64_t half,
                                    float scaling, float* cos, float* sin) {
  for (const MoehiveSequence* s = sequences; s < sequences + count; ++s)
    for (int64_t t = 0; t < s->tokens; ++t)
      for (int64_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(s->start + t) * inverse[i];
        cos[(s->first + t) * half + i] = std::cos(angle) * scaling;
        sin[(s->first + t) * half + i] = std::sin(angle) * scaling;
      }
}

// out[t] = activation(in[t][0 .. middle]) * in[t][middle .. 2 middle], rows of `in` `stride` apart.
MOEHIVE_API void moehive_trunk_gate(void* trunk, const float* in, int64_t tokens, int64_t middle, int64_t stride,
                                    int32_t activation, float* out) {
  Trunk& self = *static_cast<Trunk*>(trunk);
  self.each(tokens, tokens * middle * 8,
            [&](int64_t t) { self.kernel().gate(in + t * stride, middle, activation, out + t * middle); });
}

// The experts of each token: ids and weights [tokens, top_k], likeliest first. Returns 0; 1 if an argument can't be;
// 2 without memory.
MOEHIVE_API int32_t moehive_trunk_route(void* trunk, const MoehiveRouter* router, const float* logits, int64_t tokens,
                                        int64_t* ids, float* weights) {
  const MoehiveRouter& r = *router;
  if (r.top_k < 1 || r.top_k > r.experts || r.groups < 1 || r.experts % r.groups || r.top_groups > r.groups ||
      r.top_k > r.experts / r.groups * r.top_groups)
    return 1;
  Trunk& self = *static_cast<Trunk*>(trunk);
  try {
    thread_local std::vector<float> memory;
    const int64_t scratch = 2 * r.experts + r.groups;
    if (static_cast<int64_t>(memory.size()) < tokens * scratch) memory.resize(tokens * scratch);
    float* const at = memory.data();  // of this thread: the others must not look for their own
    self.each(tokens, tokens * r.experts * (r.top_k + 8), [&](int64_t t) {
      self.kernel().route(r, logits + t * r.experts, at + t * scratch, ids + t * r.top_k, weights + t * r.top_k);
    });
  } catch (const std::exception&) {
    return 2;
  }
  return 0;
}
