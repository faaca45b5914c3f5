// The schedule of a Gated DeltaNet layer over sequences, heads and threads; and its C interface.
#include "delta_net.h"

#include <algorithm>

#include "trunk_threads.h"

namespace {

using namespace moehive;

// A thread takes this many channels of one sequence: their inputs and weights stay in the first cache.
constexpr int64_t kChannels = 512;

const DeltaNetKernel& best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kDeltaNetAvx2;
#endif
  return kDeltaNetPlain;
}

bool sound(const MoehiveDeltaNet& layer) {
  return layer.key_heads > 0 && layer.value_heads > 0 && layer.value_heads % layer.key_heads == 0 &&
         layer.key_dim > 0 && layer.value_dim > 0 && layer.key_dim <= kMaxHeadDim && layer.taps > 1 &&
         layer.taps <= kMaxTaps;
}

}  // namespace

int32_t moehive_trunk_delta_net(void* trunk, const MoehiveDeltaNet* layer, const MoehiveDeltaNetCall* call) {
  if (!trunk || !sound(*layer)) return 1;
  Trunk& self = *static_cast<Trunk*>(trunk);
  const DeltaNetKernel& kernel = best();
  int64_t tokens = 0, pieces = 0;
  for (int64_t s = 0; s < call->count; ++s) tokens += call->sequences[s].tokens;
  for (int64_t s = 0; s < layer->segments; ++s) pieces += (layer->channels[3 * s + 2] + kChannels - 1) / kChannels;

  self.each(call->count * pieces, tokens * conv_channels(*layer) * (layer->taps + 8), [&](int64_t item) {
    int64_t piece = item % pieces;
    const int64_t* segment = layer->channels;
    for (int64_t here; piece >= (here = (segment[2] + kChannels - 1) / kChannels); segment += 3) piece -= here;
    const int64_t at = piece * kChannels;
    kernel.convolve(*layer, *call, item / pieces, segment[0] + at, segment[1] + at,
                    std::min(kChannels, segment[2] - at));
  });
  const int64_t heads = layer->value_heads;
  self.each(call->count * heads, tokens * heads * layer->key_dim * layer->value_dim * 3,
            [&](int64_t item) { kernel.head(*layer, *call, item / heads, item % heads); });
  return 0;
}
